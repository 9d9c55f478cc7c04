"""Compiled blocks: one graph without a break, which unlike packs share, and the gradients of the plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from omniloom.config import Config, DataConfig, LoraConfig, ModelConfig, PolicyRule
from omniloom.data.loader import Loader
from omniloom.data.planner import plan_all
from omniloom.data.sources import open_sources
from omniloom.models.fusion import OmniModel
from omniloom.models.layers import Attention
from omniloom.ops.attention import HeadNorms
from omniloom.ops.linear_map import keyed_seed
from omniloom.ops.rotary import Rotary
from omniloom.ops.torch_operators import count_graphs
from omniloom.parallel.apply import compile_blocks
from omniloom.parallel.recompute import Recompute, recompute_layers
from omniloom.parallel.staging import map_tensors
from omniloom.run.opening import Workshop, open_workshop
from omniloom.run.rows import open_rows
from omniloom.tools.tiny import make_tiny, tiny_config
from omniloom.types import CODE0, CODES, PackedBatch, PackPlan, Segments
from tests.device.steps import Case, make_pack, open_case, unlike_contents

FAMILIES = ("qwen3_omni", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
LORA = {"text": {"lora": {"rank": 4, "dropout": 0.3}}, "vision": {"lora": {"rank": 4, "dropout": 0.3}}}
FROZEN = {"lm_head": {"freeze": True}, "text.embed": {"freeze": True}}
PACK_TOKENS, NUM_PACKS = 384, 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    family: str
    recompute: Recompute = "none"
    lora: bool = False
    evaluates: bool = False
    backend: str = "aot_eager"


MATRIX = [
    Setting(family=family, recompute=recompute, lora=lora)
    for family in FAMILIES
    for recompute in ("none", "full")
    for lora in (False, True)
]
MATRIX += [
    Setting(family=family, recompute=recompute, evaluates=True) for family in FAMILIES for recompute in ("none", "full")
]
MATRIX += [Setting(family=family, backend="inductor") for family in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")]
SAMPLE = Setting(family="qwen3_omni", recompute="full", lora=True)
SPOKEN, SPEECH = ("qwen3_omni", "qwen2_5_omni"), (CODE0, CODES)
SPOKEN_SAMPLE = Setting(family="qwen3_omni")


def build(workshop: Workshop) -> OmniModel:
    model = workshop.build()
    policies = workshop.policies([name for name, _ in model.named_parameters()])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
        parameter.requires_grad_(policies[name].trainable)
    return model


def gradients(model: OmniModel, batch: Any) -> list[Tensor]:
    model.zero_grad()
    model(batch).sums["text"].backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def evaluated(model: OmniModel, batch: Any) -> list[Tensor]:
    return list(model.eval()(batch).sums.values())


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    counters.clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs'
@pytest.mark.parametrize(
    "setting",
    [pytest.param(each, id=f"{each}", marks=() if each == SAMPLE else pytest.mark.full) for each in MATRIX],
)
def test_unlike_packs_share_two_graphs_without_a_break(setting: Setting, tmp_path: Path) -> None:
    policy = {**LORA, **FROZEN} if setting.lora else {}
    if tiny_config(setting.family).get("tie_word_embeddings"):
        policy.pop("lm_head", None)
    workshop = open_case(Case(model=setting.family, pack_tokens=PACK_TOKENS, policy=policy), tmp_path)
    model, plan = build(workshop), workshop.spec.sharding(workshop.family)
    packs = [make_pack(workshop.family, PACK_TOKENS, content) for content in unlike_contents(NUM_PACKS)]
    for number, pack in enumerate(packs):
        object.__setattr__(pack, "draw_key", keyed_seed(number))
    results = evaluated if setting.evaluates else gradients
    expected = results(model, packs[1])  # which has media
    for root in plan.roots:
        recompute_layers(model.get_submodule(root), setting.recompute, routes=bool(plan.experts) and root == "text")
    backends = {root: CompileCounterWithBackend(setting.backend) for root in plan.roots}
    for root, backend in backends.items():
        compile_blocks(model, [block for block in plan.blocks if block.startswith(f"{root}.")], backend)
    for found, wanted in zip(results(model, packs[1]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for pack in packs:
        results(model, pack)
    assert not counters["graph_break"]
    graphs = {root: backend.frame_count for root, backend in backends.items()}
    assert count_graphs() == sum(graphs.values())  # what the metrics say
    limits = dict.fromkeys(plan.roots, 2)  # of one number of rows, and of any
    limits["text"] = 1 + bool(plan.recurrences)  # whose rows are always as many
    if setting.lora:
        limits["vision"] = 4  # its first layer, below which nothing trains, has no gradient to hand on
    assert all(0 < graphs[root] <= limit for root, limit in limits.items()), graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each == SAMPLE.family else pytest.mark.full) for each in FAMILIES]
)
def test_blocks_on_an_accelerator_are_one_graph_too(
    family: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta`, which takes the branches of accelerators and computes nothing."""
    monkeypatch.setattr("omniloom.ops.attention.resolve_kernel", lambda *_: "flash")
    workshop = open_case(Case(model=family, pack_tokens=PACK_TOKENS, policy=LORA if lora else {}), tmp_path)
    with torch.device("meta"):
        model = workshop.build().to(torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, workshop.spec.sharding(workshop.family).blocks, counter)
    pack = replace(make_pack(workshop.family, PACK_TOKENS, unlike_contents(2)[1]), draw_key=1)
    model(map_tensors(pack, lambda tensor: tensor.to("meta"))).sums["text"].backward()
    assert counter.frame_count > 0
    assert not counters["graph_break"]


def spoken_packs(family: str, folder: Path, rule: PolicyRule) -> tuple[Workshop, list[PackedBatch]]:
    """A row a pack, of 3, 5 and 2 frames, and an empty pack; of a run that trains the talker by this rule."""
    rows, groups = [], 4 if family == "qwen3_omni" else 1
    for frames in (3, 5, 2):
        speech = {"speech": [list(range(frames))] * groups, "speaker": "Ethan"}
        answer = {"role": "assistant", "content": "so it is", **speech}
        rows.append(json.dumps({"messages": [{"role": "user", "content": "is it?"}, answer]}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    config = Config(
        model=ModelConfig(path=str(make_tiny(family, folder / "model")), dtype="float32"),
        data=DataConfig(train=(str(folder / "rows.jsonl"),), pack_tokens=32),
        policy={"talker": rule},
    )
    workshop, source = open_workshop(config), open_sources(config.data.train, config.data)
    with closing(Loader(open_rows(workshop, source, cache=False), workers=0)) as loader:
        packs, bad = plan_all(num_rows=3, pack_tokens=32, measure=loader.measure, locate=source.locate)
        assert (len(packs), bad) == (3, ())
        empty = PackPlan(index=3, samples=())
        batches = [loaded.batch for loaded in loader.load_in_order([*packs, empty])]
        return workshop, [replace(batch, draw_key=keyed_seed(number)) for number, batch in enumerate(batches)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(each, id=f"{each}", marks=() if each == SPOKEN_SAMPLE else pytest.mark.full)
        for each in MATRIX
        if each.family in SPOKEN and each.backend == "aot_eager"
    ],
)
def test_frames_of_any_number_share_the_graphs_of_a_compiled_talker(setting: Setting, tmp_path: Path) -> None:
    rule = PolicyRule(lora=LoraConfig(rank=4, dropout=0.3)) if setting.lora else PolicyRule(freeze=False)
    workshop, packs = spoken_packs(setting.family, tmp_path, rule)
    model, plan = build(workshop), workshop.spec.sharding(workshop.family)
    model.trains_speech_alone = True

    def results() -> list[Tensor]:
        found = []
        for pack in packs:
            model.zero_grad()
            with torch.set_grad_enabled(not setting.evaluates):
                losses = [
                    total for name, total in model.train(not setting.evaluates)(pack).sums.items() if name in SPEECH
                ]
            if setting.evaluates:
                found += losses
                continue
            torch.stack(losses).sum().backward()
            found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        return found

    expected = results()
    lists = [name.removesuffix(".call") for name in plan.layer_calls if name.startswith("talker.")]
    for name in lists:
        routes = any(each.startswith(f"{name}.layers") for each in plan.experts)
        recompute_layers(model.get_submodule(name), setting.recompute, routes=routes)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, [block for block in plan.blocks if block.startswith("talker.")], counter)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert 0 < counter.frame_count <= 3  # experts', feed-forwards', and these again for any number of frames


class _NormingCore(nn.Module):
    """Norms heads itself, as a core does that exchanges them between ranks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, norms: HeadNorms) -> Tensor:
        q, k = norms(q, k)
        return q + k + v


def test_models_of_unlike_epsilons_are_compiled_in_one_process() -> None:
    angles, segments = torch.randn(6, 4), Segments.from_lengths([6], num_bounds=2)
    for eps in (1e-6, 1e-5, 0.1):
        heads = {"num_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        settings = {"biases": (False,) * 4, "qk_norm_eps": eps, "causal": True, "kernel": "eager"}
        attention = Attention(hidden_size=16, **heads, **settings)
        attention.core = _NormingCore()
        rows = torch.randn(6, 16)
        expected = attention(rows, Rotary(cos=angles.cos(), sin=angles.sin()), segments)
        attention.compile(backend="aot_eager")
        torch.testing.assert_close(attention(rows, Rotary(cos=angles.cos(), sin=angles.sin()), segments), expected)
