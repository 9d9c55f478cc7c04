"""The shipped recipes as they are, on a tiny model: what each of them combines works together.

Only what the model's size decides is another: which model, which rows, how many of them, and how long packs are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from omniloom.config import load_config
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from tests.mixed_rows import write_rows
from tests.run_server import ROOT

STEPS = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with as many experts as the largest recipe has ranks, and rows with media."""
    folder = tmp_path_factory.mktemp("recipes")
    sizes = {"thinker_config.text_config.num_experts": 8, "thinker_config.text_config.num_hidden_layers": 2}
    return make_tiny("qwen3_omni", folder / "model", overrides=sizes), write_rows(folder)


@pytest.mark.parametrize(
    ("name", "num_ranks", "words"),
    [
        ("qwen3_omni_lora", 2, ()),
        ("qwen3_omni_sft", 2, ("parallel.expert=2",)),
        pytest.param("qwen3_omni_sft", 8, (), marks=pytest.mark.full),
        ("tiny_cpu", 1, ()),
    ],
)
def test_a_recipe_runs_as_it_is(server, tiny, tmp_path, name: str, num_ranks: int, words: tuple[str, ...]) -> None:
    model, rows = tiny
    own = [
        *(f"model.path={model}", f"data.train={rows}", f"train.run_dir={tmp_path / 'run'}"),
        *(f"train.steps={STEPS}", "train.epochs=null", "train.warmup_steps=0", f"train.packs_per_step={num_ranks}"),
        *("data.pack_tokens=256", "data.workers=0", "data.image.max_pixels=4096", "data.max_bad_fraction=0.3"),
        *("checkpoint.every=1", "log.tensorboard=false"),
    ]
    recipe = ROOT / f"recipes/{name}.yaml"
    config = load_config(recipe)
    if config.data.split:  # of as few rows as there are
        own += ["data.split=0.2", f"train.eval_every={STEPS}"]
    run = server.run([str(recipe), *own, *words], tmp_path, num_ranks=num_ranks)
    assert set(run.wait()) == {0}, run.tail()
    assert [line["loss"] > 0 for line in read_lines(tmp_path / "run/metrics.jsonl")] == [True] * STEPS
    assert (tmp_path / "run/adapter").is_dir() == any(rule.lora is not None for rule in config.policy.values())
    before, after = (
        {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for path in (model, tmp_path / "run/hf")
    )
    assert before.keys() == after.keys()
    changed = {key for key in before if not before[key].equal(after[key])}
    assert any(".experts." in key for key in changed)
    for tower, published, part in (("vision", ".visual.", "merger"), ("audio", ".audio_tower.", ".proj")):
        trained = {part in key for key in changed if published in key}
        rules = {rule.freeze for component, rule in config.policy.items() if component.startswith(tower)}
        assert trained == {frozenset(): {True, False}, frozenset({True}): set()}.get(frozenset(rules), {True})
