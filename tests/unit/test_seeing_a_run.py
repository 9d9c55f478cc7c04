"""What a run says while it goes on, counts, sends to trackers and leaves on how it was made."""

from __future__ import annotations

import errno
import importlib.machinery
import io
import json
import logging
import os
import re
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from omniloom.cli import _hush_libraries
from omniloom.config import ConfigError, LogConfig, load_config
from omniloom.run.provenance import describe_start, record_start
from omniloom.run.records import count_warnings
from omniloom.training.metrics import MetricsLog, Screen, clock
from omniloom.training.trackers import check_trackers, open_trackers
from omniloom.types import RunError
from tests.unit.test_metrics import line


def test_a_line_tells_time_epoch_share_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(enabled=True, total_steps=8, every=1)
    screen.step(replace(line(1), epoch=0.5, step_seconds=1.25, peak_memory_bytes=3 << 30), progress=0.25)
    said = capsys.readouterr().out
    assert said.startswith("step 2/8  25%  epoch 0.50  loss 1.0000")
    assert "1.25 s" in said
    assert "memory 3.0 GiB" in said
    assert said.endswith("eta ?\n")
    assert clock(3723.9) == "1:02:03"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_of_80_columns_has_each_step_and_below_it_a_bar_with_the_eta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("rich._console", Console(file=terminal, width=80, force_terminal=True))
    screen = Screen(enabled=True, total_steps=10000, every=1)
    screen.progress("measured", 7, 7, "rows")
    screen.phase("0:00:02  loading weights of " + "a/" * 40)
    screen.step(replace(line(7), epoch=0.5), progress=0.25)
    screen.step(replace(line(8), epoch=0.5), progress=0.5)
    screen.close()
    said = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "a/" * 40 in said  # as it is, for a terminal to wrap
    assert "step 8/10000  25%  epoch 0.50  loss" in said
    assert "step 9/10000  50%  epoch 0.50  loss" in said
    assert re.search(r"━ step 9/10000  50%  eta 0:00:00", said)  # within the width
    assert "measured" not in said[said.index("loading weights") :]


def test_long_phases_say_how_far_they_are_on_ever_fewer_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, seconds = Screen(enabled=True, total_steps=8, every=1), 0.0
    monkeypatch.setattr("omniloom.training.metrics.time.monotonic", lambda: seconds)
    for done in range(1000):
        screen.progress("evaluation after step 4:", done, 1000, "rows")
        seconds += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluation after step 4: 2 of 1,000 rows, 0:00:02"
    assert 20 < len(lines) < 40
    screen.progress("evaluation after step 8:", 0, 3, "rows")
    assert capsys.readouterr().out == ""


class Library(types.ModuleType):
    """A tracker's package that notes its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            return self

        return call


def test_figures_reach_every_tracker_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {name: Library(name) for name in ("wandb", "swanlab", "mlflow")}
    for name, library in libraries.items():
        monkeypatch.setitem(sys.modules, name, library)
    config = LogConfig(wandb="mine", swanlab="mine", mlflow="mine", tensorboard=False)
    check_trackers(config)
    trackers = open_trackers(config, tmp_path, {"train": {"steps": 3}})
    log = MetricsLog(tmp_path, first_step=0, trackers=trackers)
    log.write(replace(line(4), evaluation={"eval_wer": 0.5}, samples_of={"数据 (1)+b:c/../d": 3}))
    log.close()
    for tracker in trackers:
        tracker.close()
    for name, begun, logged, ended in (
        ("wandb", "init", "log", "finish"),
        ("swanlab", "init", "log", "finish"),
        ("mlflow", "start_run", "log_metrics", "end_run"),
    ):
        calls = [call for call, *_ in libraries[name].calls]
        assert calls.index(begun) < calls.index(logged) < calls.index(ended)
        (found,) = [(arguments, options) for call, arguments, options in libraries[name].calls if call == logged]
        assert found[1]["step"] == 4
        assert ("num_samples.数据 _1__b_c_.._d" in found[0][0]) == (name == "mlflow")  # it refuses other signs
        assert found[0][0]["eval_wer"] == 0.5
        assert "step" not in found[0][0]
        assert "mine" in json.dumps(libraries[name].calls, default=str)


def test_what_mlflow_refuses_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = types.SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))

    def refuse(project: str) -> None:
        raise library.MlflowException(f"no store for {project}")

    library.set_experiment = refuse
    monkeypatch.setitem(sys.modules, "mlflow", library)
    with pytest.raises(ConfigError, match=r"log\.mlflow: no store for mine"):
        open_trackers(LogConfig(mlflow="mine", tensorboard=False), tmp_path, {})


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_tensorboard_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tracker,) = open_trackers(LogConfig(), tmp_path, {})
    tracker.close()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", _full_disk)
    with pytest.raises(RunError, match=r"log\.tensorboard: OSError: .*No space left.*\(log\.tensorboard=false\)"):
        tracker.log({"loss": 1.0}, 0)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.mlflow: mlflow is not installed; pip install mlflow"):
        check_trackers(load_config(None, ["log.mlflow=x"]).log)


def test_how_a_run_was_made_is_a_line_for_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["omniloom", "train", "my config.yaml"])
    monkeypatch.chdir(tmp_path)
    for first_step in (0, 7):
        record_start(tmp_path, describe_start(first_step, 2))
    starts = [json.loads(text) for text in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["first_step"] for start in starts] == [0, 7]
    assert starts[0]["command"] == "omniloom train 'my config.yaml'"
    assert starts[0]["versions"]["torch"]
    assert starts[0]["git_commit"] is None


def test_warnings_of_libraries_do_not_reach_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # which the command line leaves as it is
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _hush_libraries()
        for module in ("torch", "torch.nn.functional", "transformers.modeling_utils", "torchlike", "omniloom.data"):
            warnings.warn_explicit("words", UserWarning, module, 1, module=module, registry={})
    assert [warning.filename for warning in seen] == ["torchlike", "omniloom.data"]


def test_warnings_of_ours_are_counted_and_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    counted: list[int] = []
    logger = logging.getLogger("omniloom.data.planner")
    with count_warnings(lambda: counted.append(1)):
        logger.warning("one")
        logger.info("none")
        logging.getLogger("torch").warning("not ours")
    logger.warning("later")
    assert len(counted) == 1
