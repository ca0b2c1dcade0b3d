"""What the launchers' variables say about the ranks. No process is started here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from distmerge.errors import ConfigError
from distmerge.launchers import Launch, detect

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING}
TORCHRUN = {
    **RANKS, "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "ROLE_NAME": "default",
    "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1",
}  # fmt: skip
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
DEEPSPEED = {**RANKS, "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "4"}
SLURM_BODY = {
    "SLURM_JOB_ID": "40123", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gpu[03-04]",
}  # fmt: skip
SLURM_STEP = {
    **SLURM_BODY, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's own tool, where a machine has it, knows nothing of the nodes here."""
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        (RANKS, "RANK and WORLD_SIZE"),
        (TORCHRUN, "torchrun"),
        (ACCELERATE, "accelerate"),
        (DEEPSPEED, "deepspeed"),
    ],
    ids=["plain", "torchrun", "accelerate", "deepspeed"],
)
def test_launchers_that_set_rank_and_world_size(env: dict[str, str], launcher: str) -> None:
    expected = Launch(
        launcher=launcher, rank=5, size=8, local_rank=1, address=("node1", 12345), warning=None
    )
    assert detect(env) == expected


def test_a_slurm_step_meets_on_its_first_host_at_a_port_of_its_own() -> None:
    expected = Launch(launcher="slurm", rank=5, size=8, local_rank=1, address=("gpu03", 20123))
    assert detect(SLURM_STEP) == expected


def test_slurm_ports_of_two_jobs_differ() -> None:
    other = detect({**SLURM_STEP, "SLURM_JOB_ID": "40124"})
    assert other.address == ("gpu03", 20124)


def test_the_user_can_say_where_the_tasks_of_a_slurm_step_meet() -> None:
    assert detect({**SLURM_STEP, **MEETING}).address == ("node1", 12345)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-04]", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("gpu-a1,gpu-b2", "gpu-a1"),
        ("login,gpu[1-9]", "login"),
        ("gpu[3-4]-ib,gpu7", "gpu3-ib"),
        ("rack[01-02]node[1,3]", "rack01node1"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    address = detect({**SLURM_STEP, "SLURM_STEP_NODELIST": nodes}).address
    assert address is not None
    assert address[0] == first


def test_slurm_itself_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def scontrol(command: list[str], **_: object) -> object:
        assert command == ["/bin/scontrol", "show", "hostnames", "rack[1-2]node[1-4]"]
        return subprocess.CompletedProcess(command, 0, stdout="rack1node1\nrack1node2\n")

    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", scontrol)
    address = detect({**SLURM_STEP, "SLURM_STEP_NODELIST": "rack[1-2]node[1-4]"}).address
    assert address == ("rack1node1", 20123)


@pytest.mark.parametrize(
    "env",
    [
        {},
        SLURM_BODY,
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"RANK": "3"},
        {"WORLD_SIZE": "4"},
        MEETING,
    ],
    ids=["nothing", "sbatch body", "srun of one", "rank alone", "size alone", "address alone"],
)
def test_alone(env: dict[str, str]) -> None:
    """The body of an sbatch script has the variables of the job's tasks, but is none of them."""
    assert detect(env) == Launch(launcher="none", rank=0, size=1, local_rank=0, address=None)


def test_torchrun_in_a_slurm_step_goes_by_torchrun() -> None:
    """One task a node starts torchrun, whose ranks inherit the step's variables."""
    found = detect({**SLURM_STEP, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    assert (found.launcher, found.rank, found.size) == ("torchrun", 5, 8)


def test_one_rank_needs_no_meeting() -> None:
    found = detect({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (found.size, found.address) == (1, None)


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0")])
def test_a_rank_outside_the_world_is_refused(rank: str, size: str) -> None:
    with pytest.raises(ConfigError, match=f"RANK={rank} does not fit WORLD_SIZE={size}"):
        detect({**RANKS, "RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (TORCHRUN, "RANK"),
        (TORCHRUN, "WORLD_SIZE"),
        (TORCHRUN, "LOCAL_RANK"),
        (TORCHRUN, "MASTER_PORT"),
        (SLURM_STEP, "SLURM_PROCID"),
        (SLURM_STEP, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_what_is_no_number_is_refused_by_name(env: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='many'"):
        detect({**env, name: "many"})


def test_empty_variables_count_as_unset() -> None:
    found = detect({**TORCHRUN, "LOCAL_RANK": "", "MASTER_PORT": ""})
    assert (found.local_rank, found.address) == (0, ("node1", 29500))


def test_accelerate_that_started_one_process_of_several_warns() -> None:
    """`accelerate launch --num_processes 2` without --multi_gpu, on a machine without a GPU."""
    env = {**MEETING, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    found = detect(env)
    assert (found.launcher, found.size) == ("none", 1)
    assert found.warning is not None
    assert "add --multi_gpu" in found.warning


def test_accelerate_that_was_asked_for_one_process_does_not_warn() -> None:
    assert detect({"ACCELERATE_MIXED_PRECISION": "no"}).warning is None
