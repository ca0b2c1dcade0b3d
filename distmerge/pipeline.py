"""The story of a merge: recipe, sources, plan, agreement, passes, finish, choice, report, Hub."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from distmerge import attempt as attempts
from distmerge import output
from distmerge import report as reports
from distmerge.assembly import AssembleMode
from distmerge.attempt import Attempt
from distmerge.choice import choose, outputs_to_choose_from
from distmerge.coefficients import find_coefficients
from distmerge.dist import World
from distmerge.document import Plain, load
from distmerge.errors import OutputError, UserError
from distmerge.log import parse_bytes
from distmerge.meeting import join
from distmerge.passes import NOTHING, Done, Means, merge_pass
from distmerge.planner import Plan, build_plan
from distmerge.publishing.ahead import Publisher, publishing
from distmerge.publishing.publish import Published
from distmerge.reference import as_path
from distmerge.resolved import as_recipe
from distmerge.selection import Selection, check, parse_selection
from distmerge.sources.reader import ReadMode
from distmerge.sources.resolve import Sources, open_sources, pinned
from distmerge.storage import peak_memory
from distmerge.sweep import Recipe, load_recipe

DeviceChoice = Literal["auto", "cpu", "cuda"]
Document = str | Path | dict[str, Plain]

DEFAULT_SHARD = "5GB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to merge. Of these, only `shard_size` changes what comes out.

    `memory` is the budget of each rank's buffers and `shard_size` that of a shard's data, both as
    '5GB', '500MB' or '64MiB'. `device`: auto takes the CPU, for a weighted sum waits for the disk
    (but a GPU for what looks at matrices, and to choose by loss, if there is one).
    `assemble`, `read`: see docs/design.md. `stream_remote` reads inputs on the Hub by ranges, as
    they are needed, and does not download them. `restart` throws away what an earlier attempt has
    done.
    `timeout` is how long a rank may go on without reading or writing anything, in seconds.
    `progress` shows a bar or lines on standard error.
    """

    memory: str | None = None
    shard_size: str = DEFAULT_SHARD
    device: DeviceChoice = "auto"
    assemble: AssembleMode = "auto"
    read: ReadMode = "auto"
    stream_remote: bool = False
    overwrite: bool = False
    restart: bool = False
    allow_nonfinite: bool = False
    timeout: float = 600.0
    progress: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What a merge did. Bytes are those of all ranks; `seconds` is wall time, `pass_seconds` that
    of reading, computing, writing and syncing the tensors, `statistic_seconds` that of the pass
    before it (0 without one). What an earlier attempt has done does not count. `peak_memory` is
    the largest resident set, in bytes, of any rank; `nonfinite` counts NaN and Inf, where they
    were allowed.

    `outputs` are the folders in OUT ('' for OUT itself); `scores` is what the selection found,
    `report` the page that shows it all, and `published` what `publish:` did, where there are any.
    """

    out: Path
    digest: str
    ranks: int
    tensors: int
    shards: int
    outputs: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    nonfinite: int
    seconds: float
    pass_seconds: float
    statistic_seconds: float
    peak_memory: int
    scores: dict[str, Any] | None = None
    report: Path | None = None
    published: Published | None = None


def merge(
    config: Document,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    lenient: bool = False,
    options: Options = Options(),
) -> MergeResult:
    """Merge the checkpoints that `config` names into the folder `out`.

    `config` is a YAML file or the same as a mapping; `overrides` are 'dotted.key=value'. Call it
    on every rank that a launcher started, or in one process alone. On return `out` is complete
    and on the disk; after an error there is nothing at `out`, or what was there before, and the
    same call goes on with what was done. Only an error of the choice among finished outputs
    (`select:`), or of their publication (`publish:`), leaves them.

    Raises ConfigError, SourceError, MismatchError, NonFiniteError or OutputError for what the
    user can mend; RunError for what failed; PeerError on ranks that stopped for another's sake.
    """
    started = time.monotonic()
    target = as_path(str(out)).resolve()
    shard_bytes = parse_bytes(options.shard_size)
    use_cuda = _wants_cuda(options.device)
    with join(use_cuda=use_cuda) as world:
        recipe = world.on_first(
            "read the recipe", lambda: _read(config, overrides=overrides, lenient=lenient)
        )
        sources = world.node_first(
            "open the inputs",
            lambda local_only: open_sources(
                recipe, local_only=local_only, stream_remote=options.stream_remote
            ),
        )
        plan = world.together("plan", lambda: build_plan(recipe, sources, shard_bytes=shard_bytes))
        world.agree("plan", "plan", plan.digest)
        means = _means(world, plan, options)
        with (
            _attempt(world, target, plan, means, options) as attempt,
            publishing(recipe.publication, plan, attempt, first=world.rank == 0) as publisher,
        ):
            passes = (NOTHING, NOTHING)
            if not attempt.renamed:
                passes = _make(world, recipe, sources, plan, (means, target, attempt))
            found = _choose(world, recipe, plan, target, use_gpu=options.device != "cpu")
            page = world.on_first("report", lambda: _report(recipe, target))
            published = world.on_first(
                "publish", lambda: _publish(publisher, target, shown=options.progress)
            )
        peaks = world.gather("end", peak_memory)
    seconds = time.monotonic() - started
    result = _result(target, plan, passes, peaks, seconds)
    return replace(result, scores=found, report=page, published=published)


def _make(
    world: World, recipe: Recipe, sources: Sources, plan: Plan, how: tuple[Means, Path, Attempt]
) -> tuple[Done, Done]:
    """Fill the attempt's folder and give it OUT's name; what the two passes did."""
    means, target, attempt = how
    cast = recipe.shared.output_dtype is not None
    folder = attempt.folder
    beside = world.on_first(
        "copy the donor's files", lambda: output.write_sidecars(folder, plan, cast=cast)
    )
    plan, statistic = find_coefficients(world, recipe, plan, means, (target, attempt))
    done = merge_pass(world, plan, means, attempt)
    world.on_first("keep the spectra", lambda: reports.keep_spectra(folder, plan, done.spectra))
    recipes = _carried_out(recipe, sources)
    device = _device_name(means)
    world.on_first(
        "finish the output",
        lambda: output.complete(folder, plan, beside, done.shards, recipes, device),
    )

    def rename() -> None:
        attempts.mark_end(attempt)
        output.rename(folder, target)

    # A phase of its own: it begins when every rank has come so far.
    world.on_first("rename the output", rename)
    return statistic, done


def plan(
    config: Document,
    *,
    overrides: Sequence[str] = (),
    lenient: bool = False,
    shard_size: str = DEFAULT_SHARD,
    stream_remote: bool = False,
) -> Plan:
    """The plan of a merge, from the headers of its inputs alone; `stream_remote` as in Options.

    Raises what `merge` raises.
    """
    recipe = _read(config, overrides=overrides, lenient=lenient)
    sources = open_sources(recipe, local_only=False, stream_remote=stream_remote)
    return build_plan(recipe, sources, shard_bytes=parse_bytes(shard_size))


def report(out: str | Path) -> Path:
    """Make the report of the merge in `out` again; returns its page. Raises OutputError."""
    return reports.make(as_path(str(out)))


def select(out: str | Path, selection: dict[str, Plain]) -> dict[str, Any]:
    """Choose again among the outputs of the sweep in `out`; returns the scores.

    `selection` is what `select:` says in a recipe. Call it on every rank. Links OUT/best and makes
    the report again. Raises ConfigError, SourceError, OutputError or RunError.
    """
    target = as_path(str(out)).resolve()
    with join(use_cuda=False) as world:

        def prepare() -> tuple[Selection, list[str]]:
            parsed = parse_selection(load(selection))
            check(parsed)
            return parsed, outputs_to_choose_from(target)

        chosen, names = world.on_first("read the selection", prepare)
        found = choose(world, chosen, target, names)
        world.on_first("report", lambda: reports.make(target))
    return found


def _read(config: Document, *, overrides: Sequence[str], lenient: bool) -> Recipe:
    recipe = pinned(load_recipe(config, overrides=overrides, lenient=lenient))
    if recipe.selection is not None:
        check(recipe.selection)
    return recipe


def _means(world: World, plan: Plan, options: Options) -> Means:
    chosen = options.device == "cuda"
    worth_it = options.device == "auto" and any(tensor.rule.cut for tensor in plan.tensors)
    return Means(
        device=_device(world, use_cuda=chosen),
        solver=_device(world, use_cuda=chosen or (worth_it and _all_have_a_gpu(world))),
        memory=options.memory,
        read=options.read,
        assemble=options.assemble,
        allow_nonfinite=options.allow_nonfinite,
        timeout=options.timeout,
        shown=options.progress,
    )


def _device(world: World, *, use_cuda: bool) -> torch.device:
    if not use_cuda:
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def _device_name(means: Means) -> str:
    return "cpu" if means.solver.type == "cpu" else torch.cuda.get_device_name(means.solver)


def _all_have_a_gpu(world: World) -> bool:
    """Of one kind: another gives other bytes."""
    here = torch.cuda.is_available
    names = world.gather("look for GPUs", lambda: torch.cuda.get_device_name() if here() else "")
    return "" not in names and len(set(names)) == 1


def _wants_cuda(choice: DeviceChoice) -> bool:
    if choice == "cuda" and not torch.cuda.is_available():
        raise OutputError("--device cuda: there is no CUDA device here; use --device cpu")
    return choice == "cuda"


@contextmanager
def _attempt(
    world: World, target: Path, plan: Plan, means: Means, options: Options
) -> Iterator[Attempt]:
    """The attempt at `target`, new or gone on with; what it has done is kept where that helps."""
    held: list[tuple[Attempt, attempts.Lock]] = []

    def prepare() -> Attempt:
        device = _device_name(means)
        wanted = attempts.identity(plan, device, allow_nonfinite=options.allow_nonfinite)
        attempt, lock = attempts.begin(
            target, plan, wanted, overwrite=options.overwrite, restart=options.restart
        )
        held.append((attempt, lock))
        if attempt.renamed:
            reports.clear(target)
        else:
            output.create_folders(attempt.folder, plan)
        return attempt

    try:
        attempt = world.on_first("prepare the output", prepare)
        yield attempt
        world.on_first("clean up", lambda: attempts.discard(attempt))
    except BaseException as error:
        for_good = getattr(error, "exit_code", 1) == UserError.exit_code
        for attempt, _ in held:
            attempts.abandon(attempt, target, for_good=for_good)
        raise
    finally:
        for _, lock in held:
            lock.release()


def _choose(
    world: World, recipe: Recipe, plan: Plan, target: Path, *, use_gpu: bool
) -> dict[str, Any] | None:
    if recipe.selection is None:
        return None
    names = [output.name for output in plan.outputs]
    return choose(world, recipe.selection, target, names, use_gpu=use_gpu)


def _result(
    out: Path, plan: Plan, passes: tuple[Done, Done], peaks: Sequence[int], seconds: float
) -> MergeResult:
    statistic, done = passes
    return MergeResult(
        out=out,
        digest=plan.digest,
        ranks=len(peaks),
        tensors=len(plan.tensors),
        shards=len(plan.shards),
        outputs=tuple(output.name for output in plan.outputs),
        read_bytes=statistic.read_bytes + done.read_bytes,
        written_bytes=done.written_bytes,
        nonfinite=done.nonfinite,
        seconds=seconds,
        pass_seconds=done.seconds,
        statistic_seconds=statistic.seconds,
        peak_memory=max(peaks),
    )


def _carried_out(recipe: Recipe, sources: Sources) -> list[Plain]:
    recipes: list[Plain] = []
    for number, variant in enumerate(recipe.variants):
        row = sources.rows[number] if sources.rows else ()
        recipes.append(as_recipe(variant.config, [w for w in row if w is not None]))
    return recipes


def _publish(publisher: Publisher | None, target: Path, *, shown: bool) -> Published | None:
    return None if publisher is None else publisher.finish(target, shown=shown)


def _report(recipe: Recipe, target: Path) -> Path | None:
    """The page, where there is a direction, matrices or a choice to show."""
    matrices = (target / reports.FOLDER / reports.SPECTRA).is_file()
    if recipe.shared.extrapolation is None and recipe.selection is None and not matrices:
        return None
    return reports.make(target)
