"""The Chinese pages name what the English ones name: each key of the config, each figure, each command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omniloom.tools.configuration import keys
from tests.unit.test_migrating_pages import DOCS, quoted


def test_the_chinese_page_of_the_configuration_has_every_key() -> None:
    page = (DOCS / "zh" / "configuration.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w.*]+)` \| ", page, re.MULTILINE)
    wanted = [key.name for key in keys() if not key.is_section or ("." in key.name and key.words)]
    assert sorted(named) == sorted(wanted), "add the key to docs/zh/configuration.md, with a few words, or remove it"


@pytest.mark.parametrize("page", ["evaluation.md", "serving.md"])
def test_both_languages_name_the_same(page: str) -> None:
    english, chinese = ({word for word in quoted(path) if word.isascii()} for path in (DOCS / page, DOCS / "zh" / page))
    assert english == chinese


@pytest.mark.parametrize("page", ["README.md", "data_formats.md"])
def test_shorter_pages_name_the_same_keys(page: str) -> None:
    english = DOCS.parent / page if page == "README.md" else DOCS / page
    assert _settings(english) == _settings(DOCS / "zh" / page)


def _settings(page: Path) -> set[str]:
    sections = "model|data|train|policy|parallel|memory|checkpoint|log"
    found = re.findall(rf"\b(?:{sections})\.[a-z_.]+[a-z]", page.read_text(encoding="utf-8"))
    return {name for name in found if not name.endswith((".md", ".json", ".jsonl"))}
