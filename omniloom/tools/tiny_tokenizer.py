"""A small Qwen tokenizer, trained in a second on built-in text, with every special token of the real one.

It owns vocabulary, special tokens and the tokenizer files of a tiny checkpoint, chat template included (the .jinja
files beside it); it knows nothing of weights or of config.json. `tools/tiny.py` calls it first, as the config needs the
token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    from tokenizers import AddedToken

    text = (Path(__file__).parent / "tiny_models" / "tokenizer.yaml").read_text(encoding="utf-8")
    words = yaml.safe_load(text)
    added = [AddedToken(token, special=token not in words["plain_tokens"], normalized=False) for token in tokens]
    tokenizer = _train(words["sentences"], num_words)
    tokenizer.add_tokens(added)
    assert all(len(tokenizer.encode(word).ids) == 1 for word in ROLE_WORDS)

    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    ids = {text: tokenizer.encode(text).ids[0] for text in (*tokens, *ROLE_WORDS)}
    special = [token.content for token in added if token.special and token.content != "<|endoftext|>"]
    config = {
        **words["config"],
        "added_tokens_decoder": {str(ids[token.content]): token.__getstate__() for token in added},
        "additional_special_tokens": special,
        "chat_template": chat_template,
        "extra_special_tokens": token_names,
        **token_names,
        "processor_class": processor_class,
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "chat_template.json", {"chat_template": chat_template})
    return ids


def _train(sentences: list[str], num_words: int) -> Any:
    """A byte-level BPE that splits words as Qwen's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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
    tokenizer.train_from_iterator([*role_lines, *sentences, *sentences], trainer)
    return tokenizer
