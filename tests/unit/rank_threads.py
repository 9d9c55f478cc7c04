"""Threads that stand for ranks, and what they tell each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Rendezvous:
    """An all-gather between them."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.slots: list[Any] = [None] * world_size

    def exchange(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.slots[rank] = value
            self.barrier.wait()
            everything = list(self.slots)
            self.barrier.wait()
            return everything

        return gather


def run_on_ranks(run: Callable[[int], None], world_size: int) -> None:
    """`run(rank)` on each of them, until all have ended."""
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
