"""Scores, their differences with errors, and what is made of them in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

from distmerge.document import Plain
from distmerge.errors import RunError
from distmerge.scoring import Measured, difference, scores
from distmerge.selection import Selection

LOSS = Selection(metric="loss", text="held-out.txt")
MOST = Selection(metric="command", command=("x", "{model}"), goal="max")
LEAST = Selection(metric="command", command=("x", "{model}"), goal="min")
COUNTS = (64,) * 40
NAN = Measured((math.nan,) * 40, COUNTS)


def losses(better: float = 0, noise: float = 0, seed: int = 0) -> Measured:
    """Forty windows; `better` by so many nats per token, with `noise` between windows."""
    hard = numpy.random.default_rng(100).normal(90, 10, size=40)
    off = numpy.random.default_rng(seed).normal(size=40)
    off = (off - off.mean()) / off.std(ddof=1) * noise * math.sqrt(40)
    return Measured(tuple((hard - (better - off) * 64).tolist()), COUNTS)


def numbers(*values: float) -> list[Measured]:
    return [Measured(number=value) for value in values]


def scored(selection: Selection, measured: Sequence[Measured], *values: dict[str, Plain]) -> Any:
    """Of steps 0, 1, 2, ... where the values are not given."""
    swept = values or tuple({"step": float(n)} for n in range(len(measured)))
    names = [",".join(f"{key}={value:g}" for key, value in each.items()) for each in swept]
    return scores(selection, names, swept, measured)


def test_difference_and_error_are_those_of_a_ratio_over_paired_windows() -> None:
    random = numpy.random.default_rng(0)
    n = random.integers(1, 2049, size=25)
    base = n * random.normal(3, 1, size=25)
    one = base + n * random.normal(-0.01, 0.05, size=25)
    d = one - base
    delta = d.sum() / n.sum()
    error = math.sqrt(25 / 24 * ((d - delta * n) ** 2).sum()) / n.sum()

    counts = tuple(n.tolist())
    ours = Measured(tuple(one.tolist()), counts)
    found = difference(ours, Measured(tuple(base.tolist()), counts))

    assert ours.score == pytest.approx(one.sum() / n.sum(), rel=1e-12)
    assert found == pytest.approx((delta, error), rel=1e-9)


def test_with_equal_windows_the_error_is_the_usual_one() -> None:
    one, base = losses(0.1, 0.01), losses()
    d = (numpy.array(one.losses) - base.losses) / 64
    assert difference(one, base) == pytest.approx((d.mean(), d.std(ddof=1) / math.sqrt(40)))


def test_the_error_is_how_far_the_difference_strays() -> None:
    """Over many texts, the truth is within two errors of the estimate 19 times in 20."""
    random = numpy.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        n = random.integers(200, 2049, size=60)
        d = n * random.normal(-0.01, 0.05, size=60)
        counts = tuple(n.tolist())
        mean, error = difference(Measured(tuple(d.tolist()), counts), Measured((0.0,) * 60, counts))
        assert error is not None
        hits += abs(mean + 0.01) < 2 * error
    assert 920 <= hits <= 975


def test_the_content_of_scores() -> None:
    found = scored(LOSS, [losses(), losses(0.01, 0.001), losses(-0.5)])
    assert [found[key] for key in ("metric", "goal", "unit", "text", "command")] == [
        "loss", "min", "nats per token", "held-out.txt", None,
    ]  # fmt: skip
    assert (found["tokens"], found["windows"]) == (2560, 40)
    assert (found["baseline"], found["best"]) == ("step=0", "step=1")
    first, second, _ = found["candidates"]
    assert first == {
        "name": "step=0", "values": {"step": 0.0}, "score": losses().score, "difference": 0.0,
        "error": 0.0,
    }  # fmt: skip
    assert second["difference"] == pytest.approx(-0.01)
    assert second["error"] == pytest.approx(0.001)
    assert second["score"] == pytest.approx(first["score"] - 0.01)


def test_the_content_of_scores_of_a_command() -> None:
    found = scored(MOST, numbers(1, 3, 2))
    assert [found[key] for key in ("metric", "goal", "unit", "text", "command")] == [
        "command", "max", "", None, "x {model}",
    ]  # fmt: skip
    assert (found["tokens"], found["windows"], found["best"]) == (None, None, "step=1")
    assert found["candidates"][1] == {
        "name": "step=1", "values": {"step": 1.0}, "score": 3, "difference": 2, "error": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("selection", "measured", "best"),
    [
        (MOST, numbers(1, 2, 3), "step=2"),
        (LEAST, numbers(1, 2, 3), "step=0"),
        (LEAST, numbers(2, 1, 1), "step=1"),
        (MOST, numbers(2, 2, 1), "step=0"),
        (MOST, numbers(math.nan, 2, math.inf), "step=1"),
        (LEAST, numbers(1, -math.inf, math.nan), "step=0"),
        (LOSS, [losses(), losses(), NAN], "step=0"),
        (LOSS, [NAN, losses(), losses(0.1)], "step=2"),
    ],
)
def test_the_best_is_finite_and_of_equals_the_first(
    selection: Selection, measured: list[Measured], best: str
) -> None:
    found = scored(selection, measured)
    assert found["best"] == best
    json.dumps(found, allow_nan=False)
    for each, one in zip(found["candidates"], measured, strict=True):
        assert each["score"] == (one.score if math.isfinite(one.score) else None)


@pytest.mark.parametrize(
    ("selection", "measured", "message"),
    [
        (LOSS, [NAN, NAN], "the loss of no output is finite"),
        (MOST, numbers(math.nan, math.inf), "the number of no output is finite"),
        (LOSS, [losses(), Measured((1.0,), (5,))], "step=1 and step=0 were measured on other tok"),
    ],
)
def test_what_can_not_be_compared_fails(
    selection: Selection, measured: list[Measured], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        scored(selection, measured)


WINDOWS: tuple[dict[str, Plain], ...] = (
    {"window": 4, "step": 0}, {"window": 4, "step": 1}, {"window": 8, "step": 0},
    {"window": 8, "step": 1},
)  # fmt: skip
FLATTERED = " The best of {} looks better on the data that chose it than elsewhere."


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (
            [losses(), losses(0.0041, 0.00092), losses(-1)],
            "step=1 beats the average (step=0) by 0.00410 +- 0.00092 nats per token (4.5 standard "
            "errors)." + FLATTERED.format(3),
        ),
        (
            [losses(), losses(0.0003, 0.00092), losses(-1)],
            "Extrapolation does not beat the average (step=0) by more than its standard error: the "
            "best beside it, step=1, is better by 0.00030 +- 0.00092 nats per token; use step=0.",
        ),
        (
            [losses(), losses(-0.5, 0.011), losses(-1)],
            "Extrapolation does not beat the average (step=0) by more than its standard error: the "
            "best beside it, step=1, is worse by 0.500 +- 0.011 nats per token; use step=0.",
        ),
        (
            [losses(), losses()],
            "Extrapolation does not beat the average (step=0) by more than its standard error: the "
            "best beside it, step=1, does just as well; use step=0.",
        ),
        (
            [losses(), losses(0.002, 0.003), losses(0.001, 0.0002)],
            "step=1 beats the average (step=0) by 0.0020 +- 0.0030 nats per token, no more than "
            "the standard error; step=2 does by 0.00100 +- 0.00020." + FLATTERED.format(3),
        ),
        (
            [losses(), NAN, losses(0.02, 0.01)],
            "step=2 beats the average (step=0) by 0.020 +- 0.010 nats per token (2.0 standard "
            "errors). Never chosen, for want of a finite loss: step=1.",
        ),
        (
            [NAN, losses()],
            "step=1 is best (loss 1.40731); there is nothing to hold it against. Never chosen, for "
            "want of a finite loss: step=0.",
        ),
        (
            [losses(), NAN],
            "step=0 is best (loss 1.40731); there is nothing to hold it against. Never chosen, for "
            "want of a finite loss: step=1.",
        ),
        (
            [Measured((2.0,), (2,)), Measured((1.0,), (2,))],
            "step=1 beats the average (step=0) by 0.5 nats per token, perhaps by chance: a single "
            "window gives no standard error.",
        ),
    ],
)
def test_the_verdict_on_losses(measured: list[Measured], verdict: str) -> None:
    assert scored(LOSS, measured)["verdict"] == verdict


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (
            numbers(0.83, 0.85, 0.2),
            "step=1 beats the average (step=0) by 0.02, perhaps by chance: a command gives no "
            "standard error." + FLATTERED.format(3),
        ),
        (
            numbers(0.83, 0.7),
            "Nothing beats the average (step=0): the best beside it, step=1, is worse by 0.13 (a "
            "command gives no standard error).",
        ),
        (
            numbers(0.83, 0.83),
            "Nothing beats the average (step=0): the best beside it, step=1, does just as well (a "
            "command gives no standard error).",
        ),
    ],
)
def test_the_verdict_on_numbers(measured: list[Measured], verdict: str) -> None:
    assert scored(MOST, measured)["verdict"] == verdict


def test_extrapolation_is_held_against_the_best_average() -> None:
    """Else a better window would look like a merit of the step."""
    measured = [losses(), losses(0.1), losses(0.3), losses(0.3001, 0.01)]
    found = scored(LOSS, measured, *WINDOWS)
    assert found["best"] == "window=8,step=0"
    assert found["verdict"].startswith(
        "Extrapolation does not beat the best average (window=8,step=0) by more than"
    )
    assert found["candidates"][3]["difference"] == pytest.approx(-0.3001)


def test_other_sweeps_are_held_against_the_first() -> None:
    values: tuple[dict[str, Plain], ...] = ({"ema": 0.1}, {"ema": 0.2}, {"ema": 0.3})
    found = scored(LOSS, [losses(), losses(0.05, 0.01), losses(-0.1)], *values)
    assert found["verdict"].startswith("ema=0.2 beats ema=0.1 by 0.050 +- 0.010 nats per token (5")
    found = scored(LOSS, [losses(), losses(-0.05, 0.01), losses(-0.1)], *values)
    assert found["verdict"].startswith("Nothing beats ema=0.1 by more than its standard error: ")


def test_a_sweep_of_averages_alone_is_held_against_the_first() -> None:
    found = scored(LOSS, [losses(), losses(0.05, 0.01)], WINDOWS[0], WINDOWS[2])
    assert found["verdict"].startswith("window=8,step=0 beats the average (window=4,step=0) by 0.0")
