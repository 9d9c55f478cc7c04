"""Run by test_checkpoint_ranks.py in a process of its own: imports torch once, then forks ranks for each scenario.

Usage: checkpoint_ranks.py DIRECTORY. Each scenario has a folder there and leaves `passed` in it if every rank came
through its assertions.
"""

import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from omniloom.checkpoint import tensor_files
from omniloom.checkpoint.dcp import (
    Saver,
    load_model_state,
    load_optimizer_state,
    load_rng_state,
    model_state,
    optimizer_state,
    rng_state,
)
from omniloom.checkpoint.export import export
from omniloom.checkpoint.hf import gather_full, load_model
from omniloom.checkpoint.stored import find_latest
from omniloom.checkpoint.tensor_files import open_checkpoint
from omniloom.keymap import KeyMap, Rule

NUM_EXPERTS, INNER, HIDDEN = 4, 6, 8
KEY_MAP = KeyMap(
    rules=(
        Rule(published="thinker.embed.weight", ours="embed.weight"),
        Rule(published="thinker.norm.weight", ours="norm.weight"),
        Rule(published="thinker.wide.weight", ours="wide.weight"),
        Rule(
            index="e",
            published=("thinker.experts.{e}.gate.weight", "thinker.experts.{e}.up.weight"),
            ours="experts.gate_up",
        ),
    ),
    carried=("talker.",),
)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(NUM_EXPERTS, 2 * INNER, HIDDEN))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, HIDDEN)  # 13 rows do not divide
        self.norm = nn.RMSNorm(HIDDEN)
        self.wide = nn.Linear(16, 12, bias=False)
        self.experts = Experts()


def published_shapes():
    shapes = {"thinker.embed.weight": (13, HIDDEN), "thinker.norm.weight": (HIDDEN,), "thinker.wide.weight": (12, 16)}
    for expert in range(NUM_EXPERTS):
        shapes |= {f"thinker.experts.{expert}.{name}.weight": (INNER, HIDDEN) for name in ("gate", "up")}
    return shapes | {"talker.weight": (3, 3)}


def build(layout):
    """A model on the meta device, laid out as named."""
    with torch.device("meta"):
        model = Model()
    if layout == "plain":
        return model
    size = dist.get_world_size()
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif layout == "mixed":  # experts over one axis and FSDP over the other, columns over both, FSDP within TP
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("shard", "tensor"))
        replace(model.experts, "gate_up", mesh, (Shard(1), Shard(0)))
        replace(model.wide, "weight", mesh, (Replicate(), Shard(0)))
        replace(model.embed, "weight", mesh, (Shard(0), Shard(1)))
        replace(model.norm, "weight", mesh, (Replicate(), Replicate()))
    elif layout == "strided":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("shard", "tensor"))
        replace(model.wide, "weight", mesh["tensor"], (Shard(0),))
        fully_shard(model.wide, mesh=mesh["shard"])
        for module in (model.embed, model.norm, model.experts):
            fully_shard(module, mesh=mesh["shard"])
    return model


def replace(module, name, mesh, placements):
    parameter = getattr(module, name)
    setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements)))


def change(model, optimizer):
    """An elementwise step, the same in every layout."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.25
    optimizer.step()


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def full(tensors):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def save_under(layout, directory, asynchronous=False):
    """Load the published model, take two steps, save under this layout, export."""
    checkpoint = open_checkpoint(directory / "model")
    model = build(layout)
    load_model(model.to_empty(device="cpu"), checkpoint, KEY_MAP)
    optimizer = make_optimizer(model)
    change(model, optimizer)
    change(model, optimizer)
    parameters = dict(model.named_parameters())
    saver = Saver(directory / layout, asynchronous=asynchronous)
    saver.save(2, model_state(parameters) | optimizer_state(parameters, optimizer) | rng_state(), {"cursor": 5})
    change(model, optimizer)  # must not reach the save
    saver.close()
    restored, _ = restore(layout, directory / layout)
    export(
        directory / f"hf_{layout}",
        checkpoint,
        KEY_MAP,
        list(parameters),
        gather_full(dict(restored.named_parameters())),
    )


def restore(layout, run_dir):
    model = build(layout)
    model.to_empty(device="cpu")
    optimizer = make_optimizer(model)
    parameters = dict(model.named_parameters())
    stored, notes = find_latest(run_dir)
    assert not notes
    assert (stored.step, stored.extras) == (2, {"cursor": 5})
    load_model_state(stored, parameters)
    load_optimizer_state(stored, parameters, optimizer)
    return model, optimizer


def check_restored(layout, directory, source):
    """What `source` saved continues under `layout` as the single rank's run does."""
    reference, reference_optimizer = restore("plain", directory / "plain")
    model, optimizer = restore(layout, directory / source)
    stored, _ = find_latest(directory / source)
    ranks = range(dist.get_world_size())
    assert load_rng_state(stored) == tuple(number for number in ranks if f"rng.{number}.cpu" not in stored.shapes)
    for _ in range(2):
        assert_same(full(dict(model.named_parameters())), dict(reference.named_parameters()))
        moments = full(optimizer_state(dict(model.named_parameters()), optimizer))
        assert_same(moments, optimizer_state(dict(reference.named_parameters()), reference_optimizer))
        change(model, optimizer)
        change(reference, reference_optimizer)


def check_slices(layout, directory):
    """Every rank holds the published values, and has read little more than its slice of them."""
    count = 0
    fill = tensor_files._fill

    def counting(file, start, out):
        nonlocal count
        count += out.numel() * out.element_size()
        fill(file, start, out)

    tensor_files._fill = counting
    try:
        model = build(layout)
        checkpoint = open_checkpoint(directory / "model")
        load_model(model.to_empty(device="cpu"), checkpoint, KEY_MAP)
    finally:
        tensor_files._fill = fill
    plain = build("plain")
    load_model(plain.to_empty(device="cpu"), checkpoint, KEY_MAP)
    assert_same(full(dict(model.named_parameters())), dict(plain.named_parameters()))
    local = sum(p.to_local().numel() for p in model.parameters()) * 2  # bfloat16
    if layout == "fsdp":
        assert count == local, (count, local)


# ---------------------------------------------------------------------------------------- scenarios


def layouts(directory):
    fork(1, lambda: save_under("plain", directory))
    fork(2, lambda: (check_slices("fsdp", directory), save_under("fsdp", directory)))
    fork(4, lambda: (check_slices("mixed", directory), save_under("mixed", directory, asynchronous=True)))
    fork(4, lambda: (check_slices("strided", directory), save_under("strided", directory)))
    fork(3, lambda: (check_slices("fsdp", directory), check_restored("fsdp", directory, "mixed")))
    fork(2, lambda: check_restored("fsdp", directory, "strided"))
    fork(4, lambda: check_restored("mixed", directory, "plain"))
    fork(4, lambda: check_restored("strided", directory, "fsdp"))


def failing_rank(directory):
    """The disk of rank 1 is full: all ranks say so, nothing partial stays, the next save works."""

    def work():
        state = {"model.x": torch.zeros(10)}
        large = {**state, f"model.only_{dist.get_rank()}": torch.randn(200_000)}
        for asynchronous in (False, True):
            saver = Saver(directory / "run", asynchronous=asynchronous)
            saver.save(1, state, {})
            saver.finish()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            with pytest.raises(ValueError, match=r"could not save step 2.*\(rank 1\)"):  # noqa: PT012
                saver.save(2, large, {})
                saver.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            dist.barrier()
            assert sorted(path.name for path in (directory / "run" / "checkpoints").iterdir()) == [
                "latest",
                "step_00000001",
            ]
            dist.barrier()
            saver.save(3, large, {})
            saver.close()
            stored, _ = find_latest(directory / "run")
            assert stored.step == 3
            assert "model.only_1" in stored.shapes
            dist.barrier()
            if dist.get_rank() == 0:  # step 1 again is newer than step 3
                Path(directory / "run" / "checkpoints" / "step_00000003" / "COMMITTED").unlink()
            dist.barrier()

    fork(2, work)


def damaged_file(directory):
    """Whichever rank verifies the damaged file, all fall back to the same checkpoint."""

    def work():
        saver = Saver(directory / "run", keep=3)
        for step in (1, 2):
            saver.save(step, {f"model.only_{dist.get_rank()}": torch.full((50,), float(step))}, {})
        for name in ("__0_0.distcp", "__1_0.distcp"):
            path = directory / "run" / "checkpoints" / "step_00000002" / name
            dist.barrier()
            whole = path.read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
            dist.barrier()
            stored, notes = find_latest(directory / "run")
            assert stored.step == 1
            assert f"{name} does not match its checksum" in notes[0]
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(whole)

    fork(2, work)


def parted_directories(directory):
    """Ranks that do not see one another's files: no save of theirs counts, all say why, nothing is left."""

    def work():
        root = directory / f"node{dist.get_rank()}"
        for asynchronous in (False, True):
            saver = Saver(root, asynchronous=asynchronous)
            with pytest.raises(ValueError, match=r"does not find .*__1_0\.distcp.*that all nodes see"):  # noqa: PT012
                saver.save(1, {f"model.only_{dist.get_rank()}": torch.zeros(10)}, {})
                saver.finish()
            saver.close()
            assert list((root / "checkpoints").iterdir()) == []

    fork(2, work)


def killed_rank(directory):
    """A rank dies inside a save: what it leaves never counts."""

    def work(victim, moment):
        saver = Saver(directory / "run")
        state = {f"model.only_{dist.get_rank()}": torch.zeros(1000)}
        if find_latest(directory / "run")[0] is None:
            saver.save(1, state, {})
        if dist.get_rank() == victim:
            original = getattr(FileSystemWriter, moment)

            def die(self, *arguments):
                if moment == "write_data":
                    original(self, *arguments)  # its file is there, the others do not know yet
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(FileSystemWriter, moment, die)
        saver.save(2, state, {})
        raise SystemExit("saved with a dead rank")

    for victim, moment in ((0, "write_data"), (1, "write_data"), (1, "prepare_local_plan"), (0, "finish")):
        fork(2, lambda victim=victim, moment=moment: work(victim, moment), expect_failure=True)
        stored, notes = find_latest(directory / "run")
        assert stored.step == 1
        assert "step_00000002.partial was not completed and is ignored" in notes[0]
    fork(1, lambda: Saver(directory / "run").save(2, {"model.x": torch.zeros(3)}, {}))
    assert find_latest(directory / "run")[0].step == 2
    assert not list((directory / "run" / "checkpoints").glob("*.partial"))


# ---------------------------------------------------------------------------------------- ranks


def fork(num_ranks, work, expect_failure=False):
    """Run `work` on `num_ranks` forked processes with a gloo group. No thread may live here before."""
    store = Path(sys.argv[1]) / f"store_{os.urandom(4).hex()}"
    children = []
    for number in range(num_ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=num_ranks)
                work()
                dist.destroy_process_group()
                status = 0
            except BaseException as error:  # noqa: BLE001  a rank's every end is judged by its exit status
                if not expect_failure:
                    sys.excepthook(type(error), error, error.__traceback__)
                elif isinstance(error, SystemExit | AssertionError):
                    print(error, file=sys.stderr)
                    status = 3
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    states = [os.waitpid(child, 0)[1] for child in children]
    codes = [os.waitstatus_to_exitcode(state) for state in states]
    assert (3 not in codes and any(codes)) if expect_failure else not any(codes), codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scenario in (layouts, failing_rank, damaged_file, parted_directories, killed_rank):
        folder = Path(sys.argv[1]) / scenario.__name__
        folder.mkdir(exist_ok=True)
        try:
            scenario(folder)
        except AssertionError:
            traceback.print_exc()
        else:
            (folder / "passed").touch()
