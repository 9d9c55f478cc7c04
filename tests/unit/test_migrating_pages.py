"""The pages for those who come over: both languages say the same, and name keys and verbs that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omniloom.config import keys_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = ROOT.parent / "shared/guides"  # of the replaced systems; not part of the project
OF_SHELL = {"GPT_ARGS", "OUTPUT_ARGS", "SAVE_PATH"}  # variables that scripts put together themselves
OF_OTHER_TOOLS = {
    "dcp-dir",
    "hf-dir",
    "load-dir",
    "save-dir",
    "model-assets-dir",
    "dataset-root",
    "local-dir",
    "no-cache-dir",
    "recurse-submodules",
    "recursive",
}
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


@pytest.mark.skipif(not GUIDES.is_dir(), reason="the guides are not here")
def test_every_variable_and_flag_of_the_guides_is_on_a_page_or_known_to_migrate() -> None:
    guides = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES.glob("*guide*.md"))
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "migrating").glob("*.md"))
    rules = (ROOT / "omniloom/other_trainers.yaml").read_text(encoding="utf-8") + "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "omniloom/tools/migrate").glob("*.py")
    )
    variables = set(re.findall(r"\b([A-Z][A-Z0-9]+(?:_[A-Z0-9]+)+)\b", guides)) - OF_SHELL
    assert len(variables) > 20
    assert not [name for name in sorted(variables) if name not in pages and name not in rules]
    flags = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]+)", guides)} - OF_OTHER_TOOLS
    assert len(flags) > 20
    assert not [name for name in sorted(flags) if name not in pages and name.replace("-", "_") not in rules]
