"""Every launcher starts the same merge: the bytes do not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.trio import SHARDS, Trio, digests, merging, slurm_step
from tests.support.processes import BIN, SCRIPTS, environment, finish, free_port, run, start


@pytest.mark.parametrize(
    "launcher", ["torchrun", "accelerate", pytest.param("deepspeed", marks=pytest.mark.slow)]
)
def test_a_launcher_writes_the_bytes_of_one_process(
    trio: Trio, launcher: str, tmp_path: Path
) -> None:
    env = environment(RANKS_PER_NODE="2", MASTER_PORT=str(free_port()))
    out = tmp_path / "with a space"

    done = run([SCRIPTS / f"{launcher}.sh", trio.recipe, out, *SHARDS], env)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks") == 1, "really two, of which one reports"
    assert digests(out) == trio.digests


def test_a_slurm_step_writes_the_bytes_of_one_process(trio: Trio, tmp_path: Path) -> None:
    out, job = tmp_path / "out", free_port() - 20000

    ranks = [start(merging(trio, out), slurm_step(rank, 2, job)) for rank in range(2)]
    done = [finish(rank, timeout=60) for rank in ranks]

    assert [rank.returncode for rank in done] == [0, 0], done
    assert "2 ranks" in done[0].stdout
    assert done[1].stdout == ""
    assert digests(out) == trio.digests


def test_module_with_deepspeeds_argument_is_silent_if_asked_and_writes_the_same(
    trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    module = [f"{BIN}/python", "-m", "distmerge", "--local_rank=0"]

    done = run([*module, "merge", trio.recipe, out, "--quiet", *SHARDS], environment())

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert digests(out) == trio.digests


@pytest.mark.slow
def test_deepspeed_may_add_its_argument(trio: Trio, tmp_path: Path) -> None:
    out = tmp_path / "out"
    deepspeed = ["deepspeed", "--num_accelerators=2", f"--master_port={free_port()}", "--module"]

    done = run([*deepspeed, "distmerge", "merge", trio.recipe, out, *SHARDS], environment())

    assert "--local_rank=1" in done.stdout, "this deepspeed adds it"
    assert done.returncode == 0, done.stderr
    assert digests(out) == trio.digests


def test_accelerate_that_starts_one_process_of_two_is_named_with_the_remedy(
    trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    accelerate = ["accelerate", "launch", "--num_processes", "2", "--main_process_port", "0"]

    done = run([*accelerate, "-m", "distmerge", "merge", trio.recipe, out, *SHARDS], environment())

    assert done.returncode == 0, done.stderr
    assert "1 rank" in done.stdout
    warned = [line for line in done.stderr.splitlines() if "single process" in line]
    assert len(warned) == 1
    assert "--multi_gpu" in warned[0]
    assert digests(out) == trio.digests
