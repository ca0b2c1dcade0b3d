"""launch/*.sbatch in a real Slurm: two nodes, two ranks each. All that a user does to a job is done
to these: it is cancelled, runs out of time, is requeued, loses a rank; the same sbatch goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.trio import SHARDS, Trio, digests, merge_alone, on_disks, reads
from tests.support.checkpoints import average_recipe, write_checkpoint, write_recipe
from tests.support.namespaces import two_hosts
from tests.support.processes import (
    BIN,
    REPOSITORY,
    SCRIPTS,
    environment,
    slow_writes,
    wait_for_writers,
)
from tests.support.slurm import Cluster, Job, cluster, require_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Command = list[str | Path]

SRUN: Command = ["--nodes=2", "--ntasks-per-node=2", SCRIPTS / "slurm.sbatch"]
TORCHRUN: Command = ["--nodes=2", "--cpus-per-task=2", SCRIPTS / "slurm-torchrun.sbatch"]
FORMS = pytest.mark.parametrize("form", [SRUN, TORCHRUN], ids=["srun", "torchrun"])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with cluster(tmp_path_factory.mktemp("slurm"), cpus=8) as running:
        yield running


@FORMS
def test_a_job_on_two_nodes_writes_the_bytes_of_one_process(
    slurm: Cluster, trio: Trio, tmp_path: Path, form: Command
) -> None:
    out = tmp_path / "out"

    job = slurm.run([*form, trio.recipe, out, *SHARDS], environment())

    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert job.log.count("4 ranks") == 1, job.log
    assert digests(out) == trio.digests


@FORMS
def test_nodes_with_disks_of_their_own_meet_by_name_and_send_what_they_make(
    form: Command, tmp_path: Path
) -> None:
    """As on a real cluster nobody says where to meet; OUT is on the first node's disk."""
    require_slurm()
    with two_hosts(tmp_path) as hosts:
        recipe, results = on_disks(hosts), hosts[0].disk / "results"
        (tmp_path / "slurm").mkdir()
        with cluster(tmp_path / "slurm", cpus=2, hosts=hosts) as slurm:
            job = slurm.run([*form, recipe, results / "out", *SHARDS], environment())
        merge_alone(hosts[0], [recipe, results / "alone", *SHARDS])

    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert job.log.count("4 ranks") == 1, job.log
    first, second = (host.contents / "results" for host in hosts)
    assert digests(first / "out") == digests(first / "alone")
    assert not second.exists()


def start(
    slurm: Cluster, batch: Command, slow: Path, seconds: float = 0.5
) -> tuple[str, dict[int, int]]:
    """A job of four ranks that have written something: its number, the ranks' process numbers."""
    number = slurm.submit(batch, environment(**slow_writes(slow, seconds)))
    ranks = wait_for_writers(slow, 4, timeout=90)
    time.sleep(2 * seconds)
    return number, ranks


def check_gone_on(job: Job, trio: Trio, out: Path) -> None:
    """The job has made the bytes of one process, and read only what an earlier one had not."""
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert "going on: " in job.log
    assert reads(job.log) < reads(trio.alone.stdout)
    assert digests(out) == trio.digests
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@FORMS
def test_after_scancel_the_same_sbatch_goes_on(
    slurm: Cluster, trio: Trio, tmp_path: Path, form: Command
) -> None:
    out = tmp_path / "results/out"
    batch = [*form, trio.recipe, out, *SHARDS]
    number, _ = start(slurm, batch, tmp_path / "slow")

    slurm.call(["scancel", number])

    job = slurm.wait(number)
    assert job.state == "CANCELLED"
    assert job.log.count("error: stopped by SIGTERM") == 4, job.log
    assert job.log.count("to go on: ") == 1
    assert not out.exists()
    check_gone_on(slurm.run(batch, environment()), trio, out)


def test_before_the_time_limit_a_job_stops_and_one_that_waits_for_it_goes_on(
    slurm: Cluster, trio: Trio, tmp_path: Path
) -> None:
    """The script asks for a signal two minutes before; Slurm looks at the time every 30 s."""
    out = tmp_path / "results/out"
    batch = [*SRUN, trio.recipe, out, *SHARDS]
    first, _ = start(slurm, batch, tmp_path / "slow", seconds=8)
    second = slurm.submit([f"--dependency=afternotok:{first}", *batch], environment())

    slurm.call(["scontrol", "update", f"JobId={first}", "TimeLimit=2"])

    job = slurm.wait(first)
    assert (job.state, job.exit_code) == ("FAILED", "143:0")
    assert job.log.count("error: stopped by SIGTERM") == 4, job.log
    assert "Traceback" not in job.log
    check_gone_on(slurm.wait(second), trio, out)


@FORMS
def test_a_job_that_is_requeued_goes_on(
    slurm: Cluster, trio: Trio, tmp_path: Path, form: Command
) -> None:
    """Slurm would let it wait for two minutes."""
    out = tmp_path / "results/out"
    number, _ = start(slurm, [*form, trio.recipe, out, *SHARDS], tmp_path / "slow")

    slurm.call(["scontrol", "requeue", number])
    slurm.wait_for(number, "PENDING")
    slurm.call(["scontrol", "update", f"JobId={number}", "StartTime=now"])

    job = slurm.wait(number)
    assert job.log.index("stopped by SIGTERM") < job.log.index("going on: "), "one log for both"
    check_gone_on(job, trio, out)


def test_a_job_whose_task_is_killed_names_it_and_the_same_sbatch_goes_on(
    slurm: Cluster, trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "results/out"
    batch = [*SRUN, trio.recipe, out, *SHARDS]
    number, ranks = start(slurm, batch, tmp_path / "slow")

    os.kill(ranks[2], signal.SIGKILL)

    job = slurm.wait(number, timeout=40)
    assert (job.state, job.exit_code) == ("FAILED", "137:0")
    assert job.log.count("error: rank 2 on ") == 1, job.log
    assert "Traceback" not in job.log
    assert not out.exists()
    check_gone_on(slurm.run(batch, environment()), trio, out)


@pytest.mark.parametrize(
    ("form", "code"), [(SRUN, "2:0"), (TORCHRUN, "1:0")], ids=["srun", "torchrun"]
)
def test_a_job_with_a_mistake_fails_and_tells_it_once(
    slurm: Cluster, tmp_path: Path, form: Command, code: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", average_recipe("x/step-*", more="normalise: true\n"))

    job = slurm.run([*form, recipe, tmp_path / "out"], environment())

    assert (job.state, job.exit_code) == ("FAILED", code)
    assert job.log.count("normalise: unknown key") == 1, job.log
    assert sorted(tmp_path.iterdir()) == [recipe]


def test_a_task_that_does_not_come_up_ends_the_job_after_a_minute(
    slurm: Cluster, trio: Trio, tmp_path: Path
) -> None:
    """A node without the environment, say. The other ranks would wait five minutes for it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" = 3 ] && exit 127\nexec {BIN}/python "$@"\n')
    python.chmod(0o755)
    env = environment()
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"

    job = slurm.run([*SRUN, trio.recipe, tmp_path / "out", *SHARDS], env)

    assert job.state == "FAILED"
    assert "task 3: Exited with exit code 127" in job.log
    assert "First task exited 60s ago" in job.log
    assert not (tmp_path / "out").exists()


def documented() -> list[str]:
    """Every sbatch of the documentation's commands."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    blocks = [re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M) for page in pages]
    lines = [line for found in blocks for block in found for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("sbatch ")))


@pytest.mark.parametrize("command", documented())
def test_every_sbatch_of_the_documentation_runs(
    slurm: Cluster, tmp_path: Path, command: str
) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for step in range(8):
        tensors = {"weight": torch.full((100, 100), float(step))}
        write_checkpoint(tmp_path / f"runs/demo/step-{step}", tensors)
    program, *arguments = shlex.split(command, comments=True)
    assert program == "sbatch"

    job = slurm.run([f"--chdir={tmp_path}", *arguments], environment())

    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert job.log.count("8 ranks") == 1, job.log
    assert len(list(tmp_path.glob("runs/*/distmerge.json"))) == 1
