"""Run by test_large_checkpoint.py in a process of its own: forks ranks that load a checkpoint they could not hold.

Usage: large_checkpoint_ranks.py DIRECTORY MODEL. `rank_N.json` in DIRECTORY holds what rank N saw.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from omniloom.checkpoint.hf import local_region, read_tensor
from omniloom.config import Config, ModelConfig, ParallelConfig
from omniloom.parallel.degrees import resolve_degrees
from omniloom.parallel.mesh import build_layout, close_distributed, init_distributed
from omniloom.run.opening import build_model, load_weights, open_workshop

WORLD = 4
ALLOWANCE = 0.6  # of the checkpoint: its fourth, one chunk of reading, the process groups' threads


def status(key):
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def load_sharded(rank, directory, model_dir):
    parallel = ParallelConfig(expert=2)
    workshop = open_workshop(Config(model=ModelConfig(path=str(model_dir), dtype="float32"), parallel=parallel))
    num_bytes = sum(entry.num_bytes for entry in workshop.checkpoint.entries.values())
    ranks = init_distributed(timeout_seconds=60)
    layout = build_layout(resolve_degrees(parallel, WORLD, packs_per_step=WORLD), ranks)
    dist.barrier()  # the groups have their threads
    before, space = status("VmRSS"), status("VmSize")
    limit = space + int(ALLOWANCE * num_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model, _ = build_model(workshop, layout)
    load_weights(workshop, model)
    grown = status("VmHWM") - before
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    try:
        torch.empty(num_bytes, dtype=torch.uint8)
        fits = True
    except RuntimeError:
        fits = False
    wrong = [name for name, parameter in model.named_parameters() if not is_right(workshop, name, parameter)]
    found = {"num_bytes": num_bytes, "grown": grown, "held": held, "fits": fits, "wrong": wrong}
    (directory / f"rank_{rank}.json").write_text(json.dumps(found))
    close_distributed()


def is_right(workshop, name, parameter):
    """Whether the first and the last row of a shard are those of the files."""
    assert isinstance(parameter, DTensor)
    region = local_region(parameter)
    local = parameter.to_local()
    if local.numel() == 0:
        return True
    for row in (0, local.shape[0] - 1):
        first = region[0][0] + row
        expected = torch.empty_like(local[row : row + 1])
        read_tensor(workshop.assemblies[name], workshop.checkpoint, expected, ((first, first + 1), *region[1:]))
        if not torch.equal(local[row : row + 1], expected):
            return False
    return True


def main():
    directory, model_dir, port = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                load_sharded(rank, directory, model_dir)
                code = 0
            except BaseException as error:  # noqa: BLE001  a rank's every end is judged by its exit status
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
