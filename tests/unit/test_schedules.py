"""Coefficients along a trajectory: exact values, and what holds for every length."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.errors import ConfigError
from distmerge.schedules import coefficients, normalized
from distmerge.trajectory import Schedule

UNIFORM = Schedule(kind="uniform")
WMA = Schedule(kind="wma")


def ema(a: float) -> Schedule:
    return Schedule(kind="ema", numbers=(a,))


def wsm(curve: str | list[float]) -> Schedule:
    if isinstance(curve, list):
        return Schedule(kind="wsm", numbers=tuple(curve))
    return Schedule(kind="wsm", curve=curve)


def given_weights(*values: float) -> Schedule:
    return Schedule(kind="weights", numbers=values)


EXACT: list[tuple[Schedule, list[float]]] = [
    (UNIFORM, [1.0]),
    (UNIFORM, [0.25] * 4),
    (WMA, [1.0]),
    (WMA, [0.1, 0.2, 0.3, 0.4]),
    (ema(1), [0, 0, 1]),
    (ema(0.5), [0.25, 0.25, 0.5]),
    (ema(0.1), [0.81, 0.09, 0.1]),
    (ema(0.2), [0.512, 0.128, 0.16, 0.2]),
    (wsm("linear"), [0.2] * 5),
    (wsm("minus-sqrt"), [0.5, 0.2071, 0.1589, 0.1340]),
    (wsm("minus-sqrt"), [0.3536, 0.1464, 0.1124, 0.0947, 0.0835, 0.0755, 0.0694, 0.0646]),
    (wsm("cosine"), [0.1464, 0.3536, 0.3536, 0.1464]),
    (wsm([1, 0.7, 0.4, 0.1]), [0.3, 0.3, 0.3, 0.1]),
    (wsm([1, 1, 0, 0]), [0, 1, 0, 0]),
    (wsm([5, 0.25]), [0.75, 0.25]),
    (given_weights(2, -0.5), [2, -0.5]),
]


@pytest.mark.parametrize(("schedule", "expected"), EXACT)
def test_exact_coefficients(schedule: Schedule, expected: list[float]) -> None:
    assert coefficients(schedule, len(expected)) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("count", [1, 3, 7, 49])
def test_uniform_is_the_nearest_float_to_one_nth(count: int) -> None:
    assert coefficients(UNIFORM, count) == (1 / count,) * count


counts = st.integers(1, 60)
named = st.one_of(
    st.sampled_from([UNIFORM, WMA, wsm("linear"), wsm("minus-sqrt"), wsm("cosine")]),
    st.floats(1e-3, 1).map(ema),
)


@given(named, counts, st.booleans(), st.none() | st.integers(0, 2**64))
def test_every_named_schedule_sums_to_one_and_has_no_negative_weight(
    schedule: Schedule, count: int, reverse: bool, scramble: int | None
) -> None:
    changed = Schedule(
        kind=schedule.kind,
        curve=schedule.curve,
        numbers=schedule.numbers,
        reverse=reverse,
        scramble=scramble,
    )
    values = coefficients(changed, count)
    assert len(values) == count
    assert math.fsum(values) == pytest.approx(1, abs=1e-12)
    assert min(values) >= -1e-15


@given(counts)
def test_wsm_with_a_linear_decay_is_the_uniform_average(count: int) -> None:
    assert coefficients(wsm("linear"), count) == pytest.approx([1 / count] * count, abs=1e-14)


@given(st.floats(0.01, 1), st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_ema_coefficients_unroll_its_recursion(a: float, run: list[float]) -> None:
    mean = run[0]
    for value in run[1:]:
        mean = a * value + (1 - a) * mean
    terms = zip(coefficients(ema(a), len(run)), run, strict=True)
    assert math.fsum(c * value for c, value in terms) == pytest.approx(mean, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_wsm_sums_from_the_end_are_the_decay_curve(decay: list[float]) -> None:
    values = coefficients(wsm(decay), len(decay))
    for i in range(1, len(decay)):
        assert math.fsum(values[i:]) == pytest.approx(decay[i], abs=1e-12)
    assert math.fsum(values) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("curve", ["linear", "minus-sqrt", "cosine"])
def test_a_curve_by_name_is_the_curve_by_values(curve: str) -> None:
    steps = [i / 6 for i in range(6)]
    values = {
        "linear": [1 - x for x in steps],
        "minus-sqrt": [1 - math.sqrt(x) for x in steps],
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in steps],
    }
    assert coefficients(wsm(values[curve]), 6) == coefficients(wsm(curve), 6)


def test_reverse_turns_the_coefficients_round() -> None:
    turned = Schedule(kind="wma", reverse=True)
    assert coefficients(turned, 9) == coefficients(WMA, 9)[::-1]


@given(counts, st.integers(0, 2**32))
def test_scramble_is_a_permutation_and_the_same_for_a_seed(count: int, seed: int) -> None:
    scrambled = Schedule(kind="wma", scramble=seed)
    first = coefficients(scrambled, count)
    assert sorted(first) == sorted(coefficients(WMA, count))
    assert coefficients(scrambled, count) == first


def test_scramble_gives_the_same_order_on_every_machine() -> None:
    """A permutation written down: another Python must not give another merge."""
    values = coefficients(Schedule(kind="wma", scramble=0), 8)
    assert [round(36 * value) for value in values] == [4, 8, 6, 3, 5, 2, 7, 1]
    orders = {coefficients(Schedule(kind="wma", scramble=seed), 8) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(kind="weights", numbers=(1, 3), normalize=True), (0.25, 0.75)),
        (Schedule(kind="weights", numbers=(3, -1), normalize=True), (1.5, -0.5)),
        (Schedule(kind="weights", numbers=(1, 3), normalize=True, reverse=True), (0.75, 0.25)),
        (Schedule(kind="weights", numbers=(1, 3)), (1, 3)),
    ],
)
def test_explicit_weights_are_normalised_only_if_asked(
    schedule: Schedule, expected: tuple[float, ...]
) -> None:
    assert coefficients(schedule, 2) == expected


@pytest.mark.parametrize("values", [(1.0, -1.0), (0.0, 0.0), (0.1, 0.2, -0.3), (1e300, -1e300)])
def test_weights_that_sum_to_zero_can_not_be_normalised(values: tuple[float, ...]) -> None:
    schedule = Schedule(kind="weights", numbers=values, normalize=True)
    with pytest.raises(ConfigError, match=r"trajectory\.schedule: the weights sum to zero"):
        coefficients(schedule, len(values))


@pytest.mark.parametrize(("kind", "count"), [("weights", 2), ("weights", 4), ("wsm", 2)])
def test_a_list_of_another_length_is_refused(kind: str, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"{kind}: 3 values for {count} checkpoints"):
        coefficients(Schedule(kind=kind, numbers=(1, 0.5, 0.1)), count)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_normalised_weights_sum_to_one_in_proportion(values: list[float]) -> None:
    found = normalized(values, "here")
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    ratio = [f / v for f, v in zip(found, values, strict=True)]
    assert max(ratio) == pytest.approx(min(ratio), rel=1e-12)
