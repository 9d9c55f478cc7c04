"""The model that a verb reads: a directory or hub id as it is, or a run's newest; and how its media are read."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omniloom.checkpoint.export import MARKER_NAME
from omniloom.checkpoint.files import read_json
from omniloom.checkpoint.stored import MARKER_NAME as COMMITTED
from omniloom.config import Config, DataConfig, load_config
from omniloom.run.opening import model_of_run
from omniloom.run.results import media_settings
from omniloom.tools.export import export_checkpoint


@contextmanager
def trained_model(model: str | Path) -> Iterator[tuple[str, Config]]:
    """What to open as `model.path`, and a config whose `data` reads media as the model's training did.

    `model` may be a run, or one of its checkpoints: what is not in `hf/` yet is exported into a folder beside it, which
    is removed on leaving. Raises: ValueError for a run without any checkpoint.
    """
    path = Path(model)
    run_dir = path.parent.parent if (path / COMMITTED).is_file() else path
    if not (run_dir / "config.yaml").is_file():
        note = path / MARKER_NAME
        yield str(model), load_config({"data": read_json(note).get("data", {}) if note.is_file() else {}})
        return
    trained = load_config(run_dir / "config.yaml")
    config = load_config({"data": media_settings(trained.data)})
    if path == run_dir and (finished := model_of_run(str(path))) != str(path):
        yield finished, config
        return
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".export_") as folder:
        print(f"{path}: its newest checkpoint is written to {folder} to be read, and removed then", file=sys.stderr)
        export_checkpoint(path, Path(folder) / "hf", say=lambda words: None)
        yield f"{folder}/hf", config


def by_hand(data: DataConfig) -> DataConfig:
    """Settings for files that somebody names by hand: any, from where they are."""
    return replace(data, media_dir=".", allow_outside_media_dir=True)
