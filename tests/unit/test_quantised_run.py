"""QLoRA as a user has it: what is packed, what adapters learn, what is exported, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from omniloom.config import ConfigError, load_config
from omniloom.ops.nf4 import is_packed, pack, shape_of, unpack
from omniloom.parallel.degrees import Degrees
from omniloom.run.best import read_evaluations
from omniloom.run.footprint import ModelSizes
from omniloom.run.opening import apply_policy, load_weights, open_workshop
from omniloom.run.trainer import run
from omniloom.tools.export import export_checkpoint
from omniloom.tools.score import score_rows
from omniloom.tools.tiny import make_tiny
from tests.device.steps import Content, make_pack

LORA = {"text": {"lora": {"rank": 4}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("quantised")
    # experts whose rows are whole blocks
    make_tiny("qwen3_omni", found / "model", overrides={"thinker_config.text_config.moe_intermediate_size": 64})
    rows = [{"id": str(n), "query": f"what is {n}?", "response": f"it is {n} and {n + 1}"} for n in range(6)]
    (found / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return found


def settings(folder: Path, run_dir: str, quantize: str | None = "nf4", dtype: str = "float32") -> dict:
    return {
        "model": {"path": str(folder / "model"), "dtype": dtype, "quantize": quantize},
        "data": {**{key: [str(folder / "rows.jsonl")] for key in ("train", "eval")}, "workers": 0, "pack_tokens": 128},
        "train": {"run_dir": str(folder / run_dir), "steps": 2, "packs_per_step": 1, "learning_rate": 1e-2},
        "checkpoint": {"every": 2},
        "policy": LORA,
        "log": {"tensorboard": False},
    }


def tensors_of(directory: Path) -> Mapping[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}


def test_linears_and_experts_of_the_decoder_are_packed_and_nothing_else(folder: Path) -> None:
    workshop = open_workshop(load_config(settings(folder, "none")))
    ends = {name.split(".", 3)[-1] for name in workshop.packed}
    assert {"attention.q_proj.weight", "attention.o_proj.weight", "moe.experts.gate_up", "moe.experts.down"} <= ends
    assert all(name.startswith("text.layers.") for name in workshop.packed)
    model = workshop.build()
    load_weights(workshop, model)
    apply_policy(workshop, model)
    plain = open_workshop(load_config(settings(folder, "none", None)))
    published = plain.build()
    load_weights(plain, published)
    for name, parameter in model.named_parameters():
        other = published.get_parameter(name)
        assert is_packed(parameter) == (name in workshop.packed)
        assert shape_of(parameter) == tuple(other.shape)
        assert torch.equal(parameter, pack(other) if is_packed(parameter) else other.to(parameter.dtype)), name
    sizes, all_wide = ModelSizes(workshop), ModelSizes(plain)
    assert sizes.num_parameters() == all_wide.num_parameters()
    in_codes = sum(published.get_parameter(name).numel() for name in workshop.packed)
    spared = all_wide.footprint(Degrees()).parameters - sizes.footprint(Degrees()).parameters
    assert spared == in_codes * (4 - 36 / 64)


def test_a_run_trains_resumes_and_exports_the_model_that_it_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = settings(folder, "a run")
    assert run(load_config(tree)) == 0
    # as a shell takes it
    assert f"next: omniloom chat '{folder / 'a run'}'\n" in capsys.readouterr().out
    tree["train"]["steps"] = 4
    other = load_config(tree, ["model.quantize=null"])
    with pytest.raises(ValueError, match=r"model\.quantize is nf4 there and None here"):
        run(other)
    config = load_config(tree)
    assert run(config) == 0
    workshop, published = open_workshop(config), tensors_of(folder / "model")
    exported = tensors_of(folder / "a run" / "hf")
    changed = {name for name, value in exported.items() if not torch.equal(value, published[name])}
    assert changed == {piece.published for name in workshop.packed for piece in workshop.assemblies[name].pieces}
    export_checkpoint(folder / "a run", folder / "again")
    again = tensors_of(folder / "again")
    assert all(torch.equal(value, again[name]) for name, value in exported.items())
    # merged, it has the loss of the model that the run evaluated: codes and adapters
    words = ["data.workers=0", "data.pack_tokens=128", "model.dtype=float32"]
    scores, _ = score_rows(folder / "a run" / "hf", folder / "rows.jsonl", words)
    num_tokens = sum(score["num_loss_tokens"] for score in scores)
    mean = sum(score["loss"] * score["num_loss_tokens"] for score in scores) / num_tokens
    # the export is in bfloat16, as published
    assert read_evaluations(folder / "a run")[4]["eval_loss"] == pytest.approx(mean, rel=3e-3)


def test_a_delta_rule_and_experts_compute_with_the_numbers_that_their_codes_stand_for(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_value_head_dim": 16}
    make_tiny("qwen3_5_moe", tmp_path / "model", overrides={f"text_config.{key}": n for key, n in sizes.items()})
    tree = {"model": {"path": str(tmp_path / "model"), "dtype": "float32"}, "policy": LORA}
    tree["policy"] |= {"vision": {"freeze": True}, "lm_head": {"freeze": True}}
    plain = open_workshop(load_config(tree))
    packed = open_workshop(load_config(tree, ["model.quantize=nf4"]))
    ends = {name.split(".", 3)[-1] for name in packed.packed}
    projections = {f"attention.{name}.weight" for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj")}
    assert projections | {"moe.experts.gate_up", "moe.experts.down", "moe.shared.mlp.down_proj.weight"} <= ends
    batch = make_pack(packed.family, 256, Content(num_samples=3, grid=(1, 4, 4), pictures=1, mel_frames=0, answer=0.5))
    found = []
    codes: dict[str, Tensor] = {}
    for workshop in (packed, plain):
        model, generator = workshop.build(), torch.Generator().manual_seed(0)
        load_weights(workshop, model)
        apply_policy(workshop, model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
            if name in packed.packed:
                codes.setdefault(name, parameter.detach())
                if workshop is plain:
                    parameter.data.copy_(unpack(codes[name], torch.float32))
        loss = model(batch).sums["text"]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    assert len(found[0]) > 40
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_it_is_refused_where_it_means_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize: nf4 is for frozen weights beside LoRA"):
        load_config({"model": {"quantize": "nf4"}})
    with pytest.raises(ConfigError, match=r"policy\.text\.lora\.dora: .* model\.quantize"):
        load_config({"model": {"quantize": "nf4"}, "policy": {"text": {"lora": {"dora": True}}}})
