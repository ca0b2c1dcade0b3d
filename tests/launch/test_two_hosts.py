"""Two hosts that share no disk, or lose each other: the same bytes, or a clean end and then those.

The hosts are network namespaces, see tests.support.namespaces. torchrun starts two ranks on each.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.trio import SHARDS, Finished, digests, merge_alone, on_disks
from tests.support.checkpoints import average_recipe, write_checkpoint, write_recipe
from tests.support.namespaces import Host, two_hosts
from tests.support.processes import (
    SCRIPTS,
    environment,
    finish,
    slow_writes,
    start,
    wait_for_writers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Hosts = tuple[Host, Host]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as pair:
        yield pair


def start_on(
    hosts: Hosts, arguments: list[str | Path], **variables: str
) -> list[subprocess.Popen[str]]:
    """torchrun with two ranks on each of `hosts`; the first has rank 0."""
    meeting = {"NODES": "2", "MASTER_ADDR": hosts[0].name, "RANKS_PER_NODE": "2", **variables}
    return [
        start(
            host.command([SCRIPTS / "torchrun.sh", *arguments]),
            environment(NODE_RANK=str(rank), **meeting),
        )
        for rank, host in enumerate(hosts)
    ]


def merge_on(hosts: Hosts, arguments: list[str | Path]) -> Finished:
    """The same to its end; what rank 0's torchrun said."""
    done = [finish(host, timeout=100) for host in start_on(hosts, arguments)]
    assert [host.returncode for host in done] == [0, 0], done
    return done[0]


@pytest.mark.parametrize("first", ["alpha", "beta"])
def test_the_host_without_rank_0_sends_what_it_makes(hosts: Hosts, first: str) -> None:
    recipe, out = on_disks(hosts), hosts[0].disk / "results/out"
    if first == "beta":
        hosts = hosts[::-1]
    merge_alone(hosts[0], [recipe, out.with_name("alone"), *SHARDS])

    done = merge_on(hosts, [recipe, out, *SHARDS])

    assert "4 ranks" in done.stdout
    results = hosts[0].contents / "results"
    assert digests(results / "out") == digests(results / "alone")
    assert sorted(path.name for path in results.iterdir()) == ["alone", "out"]
    assert not (hosts[1].contents / "results").exists()


def test_what_another_order_of_hosts_has_left_is_not_taken_for_the_output(
    hosts: Hosts, tmp_path: Path
) -> None:
    """Rank 0 was on beta, whose disk keeps the folder of that attempt, of the same name."""
    recipe, out = on_disks(hosts), hosts[0].disk / "results/out"
    stop_in_the_middle(hosts[::-1], [recipe, out, *SHARDS], tmp_path / "slow")
    (stale,) = (hosts[1].contents / "results").glob(".out.distmerge-????????")
    left = digests(stale)
    assert left

    merge_on(hosts, [recipe, out, *SHARDS])

    merge_alone(hosts[0], [recipe, out.with_name("alone"), *SHARDS])
    results = hosts[0].contents / "results"
    assert digests(results / "out") == digests(results / "alone")
    assert digests(stale) == left


def stop_in_the_middle(hosts: Hosts, arguments: list[str | Path], slow: Path) -> None:
    """A run that gets SIGTERM after its owners of shards have written something."""
    under_way = start_on(hosts, arguments, **slow_writes(slow))
    try:
        wait_for_writers(slow, 2, timeout=90)
        time.sleep(1)
        for host in under_way:
            host.terminate()
    finally:
        done = [finish(host, timeout=60) for host in under_way]
    assert all(host.returncode for host in done), done


def test_memory_does_not_grow_with_the_model(hosts: Hosts) -> None:
    """Ranks 2 and 3 send all that they make, and 0 and 1 receive it."""
    small, large = (merge_of_size(hosts, megabytes) for megabytes in (30, 300))

    assert large < 1.1 * small, f"{small} and {large} MB"


def merge_of_size(hosts: Hosts, megabytes: int) -> int:
    """Megabytes of the largest rank that averages two models of `megabytes`."""
    alpha, _ = hosts
    tensors = {f"t{n}": torch.ones(megabytes, 25_000, dtype=torch.bfloat16) for n in range(20)}
    for step in range(2):
        for host in hosts:
            write_checkpoint(host.contents / f"in-{megabytes}/step-{step}", tensors, shards=4)
    text = average_recipe(alpha.disk / f"in-{megabytes}/step-*")
    recipe = write_recipe(alpha.root / f"{megabytes}.yaml", text)
    out = alpha.disk / f"results/{megabytes}"

    done = merge_on(hosts, [recipe, out, "--shard-size=20MB", "--memory=24MB"])

    files = [path.stat().st_size for path in (alpha.contents / "results").rglob("*.safetensors")]
    assert sum(files) >= megabytes * 1_000_000
    found = re.search(r"peak memory (\d+) MB each", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


def test_a_host_that_is_cut_off_ends_the_run_and_the_same_command_goes_on(
    hosts: Hosts, tmp_path: Path
) -> None:
    recipe, out = on_disks(hosts), hosts[0].disk / "results/out"
    under_way = start_on(hosts, [recipe, out, *SHARDS], **slow_writes(tmp_path / "slow"))
    try:
        ranks = wait_for_writers(tmp_path / "slow", 2, timeout=90)
        time.sleep(1)
        hosts[1].plug("down")
        cut = time.monotonic()
        wait_until(lambda: not any(is_alive(rank) for rank in ranks.values()))
        took = time.monotonic() - cut
    finally:
        done = [finish(host, timeout=60) for host in under_way]
    assert took < 30
    assert [host.returncode for host in done] == [1, 1]
    assert re.search(r"rank [23] on beta has given no sign of life for 20 s", done[0].stderr)
    assert "rank 0 on alpha has given no sign of life for 20 s" in done[1].stderr
    results = hosts[0].contents / "results"
    assert all(path.name.startswith(".out.distmerge-") for path in results.iterdir())
    hosts[1].plug("up")

    again = merge_on(hosts, [recipe, out, *SHARDS])

    assert "going on: " in again.stderr
    merge_alone(hosts[0], [recipe, out.with_name("alone"), *SHARDS])
    assert digests(results / "out") == digests(results / "alone")


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


def test_ranks_of_a_cut_off_attempt_that_still_write_harm_no_other_attempt(
    hosts: Hosts, tmp_path: Path
) -> None:
    """Both hosts see OUT. Slurm takes a host that it can't reach for dead, ends the job's other
    ranks and starts it again elsewhere, while ranks on that host write for another 20 s."""
    recipe, out, slow = on_disks(hosts), tmp_path / "shared/out", tmp_path / "slow"
    first = start_on(hosts, [recipe, out, *SHARDS], **slow_writes(slow, seconds=1.5))
    try:
        ranks = wait_for_writers(slow, 4, timeout=90)
        wait_until(lambda: any(f.stat().st_size for f in out.parent.glob(".out.*.state/written-*")))
        hosts[1].plug("down")
        os.killpg(first[0].pid, signal.SIGKILL)
        for rank in (0, 1):
            os.kill(ranks[rank], signal.SIGKILL)
        wait_until(lambda: not is_alive(ranks[0]))
        second = merge_alone(hosts[0], [recipe, out, *SHARDS])
        ended, made = time.time(), digests(out)
        wait_until(lambda: (slow / "marks/2").stat().st_mtime > ended)
    finally:
        done = [finish(host, timeout=60) for host in first]

    assert "going on: " in second.stderr
    assert done[1].returncode == 1
    merge_alone(hosts[0], [recipe, tmp_path / "alone", *SHARDS])
    assert made == digests(out) == digests(tmp_path / "alone")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
