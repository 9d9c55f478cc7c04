"""The comparison with transformers that README names runs: both loops train the same rows and reach the same loss."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.full
def test_both_contenders_reach_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vs_transformers as comparison

    prepared = comparison.prepare(tmp_path, family="qwen3_vl", lora=False, num_warmup_steps=0, num_steps=1)
    assert prepared.pack_fill > 0.9
    shared = {"precision": "float32", "num_threads": 1, "num_warmup_steps": 0, "lora": False}
    ours, theirs = (
        comparison.run(prepared, comparison.Setting(loop=loop, **shared, **more), peak=1e11)
        for loop, more in (("omniloom", {}), ("transformers", {"rows_per_batch": 4, "grouped_by_length": True}))
    )
    assert ours.result.useful_tokens == theirs.result.useful_tokens
    assert ours.result.loss == pytest.approx(theirs.result.loss, rel=1e-4)
