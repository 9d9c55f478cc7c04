"""A small Qwen tokenizer, trained in a second on built-in text, with every special token of the real one.

It owns vocabulary, special tokens and the tokenizer files of a tiny checkpoint, chat template included (the .jinja
files beside it); it knows nothing of weights or of config.json. `tools/tiny.py` calls it first, as the config needs the
token ids.
"""

# ruff: noqa: RUF001 -- the Chinese sentences use Chinese punctuation
from __future__ import annotations

import json
from pathlib import Path

ROLE_WORDS = ("system", "user", "assistant", "tool")  # each one token, as the talker's config demands

# (token, is it "special", i.e. dropped by skip_special_tokens), in the order in which Qwen3-Omni numbers them
QWEN3_OMNI_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
    ("<|audio_start|>", True),
    ("<|audio_end|>", True),
    ("<tts_pad>", True),
    ("<tts_text_bos>", True),
    ("<tts_text_eod>", True),
    ("<tts_text_bos_single>", True),
    ("<|audio_pad|>", True),
)

QWEN3_VL_TOKENS = tuple(token for token in QWEN3_OMNI_TOKENS if "audio" not in token[0] and "tts" not in token[0])

QWEN2_5_VL_TOKENS = tuple(token for token in QWEN3_VL_TOKENS if "think" not in token[0] and "response" not in token[0])

# in the order in which Qwen2.5-Omni numbers them
QWEN2_5_OMNI_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|AUDIO|>", True),
    ("<|audio_bos|>", True),
    ("<|audio_eos|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_bos|>", True),
    ("<|vision_eos|>", True),
    ("<|vision_pad|>", True),
    ("<|IMAGE|>", True),
    ("<|VIDEO|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
)

QWEN2_5_OMNI_TOKEN_NAMES = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}

QWEN3_OMNI_TOKEN_NAMES = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}

_SENTENCES = (
    "What is in this picture? There is a small brown dog that runs after a red ball on the grass near the water.",
    "Please describe the video in one sentence. A woman in a blue coat walks through the city while it is raining.",
    "Listen to the audio and write down what the speaker says. The quick brown fox jumps over the lazy dog.",
    "How many people do you see? I can see three people: two of them are sitting, and one is standing by the door.",
    "The weather in Paris is sunny today, with a high of 21 degrees and a light wind from the north.",
    "First we read the question, then we think about the answer, and finally we write it down for the user.",
    "You are a helpful assistant. You are given images, videos and sounds, and you answer questions about them.",
    "The model was trained on text, images, audio and video; the loss is a weighted sum over all of the tokens.",
    "Who are they? They are players from two football teams, celebrating on the field after they have won the game.",
    "What sound is this? It is the sound of a bird that sings in the morning, and after it someone is laughing.",
    "She said that the train would leave at nine, but nobody knew which platform it was going to leave from.",
    "In the kitchen there are plates, cups, spoons and a large pot of soup on the stove that is still very hot.",
    "这张图片里有什么？图片里有一只棕色的小狗，它在水边的草地上追一个红色的球。",
    "请用一句话描述这个视频。一个穿着蓝色外套的女人在下雨的时候走过城市的街道。",
    "请听这段音频，写下说话的人说了什么。他说今天的天气很好，我们可以一起去公园。",
    "你是一个有用的助手，你可以看图片、看视频、听声音，并且回答用户的问题。",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}} {"temp_c": 21, "status": "ok"}',
    '{"type": "function", "function": {"name": "search", "description": "Find pages", "parameters": {"type": "object", '
    '"properties": {"query": {"type": "string", "description": "the words"}}, "required": ["query"]}}}',
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n</tools>\n\nFor each function call, return a json object "
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    "It's done, I'm sure we'll see 0 1 2 3 4 5 6 7 8 9 10 12 2024, and 3.14 is about pi; that's all they've got.",
)


def write_tokenizer(
    directory: Path,
    *,
    num_words: int,
    tokens: tuple[tuple[str, bool], ...],
    token_names: dict[str, str],
    chat_template: str,
    processor_class: str,
) -> dict[str, int]:
    """Write tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and chat_template.json.

    `num_words` bounds the entries of the byte-level BPE, without the added `tokens`. Returns the id of every added
    token and of the role words. The same arguments always give the same files.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_words, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    role_lines = [f"{word}\n" for word in ROLE_WORDS for _ in range(200)]  # often enough to be merged first
    tokenizer.train_from_iterator([*role_lines, *_SENTENCES, *_SENTENCES], trainer)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in tokens])
    assert all(len(tokenizer.encode(word).ids) == 1 for word in ROLE_WORDS)

    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    ids = {text: tokenizer.token_to_id(text) for text in [*(text for text, _ in tokens), *ROLE_WORDS]}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[text]): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special,
            }
            for text, special in tokens
        },
        "additional_special_tokens": [text for text, special in tokens if special and text != "<|endoftext|>"],
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": token_names,
        **token_names,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "processor_class": processor_class,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "chat_template.json", {"chat_template": chat_template})
    return ids


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
