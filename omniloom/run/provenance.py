"""With what a run was made: `starts.jsonl` has a line for each time that it was started."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omniloom.run.directory import STARTS
from omniloom.training.metrics import read_lines

PACKAGES = ("omniloom", "torch", "transformers", "safetensors", "numpy", "av")
GIT_SECONDS = 5.0


def describe_start(first_step: int, num_ranks: int) -> dict[str, Any]:
    """Time, command, versions, and the commits of the folder that it was started in and of omniloom's own."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": first_step,
        "num_ranks": num_ranks,
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": _commit(Path.cwd()),
        "omniloom_git_commit": _commit(Path(__file__).parent),
    }


def record_start(run_dir: Path, start: dict[str, Any]) -> None:
    with (run_dir / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def from_where_it_ran(run_dir: Path, path: str) -> str:
    """A directory that a run's config names, as it is found from here: relative to where the run was started last."""
    if Path(path).is_dir() or not (starts := read_lines(run_dir / STARTS)):
        return path
    found = Path(starts[-1].get("folder", "")) / path
    return str(found) if found.is_dir() else path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of a git checkout, with a + behind it where files differ from it; None outside of one."""
    found = _git(folder, "rev-parse", "HEAD")
    return found and found + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or a slow file system
        return None
    return done.stdout.strip()
