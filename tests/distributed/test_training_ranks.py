"""The same command on 1, 2 and 4 ranks draws one loss curve, on mixed media and with a bad row among them."""

from __future__ import annotations

import pytest

from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import read_lines
from tests.mixed_rows import write_rows

STEPS = 20
EXPERTS_PER_TOKEN = 2  # of the tiny model
# DESIGN: loss within 1e-5 relative for the first 20 steps; sums over ranks round differently, nothing else may differ
TOLERANCE = 1e-5


LAYOUTS = {
    "1 rank": (1, ()),
    "2 ranks": (2, ()),
    "4 ranks": (4, ()),
    "context 2 x expert 2": (2, ("parallel.context=2", "parallel.expert=2")),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "tensor 2 x expert 2": (2, ("parallel.tensor=2", "parallel.expert=2")),
    "ring 2": (2, ("parallel.context.ring=2",)),
    "replicate 2, pool of all": (2, ("parallel.replicate=2", "parallel.encoder_pool=data")),
}
FULL = ("2 ranks", "tensor 2 x expert 2", "ring 2", "replicate 2, pool of all")  # with the whole matrices alone
MANY = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in LAYOUTS if name != "1 rank"]


@pytest.fixture(scope="module")
def curves(tmp_path_factory, request, server) -> dict[str, list[dict]]:
    """metrics.jsonl of every layout with a selected test, on rows one without its image and one with half of one."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_tiny("qwen3_omni", folder / "model")
    rows = write_rows(folder)
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[: len(whole) // 2])  # its header is sound, so it fails after planning
    found = {}
    chosen = {
        item.callspec.params["layout"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.path == request.path
    }
    for name in ("1 rank", *(name for name in LAYOUTS if name in chosen - {"1 rank"})):
        nproc, extra = LAYOUTS[name]
        run_dir = folder / name.replace(" ", "_").replace(",", "")
        words = [
            *(f"model.path={model}", f"data.train={rows}", f"train.run_dir={run_dir}", f"train.steps={STEPS}"),
            *("train.packs_per_step=4", "data.pack_tokens=256", "data.max_bad_fraction=0.3", "data.workers=0"),
            *("train.learning_rate=1e-3", "train.router_loss=0.02", "model.dtype=float32", "checkpoint.every=0"),
            *("data.image.max_pixels=4096", "checkpoint.export=false", "log.tensorboard=false"),
            *(f"data.eval={rows}", "train.eval_every=10", "train.eval_answers=6", "train.eval_answer_tokens=6", *extra),
        ]
        run = server.run(words, run_dir.with_suffix(".logs"), num_ranks=nproc)
        assert set(run.wait()) == {0}, run.tail()
        loads = {line["step"]: line["tokens"] for line in read_lines(run_dir / "expert_load.jsonl")}
        lines = read_lines(run_dir / "metrics.jsonl")
        found[name] = [line | {"expert_load": loads.get(line["step"])} for line in lines]
        bad = (run_dir / "bad_samples.jsonl").read_text()
        assert "missing.png" in bad
        assert "7.png" in bad
    return found


@pytest.mark.parametrize("layout", MANY)
def test_the_layout_does_not_change_the_loss_curve(curves, layout) -> None:
    for one, many in zip(curves["1 rank"], curves[layout], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=TOLERANCE), one["step"]
        assert many["router_loss"] == pytest.approx(one["router_loss"], rel=TOLERANCE), one["step"]
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]


@pytest.mark.parametrize("layout", MANY)
def test_every_layout_sees_the_same_data(curves, layout) -> None:
    keys = ("num_tokens", "num_loss_tokens", "num_samples", "num_images", "audio_seconds", "num_bad_samples")
    for one, many in zip(curves["1 rank"], curves[layout], strict=True):
        assert {key: one[key] for key in keys} == {key: many[key] for key in keys}


@pytest.mark.parametrize("layout", ["1 rank", *MANY])
def test_every_choice_of_an_expert_is_counted_once(curves, layout) -> None:
    logged = [line for line in curves[layout] if line["expert_load"] is not None]
    assert logged
    for line in logged:
        assert {sum(layer) for layer in line["expert_load"]} == {EXPERTS_PER_TOKEN * line["num_tokens"]}
    assert curves[layout][0]["expert_load"] == curves["1 rank"][0]["expert_load"]


def test_training_moves_the_loss(curves) -> None:
    assert curves["1 rank"][-1]["loss"] < 0.9 * curves["1 rank"][0]["loss"]


@pytest.mark.parametrize("layout", MANY)
def test_the_layout_does_not_change_the_evaluation(curves, layout) -> None:
    theirs, ours = (
        [{key: value for key, value in line.items() if key.startswith("eval_")} for line in curves[name]]
        for name in (layout, "1 rank")
    )
    assert sum("eval_loss.audio" in figures and "eval_exact_match" in figures for figures in ours) == STEPS // 10
    for one, many in zip(ours, theirs, strict=True):  # error rates are equal only where the answers are
        assert many == pytest.approx(one, rel=TOLERANCE)


def test_the_rate_is_never_zero_and_failed_samples_are_counted(curves) -> None:
    assert all(line["learning_rate"] > 0 for line in curves["1 rank"])
    assert sum(line["num_bad_samples"] for line in curves["1 rank"]) >= 2
