"""What a user is told where memory was not enough: where, how much, and which keys of the config are of help."""

from __future__ import annotations

import torch

from omniloom.config import Config
from omniloom.parallel.mesh import Ranks
from omniloom.types import RunError

ALLOCATORS = ("DefaultCPUAllocator", "NPU out of memory")  # which have no error of their own, as CUDA's has


class MemoryShortError(RunError):
    """A device, or the host, has too little memory for this run."""


def says_memory_is_short(error: Exception) -> bool:
    """Whether an allocator found no memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in str(error) for name in ALLOCATORS)


def describe_short_memory(error: Exception, config: Config, ranks: Ranks) -> str:
    """The allocator's own words, then what takes less, in the order of what it costs."""
    memory, train = config.memory, config.train
    remedies = [f"lower data.pack_tokens (it is {config.data.pack_tokens})"]
    if memory.recompute != "full":
        remedies.insert(0, f"set memory.recompute to {'selective or ' * (memory.recompute == 'none')}full")
    if train.optimizer_states != "8bit":
        remedies.append("set train.optimizer_states to 8bit")
    if ranks.device.type != "cpu":
        keys = ("offload_activations", "offload_optimizer")
        remedies += [f"set memory.{key}" for key in keys if not getattr(memory, key)]
    has_adapters = any(rule.lora for rule in config.policy.values())
    if not has_adapters or not config.model.quantize:
        remedies.append(f"set {'model.quantize' if has_adapters else 'policy.text.lora, to train adapters'}")
    words = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"rank {ranks.rank} has too little memory on {ranks.device}: {words}\n"
        f"{'; '.join(remedies)}; or start more ranks; `omniloom plan CONFIG --gpus N` estimates what each takes"
    )
