"""The Gram path against principal components of whole weights, and what holds exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distmerge.methods.extrapolate import add_gram, cosines, null_shares, plane, solve
from tests.support.trajectories import (
    PIECE,
    decompose,
    gram_of,
    moved,
    uniform,
    walk,
    whole_numbers,
)

F64 = torch.float64
properties = settings(settings.get_profile("math"))


def check_against_weights(points: torch.Tensor, merging: torch.Tensor) -> None:
    trend, direct = solve(gram_of(list(points)), merging, "principal"), decompose(points, merging)
    shares = direct.variances / direct.variances.sum()
    torch.testing.assert_close(trend.merged[: len(shares)], shares, rtol=0, atol=1e-9)
    raw = torch.linalg.svdvals(points - points.mean(0)) ** 2
    torch.testing.assert_close(trend.raw[: len(raw)], raw / raw.sum(), rtol=0, atol=1e-9)
    scale = float(direct.scores.abs().max())
    found = plane(gram_of(list(points)), trend, merging)[:, 0]
    torch.testing.assert_close(found, direct.scores[:, 0], rtol=1e-9, atol=1e-9 * scale)
    far = float(direct.merged.abs().max())
    for intervals in (0.0, 0.5, 1.0, -2.0, 7.0):
        expected = direct.theta(intervals)
        torch.testing.assert_close(
            moved(points, trend, intervals), expected, rtol=1e-9, atol=1e-9 * far
        )


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(24, 6, 1), (9, 3, 2), (5, 1, 1), (4, 3, 1)]
)
@pytest.mark.parametrize("size", [1000, 40, 2])
def test_the_gram_path_is_principal_components_of_the_weights(
    count: int, window: int, stride: int, size: int
) -> None:
    check_against_weights(walk(count, size, seed=count + size), uniform(count, window, stride))


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoints, and windows over them with any weights of sum 1."""
    window, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    count = window + stride * draw(st.integers(1, 6)) + draw(st.integers(0, stride - 1))
    points = walk(
        count, draw(st.integers(1, 80)), seed=draw(st.integers(0, 2**20)),
        drift=draw(st.sampled_from([0.0, 0.3, 2.0])),
    )  # fmt: skip
    weights = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=window, max_size=window)))
    merging = torch.zeros(len(uniform(count, window, stride)), count, dtype=F64)
    merging[uniform(count, window, stride) > 0] = (
        (weights / weights.sum()).double().repeat(len(merging))
    )
    return points, merging / merging.sum(1, keepdim=True)


@properties
@given(trajectories())
def test_any_trajectory_goes_where_its_weights_do(
    case: tuple[torch.Tensor, torch.Tensor],
) -> None:
    points, merging = case
    variances = decompose(points, merging).variances
    # Where two components are equally strong, neither is the direction.
    assume(len(variances) == 1 or float(variances[1]) < 0.99 * float(variances[0]))
    check_against_weights(points, merging)


@properties
@given(trajectories(), st.floats(-20, 20), st.sampled_from(["principal", "secant"]))
def test_the_coefficients_sum_to_one(
    case: tuple[torch.Tensor, torch.Tensor],
    intervals: float,
    direction: Literal["principal", "secant"],
) -> None:
    points, merging = case
    trend = solve(gram_of(list(points)), merging, direction)
    found = torch.tensor(trend.coefficients(intervals), dtype=F64)
    assert abs(float(found.sum()) - 1) < 1e-14 * (1 + float(found.abs().sum())) * len(found)


@properties
@given(trajectories(), st.sampled_from(["principal", "secant"]))
def test_no_step_is_the_last_window_s_average_to_the_bit(
    case: tuple[torch.Tensor, torch.Tensor], direction: Literal["principal", "secant"]
) -> None:
    points, merging = case
    trend = solve(gram_of(list(points)), merging, direction)
    assert trend.coefficients(0) == trend.coefficients(-0.0) == tuple(merging[-1].tolist())


@pytest.mark.parametrize("direction", ["principal", "secant"])
@pytest.mark.parametrize(
    ("count", "window", "stride"), [(8, 3, 1), (9, 2, 3), (7, 1, 2), (3, 2, 1)]
)
def test_checkpoints_on_a_line_go_on_along_it(
    count: int, window: int, stride: int, direction: Literal["principal", "secant"]
) -> None:
    """theta_t = p + t q: all variance is explained, and theta(kappa) = m_last + kappa stride q."""
    generator = torch.Generator().manual_seed(count)
    p, q = torch.randn(2, 100, generator=generator, dtype=F64)
    points = p + torch.arange(count)[:, None] * q
    merging = uniform(count, window, stride)
    trend = solve(gram_of(list(points)), merging, direction)
    assert float(trend.raw[0]) == pytest.approx(1, abs=1e-12)
    assert float(trend.merged[0]) == pytest.approx(1, abs=1e-12)
    assert trend.length == pytest.approx(stride * float(q.norm()), rel=1e-12)
    last = p + (count - 1 - (window - 1) / 2) * q
    for kappa in (0, 0.5, 1, 10, -1):
        expected = last + kappa * stride * q
        torch.testing.assert_close(moved(points, trend, kappa), expected, rtol=0, atol=1e-11)


def test_two_merged_checkpoints_make_one_direction() -> None:
    points = walk(5, 30)
    merging = uniform(5, 4)
    trend = solve(gram_of(list(points)), merging, "principal")
    first, last = merging @ points
    torch.testing.assert_close(moved(points, trend, 3), last + 3 * (last - first))
    assert trend.merged.tolist() == pytest.approx([1, 0], abs=1e-12)


def test_the_secant_joins_the_first_and_the_last_merged_checkpoint() -> None:
    points, merging = walk(12, 50), uniform(12, 4, 2)
    trend = solve(gram_of(list(points)), merging, "secant")
    merged = merging @ points
    step = (merged[-1] - merged[0]) / (len(merged) - 1)
    torch.testing.assert_close(moved(points, trend, 1.5), merged[-1] + 1.5 * step)
    assert trend.length == pytest.approx(float(step.norm()))


def test_a_trajectory_turned_round_is_oriented_the_other_way() -> None:
    points, merging = walk(10, 40, drift=1.0), uniform(10, 3)
    gram = gram_of(list(points))
    there = solve(gram, merging, "principal")
    back = solve(gram.flip(0, 1), merging, "principal")
    assert back.interval.flip(0).tolist() == pytest.approx((-there.interval).tolist(), abs=1e-12)
    ahead = moved(points, there, 1) - moved(points, there, 0)
    assert float(ahead @ (points[-1] - points[0])) > 0


@pytest.mark.parametrize("direction", ["principal", "secant"])
def test_checkpoints_that_are_equal_have_no_length(
    direction: Literal["principal", "secant"],
) -> None:
    points = walk(1, 40).repeat(6, 1)
    trend = solve(gram_of(list(points)), uniform(6, 2), direction)
    assert trend.length == 0
    assert not trend.raw.any()
    assert not trend.merged.any()


@pytest.mark.parametrize("direction", ["principal", "secant"])
@pytest.mark.parametrize("window", [1, 2])
def test_a_trajectory_that_ends_where_it_began_has_no_length(
    direction: Literal["principal", "secant"], window: int
) -> None:
    points = walk(7, 40)
    points[-window:] = points[:window]
    assert solve(gram_of(list(points)), uniform(7, window), direction).length == 0


def test_the_order_of_the_weights_changes_no_more_than_rounding() -> None:
    """Names in another order, and tensors cut elsewhere."""
    points, merging = walk(10, 997), uniform(10, 3)
    order = torch.randperm(997, generator=torch.Generator().manual_seed(0))
    whole = solve(gram_of(list(points)), merging, "principal")
    other = torch.zeros(10, 10, dtype=F64)
    for part in torch.split(points[:, order], [1, 500, 3, 400, 93], dim=1):
        add_gram(list(part), other, elements=PIECE)
    found = solve(other, merging, "principal")
    assert found.coefficients(2) == pytest.approx(whole.coefficients(2), rel=1e-10, abs=1e-12)


def test_a_constant_added_to_all_shifts_the_result_and_no_coefficient() -> None:
    """Whole numbers, so that adding loses nothing: then not a bit of the coefficients changes."""
    points, merging = whole_numbers(8, 300), uniform(8, 2)
    constant = whole_numbers(1, 300)[0] * 2**20
    here = solve(gram_of(list(points)), merging, "principal")
    there = solve(gram_of(list(points + constant)), merging, "principal")
    assert here.coefficients(2) == there.coefficients(2)
    shift = moved(points + constant, there, 2) - moved(points, here, 2)
    torch.testing.assert_close(shift, constant, rtol=1e-12, atol=1e-6)


def test_a_random_walk_looks_like_a_trend() -> None:
    """The published-looking shares: .61 of raw and .77 of merged checkpoints (T=24, N=6)."""
    merging = uniform(24, 6)
    raw, merged = null_shares(merging)
    assert float(raw[0]) == pytest.approx(0.61, abs=0.005)
    assert float(merged[0]) == pytest.approx(0.77, abs=0.005)
    simulated = solve(gram_of(list(walk(24, 20_000, drift=0)), 4096), merging, "principal")
    torch.testing.assert_close(raw, simulated.raw, rtol=0, atol=0.02)
    torch.testing.assert_close(merged, simulated.merged, rtol=0, atol=0.02)


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 4, 10])
def test_shares_descend_to_a_sum_of_one(window: int, stride: int) -> None:
    merging = uniform(24, window, stride)
    trend = solve(gram_of(list(walk(24, 100))), merging, "principal")
    for shares in (trend.raw, trend.merged, *null_shares(merging)):
        assert float(shares.sum()) == pytest.approx(1)
        assert all(before >= after >= 0 for before, after in pairwise(shares.tolist()))


@pytest.mark.parametrize("direction", ["principal", "secant"])
def test_the_plane_shows_true_projections(direction: Literal["principal", "secant"]) -> None:
    points, merging = walk(12, 60), uniform(12, 4)
    gram = gram_of(list(points))
    trend = solve(gram, merging, direction)
    merged = merging @ points
    first = (trend.interval @ points) / trend.length
    assert float(first.norm()) == pytest.approx(1)
    rest = merged - merged.mean(0)
    rest = rest - torch.outer(rest @ first, first)
    second = torch.linalg.svd(rest, full_matrices=False)[2][0]
    found = plane(gram, trend, torch.eye(12, dtype=F64))
    true = (points - merged.mean(0)) @ torch.stack([first, second]).T
    torch.testing.assert_close(found[:, 0], true[:, 0])
    torch.testing.assert_close(found[:, 1].abs(), true[:, 1].abs())
    assert bool((torch.cdist(found, found) <= torch.cdist(points, points) + 1e-9).all())


def test_distances_of_flat_trajectories_are_those_of_the_plane() -> None:
    """Weights that move in two dimensions lose nothing when they are drawn."""
    axes = torch.linalg.qr(walk(2, 40).T)[0]
    points = walk(9, 2) @ axes.T
    gram, merging = gram_of(list(points)), uniform(9, 3)
    found = plane(gram, solve(gram, merging, "principal"), torch.eye(9, dtype=F64))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points))


def test_the_plane_of_a_line_has_one_coordinate() -> None:
    points = torch.arange(6)[:, None] * walk(1, 40)
    gram = gram_of(list(points))
    found = plane(gram, solve(gram, uniform(6, 2), "principal"), torch.eye(6, dtype=F64))
    assert found[:, 1].tolist() == [0.0] * 6
    assert found[:, 0].diff().tolist() == pytest.approx([float(walk(1, 40).norm())] * 5)


def test_across_a_line_of_averages_the_plane_shows_the_raw_checkpoints() -> None:
    """Checkpoints that swing from side to side: windows of two average that away."""
    line, side = torch.eye(2, dtype=F64)
    points = torch.stack([t * line + (-1) ** t * side for t in range(8)])
    gram, merging = gram_of(list(points)), uniform(8, 2)
    trend = solve(gram, merging, "principal")
    assert float(trend.merged[0]) == pytest.approx(1)
    found = plane(gram, trend, torch.eye(8, dtype=F64))[:, 1]
    assert (found * found[0].sign()).tolist() == pytest.approx([1.0, -1.0] * 4)


def test_cosines_are_those_of_successive_differences() -> None:
    points, merging = walk(9, 50), uniform(9, 3)
    steps = (merging @ points).diff(dim=0)
    unit = steps / steps.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines(gram_of(list(points)), merging), unit @ unit.T)


def test_a_difference_of_nothing_has_no_cosine() -> None:
    points = walk(4, 30)
    points[2] = points[1]
    found = cosines(gram_of(list(points)), torch.eye(4, dtype=F64))
    assert found[1].tolist() == found[:, 1].tolist() == [0, 0, 0]
    assert found.diagonal().tolist() == pytest.approx([1, 0, 1])


def test_the_last_two_merged_checkpoints_are_a_poor_direction() -> None:
    """With stride 1 they differ by (theta_t - theta_(t-N)) / N: two raw checkpoints, no more."""
    count, window = 24, 6
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 5000, generator=generator, dtype=F64)
    drift = torch.randn(5000, generator=generator, dtype=F64)
    points = torch.arange(count)[:, None] * 0.1 * drift + noise
    merging = uniform(count, window)
    before, last = (merging @ points)[-2:]
    torch.testing.assert_close(last - before, (points[-1] - points[-1 - window]) / window)
    trend = solve(gram_of(list(points), 4096), merging, "principal")
    to_drift = torch.nn.CosineSimilarity(dim=0)
    assert float(to_drift(last - before, drift)) < 0.5
    assert float(to_drift(trend.interval @ points, drift)) > 0.9
