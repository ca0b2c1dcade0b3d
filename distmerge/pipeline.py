"""The story of a merge: recipe, sources, plan, agreement, merge pass, finish."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from distmerge import output
from distmerge.assembly import AssembleMode, Assembly, GatherSink, all_steps, choose
from distmerge.config import as_path, load_config
from distmerge.dist import World, join
from distmerge.document import Plain
from distmerge.engine import Engine, Outcome, single_threaded
from distmerge.errors import OutputError
from distmerge.log import LOGGER, Progress, parse_bytes
from distmerge.planner import DEFAULT_MEMORY, Plan, assign, build_plan, step_elements
from distmerge.resolved import as_recipe
from distmerge.sources.reader import Inputs, ReadMode
from distmerge.sources.resolve import open_sources, pinned
from distmerge.storage import free_memory, peak_memory
from distmerge.writer import ShardWriter, create_shards

DeviceChoice = Literal["auto", "cpu", "cuda"]
Recipe = str | Path | dict[str, Plain]

DEFAULT_SHARD = "5GB"
MEMORY_SHARE = 0.5
"""Of a host's free memory, what its ranks together take at most where --memory does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to merge. Of these, only `shard_size` changes what comes out.

    `memory` is the budget of each rank's buffers and `shard_size` that of a shard's data, both as
    '5GB', '500MB' or '64MiB'. `device`: auto takes the CPU, for a weighted sum waits for the disk.
    `assemble`, `read`: see docs/design.md. `progress` shows a bar or lines on standard error.
    """

    memory: str | None = None
    shard_size: str = DEFAULT_SHARD
    device: DeviceChoice = "auto"
    assemble: AssembleMode = "auto"
    read: ReadMode = "auto"
    overwrite: bool = False
    allow_nonfinite: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What a merge did. Bytes are those of all ranks; `seconds` is wall time, `pass_seconds` that
    of reading, computing, writing and syncing the tensors; `peak_memory` is the largest resident
    set, in bytes, of any rank; `nonfinite` counts NaN and Inf, where they were allowed."""

    out: Path
    digest: str
    ranks: int
    tensors: int
    shards: int
    read_bytes: int
    written_bytes: int
    nonfinite: int
    seconds: float
    pass_seconds: float
    peak_memory: int


@dataclass(frozen=True, slots=True)
class _Run:
    """What the stages of one merge share."""

    world: World
    plan: Plan
    folder: Path
    options: Options
    device: torch.device


def merge(
    config: Recipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    lenient: bool = False,
    options: Options = Options(),
) -> MergeResult:
    """Merge the checkpoints that `config` names into the folder `out`.

    `config` is a YAML file or the same as a mapping; `overrides` are 'dotted.key=value'. Call it
    on every rank that a launcher started, or in one process alone. On return `out` is complete
    and on the disk; after an error there is nothing at `out`, or what was there before.

    Raises ConfigError, SourceError, MismatchError, NonFiniteError or OutputError for what the
    user can mend; RunError for what failed; PeerError on ranks that stopped for another's sake.
    """
    started = time.monotonic()
    target = as_path(str(out)).resolve()
    shard_bytes = parse_bytes(options.shard_size)
    use_cuda = _wants_cuda(options.device)
    with join(use_cuda=use_cuda) as world:
        recipe = world.on_first(
            "read the recipe",
            lambda: pinned(load_config(config, overrides=overrides, lenient=lenient)),
        )
        sources = world.node_first(
            "open the inputs", lambda local_only: open_sources(recipe, local_only=local_only)
        )
        plan = world.together("plan", lambda: build_plan(recipe, sources, shard_bytes=shard_bytes))
        world.agree("plan", "plan", plan.digest)
        with _temporary_folder(world, target, plan, options) as folder:
            cast = recipe.output_dtype is not None
            beside = world.on_first(
                "copy the donor's files", lambda: output.write_sidecars(folder, plan, cast=cast)
            )
            run = _Run(world, plan, folder, options, _device(world, use_cuda=use_cuda))
            outcomes, digests, seconds = _merge_pass(run)
            carried_out = as_recipe(recipe, sources.coefficients)
            world.on_first(
                "finish the output",
                lambda: output.complete(folder, plan, {**beside, **digests}, carried_out),
            )
            # A phase of its own: it begins when every rank has come so far.
            world.on_first("rename the output", lambda: output.rename(folder, target))
        peaks = world.gather("end", peak_memory)
    return _result(target, plan, outcomes, peaks, (time.monotonic() - started, seconds))


def _result(
    out: Path,
    plan: Plan,
    outcomes: Sequence[Outcome],
    peaks: Sequence[int],
    seconds: tuple[float, float],
) -> MergeResult:
    return MergeResult(
        out=out,
        digest=plan.digest,
        ranks=len(peaks),
        tensors=len(plan.tensors),
        shards=len(plan.shards),
        read_bytes=sum(outcome.read_bytes for outcome in outcomes),
        written_bytes=plan.output_bytes,
        nonfinite=sum(outcome.nonfinite for outcome in outcomes),
        seconds=seconds[0],
        pass_seconds=seconds[1],
        peak_memory=max(peaks),
    )


def plan(
    config: Recipe,
    *,
    overrides: Sequence[str] = (),
    lenient: bool = False,
    shard_size: str = DEFAULT_SHARD,
) -> Plan:
    """The plan of a merge, from the headers of its inputs alone. Raises what `merge` raises."""
    recipe = pinned(load_config(config, overrides=overrides, lenient=lenient))
    sources = open_sources(recipe, local_only=False)
    return build_plan(recipe, sources, shard_bytes=parse_bytes(shard_size))


def _device(world: World, *, use_cuda: bool) -> torch.device:
    if not use_cuda:
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def _wants_cuda(choice: DeviceChoice) -> bool:
    if choice == "cuda" and not torch.cuda.is_available():
        raise OutputError("--device cuda: there is no CUDA device here; use --device cpu")
    return choice == "cuda"


@contextmanager
def _temporary_folder(world: World, target: Path, plan: Plan, options: Options) -> Iterator[Path]:
    """The folder beside `target` that is filled and renamed; removed again after a failure."""

    def prepare() -> Path:
        output.check_target(target, plan.inputs, overwrite=options.overwrite)
        for old in output.leftovers(target):
            LOGGER.warning("%s is left from a run that was killed, or another is under way", old)
        return output.create_folder(target, plan, secrets.token_hex(4))

    folder = world.on_first("prepare the output", prepare)
    try:
        yield folder
    except BaseException:
        output.discard(folder)
        raise


def _merge_pass(run: _Run) -> tuple[list[Outcome], dict[str, Plain], float]:
    """Every tensor of the output, on the disk: what the ranks did, the shards' hashes, seconds."""
    started = time.monotonic()
    world, plan = run.world, run.plan
    elements = _agreed_elements(run)
    assignment = assign(plan, world.size)
    where = choose(world, plan, assignment, run.folder, run.options.assemble)
    own = where.owned_by(world.rank)
    with closing(ShardWriter(run.folder, plan.shards)) as writer:
        world.together("create the shards", lambda: create_shards(run.folder, plan.shards, own))
        outcomes = world.gather(
            "merge", lambda: _run_jobs(run, where, assignment, elements, writer)
        )
        world.together("sync the shards", writer.sync)
        digests = world.gather("check the shards", lambda: writer.digests(own))
    shards: dict[str, Plain] = {
        plan.shards[number].name: output.described(digest, plan.shards[number].size)
        for part in digests
        for number, digest in part.items()
    }
    return outcomes, shards, time.monotonic() - started


def _agreed_elements(run: _Run) -> int:
    """How much of a job every rank holds at once: the same everywhere, for the tightest host."""
    world, memory = run.world, run.options.memory
    hosts = world.gather("look for memory", lambda: (socket.gethostname(), free_memory()))

    def within_budget() -> int:
        if memory is not None:
            return step_elements(run.plan, parse_bytes(memory))
        names = [name for name, _ in hosts]
        budgets = [int(MEMORY_SHARE * free / names.count(name)) for name, free in hosts]
        return step_elements(run.plan, min(DEFAULT_MEMORY, *budgets))

    return world.together("look for memory", within_budget)


def _run_jobs(
    run: _Run, where: Assembly, assignment: list[range], elements: int, writer: ShardWriter
) -> Outcome:
    """This rank's jobs, with progress over all ranks."""
    world, plan = run.world, run.plan
    total = sum(plan.read_bytes(job) + plan.write_bytes(job) for job in plan.jobs)
    engine = Engine(
        plan,
        elements=elements,
        device=run.device,
        allow_nonfinite=run.options.allow_nonfinite,
    )
    shown = run.options.progress and world.rank == 0
    with (
        single_threaded(),
        closing(Inputs(plan.inputs, run.options.read)) as inputs,
        Progress("merge", total, shown=shown) as progress,
        world.monitor.showing(progress),
    ):
        if not where.gather:
            return engine.run(assignment[world.rank], inputs, writer, world)
        theirs = all_steps(plan, assignment, elements)
        with closing(GatherSink(world, where.owners, writer, theirs)) as sink:
            outcome = engine.run(assignment[world.rank], inputs, sink, world)
            sink.finish()
        return outcome
