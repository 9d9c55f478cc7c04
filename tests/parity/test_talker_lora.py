"""LoRA on the talker against peft: its adapter is found, and merged it gives our losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import omniloom
from omniloom.checkpoint.adapters import TENSORS_NAME
from omniloom.config import DataConfig
from omniloom.tools.generate import add_adapter, open_model
from omniloom.tools.tiny import make_tiny
from tests.parity.test_lora import load_peft

OPTIONS = ("model.dtype=float32", "data.workers=0", "data.pack_tokens=256")


ADAPTED = ("talker", "text", "lm_head")
OF_TALKER = {
    "qwen3_omni": {
        "text_projection.linear_fc1",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.experts.base_layer",
        "model.layers.1.mlp.shared_expert.down_proj",
        "codec_head",
        "code_predictor.model.layers.0.mlp.up_proj",
        "code_predictor.lm_head.2",
    },
    "qwen2_5_omni": {"thinker_to_talker_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj",
                     "codec_head"},
}  # fmt: skip


def write_rows(folder: Path, num_groups: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(3):
        codes = torch.randint(0, 64, (num_groups, 4 + number), generator=generator).tolist()
        answer = {"role": "assistant", "content": f"It is {number}.", "speech": codes, "speaker": "Ethan"}
        rows.append({"messages": [{"role": "user", "content": "Which?"}, answer]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(scores: list[dict[str, Any]]) -> list[float]:
    return [score[name] for score in scores for name in ("loss", "loss_code0", "loss_codes") if name in score]


@pytest.mark.parametrize("family", ["qwen3_omni", pytest.param("qwen2_5_omni", marks=pytest.mark.full)])
def test_peft_finds_the_adapter_of_a_talker_and_merges_what_we_export(tmp_path: Path, family: str) -> None:
    model, rows = make_tiny(family, tmp_path / "model"), write_rows(tmp_path, 4 if family == "qwen3_omni" else 1)
    lora = {"rank": 4, "alpha": 8.0}
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [str(rows)], "pack_tokens": 256, "workers": 0},
        "train": {"run_dir": str(tmp_path / "run"), "steps": 3, "packs_per_step": 1, "learning_rate": 1e-2},
        "policy": {name: {"lora": lora} for name in ADAPTED},
        "log": {"tensorboard": False},
    }
    assert omniloom.train(config) == 0
    adapter = tmp_path / "run" / "adapter"
    adapted = {name.partition(".lora_")[0] for name in safetensors.torch.load_file(adapter / TENSORS_NAME)}
    of_talker = {name.removeprefix("base_model.model.talker.") for name in adapted if ".talker." in name}
    assert of_talker > OF_TALKER[family]
    names = {"qwen3_omni": "Qwen3OmniMoe", "qwen2_5_omni": "Qwen2_5Omni"}
    whole = getattr(transformers, f"{names[family]}ForConditionalGeneration")
    ours = whole.from_pretrained(model, dtype=torch.float32)
    add_adapter(ours, open_model(model, DataConfig(), adapter, speaks=True))
    merged = load_peft(whole.from_pretrained(model, dtype=torch.float32), adapter).merge_and_unload()
    expected = dict(merged.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    for file in model.iterdir():
        if not (tmp_path / "merged" / file.name).exists() and "safetensors" not in file.name:
            shutil.copy(file, tmp_path / "merged" / file.name)
    base, adapted_losses, by_peft, exported = (
        losses(omniloom.score(directory, rows, OPTIONS, adapter=own)[0])
        for directory, own in (
            (model, None),
            (model, adapter),
            (tmp_path / "merged", None),
            (tmp_path / "run" / "hf", None),
        )
    )
    assert adapted_losses == pytest.approx(by_peft, rel=1e-5)
    assert exported == pytest.approx(by_peft, rel=3e-3)  # bfloat16, as published
    assert base != pytest.approx(by_peft, rel=3e-2)

    # where nothing is spoken, the talker and what it has learnt are left out
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"query": "Which?", "response": "It is 1."}) + "\n")
    scored = [losses(omniloom.score(where, silent, OPTIONS, adapter=own)[0]) for where, own in
              ((model, adapter), (tmp_path / "merged", None))]  # fmt: skip
    assert scored[0] == pytest.approx(scored[1], rel=1e-5)
    quiet = whole.from_pretrained(model, dtype=torch.float32)
    add_adapter(quiet, open_model(model, DataConfig(), adapter))
    for name, weight in quiet.thinker.named_parameters():
        torch.testing.assert_close(weight, expected[f"thinker.{name}"], rtol=1e-5, atol=1e-6)
