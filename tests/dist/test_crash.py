"""Kill all ranks of a run, at any moment, and go on, until it is done.

Whenever the ranks die, OUT is what it was before, or complete. What comes out in the end are the
bytes of a run that nobody disturbed, and what is read beyond its bytes is what was under way.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

import distmerge
from distmerge import output, statistic
from distmerge.assembly import AssembleMode
from distmerge.dist import World
from distmerge.pipeline import Options
from distmerge.budget import SLOTS
from distmerge.sources import reader
from distmerge.statistic import GramPass
from distmerge.writer import ShardWriter
from tests.dist import cases
from tests.dist.cases import BLOCK, Recipe, fingerprints
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks

PHASES = (
    "read the recipe", "open the inputs", "plan", "prepare the output", "copy the donor's files",
    "look for a statistic", "look for memory", "look for sums", "statistic", "solve",
    "keep the statistic", "look for the output folder", "look for what is done",
    "check what is done", "create the shards", "merge", "sync the shards", "check the shards",
    "finish the output", "rename the output", "choose", "report", "clean up", "end",
)  # fmt: skip
"""Those in which a run may be killed, in order."""


class Kill(NamedTuple):
    """`delay` seconds after rank `killer` came to `phase`, all die."""

    phase: str
    delay: float
    killer: int


def merge(recipe: Recipe, out: Path, options: Options) -> int:
    """Undisturbed; returns the bytes that were read."""
    cut()
    return distmerge.merge(recipe, out, options=options).read_bytes


def cut() -> None:
    cases.cut(job=2 * BLOCK)
    without_drawing().start()
    mock.patch.object(statistic, "SNAPSHOT_SECONDS", 0).start()


def merge_and_die(recipe: Recipe, out: Path, options: Options, marks: Path, kill: Kill) -> None:
    """A rank whose reads and process number are kept in `marks`; slow enough to be hit anywhere."""
    cut()
    rank = int(os.environ.get("RANK", "0"))
    (marks / f"{rank}.pid").write_text(str(os.getpid()))
    count_reads(marks / f"{rank}.reads")
    slow_down()
    if rank == kill.killer:
        die_in(kill, marks)
    distmerge.merge(recipe, out, options=options)


def count_reads(path: Path) -> None:
    real = reader._Read.read
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted(self: reader._Read, start: int, num_bytes: int, buffer: object) -> object:
        os.write(file, b"%d\n" % num_bytes)
        return real(self, start, num_bytes, buffer)  # type: ignore[arg-type]

    mock.patch.object(reader._Read, "read", counted).start()


def slow_down() -> None:
    for holder, name, seconds in (
        (ShardWriter, "write", 0.004),
        (GramPass, "_add", 0.004),
        (output, "_write", 0.002),
        (Path, "rename", 0.02),
    ):
        slow(holder, name, seconds)


def slow(holder: object, name: str, seconds: float) -> None:
    """As long before as after."""
    real: Callable[..., object] = getattr(holder, name)

    def slowed(*args: object, **kwargs: object) -> object:
        time.sleep(seconds)
        result = real(*args, **kwargs)
        time.sleep(seconds)
        return result

    mock.patch.object(holder, name, slowed).start()


def die_in(kill: Kill, marks: Path) -> None:
    """Once this rank has come to `kill.phase`, it kills all, the others first."""
    real, now = World._phase, [""]

    def end_all() -> None:
        time.sleep(kill.delay)
        (marks / "phase").write_text(now[0])
        ranks = [int(path.read_text()) for path in marks.glob("*.pid")]
        for process in sorted(ranks, key=lambda process: process == os.getpid()):
            if parent_of(process) == os.getppid():
                os.kill(process, signal.SIGKILL)

    def entered(self: World, phase: str, work: Callable[[], object], *, share: bool) -> object:
        if phase == kill.phase:
            threading.Thread(target=end_all, daemon=True).start()
        now[0] = phase
        return real(self, phase, work, share=share)

    mock.patch.object(World, "_phase", entered).start()


def parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return None


class Bench:
    """One recipe, what an undisturbed run makes of it, and chains of killed attempts.

    With `old`, a recipe, OUT holds its output before, and is to be replaced.
    """

    def __init__(self, folder: Path, recipe: Recipe, old: Recipe | None):
        self.recipe, self.folder, self.rounds = recipe, folder, 0
        (self.whole,) = run_ranks(merge, 1, recipe, folder / "one/out", self._options("auto"))
        self.undisturbed = fingerprints(folder / "one/out")
        self.largest_job = max(run_ranks(job_sizes, 1, recipe)[0])
        self.old: dict[str, str] | None = None
        if old is not None:
            run_ranks(merge, 1, old, folder / "old/out", self._options("auto"))
            self.old = fingerprints(folder / "old/out")

    def _options(self, assemble: AssembleMode) -> Options:
        return Options(shard_size="150kB", read="pread", assemble=assemble, overwrite=True)

    def round(self, kills: Sequence[Kill], dice: random.Random) -> list[str]:
        """Attempts on one OUT, each killed in its turn, the last one not; where they died."""
        self.rounds += 1
        out = self.folder / f"round-{self.rounds}" / "out"
        out.parent.mkdir()
        if self.old is not None:
            shutil.copytree(self.folder / "old/out", out, symlinks=True)
        died, read, under_way = [], 0, 0
        for number, kill in enumerate([*kills, Kill("", 0, -1)]):
            ranks = max(kill.killer + 1, dice.randint(1 if kill.killer < 0 else 2, 4))
            marks = out.parent / f"marks-{number}"
            marks.mkdir()
            options = self._options(dice.choice(("direct", "gather")))
            outcomes = observe_ranks(merge_and_die, ranks, self.recipe, out, options, marks, kill)
            read += sum(sum(map(int, f.read_text().split())) for f in marks.glob("*.reads"))
            if not any(outcome.failed for outcome in outcomes):
                break
            told = "\n".join(outcome.describe() for outcome in outcomes)
            assert (marks / "phase").is_file(), f"it failed by itself\n{told}"
            died.append((marks / "phase").read_text())
            under_way += ranks * (SLOTS + 1) * self.largest_job
            if self.check_out(out):
                break
        self.check_end(out)
        assert read <= self.whole + under_way, (died, read, self.whole, under_way)
        return died

    def check_out(self, out: Path) -> bool:
        """After a kill there is nothing, what was there before, or all that belongs there.

        Returns whether there is nothing left to do.
        """
        if not out.exists():
            assert self.old is None or list(out.parent.glob(".out.distmerge-*-replaced"))
            return False
        found = fingerprints(out)
        if found == self.old:
            return False
        made = {name: sha for name, sha in self.undisturbed.items() if "report/" not in name}
        assert {name: found.get(name) for name in made} == made
        return not list(out.parent.glob(".out.*"))

    def check_end(self, out: Path) -> None:
        """All bytes are those of an undisturbed run, and nothing lies beside them."""
        assert fingerprints(out) == self.undisturbed
        assert (out / "best").readlink() == (self.folder / "one/out/best").readlink()
        left = {path.name for path in out.parent.iterdir() if not path.name.startswith("marks-")}
        assert left == {"out", ".distmerge"}


def job_sizes(recipe: Recipe) -> list[int]:
    cut()
    plan = distmerge.plan(recipe)
    return [plan.read_bytes(job) for job in plan.jobs]


def sweep(folder: Path) -> Recipe:
    """A statistic, two outputs, a choice between them."""
    cases.write_steps(folder, cases.mixed, count=4)
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(folder / "step-*"), "window": 2},
        "parameters": {"step": [0, 0.5]},
        "select": {"command": "sh -c 'echo 0.5' {model}", "goal": "min"},
    }


def test_six_kills_on_the_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path, sweep(tmp_path / "in"), None)
    kills = [
        Kill("read the recipe", 0.1, 1),
        Kill("statistic", 0.03, 0),
        Kill("merge", 0.03, 1),
        Kill("merge", 0.03, 0),
        Kill("rename the output", 0.02, 0),
        Kill("report", 0, 1),
    ]
    died = bench.round(kills, random.Random(0))
    assert len(died) == 6


def all_kills(dice: random.Random) -> list[Kill]:
    """In every phase, at its start and somewhat later, and at moments of no phase in particular."""
    kills = [
        Kill(phase, delay, dice.randrange(3))
        for phase in PHASES
        for delay in (0, dice.uniform(0, 0.01), dice.uniform(0, 0.05))
    ]
    kills += [Kill(PHASES[0], dice.uniform(0, 0.6), dice.randrange(3)) for _ in range(20)]
    dice.shuffle(kills)
    return kills


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replaces", [False, True])
def test_kills_in_all_phases(tmp_path: Path, replaces: bool) -> None:
    """Some ninety kills, in chains of up to five attempts on one OUT."""
    dice = random.Random(replaces)
    recipe = sweep(tmp_path / "in")
    bench = Bench(tmp_path, recipe, cases.average(tmp_path / "in") if replaces else None)
    kills, died = all_kills(dice), Counter[str]()
    while kills:
        chain = sorted(kills[:5], key=lambda kill: (PHASES.index(kill.phase), kill.delay))
        del kills[:5]
        died.update(bench.round(chain, dice))
    print(f"{died.total()} kills in {bench.rounds} rounds: {dict(died)}")
    assert died.total() >= 50
    assert len(died) >= len(PHASES) - 4
