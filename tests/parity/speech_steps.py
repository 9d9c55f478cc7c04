"""A pack of spoken rows through a whole model of ours, and what transformers is given for the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from omniloom.config import Config, DataConfig, ModelConfig, PolicyRule
from omniloom.data.loader import Loader
from omniloom.data.planner import plan_all
from omniloom.data.sources import Sources, open_sources
from omniloom.models.fusion import OmniModel
from omniloom.parallel.apply import materialize
from omniloom.run.opening import Workshop, load_weights, open_workshop
from omniloom.run.rows import open_rows
from omniloom.tools.generate import read_prompt
from omniloom.types import PackedBatch
from tests.parity.builders import assemble, published


@dataclass(frozen=True, kw_only=True)
class SpokenPack:
    """All rows of a file in one pack, and a model of which thinker, towers and talker train together."""

    workshop: Workshop
    source: Sources
    model: OmniModel
    batch: PackedBatch

    def answers(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[int]]]:
        """Of every spoken turn its message, what `generate` takes of all before it, and the answer's tokens."""
        directory, (data,) = self.workshop.config.model.path, self.workshop.config.data.train
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        reader = open_rows(self.workshop, self.source, cache=False)().readers[0]
        for index, row in enumerate(json.loads(Path(data).read_text())):
            conversation = reader.parse(*self.source.read_row(index))
            for number, message in enumerate(row["messages"]):
                if "speech" in message:
                    turns = conversation.turns[: number + 1]
                    inputs = read_prompt(reader, replace(conversation, turns=turns), str(data)).inputs
                    answer = tokenizer(message["content"] + "<|im_end|>", add_special_tokens=False).input_ids
                    yield message, inputs, answer

    def assert_gradients_of(self, reference: torch.nn.Module, nonzero: str) -> None:
        """`nonzero` names a weight that has a gradient."""
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in reference.named_parameters()
        }
        wanted = assemble(self.workshop.key_map, published(reference, gradients))
        largest = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        for name, parameter in self.model.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # below the floor are gradients that vanish in exact arithmetic
            assert (found - wanted[name]).norm() <= 1e-4 * max(wanted[name].norm(), 1e-3 * largest), name
        assert wanted[nonzero].norm() > 0


def load_pack(directory: Path, data: Path) -> SpokenPack:
    policy = {name: PolicyRule(freeze=False) for name in ("talker", "text", "lm_head", "vision", "audio")}
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        data=DataConfig(train=(str(data),), pack_tokens=2048),
        policy=policy,
    )
    workshop, source = open_workshop(config), open_sources(config.data.train, config.data)
    with closing(Loader(open_rows(workshop, source, cache=False), workers=0)) as loader:
        packs, bad = plan_all(num_rows=len(source), pack_tokens=2048, measure=loader.measure, locate=source.locate)
        (loaded,) = loader.load_in_order(packs)
    assert not bad
    with torch.device("meta"):
        model = workshop.build()
    materialize(model, "cpu")
    load_weights(workshop, model)
    return SpokenPack(workshop=workshop, source=source, model=model, batch=loaded.batch)
