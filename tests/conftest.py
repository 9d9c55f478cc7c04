"""One thread per process: models here are tiny, and threads that wait for each other cost more than they bring."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.run_server import RunServer

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LONGEST = ("distributed", "faults", "device", "parity", "unit", "gpu")  # folders by how long their longest file takes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.parent.name))  # a stable sort: files keep their order


@pytest.fixture(scope="session")
def server() -> Iterator["RunServer"]:
    """Forks runs from a process that has everything imported."""
    from tests.run_server import RunServer

    server = RunServer()
    yield server
    server.close()
