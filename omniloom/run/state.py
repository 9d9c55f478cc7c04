"""What a run goes on from: trained parameters, optimizer, generators and the position in the data, saved and loaded.

Decides which checkpoint a run resumes and whether it may; how files are written is `checkpoint/dcp.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniloom.checkpoint import dcp
from omniloom.checkpoint.adapters import fingerprint
from omniloom.checkpoint.stored import StoredCheckpoint, find_latest, open_stored
from omniloom.models.fusion import OmniModel
from omniloom.parallel.device import synchronize
from omniloom.parallel.mesh import Layout
from omniloom.run.opening import Workshop, load_weights
from omniloom.run.trained_media import TrainedMedia
from omniloom.training.policy import ParameterPolicy


def _own_record(workshop: Workshop, policies: Mapping[str, ParameterPolicy]) -> dict[str, Any]:
    """What a checkpoint says of its run beside the weights, as JSON: a run that goes on from it must have the same."""
    train = workshop.config.train
    return {
        "model": fingerprint(workshop.checkpoint),
        "adapters": {  # what decides, beside their weights, what adapters do
            f"policy.{policy.component}.lora.{key}": getattr(policy.lora, key)
            for policy in policies.values()
            if policy.lora is not None and policy.trainable
            for key in ("alpha", "rslora", "dora")
        }
        | {"model.quantize": workshop.config.model.quantize},
        "optimizer": {f"train.{key}": getattr(train, key) for key in ("optimizer", "optimizer_states")},
        "adapter_sizes": {  # of those that follow the adapter they began with
            adapter.base: [adapter.rank, adapter.alpha]
            for adapter in workshop.adapters
            if (lora := policies[adapter.base].lora) and (lora.rank, lora.alpha) != (adapter.rank, adapter.alpha)
        },
    }


def check_model(stored: StoredCheckpoint, workshop: Workshop, otherwise: str) -> None:
    """Raises: ValueError where a checkpoint's run began with another model; it leaves out what is as there."""
    if stored.extras["model"] != fingerprint(workshop.checkpoint):
        raise ValueError(
            f"{stored.directory} belongs to a run on another model than model.path={workshop.config.model.path}; name "
            f"that model, {otherwise}"
        )


class RunState:
    """A run's parameters and their checkpoints. Made and used on every rank; all methods are collective.

    `parameters` as `all_parameters`: each rank writes and reads those that are here.
    """

    def __init__(
        self,
        workshop: Workshop,
        layout: Layout,
        model: OmniModel,
        parameters: Mapping[str, nn.Parameter],
        policies: Mapping[str, ParameterPolicy],
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        config, self._device = workshop.config, layout.device
        self._workshop, self._model, self._optimizer, self._say = workshop, model, optimizer, say
        self._settings, self._run_dir = config.checkpoint, Path(config.train.run_dir)
        self.parameters = dict(parameters)
        self._here = {name: parameter for name, parameter in parameters.items() if not parameter.is_meta}
        # what differs from the published weights
        self.changed = [
            name for name, parameter in self.parameters.items() if parameter.requires_grad or name in workshop.replaced
        ]
        self.media = TrainedMedia()
        self._own = _own_record(workshop, policies)
        self.saver = dcp.Saver(
            self._run_dir,
            keep=self._settings.keep,
            asynchronous=self._settings.asynchronous,
            group=layout.channels["checkpoint"],
        )
        self.group = self.saver.group
        stack.callback(self.saver.close)

    def find(self, *, overwrite: bool = False) -> StoredCheckpoint | None:
        """The checkpoint to go on from, verified; with `overwrite` only one that is named.

        Raises: ValueError for one of another model or policy.
        """
        stored = None
        if self._settings.resume == "auto" and not overwrite:
            stored, passed_over = find_latest(self._run_dir, group=self.group)
            for words in passed_over:
                self._say(f"warning: {words}")
        elif self._settings.resume not in ("auto", "none"):
            stored = open_stored(self._settings.resume, group=self.group)
        if stored is not None:
            self._check(stored)
        return stored

    def load(self, stored: StoredCheckpoint | None) -> int:
        """Fill the model from the checkpoint, or from the published one. Returns the first step to take."""
        held = [] if stored is None else dcp.stored_names(stored, self.parameters)
        if len(held) < len(self.parameters):  # checkpoints leave out what is as published
            load_weights(self._workshop, self._model, self.parameters)
        if stored is None:
            return 0
        self.media = TrainedMedia(**stored.extras.get("media", {}))
        dcp.load_model_state(stored, {name: self._here[name] for name in held if name in self._here})
        changed = {*held, *self.changed}
        self.changed = [name for name in self.parameters if name in changed]
        has_states = any(name.startswith(dcp.OPTIMIZER) for name in stored.shapes)
        if self._settings.load_optimizer and (has_states or not stored.extras.get("saves_optimizer")):
            dcp.load_optimizer_state(stored, self._here, self._optimizer)
        if self._settings.load_rng and (lacking := dcp.load_rng_state(stored)):
            self._say(
                f"warning: {stored.directory} was saved by other ranks and has no state of random generators for "
                f"ranks {', '.join(map(str, lacking))}; they start from train.seed"
            )
        self._say(f"resumed after step {stored.step} from {stored.directory}")
        return stored.step

    def save(self, step: int, data: Mapping[str, Any], *, compiled: bool) -> None:
        """Write a checkpoint, in the background where the config says so.

        `data`: the position in it; `compiled`: whether blocks were compiled on the way (`memory.compile: auto`).
        """
        if self._workshop.config.memory.offload_optimizer:
            synchronize(self._device)  # states that are still on their way to the host
        state = dcp.model_state({name: self._here[name] for name in self.changed if name in self._here})
        if self._settings.save_optimizer:
            state |= dcp.optimizer_state(self._here, self._optimizer)
        extras = {"data": data, "media": asdict(self.media), "compiled": compiled, **self._own}
        extras["saves_optimizer"] = self._settings.save_optimizer  # which has no states before a step that counts
        self.saver.save(step, state | dcp.rng_state(), extras)

    def _check(self, stored: StoredCheckpoint) -> None:
        """What a checkpoint does not keep must be as it was."""
        check_model(stored, self._workshop, "set another train.run_dir, or start anew with --overwrite")
        if self._settings.load_optimizer:
            for key, asked in self._own["optimizer"].items():
                if (then := stored.extras.get("optimizer", {}).get(key, asked)) != asked:
                    raise ValueError(
                        f"{stored.directory}: {key} is {then} there and {asked} here, whose states are others; set it "
                        f"to {then}, or start with fresh ones (checkpoint.load_optimizer=false)"
                    )
        before, asked = stored.extras.get("adapters", {}), self._own["adapters"]
        for key in sorted(asked, key=len):  # what a rule is named for before what lies below
            if (then := before.get(key, asked[key])) != asked[key]:
                raise ValueError(
                    f"{stored.directory}: {key} is {then} there and {asked[key]} here, which makes another model of "
                    f"the same weights; set it to {then}, or start anew with --overwrite"
                )
