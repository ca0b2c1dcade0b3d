"""launch/slurm.sbatch in a real Slurm: two virtual nodes, two ranks each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.trio import SHARDS, Trio, digests
from tests.support.checkpoints import average_recipe, write_recipe
from tests.support.processes import SCRIPTS, environment
from tests.support.slurm import Cluster, cluster, missing_programs

pytestmark = pytest.mark.slow

SBATCH: list[str | Path] = ["--nodes=2", "--ntasks-per-node=2", SCRIPTS / "slurm.sbatch"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(
            f"NO SLURM HERE ({', '.join(missing)} missing), so launch/slurm.sbatch stays untested: "
            "apt-get install slurm-wlm munge"
        )
    root = tmp_path_factory.mktemp("slurm")
    with cluster(root, nodes=2, cpus=2, env=environment()) as running:
        yield running


def test_a_job_on_two_nodes_writes_the_bytes_of_one_process(
    slurm: Cluster, trio: Trio, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    job = slurm.run([*SBATCH, trio.recipe, out, *SHARDS], environment())

    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert job.log.count("4 ranks") == 1, job.log
    assert digests(out) == trio.digests


def test_a_job_with_a_mistake_fails_and_tells_it_once(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", average_recipe("x/step-*", more="normalise: true\n"))

    job = slurm.run([*SBATCH, recipe, tmp_path / "out"], environment())

    assert job.state == "FAILED"
    assert job.log.count("normalise: unknown key") == 1, job.log
    assert "Traceback" not in job.log
    assert sorted(tmp_path.iterdir()) == [recipe]
