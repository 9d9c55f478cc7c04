"""Experiment trackers: TensorBoard, Weights & Biases, SwanLab, MLflow, each through its own library.

Accounts, servers and offline modes are the libraries' own settings (`WANDB_MODE=offline`, `SWANLAB_MODE=offline`,
`MLFLOW_TRACKING_URI`, and `MLFLOW_ALLOW_FILE_STORE=true` for files on a disk). A run is called by its
directory.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omniloom.config import ConfigError, LogConfig
from omniloom.types import RunError


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A run at one of them."""

    log: Callable[[Mapping[str, float], int], object]  # figures, step
    close: Callable[[], object]


def _open_tensorboard(run_dir: Path, first_step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    return Tracker(log=log, close=writer.close)


def _open_wandb(project: str, run_dir: Path, about: Mapping[str, Any]) -> Tracker:
    import wandb

    run: Any = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=dict(about))
    return Tracker(log=lambda figures, step: run.log(dict(figures), step=step), close=run.finish)


def _open_swanlab(project: str, run_dir: Path, about: Mapping[str, Any]) -> Tracker:
    import swanlab

    folder = str(run_dir / "swanlab")
    run: Any = swanlab.init(project=project, experiment_name=run_dir.name, logdir=folder, config=dict(about))
    return Tracker(log=lambda figures, step: run.log(dict(figures), step=step), close=swanlab.finish)


def _open_mlflow(project: str, run_dir: Path, about: Mapping[str, Any]) -> Tracker:
    import mlflow

    try:
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=run_dir.name)
        mlflow.log_dict(dict(about), "config.json")
    except mlflow.MlflowException as error:
        raise ConfigError([f"log.mlflow: {error}"], "the configuration") from None

    def log(figures: Mapping[str, float], step: int) -> None:
        named = {re.sub(r"[^\w.\- ]", "_", key): value for key, value in figures.items()}  # others are refused
        mlflow.log_metrics(named, step=step, synchronous=False)  # sent by a thread of MLflow's

    def close() -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()

    return Tracker(log=log, close=close)


TRACKERS: Mapping[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = MappingProxyType(
    {"wandb": _open_wandb, "swanlab": _open_swanlab, "mlflow": _open_mlflow}
)  # those elsewhere, by their packages, which are their keys in the section log


def check_trackers(config: LogConfig) -> None:
    """Raises: ConfigError for a tracker whose package is not installed."""
    absent = [name for name in TRACKERS if getattr(config, name) and not importlib.util.find_spec(name)]
    if absent:
        faults = [f"log.{name}: {name} is not installed; pip install {name}, or unset it" for name in absent]
        raise ConfigError(faults, "the configuration")


def open_trackers(config: LogConfig, run_dir: Path, about: Mapping[str, Any], *, first_step: int = 0) -> list[Tracker]:
    """The trackers that `log` names, with what is to be known of the run, which goes on at `first_step`."""
    board = [_named("tensorboard", "false", _open_tensorboard(run_dir, first_step))] if config.tensorboard else []
    projects = {name: project for name in TRACKERS if (project := getattr(config, name))}
    return board + [_named(name, "null", TRACKERS[name](own, run_dir, about)) for name, own in projects.items()]


def _named(name: str, none: str, tracker: Tracker) -> Tracker:
    """The tracker, whose errors say which one it is, and that `none` does without it."""

    def named(work: Callable[..., object]) -> Callable[..., None]:
        def call(*values: Any) -> None:
            try:
                work(*values)
            except Exception as error:  # another library's, of any kind
                fault = f"log.{name}: {type(error).__name__}: {error}; mend it, or go on without it (log.{name}={none})"
                raise RunError(fault) from error

        return call

    return Tracker(log=named(tracker.log), close=named(tracker.close))
