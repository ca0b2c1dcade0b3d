"""Singular Value Calibration against a full SVD in float64, and what holds exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.methods.calibrate import Calibration, Setting, calibrate
from distmerge.methods.linalg import LinAlgError
from distmerge.methods.stages import Panel, drive
from tests.support.svc_reference import calibrated

SHAPES = ((24, 60), (60, 24), (33, 33), (1, 50), (50, 1), (1, 1), (40, 1300), (1300, 40))
properties = settings(settings.get_profile("math"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(count: int, rows: int, columns: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Deltas that share a part, as those of related tasks do."""
    shared = random(rows, columns, seed=seed)
    return [shared + 2 * random(rows, columns, seed=seed + 1 + i) for i in range(count)]


def solve(
    merged: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    *outputs: tuple[float, float],
    cuts: Sequence[int] = (),
) -> tuple[Calibration, list[torch.Tensor]]:
    """Calibrate for pairs (alpha, scale), in panels that end at `cuts`."""
    rows, columns = merged.shape[-2:]
    long = -1 if rows <= columns else -2
    ends = [0, *cuts, merged.shape[long]]
    panels = [
        Panel([x.narrow(long, a, b - a) for x in deltas], merged.narrow(long, a, b - a))
        for a, b in pairwise(ends)
    ]
    found = drive(calibrate(rows, columns, [Setting(*x) for x in outputs]), lambda: panels)
    parts = [[found.apply(panel, n) for n in range(len(found.outputs))] for panel in panels]
    return found, [torch.cat(list(output), dim=long) for output in zip(*parts, strict=True)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to `expected`, or to 1e-300 where that is zero."""
    return float((found.double() - expected).norm() / expected.double().norm().clamp(min=1e-300))


def apart(sigma: torch.Tensor) -> torch.Tensor:
    """Which directions have a singular value of their own, and not far below the largest."""
    gaps = sigma.diff(prepend=torch.tensor([torch.inf])).abs() > 1e-3 * sigma
    return gaps & gaps.roll(-1) & (sigma > 1e-6 * sigma[0])


def check(
    merged: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    alpha: float,
    scale: float = 1.0,
    slack: tuple[float, float] = (0, 0),
) -> Calibration:
    """Hold result, singular values and gamma against the reference. `slack` is how much more than
    usual result and gamma may be off."""
    found, (result,) = solve(merged, deltas, (alpha, scale))
    expected = calibrated(merged, deltas, alpha, scale)
    assert result.dtype == torch.float32
    assert distance(result, expected.result) < 1e-5 + slack[0]
    assert float((scale * found.sigma - expected.sigma).abs().max()) <= 1e-7 * expected.sigma[0]
    which = apart(expected.sigma)
    torch.testing.assert_close(
        found.gamma[0, which], expected.gamma[which], rtol=1e-4 + slack[1], atol=0
    )
    assert float(found.gamma.max()) <= max(1, 1 / alpha) * (1 + 1e-12)
    return found


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_it_is_the_formulas(rows: int, columns: int, count: int) -> None:
    deltas = related(count, rows, columns)
    found = check(torch.stack(deltas).mean(0), deltas, 1 / count)
    assert found.fallback == [None]


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor], float, float]:
    """Tasks of any ranks and sizes, merged by any weights."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    count, seed = draw(st.integers(1, 16)), draw(st.integers(0, 2**20))
    size = 10.0 ** draw(st.integers(-30, 15))
    deltas = []
    for i in range(count):
        rank = draw(st.integers(0, min(rows, columns)))
        left, right = random(rows, rank, seed=seed + i), random(rank, columns, seed=seed - i)
        deltas.append(left @ right * size * 10.0 ** draw(st.integers(-1, 1)))
    weights = draw(st.lists(st.floats(-0.5, 2), min_size=count, max_size=count))
    merged = sum((w * x for w, x in zip(weights, deltas, strict=True)), torch.zeros(rows, columns))
    alpha = draw(st.floats(0.02, 2))
    return merged, deltas, alpha, draw(st.sampled_from([0.05, 0.3, 1.0, 4.0]))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as another rounding to float32 might have left it."""
    return x.double() * (1 + 6e-8 * random(*x.shape, seed=1).double().clamp(-1, 1))


@properties
@given(cases())
def test_any_tasks_are_calibrated_as_the_formulas_say(
    case: tuple[torch.Tensor, list[torch.Tensor], float, float],
) -> None:
    """As far as rounding of the inputs leaves it open: a task that has next to nothing in a
    direction of D can have any say in it."""
    merged, deltas, alpha, scale = case
    expected = calibrated(merged, deltas, alpha, scale)
    other = calibrated(rounded(merged), [rounded(x) for x in deltas], alpha, scale)
    moved = (other.gamma / expected.gamma - 1).abs()[apart(expected.sigma)]
    slack = 30 * distance(other.result, expected.result), 100 * float(moved.sum())
    check(merged, deltas, alpha, scale, slack)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_task_alone_is_itself_at_any_scale(rows: int, columns: int) -> None:
    delta = random(rows, columns)
    _, outputs = solve(delta, [delta], (1.0, 1.0), (0.3, 1.0), (0.3, 0.3), (1.0, 5.0))
    for output in outputs:
        assert distance(output, delta) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("count", [2, 7])
def test_identical_tasks_make_one_of_them(rows: int, columns: int, count: int) -> None:
    delta = random(rows, columns)
    _, outputs = solve(delta * count, [delta] * count, (1 / count, 1.0), (1 / count, 1 / count))
    for output in outputs:
        assert distance(output, delta) < 1e-6


def orthogonal(count: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Tasks whose row spaces and column spaces are orthogonal to those of the others."""
    left = torch.linalg.qr(random(rows, rows).double()).Q
    right = torch.linalg.qr(random(columns, columns, seed=1).double()).Q
    size = min(rows, columns) // count
    values = torch.linspace(1, 2, size * count, dtype=torch.float64)
    parts = [slice(i * size, (i + 1) * size) for i in range(count)]
    return [((left[:, p] * values[p]) @ right[:, p].T).float() for p in parts]


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize(
    ("alpha", "scale", "factor"),
    [
        (1 / 8, 1 / 8, 1),  # the mean: calibration makes it the sum
        (1, 1, 1),
        (1 / 8, 1, 8 / (1 + 7 / 8)),
        (1 / 8, 0.3, 0.3 * 8 / (0.3 + 7 / 8)),
    ],
)
def test_orthogonal_tasks_do_not_suppress_each_other(
    rows: int, columns: int, alpha: float, scale: float, factor: float
) -> None:
    deltas = orthogonal(8, rows, columns)
    total = torch.stack(deltas).sum(0)
    found, (result,) = solve(total, deltas, (alpha, scale))
    assert found.fallback == [None]
    assert distance(result, factor * total.double()) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30)])
def test_only_the_ratio_of_scale_to_alpha_matters(rows: int, columns: int) -> None:
    deltas = related(4, rows, columns)
    total = torch.stack(deltas).sum(0)
    _, (mean, plain) = solve(total, deltas, (1 / 4, 1 / 4), (1, 1))
    assert distance(mean, plain) < 1e-6
    _, (larger,) = solve(8 * total, deltas, (8, 1))
    assert distance(larger, plain) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30)])
def test_the_order_of_the_tasks_does_not_matter(rows: int, columns: int) -> None:
    deltas = related(5, rows, columns)
    total = torch.stack(deltas).sum(0)
    _, (there,) = solve(total, deltas, (0.2, 1.0))
    _, (back,) = solve(total, deltas[::-1], (0.2, 1.0))
    assert distance(there, back) < 1e-6


def test_a_task_that_was_outvoted_counts_as_alpha() -> None:
    """D_2 = -D_1 / 2: s is 1/2 for the first task, and -1 for the second."""
    delta = random(20, 30)
    _, (result,) = solve(delta / 2, [delta, -delta / 2], (0.25, 1.0))
    assert distance(result, 2 / (0.5 + 0.25) * delta / 2) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (30, 20)])
def test_a_task_without_a_delta_counts(rows: int, columns: int) -> None:
    delta = random(rows, columns)
    found, (result,) = solve(delta, [delta, torch.zeros_like(delta)], (0.5, 1.0))
    assert distance(result, 2 / (1 + 0.5) * delta) < 1e-6
    torch.testing.assert_close(found.gamma, torch.full_like(found.gamma, 2 / 1.5))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_nothing_stays_nothing(rows: int, columns: int) -> None:
    delta = random(rows, columns)
    for deltas in ([delta, -delta], [delta * 0, delta * 0]):
        found, (result,) = solve(delta * 0, deltas, (0.5, 1.0))
        assert not result.any()
        assert bool((found.gamma == 1).all())
        assert found.fallback == [None]


@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e15])
def test_the_size_of_the_deltas_changes_nothing(rows: int, columns: int, size: float) -> None:
    deltas = [size * x for x in related(3, rows, columns)]
    check(torch.stack(deltas).sum(0), deltas, 1 / 3)


@pytest.mark.parametrize(("rows", "columns"), [(30, 700), (700, 30), (40, 40)])
def test_low_ranks_and_twins(rows: int, columns: int) -> None:
    first, second = (random(rows, 3, seed=i) @ random(3, columns, seed=9 + i) for i in range(2))
    deltas = [first, first, second]
    found = check(torch.stack(deltas).sum(0), deltas, 1 / 3)
    assert found.fallback == [None]


def graded(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Singular values from 1 to 1e-9, none of them lost in float32: they lie in their own rows."""
    side = min(rows, columns)
    scale = 10 ** torch.linspace(0, -9, side)
    wide = scale[:, None] * random(side, max(rows, columns), seed=seed)
    return wide if rows <= columns else wide.T.contiguous()


@pytest.mark.parametrize(("rows", "columns"), [(12, 90), (90, 12), (19, 900)])
def test_small_directions_are_right_where_alpha_lets_them_matter(rows: int, columns: int) -> None:
    """Two tasks that nearly cancel: what is left is amplified up to 1 / alpha times."""
    merged, apart = graded(rows, columns, 0), random(rows, columns, seed=1)
    deltas = [merged / 2 + apart, merged / 2 - apart]
    found = check(merged, deltas, 1e-7)
    assert found.fallback == ["singular values below 1e-07 of the largest matter at alpha=1e-07"]
    assert float(found.gamma.max()) > 1e6
    assert check(merged, deltas, 0.5).fallback == [None]


@pytest.mark.parametrize(("rows", "columns"), [(20, 900), (900, 20)])
def test_small_directions_are_measured_as_well_as_large_ones(rows: int, columns: int) -> None:
    merged = graded(rows, columns, 0)
    found, _ = solve(merged, [merged, merged], (0.5, 0.5))
    which = found.sigma > 1e-6 * found.sigma[0]
    torch.testing.assert_close(found.gamma[0, which], torch.full((int(which.sum()),), 2.0).double())


@pytest.mark.parametrize(("rows", "columns"), [(20, 60), (60, 20)])
def test_what_is_amplified_does_not_drown_the_rest(rows: int, columns: int) -> None:
    """A direction of 1e-5 that grows 20000 times."""
    side = min(rows, columns)
    left = torch.linalg.qr(random(rows, rows).double()).Q[:, :side]
    right = torch.linalg.qr(random(columns, columns, seed=1).double()).Q
    sigma = torch.linspace(2, 1, side, dtype=torch.float64)
    sigma[-1] = 1e-5
    beyond = right[:, -1] if rows < columns else right[:, 0]
    merged = (left * sigma) @ right[:, :side].T
    task = 1e-3 * torch.outer(left[:, -1], beyond)
    deltas = [(merged / 2 + task).float(), (merged / 2 - task).float()]
    found = check(merged.float(), deltas, 1e-6)
    assert found.fallback == [None]
    assert float(found.gamma.max()) > 1e4


@pytest.mark.parametrize(("rows", "columns"), [(12, 90), (90, 12)])
def test_an_output_does_not_depend_on_the_others(rows: int, columns: int) -> None:
    merged, apart = graded(rows, columns, 0), random(rows, columns, seed=1)
    deltas = [merged / 2 + apart, merged / 2 - apart]
    sweep = [(0.5, 1.0), (1e-7, 1.0), (0.5, 0.3)]
    found, together = solve(merged, deltas, *sweep)
    assert [reason is None for reason in found.fallback] == [True, False, True]
    for setting, output in zip(sweep, together, strict=True):
        assert torch.equal(solve(merged, deltas, setting)[1][0], output)


@pytest.mark.parametrize(("rows", "columns"), [(30, 1500), (1500, 30)])
def test_panels_change_no_more_than_rounding(rows: int, columns: int) -> None:
    deltas = related(3, rows, columns)
    total = torch.stack(deltas).sum(0)
    _, (whole,) = solve(total, deltas, (0.3, 1.0))
    for cuts in ([700], [1, 2, 40], [512, 1024], range(100, 1500, 100)):
        assert distance(solve(total, deltas, (0.3, 1.0), cuts=cuts)[1][0], whole) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(30, 1500), (1500, 30)])
def test_where_the_panels_lie_changes_no_bit(rows: int, columns: int) -> None:
    deltas = related(3, rows, columns)
    matrices = [torch.stack(deltas).sum(0), *deltas]
    _, (expected,) = solve(matrices[0], deltas, (0.3, 1.0), cuts=[700])
    for offset in (1, 3, 7):
        moved = [torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x) for x in matrices]
        _, (result,) = solve(moved[0], moved[1:], (0.3, 1.0), cuts=[700])
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12), (8, 8)])
def test_a_batch_is_its_matrices_one_by_one(rows: int, columns: int) -> None:
    """Among them one of low rank, one graded and one of zeros."""
    deltas = [random(2, 3, rows, columns, seed=i) for i in range(3)]
    for i, delta in enumerate(deltas):
        delta[0, 1] = random(rows, 2, seed=i) @ random(2, columns, seed=i)
        delta[1, 0] = graded(rows, columns, i)
        delta[1, 2] = 0
    total = torch.stack(deltas).sum(0)
    found, outputs = solve(total, deltas, (1 / 3, 1.0), (0.5, 0.4))
    assert found.sigma.shape == (2, 3, min(rows, columns))
    assert found.gamma.shape == (2, 3, 2, min(rows, columns))
    for index in ((i, j) for i in range(2) for j in range(3)):
        own, alone = solve(total[index], [x[index] for x in deltas], (1 / 3, 1.0), (0.5, 0.4))
        which = apart(own.sigma)
        torch.testing.assert_close(
            found.gamma[index][:, which], own.gamma[:, which], rtol=1e-5, atol=0
        )
        for batched, single in zip(outputs, alone, strict=True):
            assert distance(batched[index], single.double()) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(rows: int, columns: int, bad: float) -> None:
    delta = random(rows, columns)
    delta[3, 4] = bad
    with pytest.raises(ArithmeticError, match=r"can't be decomposed: .* NaN or Inf"):
        solve(delta, [delta], (1.0, 1.0))


@pytest.mark.parametrize("wrong", ["raises", "not orthogonal", "of another matrix"])
def test_an_svd_steps_in_where_eigh_fails(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """It has to be made to fail: no matrix is known with which it does."""
    eigh = torch.linalg.eigh

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "raises":
            raise LinAlgError("did not converge")
        values, vectors = eigh(matrix)
        if wrong == "not orthogonal":
            vectors[:, 0] += 1e-9
        return values, vectors.roll(1, 0) if wrong == "of another matrix" else vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    deltas = related(3, 20, 30)
    assert check(torch.stack(deltas).sum(0), deltas, 0.3).fallback == [
        "eigh failed; SVD of the Gram matrix"
    ]
