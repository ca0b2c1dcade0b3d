"""What the report says of merges of whole matrices: OUT/report/spectra.json, kept and summed up.

spectra.json has an entry for every job on matrices (tasks.spectra.described). Summed up, it is about
modules: all matrices of one kind in one stack of layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distmerge.places import Place, Row, place, row_names
from distmerge.planner import Plan
from distmerge.spec import Job

MAX_SHOWN = 4
"""Outputs that are shown module by module; of the others only what holds for all matrices is."""

MAX_CHOSEN = 4
"""Matrices whose singular values are shown."""

QUANTILES = 5
MEDIAN = 2

Numbers = dict[str, Any]


def kept(plan: Plan, found: Iterable[Numbers]) -> list[Numbers]:
    """The content of spectra.json: an entry for each job on matrices, in the order of the plan.

    To what is `found` it adds each output's alpha and lambda, and of which outputs the singular
    values are: of those that calibrate the same matrix. A job of which nothing is found, because an
    attempt that was stopped has done it on a rank that could not keep it, has name and shape only.
    """
    by_job = {(entry["tensor"], entry["start"]): entry for entry in found}
    entries = []
    for job in plan.jobs:
        if matrices := plan.matrices(job):
            name = plan.tensors[job.tensor].name
            entry = {
                "tensor": name,
                "start": job.start,
                "matrices": sum(matrix.slices for matrix in matrices),
                "shape": [matrices[0].outputs, matrices[0].inputs],
            }
            found_of = by_job.get((name, job.start))
            entries.append(entry if found_of is None else _completed(plan, job, found_of))
    return entries


def _completed(plan: Plan, job: Job, entry: Numbers) -> Numbers:
    tasks = plan.tensors[job.tensor].rule.tasks
    pairs = zip(plan.outputs, tasks, strict=True)
    of = {output.name: task for output, task in pairs if task.alpha is not None}
    last = [task.base for task in dict.fromkeys(task._replace(scale=1.0, alpha=None) for task in of.values())][-1:]
    return {
        **entry,
        "sigma_of": [name for name, task in of.items() if task.base in last],
        "outputs": {
            name: {"alpha": of[name].alpha, "lambda": of[name].scale, **gammas}
            for name, gammas in entry["outputs"].items()
        },
    }
