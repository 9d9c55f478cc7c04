"""The pages for those who come over: both languages say the same, and name keys and verbs that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omniloom.config import keys_of

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in (DOCS / "migrating").glob("*.md"))
SECTIONS = "model|data|train|policy|parallel|memory|checkpoint|log"


def quoted(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_name_the_same_settings(page: str) -> None:
    english, chinese = (quoted(DOCS / folder / page) for folder in ("migrating", "zh/migrating"))
    plain = [[word for word in words if word.isascii()] for words in (english, chinese)]
    assert {word for word in plain[0] if "generate" not in word} == {
        word for word in plain[1] if "generate" not in word
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_a_page_names_is_one_of_the_config(page: str) -> None:
    keys = {name for name, *_ in keys_of()}
    for word in quoted(DOCS / "migrating" / page):
        name = re.fullmatch(rf"((?:{SECTIONS})\.[a-z_.]+)(?:\.\*|: .*)?", word)
        if name and not name[1].endswith((".json", ".py")):
            assert name[1] in keys, f"{page}: {word}"
