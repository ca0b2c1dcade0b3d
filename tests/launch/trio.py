"""Three tiny checkpoints, the commands that merge them, and what one process makes of them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.checkpoints import average_recipe, write_checkpoint, write_recipe
from tests.support.namespaces import Host
from tests.support.processes import BIN, environment, run

Finished = subprocess.CompletedProcess[str]

SHARDS = ["--shard-size", "50KB"]


@dataclass(frozen=True)
class Trio:
    """Three tiny checkpoints, a recipe that averages them, and what one process makes of it."""

    recipe: Path
    alone: Finished
    digests: dict[str, str]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`; empty where there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def inputs(folder: Path) -> Path:
    """Three checkpoints of forty tensors each, in two shards."""
    torch.manual_seed(0)
    for step in (10, 20, 30):
        tensors = {
            f"layers.{number}.weight": torch.randn(64, 33, dtype=torch.bfloat16)
            for number in range(40)
        }
        write_checkpoint(folder / f"step-{step}", tensors, shards=2, config={"dtype": "bfloat16"})
    return folder


def make_trio(folder: Path) -> Trio:
    """The checkpoints and the recipe in `folder`, merged once in a process alone."""
    recipe = write_recipe(folder / "average.yaml", average_recipe(inputs(folder) / "step-*"))
    out = folder / "alone"
    alone = run([BIN / "distmerge", "merge", recipe, out, *SHARDS], environment())
    assert alone.returncode == 0, alone.stderr
    return Trio(recipe, alone, digests(out))


def merging(trio: Trio, out: Path) -> list[str | Path]:
    """The command of one process."""
    return [BIN / "distmerge", "merge", trio.recipe, out, *SHARDS]


def on_disks(hosts: Sequence[Host]) -> Path:
    """The checkpoints on the disk of every host, with the same times, as rsync --archive copies
    them; returns the recipe of their average."""
    first = inputs(hosts[0].contents / "in")
    for host in hosts[1:]:
        shutil.copytree(first, host.contents / "in")
    recipe = average_recipe(hosts[0].disk / "in/step-*")
    return write_recipe(hosts[0].root / "average.yaml", recipe)


def merge_alone(host: Host, arguments: Sequence[str | Path]) -> Finished:
    """One process on `host`."""
    done = run(host.command([BIN / "distmerge", "merge", *arguments]), environment())
    assert done.returncode == 0, done.stderr
    return done


def reads(printed: str) -> int:
    """The kilobytes that a run says it read."""
    words = printed.split("\nread ")[1].split()
    assert words[1] == "kB,"
    return int(words[0])


def slurm_step(rank: int, size: int, job: int) -> dict[str, str]:
    """What srun gives a task; the job's id makes the port where the ranks meet."""
    return environment(
        SLURM_JOB_ID=str(job),
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS=str(size),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS=str(size),
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        MASTER_ADDR="127.0.0.1",
    )
