"""A decoder cut in two, composed by hand in the order of a pipeline, gives what the whole one gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from layout_worker import Case, make_reference
from tiny_omni import Dims
from torch import Tensor

from omniloom.config import LoraConfig
from omniloom.models.decoder import Decoder
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.parallel.recompute import recompute_layers
from omniloom.parallel.step import Objective, list_rows, map_rows
from omniloom.training.lora import install_lora
from omniloom.types import LossTerms, PackedBatch, TowerRows

CASE = Case(dims=Dims(num_layers=4, vision_depth=3, deepstack=(0, 2)), seed=7)
FIRST_OF_SECOND = 1  # so that a level of deepstack rows belongs to each stage
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.3)


def make_model() -> OmniModel:
    """With adapters on the decoder's attention and experts, which drop out; what else it has trains too."""
    model = make_reference(CASE)
    adapted = [name for name, _ in model.named_parameters() if name.startswith("text.layers")]
    adapted = [name for name in adapted if "_proj" in name or "experts" in name]
    generator = torch.Generator().manual_seed(1)
    for adapter in install_lora(model, dict.fromkeys(adapted, LORA)):
        for name in adapter.names:
            parameter = model.get_parameter(name)
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        model.get_parameter(adapter.base).requires_grad_(False)
    return model


def cut(text: Decoder) -> tuple[Decoder, Decoder]:
    """Both stages are the same module with fewer parts."""
    first, second = copy.deepcopy(text), copy.deepcopy(text)
    first.loss_head, second.embed = None, None
    for name in list(text.layers):
        del (first if int(name) >= FIRST_OF_SECOND else second).layers[name]
    for stage in (first, second):
        recompute_layers(stage, "full", routes=True)
    return first, second


class Stages:
    """The state of one run over the packs: what each stage holds between a forward and its backward."""

    def __init__(self, stages: tuple[Decoder, Decoder], packs: list[PackedBatch], media: list[TowerRows]) -> None:
        self.stages, self.packs, self.media = stages, packs, media
        self.handed: dict[int, tuple[Tensor, Tensor]] = {}  # rows as they left the first stage, and as they arrived
        self.terms: dict[tuple[int, int], LossTerms] = {}

    def forward(self, stage: int, pack: int) -> None:
        arrived = self.handed[pack][1] if stage == 1 else None
        terms = self.stages[stage](self.packs[pack], self.media[pack], arrived)
        self.terms[stage, pack] = terms
        if stage == 0:
            self.handed[pack] = (terms.hidden, terms.hidden.detach().requires_grad_())

    def backward(self, stage: int, pack: int, objective: Objective) -> None:
        if stage == 1:
            objective.of_pack(self.terms[1, pack]).backward()
        else:
            left, arrived = self.handed.pop(pack)
            left.backward(arrived.grad)


ONE_FORWARD_ONE_BACKWARD = (
    *("0F0", "0F1", "1F0", "1B0", "0B0", "0F2", "1F1", "1B1", "0B1"),
    *("0F3", "1F2", "1B2", "0B2", "1F3", "1B3", "0B3"),
)  # stage, direction, pack


def test_two_stages_recomputing_and_dropping_out_give_the_gradients_of_one() -> None:
    model = make_model()
    objective = Objective(coefficients={"text": 1.0, "router": 0.3}, weight_sums={"text": 50.0, "router": 3.0})
    packs = [
        replace(pack, loss_scales=objective.scales, draw_key=keyed_seed(0, number))
        for number, pack in enumerate(CASE.packs())
    ]
    with torch.no_grad():
        rows = [model.encode(pack) for pack in packs]
    media, cut_media = ([map_rows(lambda row: row.clone().requires_grad_(), each) for each in rows] for _ in range(2))
    stages = cut(model.text)
    whole = []
    for pack, own in zip(packs, media, strict=True):
        whole.append(model.decode(pack, own))
        objective.of_pack(whole[-1]).backward()
    run = Stages(stages, packs, cut_media)
    for stage, direction, pack in ONE_FORWARD_ONE_BACKWARD:
        if direction == "F":
            run.forward(int(stage), int(pack))
        else:
            run.backward(int(stage), int(pack), objective)
    for number, terms in enumerate(whole):
        first, second = run.terms[0, number], run.terms[1, number]
        assert torch.equal(second.sums["text"], terms.sums["text"])
        torch.testing.assert_close(first.sums["router"] + second.sums["router"], terms.sums["router"])
        assert torch.equal(torch.cat([first.expert_counts, second.expert_counts]), terms.expert_counts)
    found = {name: p for stage in stages for name, p in stage.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in model.text.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert {"embed.weight", "loss_head.head.weight"} < wanted.keys()
    assert any("router" in name for name in wanted)
    assert any("gate_up_lora_a" in name for name in wanted)
    for name, parameter in wanted.items():
        assert parameter.grad.any(), name
        assert torch.equal(found[name].grad, parameter.grad), name
    for own, other in zip(media, cut_media, strict=True):
        for one, two in zip(list_rows(own), list_rows(other), strict=True):
            torch.testing.assert_close(two.grad, one.grad)


def test_dropout_without_a_key_is_a_fault_of_ours_that_is_told() -> None:
    model = make_model()
    with pytest.raises(AssertionError, match="draw_key"):
        model(replace(CASE.packs()[0], draw_key=None))
