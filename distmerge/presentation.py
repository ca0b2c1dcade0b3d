"""What the commands print: plans, inspections and summaries, as text for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from distmerge.assignment import assign
from distmerge.budget import budget, buffer_bytes, default_memory
from distmerge.document import Plain
from distmerge.log import format_bytes, parse_bytes
from distmerge.pipeline import MergeResult
from distmerge.planner import Plan
from distmerge.publishing.publish import Published
from distmerge.verification.verify import Verification

SHOWN = 12
"""Rows of a long table: the first and the last ones stand for the rest."""

Described = dict[str, Any]


def summary(result: MergeResult) -> str:
    """The closing lines of a merge."""
    moved = result.read_bytes + result.written_bytes
    ranks = "1 rank" if result.ranks == 1 else f"{result.ranks} ranks"
    count = len(result.outputs)
    each = f"{count} outputs of " if count > 1 else ""
    seconds = result.statistic_seconds + result.pass_seconds
    statistic = f" (statistic {result.statistic_seconds:.2f} s)" if result.statistic_seconds else ""
    lines = [
        f"{result.out}: {each}{result.tensors} tensors in {_count(result.shards, 'shard')}, "
        f"{format_bytes(result.written_bytes)}",
        f"read {format_bytes(result.read_bytes)}, wrote {format_bytes(result.written_bytes)} in "
        f"{seconds:.2f} s{statistic} ({format_bytes(moved / max(seconds, 1e-3))}/s), "
        f"{result.seconds:.2f} s in all; {ranks}, "
        f"peak memory {format_bytes(result.peak_memory)} each",
    ]
    if result.nonfinite:
        lines.append(f"warning: {result.nonfinite} values were NaN or Inf")
    if result.scores:
        lines += ["", scores_text(result.scores)]
    if result.report:
        lines.append(f"report: {result.report}")
    if result.published:
        lines.append(published_text(result.published))
    return "\n".join(lines)


def published_text(found: Published) -> str:
    """Where it is, and what it took."""
    return (
        f"published: {found.url}\n{_count(found.files, 'file')} in commit {found.commit}; "
        f"{format_bytes(found.sent_bytes)} of weights sent"
    )


def verification_text(found: Verification) -> str:
    """The verdict, what is off, and what was looked at."""
    count = _count(len(found.findings), "thing") + (" is" if len(found.findings) == 1 else " are")
    again = ""
    if found.seed is not None:
        again = f", {found.recomputed} of them merged again (seed {found.seed})"
    return "\n".join(
        [
            f"{found.out}: " + ("sound" if found.sound else f"{count} off"),
            *(f"  {finding}" for finding in found.findings),
            *(f"note: {note}" for note in found.notes),
            f"looked at {_count(found.outputs, 'output')}, {_count(found.files, 'file')} of "
            f"{format_bytes(found.bytes)}, {_count(found.tensors, 'tensor')}{again}; "
            f"{_count(found.ranks, 'rank')}, {found.seconds:.2f} s",
        ]
    )


def scores_text(scores: Described) -> str:
    """What the selection measured, and what it says."""
    marks = [(scores["baseline"], "baseline"), (scores["best"], "best")]
    forms = {"score": ".5g", "difference": "+.4g", "error": ".2g"}
    rows = [
        [
            row["name"],
            *(_shown(row[key], form) for key, form in forms.items()),
            ", ".join(mark for name, mark in marks if name == row["name"]),
        ]
        for row in scores["candidates"]
    ]
    header = ["output", scores["metric"], "difference", "std. err.", ""]
    return "\n".join([*_table(header, rows, shown=len(rows)), str(scores["verdict"])])


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def describe(plan: Plan, *, ranks: int, memory: str | None) -> Described:
    """A plan as JSON. Memory is that of a rank's buffers, with `memory` as budget if given.

    Raises OutputError where the budget is too small.
    """
    given = parse_bytes(memory) if memory else default_memory(plan, sys.maxsize)
    allowed = budget(plan, given)
    rows = [_rank(plan, number, jobs) for number, jobs in enumerate(assign(plan, ranks))]
    costs = [row.pop("cost") for row in rows]
    mean = sum(costs) / len(costs)
    return {
        "digest": plan.digest,
        "inputs": [
            {
                "model": c.label,
                "step": c.step,
                "commit": c.revision,
                "tensors": len(c.tensors),
                "bytes": c.nbytes,
                "fingerprint": c.fingerprint,
                "donor": number == plan.donor,
            }
            for number, c in enumerate(plan.inputs)
        ],
        "outputs": [output.name for output in plan.outputs],
        "tensors": len(plan.tensors),
        "tensors_by_rule": _by_rule(plan),
        "shards": [{"name": shard.name, "bytes": shard.size} for shard in plan.shards],
        "jobs": len(plan.jobs),
        "matrices": sum(m.slices for job in plan.jobs for m in plan.matrices(job)),
        "ranks": rows,
        "balance": max(costs) / mean if mean else 1.0,
        "memory_bytes": buffer_bytes(plan, allowed),
        "read_bytes": sum(row["read_bytes"] for row in rows),
        "statistic_bytes": sum(plan.read_bytes(plan.jobs[number]) for number in plan.trend_jobs),
        "write_bytes": plan.output_bytes,
    }


def _rank(plan: Plan, number: int, jobs: Sequence[int]) -> Described:
    return {
        "rank": number,
        "jobs": len(jobs),
        "cost": sum(plan.cost(plan.jobs[j]) for j in jobs),
        "read_bytes": sum(plan.read_bytes(plan.jobs[j]) for j in jobs),
        "write_bytes": sum(plan.write_bytes(plan.jobs[j]) for j in jobs),
    }


def _by_rule(plan: Plan) -> dict[str, int]:
    """How many tensors are summed, copied, or summed from fewer inputs than most."""
    widest = max((len(t.rule.inputs) for t in plan.tensors if t.rule.kind == "sum"), default=0)
    kinds = ("sum", "sum of fewer inputs", "trend", "tasks", "equal", "copy")
    counts = dict.fromkeys(kinds, 0)
    for tensor in plan.tensors:
        fewer = tensor.rule.kind == "sum" and len(tensor.rule.inputs) < widest
        counts["sum of fewer inputs" if fewer else tensor.rule.kind] += 1
    return {name: count for name, count in counts.items() if count}


def plan_text(described: Described) -> str:
    """The plan for people."""
    inputs = [
        [
            "*" if row["donor"] else "",
            row["model"],
            "" if row["step"] is None else str(row["step"]),
            str(row["tensors"]),
            format_bytes(row["bytes"]),
            row["fingerprint"][:12],
        ]
        for row in described["inputs"]
    ]
    ranks = [
        [
            str(row["rank"]),
            str(row["jobs"]),
            format_bytes(row["read_bytes"]),
            format_bytes(row["write_bytes"]),
        ]
        for row in described["ranks"]
    ]
    shards = [[row["name"], format_bytes(row["bytes"])] for row in described["shards"]]
    rules = ", ".join(f"{count} {name}" for name, count in described["tensors_by_rule"].items())
    if described["matrices"]:
        rules += f"; {_count(described['matrices'], 'matrix', 'matrices')} looked at as a whole"
    return "\n".join(
        [
            "Inputs (* gives config and tokenizer)",
            *_table(["", "model", "step", "tensors", "bytes", "fingerprint"], inputs),
            "",
            *_outputs_text(described["outputs"]),
            f"Output: {described['tensors']} tensors ({rules}), {_count(len(shards), 'shard')}",
            *_table(["shard", "bytes"], shards),
            "",
            f"Ranks: {described['jobs']} jobs; the busiest has {described['balance']:.2f} "
            "of the mean cost",
            *_table(["rank", "jobs", "read", "write"], ranks),
            "",
            *_statistic_text(described["statistic_bytes"]),
            f"read {format_bytes(described['read_bytes'])}, write "
            f"{format_bytes(described['write_bytes'])}, buffers of up to "
            f"{format_bytes(described['memory_bytes'])} per rank",
            f"digest {described['digest']}",
        ]
    )


def _outputs_text(names: list[str]) -> list[str]:
    """Nothing for a single output, which is OUT itself."""
    if len(names) == 1:
        return []
    return [
        f"Outputs: {len(names)}, each in a folder of OUT",
        *_table(["folder"], _rows(names)),
        "",
    ]


def _rows(cells: list[str]) -> list[list[str]]:
    return [[cell] for cell in cells]


def _statistic_text(num_bytes: int) -> list[str]:
    if not num_bytes:
        return []
    return [f"first a statistic pass that reads {format_bytes(num_bytes)}, unless it is known"]


def inspection_text(described: dict[str, Plain]) -> str:
    """A checkpoint for people: every tensor, then the totals."""
    c: Described = dict(described)
    rows = [
        [row["name"], row["dtype"], str(row["shape"]), row["shard"], format_bytes(row["bytes"])]
        for row in c["tensors"]
    ]
    dtypes = ", ".join(f"{format_bytes(size)} {name}" for name, size in c["bytes_by_dtype"].items())
    header = ["tensor", "dtype", "shape", "shard", "bytes"]
    shards = _count(len(c["shards"]), "shard")
    total = f"{len(rows)} tensors in {shards}, {format_bytes(c['bytes'])} ({dtypes})"
    return "\n".join(
        [*_table(header, rows, shown=len(rows)), "", total, f"fingerprint {c['fingerprint']}"]
    )


def _table(header: list[str], rows: list[list[str]], *, shown: int = SHOWN) -> list[str]:
    """Aligned columns, two spaces apart."""
    if len(rows) > shown:
        rows = [*rows[: shown - 2], ["..."] + [""] * (len(header) - 1), rows[-1]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
