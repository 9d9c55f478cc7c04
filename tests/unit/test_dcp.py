"""Resumable checkpoints in one process: what is saved comes back exactly, the newest whole one is found."""

import json
import threading

import pytest
import torch
from torch import nn

from omniloom.checkpoint import dcp
from omniloom.checkpoint.dcp import (
    Saver,
    load_model_state,
    load_optimizer_state,
    load_rng_state,
    model_state,
    optimizer_state,
    rng_state,
)
from omniloom.checkpoint.stored import find_latest, open_stored, read_stored_tensor


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.95))


def train(model, optimizer, num_steps):
    losses = []
    for _ in range(num_steps):
        noise = torch.randn(5, 4)  # from the generator that a checkpoint has to carry
        loss = model(noise.to(model[0].weight.dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole_state(model, optimizer):
    parameters = dict(model.named_parameters())
    return model_state(parameters) | optimizer_state(parameters, optimizer) | rng_state()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path, asynchronous, dtype):
    model, optimizer = make(dtype=dtype)
    train(model, optimizer, 3)
    saver = Saver(tmp_path, asynchronous=asynchronous)
    extras = {"planner": {"cursor": 17, "carried": [3, 1]}, "exact": 0.1 + 0.2}
    saver.save(3, whole_state(model, optimizer), extras)
    expected = train(model, optimizer, 4)  # an asynchronous save must hold what was, not what becomes of it
    saver.close()

    other, other_optimizer = make(seed=9, dtype=dtype)
    stored, notes = find_latest(tmp_path)
    assert (stored.step, stored.extras, notes) == (3, extras, ())
    parameters = dict(other.named_parameters())
    load_model_state(stored, parameters)
    load_optimizer_state(stored, parameters, other_optimizer)
    assert load_rng_state(stored) == ()
    assert train(other, other_optimizer, 4) == expected
    for got, wanted in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_optimizer_state_does_not_depend_on_the_order_of_parameters(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 2)
    Saver(tmp_path).save(2, whole_state(model, optimizer), {})
    stored, _ = find_latest(tmp_path)
    parameters = dict(model.named_parameters())
    groups = [{"params": [parameter], "lr": 1e-3} for parameter in reversed(list(parameters.values()))]
    other = torch.optim.AdamW(groups)
    load_optimizer_state(stored, parameters, other)
    for parameter in parameters.values():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
    assert [group["lr"] for group in other.param_groups] == [1e-3] * 4  # learning rates are the run's, not the file's


def test_one_full_tensor_is_read_without_a_model(tmp_path):
    model, optimizer = make()
    Saver(tmp_path).save(1, whole_state(model, optimizer), {})
    stored = open_stored(tmp_path)
    assert torch.equal(read_stored_tensor(stored, "model.0.weight"), model[0].weight)
    with pytest.raises(ValueError, match=r"has no model\.nothing"):
        read_stored_tensor(stored, "model.nothing")


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    model, optimizer = make()
    saver = Saver(tmp_path, keep=2)
    for step in (10, 20, 30):
        saver.save(step, whole_state(model, optimizer), {"step": step})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000020", "step_00000030"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000030\n"
    marker = json.loads((tmp_path / "checkpoints" / "step_00000030" / "COMMITTED").read_text())
    assert marker["step"] == 30
    assert marker["files"].keys() == {".metadata", "__0_0.distcp", "extras.json"}


def test_after_going_back_the_newest_is_the_one_written_last(tmp_path):
    model, optimizer = make()
    saver = Saver(tmp_path, keep=9)
    for step in (10, 20, 30, 10):
        saver.save(step, whole_state(model, optimizer), {"step": step})
    assert find_latest(tmp_path)[0].step == 10
    saver.save(20, whole_state(model, optimizer), {"again": True})
    stored, _ = find_latest(tmp_path)
    assert (stored.step, stored.extras) == (20, {"again": True})
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_00000010", "step_00000020", "step_00000030"]


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert find_latest(tmp_path) == (None, ())
    with pytest.raises(ValueError, match="no complete checkpoint here"):
        open_stored(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_filled(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    Saver(tmp_path).save(1, whole_state(model, optimizer), {})
    stored, _ = find_latest(tmp_path)
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(1, 1))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"another model or policy: model\.3\.weight is not in it") as error:
        load_model_state(stored, dict(other.named_parameters()))
    assert "model.2.weight has shape [3, 8] there, [5, 8] here" in str(error.value)
    assert torch.equal(other[0].weight, before)


def test_missing_optimizer_state_says_which_setting_helps(tmp_path):
    model, optimizer = make()
    Saver(tmp_path).save(1, model_state(dict(model.named_parameters())), {})
    stored, _ = find_latest(tmp_path)
    with pytest.raises(ValueError, match=r"no optimizer state for 0\.weight.*checkpoint\.load_optimizer=false"):
        load_optimizer_state(stored, dict(model.named_parameters()), optimizer)
    assert load_rng_state(stored) == (0,)


def test_an_asynchronous_save_does_not_hold_the_step_and_counts_only_when_written(tmp_path, monkeypatch):
    model, optimizer = make()
    go_on = threading.Event()
    write = dcp.FileSystemWriter.write_data
    monkeypatch.setattr(
        dcp.FileSystemWriter, "write_data", lambda self, plan, planner: go_on.wait(30) and write(self, plan, planner)
    )
    saver = Saver(tmp_path, asynchronous=True)
    saver.save(1, whole_state(model, optimizer), {})  # returns although nothing can be written yet
    assert not list((tmp_path / "checkpoints").glob("step_*/COMMITTED"))
    assert find_latest(tmp_path)[0] is None
    saved = model[0].weight.detach().clone()
    train(model, optimizer, 1)  # while the thread still waits
    go_on.set()
    saver.close()
    stored, _ = find_latest(tmp_path)
    assert stored.step == 1
    assert torch.equal(read_stored_tensor(stored, "model.0.weight"), saved)
