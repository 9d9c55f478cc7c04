"""omniloom fine-tunes omni-modal language models on text, images, audio and video.

The verbs of the command line as functions. Importing this imports nothing slow; each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniloom.config import Config
    from omniloom.training.metrics import StepMetrics
    from omniloom.types import BadSample

__version__ = "0.1.0"
__all__ = ["export", "generate", "load_config", "score", "train"]


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """A config from a YAML file, from sections as a dict, or from nothing, with overrides such as `train.steps=100`.

    Raises: ConfigError (a ValueError) that lists every fault.
    """
    from omniloom import config

    return config.load_config(source, overrides)


def train(
    config: Config | Mapping[str, Any],
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_end: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> int:
    """Train in this process, as one rank or as the one that torchrun made it; the report is drawn on the way, too.

    On the first rank `on_step` is called after each step and `on_end`, with the run directory, when all is written.
    Returns 0, or 75 where a signal or the time limit stopped the run: the same call goes on. Raises: ValueError for bad
    input, RunError (a RuntimeError) for what stops a sound run.
    """
    from omniloom.tools.report import train_with_report

    asked = load_config(config) if isinstance(config, Mapping) else config
    return train_with_report(asked, on_step, on_end, overwrite=overwrite)


def score(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    adapter: str | Path | None = None,
    worst: int | None = None,
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """The loss of every row, as {"id", "num_loss_tokens", "loss"} in order, and the rows that have none.

    `data`: a file, folder or pattern, or several, as `data.train` takes them; of several each loss has its "data_set".
    `adapter`: a PEFT adapter, to be put on the model. `worst`: only so many rows of the highest loss, that one first,
    with their words and media. Raises: ValueError.
    """
    from omniloom.tools.score import score_rows

    return score_rows(model, data, overrides, adapter=adapter, worst=worst)


def export(
    source: str | Path, directory: str | Path, *, adapter: bool = False, best: bool = False, overwrite: bool = False
) -> None:
    """Write a Hugging Face directory from a run or one of its checkpoints, or with `adapter` the adapters alone.

    `best`: from the checkpoint that the run keeps for its `checkpoint.best`.

    Raises: ValueError.
    """
    from omniloom.tools.export import export_checkpoint

    export_checkpoint(Path(source), Path(directory), adapter=adapter, best=best, overwrite=overwrite)


def generate(
    model: str | Path,
    prompt: str,
    *,
    image: str | Path | Sequence[str | Path] = (),
    audio: str | Path | Sequence[str | Path] = (),
    video: str | Path | Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> str:
    """The answer to a prompt about media files, one or several; at temperature 0 the greedy one. `model` may be a run.

    Raises: ValueError.
    """
    from omniloom.tools.generate import Sampling, answers

    given = {"image": image, "audio": audio, "video": video}
    media = {kind: [files] if isinstance(files, str | Path) else files for kind, files in given.items()}
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens)
    (line,) = answers(model, prompt, media, sampling=sampling, overrides=overrides, adapter=adapter)
    return line["answer"]
