"""What was measured of a sweep's outputs, side by side: scores.json and its verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from distmerge.document import Plain
from distmerge.errors import RunError
from distmerge.selection import Selection

EXTRAPOLATED = ("step", "span")
"""Swept values that are zero for an average and go beyond it elsewhere."""


class Measured(NamedTuple):
    """Of one candidate: summed loss (nats) and target tokens by window, or a command's `number`."""

    losses: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    number: float | None = None

    @property
    def score(self) -> float:
        """The mean loss per token, or the number."""
        if self.number is not None:
            return self.number
        return math.fsum(self.losses) / sum(self.counts)


class Difference(NamedTuple):
    """Of two scores, with its standard error where there is one."""

    mean: float
    error: float | None

    @property
    def clear(self) -> bool:
        return self.error is not None and self.mean > self.error


def difference(one: Measured, base: Measured) -> Difference:
    """The score of `one` less that of `base`; NaN where one of them is not finite.

    Windows are paired, so what makes a window hard for both cancels out. The mean is a ratio (loss
    by tokens), and so the error is a ratio estimator's, linearised: Cochran, Sampling Techniques,
    6.4. It takes windows as independent, and needs two of them.
    """
    if not (math.isfinite(one.score) and math.isfinite(base.score)):
        return Difference(math.nan, None)
    if one.number is not None:
        return Difference(one.score - base.score, None)
    tokens, windows = sum(base.counts), len(base.counts)
    gaps = [ours - theirs for ours, theirs in zip(one.losses, base.losses, strict=True)]
    mean = math.fsum(gaps) / tokens
    if windows < 2:
        return Difference(mean, None)
    squares = math.fsum((gap - mean * n) ** 2 for gap, n in zip(gaps, base.counts, strict=True))
    return Difference(mean, math.sqrt(windows / (windows - 1) * squares) / tokens)


class _Candidate(NamedTuple):
    name: str
    values: dict[str, Plain]
    measured: Measured

    @property
    def finite(self) -> bool:
        return math.isfinite(self.measured.score)

    @property
    def average(self) -> bool:
        """Whether this is an average that others of the sweep go beyond."""
        steps = [self.values[key] for key in EXTRAPOLATED if key in self.values]
        return bool(steps) and not any(steps)


def scores(
    selection: Selection,
    names: Sequence[str],
    values: Sequence[dict[str, Plain]],
    measured: Sequence[Measured],
) -> dict[str, Plain]:
    """The content of scores.json. The first candidate is the baseline; ties go to the earlier.

    What is not finite is null there. Raises RunError where no score is finite, or where the
    candidates were not measured on the same tokens.
    """
    table = [_Candidate(*row) for row in zip(names, values, measured, strict=True)]
    base, loss = table[0], selection.metric == "loss"
    for one in table:
        if one.measured.counts != base.measured.counts:
            raise RunError(
                f"select: {one.name} and {base.name} were measured on other tokens: do all hosts "
                "see the same text, and do the outputs have the same tokenizer?"
            )
    finite = [one for one in table if one.finite]
    if not finite:
        raise RunError(f"select: the {_score(selection)} of no output is finite")
    return {
        "metric": selection.metric,
        "goal": selection.goal,
        "unit": "nats per token" if loss else "",
        "text": selection.text,
        "command": selection.command_line,
        "tokens": sum(base.measured.counts) if loss else None,
        "windows": len(base.measured.counts) if loss else None,
        "candidates": [_row(one, base) for one in table],
        "baseline": base.name,
        "best": _chosen(selection, table).name,
        "verdict": _verdict(selection, table),
    }


def _row(one: _Candidate, base: _Candidate) -> Plain:
    mean, error = difference(one.measured, base.measured)
    return {
        "name": one.name,
        "values": one.values,
        "score": one.measured.score if one.finite else None,
        "difference": mean if math.isfinite(mean) else None,
        "error": error,
    }


def _score(selection: Selection) -> str:
    return "loss" if selection.metric == "loss" else "number"


def _best(selection: Selection, finite: Sequence[_Candidate]) -> _Candidate:
    """Python's min takes the first of equals."""
    sign = 1 if selection.goal == "min" else -1
    return min(finite, key=lambda one: sign * one.measured.score)


def _groups(table: Sequence[_Candidate]) -> tuple[list[_Candidate], list[_Candidate]]:
    """What is to be had without extrapolation, and what has to beat it; the finite ones.

    Extrapolations are held against the best average, so that none of them shines by a better
    window or schedule alone; in other sweeps all are held against the baseline.
    """
    averages = [one for one in table if one.average]
    plain = averages if 0 < len(averages) < len(table) else [table[0]]
    rivals = [one for one in table if one not in plain]
    return [one for one in plain if one.finite], [one for one in rivals if one.finite]


def _chosen(selection: Selection, table: Sequence[_Candidate]) -> _Candidate:
    """The best of those that beat the simpler ones by more than their standard error, else the
    best of the simpler ones. Where no error is known, any gain counts."""
    plain, rivals = _groups(table)
    if not plain:
        return _best(selection, rivals)
    base = _best(selection, plain)
    gains = [(one, _gain(selection, one, base)) for one in rivals]
    winners = [one for one, gain in gains if gain.clear or (gain.error is None and gain.mean > 0)]
    return _best(selection, winners or [base])


def _gain(selection: Selection, one: _Candidate, base: _Candidate) -> Difference:
    """As `difference`, but positive where `one` is the better."""
    mean, error = difference(one.measured, base.measured)
    return Difference(-mean if selection.goal == "min" else mean, error)


def _verdict(selection: Selection, table: Sequence[_Candidate]) -> str:
    """In words: does the best beat what there is without it, by more than its standard error?"""
    known, rivals = _groups(table)
    best = _chosen(selection, table)
    if known and rivals:
        sentences = [_comparison(selection, known, rivals)]
    else:
        score = f"{_score(selection)} {best.measured.score:.6g}"
        sentences = [f"{best.name} is best ({score}); there is nothing to hold it against."]
    if lost := [one.name for one in table if not one.finite]:
        names = ", ".join(lost)
        sentences.append(f"Never chosen, for want of a finite {_score(selection)}: {names}.")
    if len(rivals) > 1 and best in rivals:
        count = len(known) + len(rivals)
        sentences.append(
            f"The best of {count} looks better on the data that chose it than elsewhere."
        )
    return " ".join(sentences)


def _comparison(
    selection: Selection, plain: Sequence[_Candidate], rivals: Sequence[_Candidate]
) -> str:
    """The best of `rivals` against the best of `plain`."""
    base, best = _best(selection, plain), _best(selection, rivals)
    gains = {one.name: _gain(selection, one, base) for one in rivals}
    gain = gains[best.name]
    against = base.name
    if base.average:
        against = f"the {'best ' if len(plain) > 1 else ''}average ({base.name})"
    if gain.error is None:
        return _without_error(selection, best.name, against, gain)
    if gain.clear:
        times = f" ({gain.mean / gain.error:.1f} standard errors)" if gain.error else ""
        return f"{best.name} beats {against} by {_amount(gain)} nats per token{times}."
    clearest = max(gains, key=lambda name: (gains[name].clear, gains[name].mean))
    if gains[clearest].clear:
        return (
            f"{best.name} beats {against} by {_amount(gain)} nats per token, no more than the "
            f"standard error; {clearest} does by {_amount(gains[clearest])}."
        )
    size = _amount(Difference(abs(gain.mean), gain.error))
    how = "better" if gain.mean > 0 else "worse"
    way = f"is {how} by {size} nats per token" if gain.mean else "does just as well"
    subject = "Extrapolation does not beat" if base.average else "Nothing beats"
    return (
        f"{subject} {against} by more than its standard error: the best beside it, {best.name}, "
        f"{way}; use {base.name}."
    )


def _amount(gain: Difference) -> str:
    """'0.00410 +- 0.00092': two digits of the error say all that it knows."""
    if not gain.error:
        return f"{gain.mean:.3g} +- 0"
    digits = max(0, 1 - math.floor(math.log10(gain.error)))
    return f"{gain.mean:.{digits}f} +- {gain.error:.{digits}f}"


def _without_error(selection: Selection, best: str, against: str, gain: Difference) -> str:
    """Of a command, or a text of one window: nothing tells whether numbers differ by chance."""
    loss = selection.metric == "loss"
    unit = " nats per token" if loss else ""
    why = f"{'a single window' if loss else 'a command'} gives no standard error"
    size = f"{abs(gain.mean):.3g}{unit}"
    if gain.mean > 0:
        return f"{best} beats {against} by {size}, perhaps by chance: {why}."
    way = f"is worse by {size}" if gain.mean else "does just as well"
    return f"Nothing beats {against}: the best beside it, {best}, {way} ({why})."
