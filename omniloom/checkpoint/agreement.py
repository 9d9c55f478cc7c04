"""What ranks tell each other around files: who writes, and whether everybody came through.

A rank that raised alone would leave the others waiting in the next collective; `agree` makes one rank's fault the
fault of all. Works without a process group, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: all ranks, or no group at all


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if in_group() else 0


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if in_group() else 1


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, on every rank. Collective over `group` (None: all ranks); any picklable value."""
    if not in_group():
        return [value]
    values = [value] * num_ranks(group)
    dist.all_gather_object(values, value, group=group)
    return values


def agree(fault: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Collective over `group`. Raises: ValueError on every rank if any rank reports a fault, the first one's words."""
    faults = [(number, told) for number, told in enumerate(gather(fault, group)) if told is not None]
    if faults:
        number, told = faults[0]
        raise ValueError(told if num_ranks(group) == 1 or number == 0 else f"{told} (rank {number})")


def on_first(work: Callable[[], object], what: str, unharmed: str = "", *, group: Group) -> None:
    """`attempt` by rank 0, and `agree` on it. Collective over `group`. Raises: ValueError on every rank."""
    agree(attempt(work, what, unharmed) if rank(group) == 0 else None, group)


def attempt(work: Callable[[], object], what: str, unharmed: str = "") -> str | None:
    """Do the work; a fault of disk or data comes back in words, for `agree`.

    `what` is tried ("save step 3"), `unharmed` ("; ...") is as before where it fails.
    """
    try:
        work()
    except OSError as error:
        return f"could not {what}: {error.strerror or error}{unharmed}"
    except ValueError as error:
        return str(error)
    except (RuntimeError, SafetensorError) as error:  # of torch's and safetensors' writers, on a full disk
        return f"could not {what} (is the disk full?): {str(error).splitlines()[0]}{unharmed}"
    return None
