"""What the report says of merges of whole matrices: OUT/report/spectra.json, kept and summed up.

spectra.json has an entry for every job on matrices (tasks.spectra.described). It is summed up by
module: all matrices of one kind in one stack of layers. Shares are those of directions, of which a
matrix has as many as its shorter side has elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from distmerge.places import Place, place, row_names
from distmerge.planner import Plan
from distmerge.spec import Job

MAX_CHOSEN = 4
"""Matrices whose singular values are shown."""

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles of gamma that an entry has."""

_AT_CEILING = 1 - 1e-5
"""spectra.json has six digits."""

Numbers = dict[str, Any]


def kept(plan: Plan, found: Iterable[Numbers]) -> list[Numbers]:
    """The content of spectra.json: an entry for each job on matrices, in the order of the plan.

    To what is `found` it adds each output's alpha and lambda, and of which outputs the singular
    values are: of those that calibrate the same merged matrix. A job of which nothing is found (an
    attempt that was stopped has done it on a rank that could not keep it) has only name and shape.
    """
    by_job = {(entry["tensor"], entry["start"]): entry for entry in found}
    entries = []
    for job in plan.jobs:
        matrices = plan.matrices(job)
        if not matrices:
            continue
        name = plan.tensors[job.tensor].name
        entry = {
            "tensor": name,
            "start": job.start,
            "matrices": sum(matrix.slices for matrix in matrices),
            "shape": [matrices[0].outputs, matrices[0].inputs],
        }
        if (name, job.start) in by_job:
            entry |= _completed(plan, job, by_job[name, job.start])
        entries.append(entry)
    return entries


def _completed(plan: Plan, job: Job, entry: Numbers) -> Numbers:
    tasks = plan.tensors[job.tensor].rule.tasks
    of = {output.name: task for output, task in zip(plan.outputs, tasks, strict=True)}
    # Of several merged matrices, the last one's singular values are kept.
    last = list(dict.fromkeys(task.base for task in tasks))[-1]
    return {
        **entry,
        "sigma_of": [name for name in entry["outputs"] if of[name].base == last],
        "outputs": {
            name: {"alpha": of[name].alpha, "lambda": of[name].scale, **gammas}
            for name, gammas in entry["outputs"].items()
        },
    }


def summed_up(
    entries: Sequence[Numbers], tasks: Sequence[str], outputs: Sequence[str], shown: Sequence[str]
) -> Numbers:
    """What the report says of the `entries` of spectra.json, about the task vectors `tasks`.

    Of the outputs that are `shown`, gamma is told by module and layer; of the others, in total.
    Raises ValueError, TypeError, KeyError or AttributeError where an entry is damaged.
    """
    known = [_checked(entry, len(tasks)) for entry in entries if "products" in entry]
    groups = _groups(known)
    return {
        "tasks": list(tasks),
        "matrices": sum(entry["matrices"] for entry in known),
        "missing": sum(entry["matrices"] for entry in entries if "products" not in entry),
        "cosines": _cosines(known, len(tasks)),
        "modules": [_module(name, group, len(tasks)) for name, group in groups.items()],
        "outputs": [
            _output(name, known, groups if name in shown else {})
            for name in outputs
            if any(name in entry["outputs"] for entry in known)
        ],
        "singular_values": next(filter(None, (_singular_values(n, known) for n in shown)), []),
        "fallbacks": [
            {key: entry[key] for key in ("tensor", "start", "matrices", "fallback")}
            for entry in known
            if entry["fallback"]
        ],
    }


def _checked(entry: Numbers, tasks: int) -> Numbers:
    """`entry` itself. Raises ValueError where its numbers are not such as `kept` writes."""
    outputs = entry["outputs"].values()
    found = [entry["products"], entry["sigma"]]
    lengths = [tasks * (tasks + 1) // 2, len(entry["places"])]
    for gammas in outputs:
        shares = [gammas[key] for key in ("alpha", "damped", "amplified", "lambda")]
        found += [gammas["quantiles"], gammas["gamma"], shares]
        lengths += [len(LEVELS), len(entry["places"]), len(shares)]
    positive = [
        _directions(entry),
        *(x for g in outputs for x in (g["alpha"], *g["quantiles"][:1])),
    ]
    finite = all(math.isfinite(x) for numbers in found for x in numbers)
    if not finite or min(positive) <= 0 or [len(numbers) for numbers in found] != lengths:
        raise ValueError(f"{entry['tensor']}: its numbers are not what a merge writes")
    return entry


def _place(entry: Numbers) -> Place | None:
    return place(entry["tensor"].removesuffix(".weight"))


def _groups(entries: Sequence[Numbers]) -> dict[str, list[Numbers]]:
    """The entries of each module, by its name; what is in no layer stands for itself."""
    places = [_place(entry) for entry in entries]
    names = row_names(found.row for found in places if found)
    groups: dict[str, list[Numbers]] = {}
    for entry, found in zip(entries, places, strict=True):
        groups.setdefault(names[found.row] if found else entry["tensor"], []).append(entry)
    return groups


def _module(name: str, entries: Sequence[Numbers], tasks: int) -> Numbers:
    """`cosine` is the mean over the pairs of tasks."""
    rows = _cosines(entries, tasks)
    pairs = [rows[i][j] for i in range(tasks) for j in range(i)]
    some = [cosine for cosine in pairs if cosine is not None]
    return {
        "name": name,
        "layers": len({found for entry in entries if (found := _place(entry))}),
        "matrices": sum(entry["matrices"] for entry in entries),
        "directions": sum(map(_directions, entries)),
        "cosine": math.fsum(some) / len(some) if some else None,
    }


def _cosines(entries: Iterable[Numbers], tasks: int) -> list[list[float | None]]:
    """Of the task vectors over all `entries`; None where one of a pair is zero."""
    columns = zip(*(entry["products"] for entry in entries), strict=True)
    sums = [math.fsum(column) for column in columns]
    pairs = [(i, j) for i in range(tasks) for j in range(i, tasks)]
    products = dict(zip(pairs, sums, strict=False))
    norms = [math.sqrt(max(0.0, products.get((i, i), 0.0))) for i in range(tasks)]
    return [
        [
            products[min(i, j), max(i, j)] / norms[i] / norms[j] if norms[i] and norms[j] else None
            for j in range(tasks)
        ]
        for i in range(tasks)
    ]


def _output(name: str, entries: Sequence[Numbers], groups: dict[str, list[Numbers]]) -> Numbers:
    """One output in total and by module.

    `ceiling` is the share of directions with gamma at its largest, 1/alpha: the quantiles tell that
    it is so many at least.
    """
    own = [entry for entry in entries if name in entry["outputs"]]
    scales = {entry["outputs"][name]["lambda"] for entry in own}
    return {
        "name": name,
        "alpha": own[0]["outputs"][name]["alpha"],
        "lambda": scales.pop() if len(scales) == 1 else None,
        **_gammas(name, own),
        "modules": {
            module: {**_gammas(name, members), "layers": _by_layer(name, members)}
            for module, group in groups.items()
            if (members := [entry for entry in group if name in entry["outputs"]])
        },
    }


def _gammas(name: str, entries: Sequence[Numbers]) -> Numbers:
    """How gamma is spread. Of several matrices, a quantile is that of the one in the middle."""
    weights = [_directions(entry) for entry in entries]
    gammas = [entry["outputs"][name] for entry in entries]

    def share(values: Iterable[float]) -> float:
        return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    return {
        "quantiles": [
            _middle([gamma["quantiles"][n] for gamma in gammas], weights)
            for n in range(len(LEVELS))
        ],
        "damped": share(gamma["damped"] for gamma in gammas),
        "amplified": share(gamma["amplified"] for gamma in gammas),
        "ceiling": share(map(_at_ceiling, gammas)),
    }


def _middle(values: Sequence[float], weights: Sequence[int]) -> float:
    """The weighted median; the lower one of two."""
    order = sorted(range(len(values)), key=values.__getitem__)
    passed = itertools.accumulate(weights[i] for i in order)
    half = sum(weights) / 2
    return next(values[i] for i, weight in zip(order, passed, strict=True) if weight >= half)


def _at_ceiling(gamma: Numbers) -> float:
    """The share of directions that the quantiles prove to be there."""
    largest = _AT_CEILING / gamma["alpha"]
    reached = [level for level, x in zip(LEVELS, gamma["quantiles"], strict=True) if x >= largest]
    return 1 - min(reached, default=1.0)


def _by_layer(name: str, entries: Sequence[Numbers]) -> list[list[float]]:
    """Layer and median gamma, layer by layer."""
    layers: dict[int, list[Numbers]] = {}
    for entry in entries:
        if found := _place(entry):
            layers.setdefault(found.layer, []).append(entry)
    medians = {layer: _gammas(name, own)["quantiles"] for layer, own in sorted(layers.items())}
    return [[layer, quantiles[len(LEVELS) // 2]] for layer, quantiles in medians.items()]


def _directions(entry: Numbers) -> int:
    found: int = entry["matrices"] * min(entry["shape"])
    return found


def _singular_values(name: str, entries: Sequence[Numbers]) -> list[Numbers]:
    """Before and after the calibration, lambda included, of a few matrices, layer by layer."""
    able = [
        entry
        for entry in entries
        if name in entry["sigma_of"] and entry["outputs"][name]["lambda"] and any(entry["sigma"])
    ]
    return [_before_and_after(entry, name) for entry in sorted(_chosen(able, name), key=_layer)]


def _layer(entry: Numbers) -> tuple[str, int]:
    found = _place(entry)
    return (found.row.stack, found.layer) if found else ("", -1)


def _chosen(entries: Sequence[Numbers], name: str) -> list[Numbers]:
    """In each of the first, the middle and the last layer the matrix with the widest spread of
    gamma, of another kind if there is one; then the widest of all."""
    kinds = [found.row.kind if (found := _place(entry)) else None for entry in entries]
    at = [_layer(entry) for entry in entries]
    layers = sorted({layer for layer in at if layer[1] >= 0})
    wanted = [layers[n] for n in (0, len(layers) // 2, -1)] if layers else []
    chosen: list[int] = []

    def rank(n: int) -> tuple[bool, float]:
        low, *_, high = entries[n]["outputs"][name]["quantiles"]
        return kinds[n] in [kinds[other] for other in chosen], low / high

    for layer in [*wanted, *[None] * MAX_CHOSEN][:MAX_CHOSEN]:
        left = [n for n in range(len(entries)) if n not in chosen and layer in (None, at[n])]
        chosen += [min(left, key=rank)] if left else []
    return [entries[n] for n in chosen]


def _before_and_after(entry: Numbers, name: str) -> Numbers:
    """Of one matrix; of the first of a stack."""
    own = entry["outputs"][name]
    before = [abs(own["lambda"]) * sigma for sigma in entry["sigma"]]
    return {
        "tensor": entry["tensor"],
        "output": name,
        "shape": entry["shape"],
        "places": [at + 1 for at in entry["places"]],
        "before": before,
        "after": [gamma * sigma for gamma, sigma in zip(own["gamma"], before, strict=True)],
    }
