"""Which ranks a command starts or is, from its options and from what torchrun, Slurm or Kubernetes say of it."""

from __future__ import annotations

import pytest

from omniloom.tools.launch import SLURM_PORTS, Job, Launch, find_place, first_node

OF_SLURM = {
    "SLURM_JOB_ID": "40021",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
TASKS_ARE_RANKS = {**OF_SLURM, "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
TASKS_ARE_MACHINES = {**OF_SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                      "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}  # fmt: skip
OF_TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
OF_A_POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
PORT = SLURM_PORTS[40021 % len(SLURM_PORTS)]
TWO = Launch(nproc=8, nnodes=2, node_rank=1, rdzv_endpoint="gpu07:29500")


@pytest.mark.parametrize(
    ("launch", "environment", "job", "local_rank"),
    [
        (Launch(), {}, None, None),
        (Launch(nproc=1), {}, None, None),
        (Launch(), OF_TORCHRUN, None, None),
        (Launch(), OF_A_POD, None, None),  # one rank a pod
        (TWO, {}, Job(first=8, count=8, world=16, host="gpu07", port=29500), None),
        (TWO, OF_A_POD, Job(first=8, count=8, world=16, host="gpu07", port=29500), None),
        (TWO, TASKS_ARE_MACHINES, Job(first=8, count=8, world=16, host="gpu07", port=29500), None),
        (Launch(nproc=1, nnodes=2, node_rank=0, rdzv_endpoint="[fd00::1]:29500"), {},
         Job(first=0, count=1, world=2, host="fd00::1", port=29500), None),
        (Launch(nproc=4, nnodes=1, node_rank=0, rdzv_endpoint="a:1"), {},
         Job(first=0, count=4, world=4, host="a", port=1), None),
        (Launch(), TASKS_ARE_RANKS, Job(first=8, count=8, world=16, host="gpu07", port=PORT), 1),
        (Launch(rdzv_endpoint="gpu07:1234"), TASKS_ARE_RANKS,
         Job(first=8, count=8, world=16, host="gpu07", port=1234), 1),
        (Launch(nproc=8), TASKS_ARE_MACHINES, Job(first=8, count=8, world=16, host="gpu07", port=PORT), None),
        (Launch(), {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}, None, None),  # in a batch script, on its only machine
        (Launch(), {**OF_SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None, None),  # a shell within a job
    ],
)  # fmt: skip
def test_ranks_follow_from_options_and_surroundings(launch, environment, job, local_rank) -> None:
    assert find_place(launch, environment) == (job, local_rank)


def test_ranks_of_one_machine_meet_on_a_port_that_is_free() -> None:
    job, _ = find_place(Launch(nproc=2), {})
    assert job is not None
    assert (job.first, job.count, job.world, job.host) == (0, 2, 2, "127.0.0.1")
    assert job.environment(1) == {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port)}  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "environment", "words"),
    [
        (Launch(nproc=0), {}, "--nproc: expected at least 1, got 0"),
        (Launch(nproc=2), OF_TORCHRUN, "torchrun already started them"),
        (Launch(nproc=2, nnodes=2), {}, "--node-rank --rdzv-endpoint: not given"),
        (Launch(nproc=2, rdzv_endpoint="a:1"), {}, "--nnodes --node-rank: not given"),
        (Launch(nproc=2, nnodes=2, node_rank=2, rdzv_endpoint="a:1"), {}, "expected 0 to 1 of --nnodes 2, got 2"),
        (Launch(nproc=2, nnodes=2, node_rank=0, rdzv_endpoint="a"), {}, "expected HOST:PORT, as gpu-01:29500, got 'a'"),
        (Launch(nproc=2, nnodes=2, node_rank=0, rdzv_endpoint="a:99999"), {}, "expected HOST:PORT"),
        (Launch(nproc=8), TASKS_ARE_RANKS, "srun started 16 tasks on 2; leave --nproc out"),
        (Launch(node_rank=1), TASKS_ARE_RANKS, "Slurm numbers the machines"),
        (Launch(nproc=8), {"SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}, "gave this job 4 machines.*srun"),
        (Launch(), {**OF_A_POD, "RANK": "2"}, "RANK: expected less than WORLD_SIZE=2, got 2"),
        (Launch(), {"RANK": "0"}, "WORLD_SIZE: not set, though others of the same launcher are"),
        (Launch(), {**OF_TORCHRUN, "RANK": "x"}, "RANK: expected a whole number, got 'x'"),
        (Launch(), {**TASKS_ARE_RANKS, "SLURM_STEP_TASKS_PER_NODE": "x(x2)"}, "SLURM_STEP_TASKS_PER_NODE: expected"),
        (Launch(), OF_SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_TASKS_PER_NODE: not set, though"),
    ],
)
def test_what_does_not_go_together_is_one_message_with_its_fix(launch, environment, words) -> None:
    with pytest.raises(ValueError, match=words):
        find_place(launch, environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-006,009],login", "gpu003"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]-n[01-03]", "rack1-n01"),
        ("n[5]", "n5"),
        ("one", "one"),
    ],
)
def test_the_first_of_slurms_nodes_is_where_ranks_meet(nodes, first) -> None:
    assert first_node(nodes) == first
