"""The plan: every decision of a merge as data, made before a file is touched. Pure, without torch.

Nothing in a Plan depends on the number of ranks; only `assign`, which deals out its jobs, does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distmerge import collector
from distmerge.config import Config
from distmerge.errors import ConfigError
from distmerge.layout import index_json, lay_out
from distmerge.matrices import Matrix, flops, matrices
from distmerge.matrices import jobs as jobs_of
from distmerge.rules import contents, nonzero, sum_rule
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.resolve import Sources
from distmerge.spec import (
    ELEMENTWISE,
    JOB_ELEMENTS,
    Job,
    OutputShard,
    OutputTensor,
    Rule,
)  # fmt: skip
from distmerge.sweep import Recipe

FORMAT = 1
"""Goes up whenever the same recipe and inputs would give other bytes."""

BYTE_OF_FLOPS = 40.0
"""Floating-point operations that take as long as moving a byte, on a core or on a GPU, roughly."""

BYTES_OF_TASKS = 4.0
"""How much longer than adding it up a byte takes in a method that merges task vectors."""


class Output(NamedTuple):
    """One checkpoint that the run writes.

    `name` is its folder in OUT, '' for OUT itself; `inputs` are the positions of the inputs that
    its recipe names; `digest` is that of the plan which makes this output alone.
    """

    name: str
    inputs: tuple[int, ...]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that the ranks agree on. `digest` covers everything but time stamps and folders.

    Every output has the same tensors in the same `shards`, which hold up to `shard_bytes` of data.
    `widths` are the bytes that one element of each tensor takes in all its inputs and outputs.
    """

    inputs: tuple[Checkpoint, ...]
    donor: int
    outputs: tuple[Output, ...]
    tensors: tuple[OutputTensor, ...]
    shards: tuple[OutputShard, ...]
    shard_bytes: int
    jobs: tuple[Job, ...]
    widths: tuple[int, ...]
    digest: str

    @property
    def output_bytes(self) -> int:
        return len(self.outputs) * sum(shard.size for shard in self.shards)

    @property
    def files(self) -> tuple[OutputShard, ...]:
        """The shards of all outputs, named from OUT; see `file`."""
        return tuple(
            shard._replace(name=f"{output.name}/{shard.name}") if output.name else shard
            for output in self.outputs
            for shard in self.shards
        )

    def file(self, output: int, shard: int) -> int:
        """The position of an output's shard in `files`."""
        return output * len(self.shards) + shard

    @property
    def index(self) -> bytes | None:
        return index_json(self.tensors, self.shards)

    @property
    def main_dtype(self) -> str | None:
        """The torch name of the float dtype that most of the output's bytes have."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.dtype.kind == "float":
                name = tensor.dtype.torch_name
                totals[name] = totals.get(name, 0) + tensor.elements * tensor.dtype.itemsize
        return max(totals, key=totals.__getitem__, default=None)

    @property
    def trend_jobs(self) -> list[int]:
        """The jobs of the statistic pass: those whose coefficients are still to be found."""
        return [
            n for n, job in enumerate(self.jobs) if self.tensors[job.tensor].rule.kind == "trend"
        ]

    def on_tasks(self, job: Job) -> bool:
        """Whether a job merges task vectors."""
        return self.tensors[job.tensor].rule.kind == "tasks"

    def matrices(self, job: Job) -> list[Matrix]:
        """The matrices of a job, none where its method looks at elements."""
        tensor = self.tensors[job.tensor]
        cut = tensor.rule.cut
        return [] if cut is None else matrices(tensor.shape, cut, job.start, job.stop)

    def cost(self, job: Job) -> float:
        """What a job takes, in bytes moved."""
        rule = self.tensors[job.tensor].rule
        moved = (job.stop - job.start) * self.widths[job.tensor]
        if rule.kind != "tasks":
            return moved
        methods = len({task.base for task in rule.tasks})
        found = sum(flops(matrix, len(rule.inputs) - 1) for matrix in self.matrices(job))
        return moved * (1.0 if found else BYTES_OF_TASKS) + methods * found / BYTE_OF_FLOPS

    def read_bytes(self, job: Job) -> int:
        """Bytes of all inputs that `job` reads."""
        return (job.stop - job.start) * self.widths[job.tensor] - self.write_bytes(job)

    def write_bytes(self, job: Job) -> int:
        """Bytes of all outputs that `job` writes."""
        itemsize = self.tensors[job.tensor].dtype.itemsize
        return (job.stop - job.start) * itemsize * len(self.outputs)


@collector.paused()
def build_plan(recipe: Recipe, sources: Sources, *, shard_bytes: int) -> Plan:
    """Lay out the outputs and cut them into jobs.

    Raises MismatchError or ConfigError (see rules.contents), or ConfigError where two outputs
    would be the same.
    """
    tensors, shards = lay_out(contents(recipe, sources), shard_bytes)
    outputs = tuple(
        Output(variant.name, inputs, _digest(variant.config, sources, number, tensors, shards))
        for number, (variant, inputs) in enumerate(
            zip(recipe.variants, sources.inputs, strict=True)
        )
    )
    _check_distinct(outputs)
    return Plan(
        inputs=sources.checkpoints,
        donor=sources.donor,
        outputs=outputs,
        tensors=tuple(tensors),
        shards=tuple(shards),
        shard_bytes=shard_bytes,
        jobs=tuple(_cut(tensors)),
        widths=_widths(sources.checkpoints, tensors, len(outputs)),
        digest=outputs[0].digest if len(outputs) == 1 else _joint_digest(outputs),
    )


def _check_distinct(outputs: Sequence[Output]) -> None:
    """Raise ConfigError where two outputs would be the same, as their digests show."""
    first: dict[str, str] = {}
    for output in outputs:
        if (other := first.setdefault(output.digest, output.name)) != output.name:
            raise ConfigError(f"sweep: {output.name} gives the same bytes as {other}; leave it out")


@collector.paused()
def solved(plan: Plan, rows: Sequence[Sequence[float]]) -> Plan:
    """`plan` with the coefficients that the statistic pass has found, for each output a row."""
    rules: dict[Rule, Rule] = {}
    for rule in {tensor.rule: None for tensor in plan.tensors if tensor.rule.kind == "trend"}:
        terms = [nonzero(dict(zip(rule.inputs, row, strict=True))) for row in rows]
        rules[rule] = sum_rule(terms)
    tensors = tuple(t._replace(rule=rules.get(t.rule, t.rule)) for t in plan.tensors)
    widths = _widths(plan.inputs, tensors, len(plan.outputs))
    return replace(plan, tensors=tensors, widths=widths)


def _widths(
    inputs: Sequence[Checkpoint], tensors: Iterable[OutputTensor], outputs: int
) -> tuple[int, ...]:
    return tuple(
        t.dtype.itemsize * outputs
        + sum([inputs[i].tensors[t.name].dtype.itemsize for i in t.rule.inputs])
        for t in tensors
    )


def _cut(tensors: Sequence[OutputTensor]) -> Iterator[Job]:
    for number, tensor in enumerate(tensors):
        if tensor.rule.kind == "tasks" and tensor.elements:
            # A threshold or a norm is that of the whole tensor.
            cut = tensor.rule.cut if tensor.rule.tasks[0].method not in ELEMENTWISE else None
            yield from (Job(number, start, stop) for start, stop in jobs_of(tensor.shape, cut))
            continue
        for start in range(0, tensor.elements, JOB_ELEMENTS):
            yield Job(number, start, min(start + JOB_ELEMENTS, tensor.elements))


def _digest(
    config: Config,
    sources: Sources,
    output: int,
    tensors: Sequence[OutputTensor],
    shards: Sequence[OutputShard],
) -> str:
    """Of the plan that makes this output alone: what the other outputs are does not show."""
    place = {i: n for n, i in enumerate(sources.inputs[output])}
    digest = hashlib.sha256(f"distmerge {FORMAT} donor {place[sources.donor]}\n".encode())
    for i in place:
        digest.update(f"input {sources.checkpoints[i].identity}\n".encode())
    for shard in shards:
        digest.update(f"shard {shard.name} {shard.size}\n".encode())
    if config.extrapolation is not None:
        digest.update(f"trend {config.extrapolation} {_merging(config)}\n".encode())
    rules: dict[Rule, str] = {}
    for t in tensors:
        if t.rule not in rules:
            rules[t.rule] = _described(t.rule, output, place)
        line = f"{t.name} {t.dtype.name} {t.shape} {t.shard} {t.offset} {rules[t.rule]}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def _merging(config: Config) -> str:
    trajectory = config.trajectory
    assert trajectory is not None, "only trajectories are extrapolated"
    return f"{trajectory.window} {trajectory.stride} {trajectory.schedule}"


def _described(rule: Rule, output: int, place: Mapping[int, int]) -> str:
    """The rule of one output, with its inputs as that output's recipe counts them."""
    if rule.kind == "tasks":
        return f"tasks {rule.inputs} {rule.tasks[output]} {rule.cut}"
    if rule.kind != "sum":
        return f"{rule.kind} {tuple(place[i] for i in rule.inputs if i in place)}"
    terms = output_terms(rule, output)
    values = " ".join(value.hex() for value in terms.values())
    return f"sum {tuple(place[i] for i in terms)} {values}"


def output_terms(rule: Rule, output: int) -> dict[int, float]:
    """The coefficients of one output of a sum, by input, without those that add nothing."""
    return nonzero(dict(zip(rule.inputs, rule.coefficients[output], strict=True)))


def _joint_digest(outputs: Sequence[Output]) -> str:
    lines = "".join(f"{output.name} {output.digest}\n" for output in outputs)
    return hashlib.sha256(f"distmerge {FORMAT} outputs\n{lines}".encode()).hexdigest()
