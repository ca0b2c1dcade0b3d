"""What SVC did to each matrix, as numbers for the report; kept by every attempt at an output."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from distmerge.planner import Plan
from distmerge.tasks.merging import MatrixMerge

_PREFIX = "spectra-"

POINTS = 64
"""Singular values of a matrix that are reported, from the largest on at growing distances."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Numbers = dict[str, Any]


def described(
    plan: Plan, number: int, merges: Sequence[MatrixMerge], place: int | None = None
) -> Numbers:
    """The matrices of a job: how gamma is spread in each output, inner products of the tasks (of
    the first with all from itself on, then of the second ...), what was done where the usual way
    was not good enough; and singular values of the first matrix. With `place`, only the matrix
    that stands there in a batch is the job's."""
    job = plan.jobs[number]
    spectra = [merge.spectrum(place) for merge in merges]
    first = spectra[0]
    places = _places(first.sigma.shape[-1])
    return {
        "tensor": plan.tensors[job.tensor].name,
        "start": job.start,
        "matrices": sum(merge.matrix.slices for merge in merges) if place is None else 1,
        "shape": [merges[0].matrix.outputs, merges[0].matrix.inputs],
        "products": _products(merges, place),
        "fallback": "; ".join(dict.fromkeys(s.fallback for s in spectra if s.fallback)) or None,
        "places": places,
        "sigma": _picked(first.sigma, places),
        "outputs": {
            plan.outputs[output].name: _gammas(
                torch.cat([s.gammas[output].reshape(-1).cpu() for s in spectra]),
                _picked(first.gammas[output], places),
            )
            for output in first.gammas
        },
    }


def _products(merges: Sequence[MatrixMerge], place: int | None) -> list[float]:
    parts = [
        sum((merge.products[n] for n in range(len(merge.pieces))), torch.zeros(()))
        for merge in merges
    ]
    own = [part.sum(1) if place is None else part[:, place] for part in parts]
    return [float(x) if math.isfinite(x) else 0.0 for x in torch.stack(own).sum(0).tolist()]


def _gammas(gamma: torch.Tensor, picked: list[float]) -> Numbers:
    levels = torch.quantile(gamma, torch.tensor(QUANTILES, dtype=gamma.dtype))
    return {
        "quantiles": _rounded(levels),
        "damped": float((gamma < 1 - 1e-6).double().mean()),
        "amplified": float((gamma > 1 + 1e-6).double().mean()),
        "gamma": picked,
    }


def _places(count: int) -> list[int]:
    """Up to POINTS of `count` places, the first and the last among them, ever further apart."""
    if count <= POINTS:
        return list(range(count))
    steps = [round(count ** (i / (POINTS - 1))) - 1 for i in range(POINTS)]
    return sorted({0, count - 1, *steps})


def _picked(values: torch.Tensor, places: Sequence[int]) -> list[float]:
    """Of the first matrix of a batch."""
    return _rounded(values.reshape(-1, values.shape[-1])[0, list(places)]) if places else []


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


class Spectra:
    """What one rank has described, in memory and, where it sees the attempt's state, in a file."""

    def __init__(self, state: Path, name: str | None):
        self.found: list[Numbers] = []
        self._path = None if name is None else state / f"{_PREFIX}{name}"

    def add(self, numbers: Numbers) -> None:
        self.found.append(numbers)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(numbers) + "\n")


def read_spectra(state: Path) -> list[Numbers]:
    """What earlier attempts have described; what is not a whole line (a kill) is none."""
    found: list[Numbers] = []
    for path in sorted(state.glob(f"{_PREFIX}*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def ordered(plan: Plan, parts: Iterable[Numbers]) -> list[Numbers]:
    """Each job once, in the order of the plan: a job done twice is the same both times."""
    by_job = {(each["tensor"], each["start"]): each for each in parts}
    keys = [(plan.tensors[job.tensor].name, job.start) for job in plan.jobs]
    return [by_job[key] for key in keys if key in by_job]
