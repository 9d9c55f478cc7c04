"""What a run directory holds of earlier runs, whether this one may go on in it, and which config held for which steps.

A record never changes to something that did not happen: a finished run stays as it is, a used directory is not started
anew in, and a config that trained the first steps is kept beside the one that trains the next. Knows files alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from omniloom.checkpoint.files import write_json, write_text
from omniloom.config import Config, config_to_dict, dump_config

STARTS = "starts.jsonl"  # a line for each time that the run was started
FINISHED = "finished.json"  # {"step": N}: all steps are done and all results written
# What a run writes, checkpoints first. Not among it: the cache of extents, which is no record, and bad_samples.jsonl,
# which a new run begins anew before its first step.
OWN_FILES = (
    *("checkpoints", FINISHED, "stopped.json", "config.yaml", "config_until_step_*.yaml", "metrics.jsonl"),
    *("expert_load.jsonl", "trainable.json", STARTS, "worst_rows.jsonl", "spoken_rows.jsonl"),
    *("evaluations.jsonl", "answers", "tensorboard", "wandb", "swanlab"),
    *("nonfinite_step_*.json", "trace_rank*.json", "hf", "adapter", "report.html"),
)
# keys that change neither what is trained nor what is left of it
NEUTRAL = (
    *("log.*", "memory.*", "parallel.*", "model.attention.*", "policy.*.recompute", "train.run_dir"),
    *("data.workers", "data.prefetch_packs", "data.cache*", "train.time_limit_minutes"),
    *("train.step_timeout_seconds", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best", "checkpoint.best*"),
    *("checkpoint.asynchronous", "checkpoint.save_optimizer", "checkpoint.load_*"),
)
RESULTS = ("data.eval", "train.eval_*", "checkpoint.export")  # what is measured and written, not what is trained
PATHS = ("model.path", "model.adapter", "data.train", "data.eval", "data.media_dir")  # however they are spelled


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value differs from that of the steps before."""

    key: str
    before: Any
    now: Any

    @property
    def is_neutral(self) -> bool:
        if self.key == "checkpoint.resume":  # to go back to an earlier step is no neutral wish
            return self.now in ("auto", "none")
        return any(fnmatchcase(self.key, pattern) for pattern in NEUTRAL)

    @property
    def is_of_results(self) -> bool:
        return any(fnmatchcase(self.key, pattern) for pattern in RESULTS)

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r}, is {self.now!r}"


def find_finished(run_dir: Path, config: Config) -> str | None:
    """What to say of a run that is over and is not asked for more steps; None of one that is to go on.

    Raises: ValueError where it is over and its config differs in what decides the outcome.
    """
    step = finished_step(run_dir)
    if step is None or config.checkpoint.resume == "none":  # none is refused with the rest of used directories
        return None
    changes = changes_of(run_dir / "config.yaml", config)
    if _asks_for_more(changes, config, step):
        return None
    if deciding := [change for change in changes if not change.is_neutral]:
        hf = run_dir / "hf"
        result = f"model.path={hf}" if hf.is_dir() else f"as model.path what `omniloom export {run_dir} DIR` writes"
        raise ValueError(
            f"{run_dir} holds a run that is finished after step {step}; nothing was trained or written, and its "
            f"config.yaml stays. What differs: {_listed(deciding)}. To train on from its result, set {result} "
            "and another train.run_dir; to train it anew, set another train.run_dir or --overwrite"
        )
    others = f" ({_listed(changes)}: no matter to it)" if changes else ""
    return f"{run_dir}: finished after step {step}, nothing to do{others}"


def check_all_done(run_dir: Path, config: Config, step: int) -> None:
    """Raises: ValueError where all `step` steps are done, some results are missing and the config trains otherwise."""
    changes = changes_of(run_dir / "config.yaml", config)
    if deciding := [change for change in changes if not (change.is_neutral or change.is_of_results)]:
        raise ValueError(
            f"{run_dir}: all {step} steps are done, with other values: {_listed(deciding)}. Call it with those to have "
            "its results written, or set another train.run_dir"
        )


def check_start(run_dir: Path, config: Config, *, overwrite: bool) -> None:
    """Whether a run may take its first step here, or start from a checkpoint of elsewhere. Raises: ValueError."""
    if (run_dir / "config.yaml").exists() and not is_used(run_dir) and not (run_dir / STARTS).exists():
        raise ValueError(
            f"{run_dir / 'config.yaml'} was written by no run, and this one would replace it; set another train.run_dir"
        )
    resume = config.checkpoint.resume
    is_own = resume not in ("auto", "none") and _lies_in(Path(resume), run_dir)
    if overwrite:
        _check_overwrite(run_dir, config)
    elif is_used(run_dir) and resume != "auto" and not is_own:
        raise ValueError(
            f"checkpoint.resume={resume}: {run_dir} holds steps or results of a run already, which would be lost; set "
            "checkpoint.resume=auto to go on with it, another train.run_dir, or --overwrite to remove what it left"
        )


def check_anew(run_dir: Path) -> None:
    """Whether a run without a checkpoint may start in this directory. Raises: ValueError."""
    if kept := [name for name in (FINISHED, "hf", "adapter") if (run_dir / name).exists()]:
        raise ValueError(
            f"{run_dir} holds what a run left ({', '.join(kept)}) and no checkpoint to go on from; set another "
            "train.run_dir, or --overwrite to remove it and train anew"
        )


def is_used(run_dir: Path) -> bool:
    """Whether a run has left steps or results here."""
    metrics = run_dir / "metrics.jsonl"
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    return (
        has_steps
        or any((run_dir / "checkpoints").glob("step_*"))
        or any((run_dir / name).exists() for name in (FINISHED, "hf", "adapter"))
    )


def remove_own_files(run_dir: Path) -> None:
    """What an earlier run wrote, and nothing else."""
    for path in _own_files(run_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def record_config(run_dir: Path, config: Config, first_step: int) -> tuple[Change, ...]:
    """Write `config.yaml`; what held for the steps before `first_step` stays as `config_until_step_N.yaml`.

    N counts steps, as checkpoints do. Records of steps that will be taken again are removed. Returns: what differs from
    the config of the last step that counts, neutral keys left out.
    """
    path = run_dir / "config.yaml"
    former = sorted((int(match[1]), file) for file, match in _former_configs(run_dir))
    # the config in force at the last step that counts: the first that held until there or longer
    held = next((file for until, file in former if until >= first_step), path)
    changes: tuple[Change, ...] = ()
    if first_step and held.is_file():
        changes = tuple(change for change in changes_of(held, config) if not change.is_neutral)
        if changes:
            held.replace(run_dir / f"config_until_step_{first_step:08d}.yaml")
    for until, file in former:
        if until > first_step or (until == first_step and not changes):
            file.unlink(missing_ok=True)
    write_text(path, dump_config(config))
    return changes


def finished_step(run_dir: Path) -> int | None:
    """After how many steps the run here ended with all its results, None where it did not."""
    try:
        return int(json.loads((run_dir / FINISHED).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_finished(run_dir: Path, step: int) -> None:
    write_json(run_dir / FINISHED, {"step": step}, indent=None)


def changes_of(path: Path, config: Config) -> list[Change]:
    """What differs between a written config and this one; none where the file is gone or damaged."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    usual, now = flat(config_to_dict(Config())), flat(config_to_dict(config))
    then = usual | {key: value for key, value in flat(before).items() if key in now or key.startswith("policy.")}
    return [
        Change(key=key, before=then.get(key), now=now.get(key))
        for key in sorted(then.keys() | now.keys())
        if not _is_same(key, then.get(key), now.get(key))
    ]


def _asks_for_more(changes: list[Change], config: Config, step: int) -> bool:
    keys = ("train.steps", "train.epochs", "train.patience")
    length = {change.key: change for change in changes if change.key in keys}
    if not length:
        return False
    if config.train.steps is not None:
        return config.train.steps > step
    if length.keys() != {"train.epochs"}:  # the planner knows which are more, or whether any were left
        return True
    return (length["train.epochs"].now or 1.0) > (length["train.epochs"].before or 1.0)


def _check_overwrite(run_dir: Path, config: Config) -> None:
    resume = config.checkpoint.resume
    read = [("model.path", config.model.path), ("model.adapter", config.model.adapter)]
    for key, entries in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        read += [(key, entry if isinstance(entry, str) else entry.path) for entry in entries]
    read += [("checkpoint.resume", resume)] if resume not in ("auto", "none") else []
    doomed = list(_own_files(run_dir))
    for key, path in read:
        is_this_run = path is not None and Path(path).resolve() == run_dir.resolve()  # of which its hf/ would be read
        if path and (is_this_run or any(_lies_in(Path(path), own) for own in doomed)):
            raise ValueError(f"--overwrite would remove {path}, from which {key} reads; set another train.run_dir")


def _own_files(run_dir: Path) -> Iterator[Path]:
    for pattern in OWN_FILES:
        yield from run_dir.glob(pattern)


def _former_configs(run_dir: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for file in run_dir.glob("config_until_step_*.yaml"):
        if match := re.fullmatch(r"config_until_step_(\d+)\.yaml", file.name):
            yield file, match


def _lies_in(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Leaves by dotted key; lists are leaves, empty sections and nulls of rules are nothing."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{key}.")
        elif value is not None or not path.startswith("policy."):
            found[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _is_same(key: str, before: Any, now: Any) -> bool:
    if before == now or key not in PATHS:
        return bool(before == now)
    there, here = ([item] if isinstance(item, str) else item or [] for item in (before, now))
    return [_place(item) for item in there] == [_place(item) for item in here]


def _place(item: Any) -> Any:
    """A path, or the record of a data source, whatever the spelling of its path."""
    return {**item, "path": Path(item["path"]).resolve()} if isinstance(item, dict) else Path(item).resolve()


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))
