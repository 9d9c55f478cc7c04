"""A talker in every layout that it has: neither its losses nor any gradient depend on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from rank_jobs import run_ranks
from speech_worker import Case, Outcome, run_job

from omniloom.config import ContextConfig, ParallelConfig
from omniloom.tools.tiny import make_tiny

DENSE = "qwen2_5_omni"
SAMPLE = ("hsdp_expert", "context_expert_recompute", "ring_alone", "one_codebook_ring")
CASES = {
    "fsdp": Case(parallel=ParallelConfig()),
    "hsdp": Case(parallel=ParallelConfig(replicate=2, shard=2)),
    "replicate": Case(parallel=ParallelConfig(replicate=4)),
    "expert": Case(parallel=ParallelConfig(expert=4)),
    "hsdp_expert": Case(parallel=ParallelConfig(replicate=2, shard=2, expert=2)),
    "recompute_expert": Case(parallel=ParallelConfig(expert=2), recompute=True),
    "context": Case(parallel=ParallelConfig(context=4)),
    "context_expert_recompute": Case(parallel=ParallelConfig(shard=2, context=2, expert=4), recompute=True),
    "ring_alone": Case(parallel=ParallelConfig(context=ContextConfig(ulysses=2, ring=2)), alone=True),
    "context_alone": Case(parallel=ParallelConfig(replicate=2, context=2), alone=True),
    "talker_alone": Case(parallel=ParallelConfig(replicate=2, shard=2), alone=True),
    "one_codebook_hsdp": Case(parallel=ParallelConfig(replicate=2, shard=2), family=DENSE),
    "one_codebook_ring": Case(parallel=ParallelConfig(context=ContextConfig(ulysses=2, ring=2)), family=DENSE),
    "one_codebook_alone": Case(parallel=ParallelConfig(shard=2, context=2), family=DENSE, alone=True, recompute=True),
}


def write_rows(path: Path, num_groups: int) -> Path:
    """Rows about pictures and about nothing, spoken and silent, of one and of two spoken turns."""
    draw = random.Random(7)
    Image.new("RGB", (48, 40), "red").save(path.parent / "red.png")
    rows = []
    for number in range(5):
        codes = [[draw.randrange(64) for _ in range(3 + number)] for _ in range(num_groups)]
        turns = [
            {"role": "user", "content": "<image>which one is it?" if number % 2 else "which one is it?"},
            {"role": "assistant", "content": f"number {number}", "speech": codes, "speaker": "chelsie"},
        ]
        if number == 2:
            turns += [{"role": "user", "content": "again"}, {**turns[1], "content": "so"}]
        if number == 3:
            del turns[1]["speech"], turns[1]["speaker"]
        rows.append({"messages": turns, **({"images": ["red.png"]} if number % 2 else {})})
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module", params=["sample", pytest.param("all", marks=pytest.mark.full)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    cases = CASES if request.param == "all" else {name: CASES[name] for name in SAMPLE}
    folder = tmp_path_factory.mktemp("speech_layouts")
    for family, num_groups in (("qwen3_omni", 4), (DENSE, 1)):
        make_tiny(family, folder / family)
        write_rows(folder / f"{family}.json", num_groups)
    run_ranks(run_job, 4, cases, str(folder))
    return torch.load(folder / "results.pt", weights_only=False)


def test_layout_does_not_change_what_a_talker_learns(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        errors, right = outcome.gradient_errors, outcome.right
        # DESIGN: float32 sums in another order
        assert max(outcome.loss_errors.values()) < 1e-5, (name, outcome.loss_errors)
        worst = max((error, parameter) for parameter, error in errors.items())
        assert worst[0] < 1e-4, (name, worst)
        one_codebook = CASES[name].family == DENSE
        assert any(parameter.startswith("talker.code_predictor.heads.2") for parameter in errors) != one_codebook
        assert any(parameter.startswith("text.") for parameter in errors) != CASES[name].alone
        assert set(right) == {"code0.0", *(() if one_codebook else ("codes.1", "codes.2", "codes.3"))}
        assert max(map(abs, right.values())) < 1e-6, (name, right)
