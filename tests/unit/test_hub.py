"""model.path as a directory or a hub id."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from omniloom.checkpoint.hub import resolve_model_path


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("org/name") == Path("org/name")
    assert resolve_model_path(str(tmp_path / "missing")) == tmp_path / "missing"
    assert resolve_model_path("org/nmae") == Path("org/nmae")  # a slip beside real directories is no hub id


def test_an_id_offline_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Offline\? Download it elsewhere with `hf download some-org/some-model`"):
        resolve_model_path("some-org/some-model")


def test_a_cached_id_is_found_without_a_network(monkeypatch, tmp_path) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(tmp_path / "cache" / name))
    assert resolve_model_path("hf:some-org/some-model") == tmp_path / "cache" / "some-org/some-model"


def test_modelscope_is_asked_only_where_it_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        resolve_model_path("modelscope:some-org/some-model")
    stand_in = types.SimpleNamespace(snapshot_download=lambda name: f"/elsewhere/{name}")
    monkeypatch.setitem(sys.modules, "modelscope", stand_in)
    assert resolve_model_path("modelscope:some-org/some-model") == Path("/elsewhere/some-org/some-model")
