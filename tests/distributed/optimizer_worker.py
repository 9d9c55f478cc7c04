"""One rank of the job that steps sharded weights, saves, and goes on. Started by `test_optimizer_ranks.py`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from omniloom.checkpoint.dcp import Saver, load_optimizer_state, optimizer_state
from omniloom.checkpoint.stored import open_stored
from omniloom.config import TrainConfig
from omniloom.parallel.mesh import close_distributed, init_distributed
from omniloom.parallel.optimizer import ShardedOptimizer
from omniloom.training.optimizer import parameter_groups
from omniloom.training.policy import ParameterPolicy

POLICY = ParameterPolicy(component="text", trainable=True, learning_rate=0.01, weight_decay=0.1)
PLACED: dict[str, tuple[tuple[int, ...], int | None]] = {  # shape, and the dim that is cut
    "text.layers.0.rows": ((7, 10), 0),
    "text.layers.1.rows": ((7, 10), 0),
    "text.layers.2.rows": ((7, 10), 0),
    "text.layers.0.columns": ((10, 5), 1),
    "text.layers.0.one_row": ((1, 6), 0),
    "text.layers.0.experts": ((3, 4, 6), 0),
    "text.layers.1.experts": ((3, 4, 6), 1),
    "text.layers.2.experts": ((2, 6, 9), 2),
    "text.layers.0.whole": ((6, 4), None),
    "text.embed": ((9, 16), 0),
    "text.norm": ((5,), 0),
}
SETTINGS = {
    "adamw_bf16": TrainConfig(optimizer_states="bf16"),
    "adamw_8bit": TrainConfig(optimizer_states="8bit"),
    "muon": TrainConfig(optimizer="muon"),
    "muon_8bit": TrainConfig(optimizer="muon", optimizer_states="8bit"),
}
STEPS, SAVED = 5, 3


def full_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in PLACED.items()}


class Weights:
    """Sharded over all ranks, or whole where there is one process."""

    def __init__(self, settings: TrainConfig, *, sharded: bool) -> None:
        self._mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if sharded else None
        self.named = {name: nn.Parameter(self._place(name, full)) for name, full in full_tensors(0).items()}
        policies = dict.fromkeys(self.named, POLICY)
        groups = parameter_groups(self.named.items(), policies, muon=settings.optimizer == "muon")
        self.optimizer = ShardedOptimizer(
            groups,
            betas=settings.betas,
            epsilon=settings.epsilon,
            states=settings.optimizer_states,
            copies=None,
            compute_dtype=torch.float32,
        )

    def _place(self, name: str, full: Tensor) -> Tensor:
        dim = PLACED[name][1]
        placement: Placement = Replicate() if dim is None else Shard(dim)
        return full if self._mesh is None else distribute_tensor(full, self._mesh, [placement])

    def take_steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for name, full in full_tensors(100 + step).items():
                self.named[name].grad = self._place(name, 0.01 * full)
            self.optimizer.step()

    def full(self) -> dict[str, Tensor]:
        tensors = ((name, weight.detach()) for name, weight in self.named.items())
        return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors}

    def go_on(self, directory: Path) -> dict[str, Tensor]:
        """Weights after the last step, of a run that goes on from the checkpoint in `directory`."""
        before = torch.load(directory / "weights.pt")
        with torch.no_grad():
            for name, weight in self.named.items():
                weight.copy_(self._place(name, before[name]))
        stored = open_stored(directory / f"checkpoints/step_{SAVED:08d}")
        load_optimizer_state(stored, self.named, self.optimizer)
        self.take_steps(SAVED, STEPS)
        return self.full()


def run_job(rank: int, world_size: int, port: int, folder: str) -> None:
    """Body of one process: of each setting the weights after all steps, in one go and resumed."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    init_distributed(timeout_seconds=120)
    found = {}
    for name, settings in SETTINGS.items():
        run, directory = Weights(settings, sharded=True), Path(folder) / name
        run.take_steps(0, SAVED)
        Saver(directory).save(SAVED, optimizer_state(run.named, run.optimizer), {})
        weights = run.full()
        if rank == 0:
            torch.save(weights, directory / "weights.pt")
        torch.distributed.barrier()
        run.take_steps(SAVED, STEPS)
        found[name] = run.full(), Weights(settings, sharded=True).go_on(directory)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    close_distributed()
