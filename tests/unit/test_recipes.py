"""Every recipe is a valid configuration and says what it is for."""

from pathlib import Path

import pytest

from omniloom.config import load_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_header_gives_command_hardware_and_expectation(path) -> None:
    load_config(path)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(f"# {word}" in header for word in ("command", "hardware", "expected"))
    assert f"recipes/{path.name}" in header


def test_the_readme_names_recipes_that_exist() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    named = {word for word in text.split() if word.startswith("recipes/")}
    assert named
    assert named <= {f"recipes/{path.name}" for path in RECIPES}
