"""A small Qwen tokenizer, trained in a second on built-in text, with every special token of the real one.

It owns vocabulary, special tokens and the tokenizer files of a tiny checkpoint, chat template included (the .jinja
files beside it); it knows nothing of weights or of config.json. `tools/tiny.py` calls it first, as the config needs the
token ids.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from omniloom.checkpoint.files import write_json

ROLE_WORDS = ("system", "user", "assistant", "tool")  # each one token, as the talker's config demands


def write_tokenizer(
    directory: Path,
    *,
    num_words: int,
    tokens: tuple[str, ...],
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

    text = (Path(__file__).parent / "tiny_models" / "tokenizer.yaml").read_text(encoding="utf-8")
    words = yaml.safe_load(text)
    special = {token: token not in words["plain_tokens"] for token in tokens}
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
    tokenizer.train_from_iterator([*role_lines, *words["sentences"], *words["sentences"]], trainer)
    tokenizer.add_tokens([AddedToken(token, special=special[token], normalized=False) for token in tokens])
    assert all(len(tokenizer.encode(word).ids) == 1 for word in ROLE_WORDS)

    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    ids = {text: tokenizer.encode(text).ids[0] for text in (*tokens, *ROLE_WORDS)}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[token]): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": special[token],
            }
            for token in tokens
        },
        "additional_special_tokens": [token for token in tokens if special[token] and token != "<|endoftext|>"],
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
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "chat_template.json", {"chat_template": chat_template})
    return ids
