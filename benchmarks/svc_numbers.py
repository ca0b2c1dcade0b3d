"""The SVC experiment in numbers: what is compared, how it is chosen, and how sure one may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

SCALES = [0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
"""Values of lambda that are tried, for every merger alike, without calibration and with it."""

ALPHA = 0.5
"""Tried beside `auto` where alpha is tuned too. (For matrices only alpha / lambda matters.)"""

GAMMAS_OF, GAMMA_SCALES = "task_arithmetic", ("0.3", "1")
RESOLVED = 1e-6  # of the largest singular value; below are only directions that no task uses

Numbers = dict[str, Any]  # what goes into the JSON


class Merger(NamedTuple):
    """A base merger: what its recipe says, and the lambda of those who tune nothing."""

    default: float
    of_each_model: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


_SPARSE = {"weight": 1, "density": 0.2}
MERGERS = {
    "task_arithmetic": Merger(0.3, {"weight": 1}),
    "ties": Merger(1.0, _SPARSE, {"normalize": True}),
    "dare_linear": Merger(0.3, _SPARSE),
    "tsv_m": Merger(1.0),
    "iso_c": Merger(1.0),
    "iso_cts": Merger(1.0),
    "star": Merger(1.0),
}


class Candidate(NamedTuple):
    """One merge: without SVC, or with it; its lambda; and alpha, where it is not `auto`."""

    calibrated: bool
    scale: float
    alpha: float | None = None


Answers = dict[Candidate, torch.Tensor]
"""Which examples each merge gets right: bool, (tasks, examples)."""


class Measured(NamedTuple):
    """All merges by one merger of one run: all on the examples that choose, few on the others.

    `spectra` is what the report of the calibrated sweep says of each matrix.
    """

    choose: Answers
    report: Answers
    spectra: list[Numbers]


class Finding(NamedTuple):
    """One run: a suite and a seed; the trained models' answers, and the merges by merger.

    `trained` are the base's answers, and each fine-tune's to its own task: (tasks, examples).
    """

    suite: str
    seed: int
    trained: dict[str, torch.Tensor]
    merges: dict[str, Measured]


Pick = Callable[[Answers], Candidate]


def untuned(_: Answers, merger: str, calibrated: bool) -> Candidate:
    return Candidate(calibrated, MERGERS[merger].default)


def tuned(choose: Answers, calibrated: bool, alpha: bool = False) -> Candidate:
    """The best on the examples that choose; `alpha` tells whether alpha is chosen too."""
    found = [one for one in choose if one.calibrated == calibrated and (alpha or not one.alpha)]
    return max(found, key=lambda one: accuracy(choose[one]))


def picks(merger: str) -> dict[str, Pick]:
    """What stands for a merger, by who tunes what."""
    return {
        "untuned": partial(untuned, merger=merger, calibrated=False),
        "untuned SVC": partial(untuned, merger=merger, calibrated=True),
        "tuned": partial(tuned, calibrated=False),
        "tuned SVC": partial(tuned, calibrated=True),
        "tuned SVC and alpha": partial(tuned, calibrated=True, alpha=True),
    }


PAIRS = {
    "untuned": ("untuned SVC", "untuned"),
    "tuned": ("tuned SVC", "tuned"),
    "alpha": ("tuned SVC and alpha", "tuned"),
}
"""What is compared with what."""


def accuracy(answers: torch.Tensor) -> float:
    """The mean over tasks; all of a suite's tasks have as many examples."""
    return answers.double().mean().item()


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Numbers:
    """The difference of two rows of answers, one a seed, and two standard errors of its mean.

    `error` is over examples, of the mean over seeds and tasks; an image that occurs in every task
    counts as one example. `seed_error` is over seeds: None where there is one.
    """
    pairs = zip(ours, theirs, strict=True)
    differences = torch.stack([(a.double() - b.double()).mean(dim=0) for a, b in pairs])
    by_seed, by_example = differences.mean(dim=1), differences.mean(dim=0)
    several = len(by_seed) > 1
    return {
        "difference": by_example.mean().item(),
        "error": _standard_error(by_example),
        "seed_error": _standard_error(by_seed) if several else None,
        "by_seed": by_seed.tolist(),
    }


def _standard_error(values: torch.Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def summary(findings: list[Finding]) -> Numbers:
    """All numbers of one suite."""
    return {
        "seeds": [finding.seed for finding in findings],
        "tasks": len(findings[0].trained["base"]),
        "examples": len(findings[0].trained["base"][0]),
        "trained": {
            name: _mean([accuracy(finding.trained[name]) for finding in findings])
            for name in findings[0].trained
        },
        "mergers": {name: merger_summary(findings, name) for name in findings[0].merges},
        "best": best_summary(findings),
        "gammas": gammas(findings[0]),
    }


def merger_summary(findings: list[Finding], merger: str) -> Numbers:
    """One merger: its rows, what is compared, and the curve over lambda."""
    merges = [finding.merges[merger] for finding in findings]
    chosen = {name: [pick(m.choose) for m in merges] for name, pick in picks(merger).items()}
    answers = {
        name: [measured.report[one] for measured, one in zip(merges, ones, strict=True)]
        for name, ones in chosen.items()
    }
    return {
        "accuracy": {name: _mean(map(accuracy, rows)) for name, rows in answers.items()},
        "chosen": {name: [one._asdict() for one in ones] for name, ones in chosen.items()},
        "compared": {
            name: compare(answers[ours], answers[theirs]) for name, (ours, theirs) in PAIRS.items()
        },
        "curve": {
            name: [
                [accuracy(measured.choose[Candidate(calibrated, scale)]) for measured in merges]
                for scale in SCALES
            ]
            for name, calibrated in (("plain", False), ("SVC", True))
        },
    }


def best_summary(findings: list[Finding]) -> Numbers:
    """The same where the merger too is chosen: the best of all with SVC against all without."""
    found: dict[str, list[torch.Tensor]] = {}
    names: dict[str, list[str]] = {}
    for kind, calibrated in (("plain", False), ("SVC", True)):
        best = [best_merge(finding.merges, calibrated) for finding in findings]
        names[kind] = [name for name, _ in best]
        found[kind] = [
            finding.merges[name].report[one]
            for finding, (name, one) in zip(findings, best, strict=True)
        ]
    return {
        "accuracy": {kind: _mean(map(accuracy, rows)) for kind, rows in found.items()},
        "chosen": names,
        **compare(found["SVC"], found["plain"]),
    }


def best_merge(merges: dict[str, Measured], calibrated: bool) -> tuple[str, Candidate]:
    """The best merger and lambda, on the examples that choose."""
    best = {name: tuned(measured.choose, calibrated) for name, measured in merges.items()}
    name = max(best, key=lambda name: accuracy(merges[name].choose[best[name]]))
    return name, best[name]


def gammas(finding: Finding) -> Numbers:
    """The gammas of one run by lambda and matrix, at some of the directions: `places`, from 0."""
    spectra = [matrix for matrix in finding.merges[GAMMAS_OF].spectra if matrix["sigma"][0]]
    (places,) = {tuple(matrix["places"]) for matrix in spectra}
    sizes = [[value / matrix["sigma"][0] for value in matrix["sigma"]] for matrix in spectra]
    present = [n for n in range(len(places)) if min(row[n] for row in sizes) > RESOLVED]
    found: Numbers = {"places": [places[n] for n in present], "by_lambda": {}}
    for scale in GAMMA_SCALES:
        of_scale = {
            matrix["tensor"]: matrix["outputs"][f"lambda={scale},alpha=auto"]["gamma"]
            for matrix in spectra
        }
        found["by_lambda"][scale] = {
            name: [gamma[n] for n in present] for name, gamma in of_scale.items()
        }
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
