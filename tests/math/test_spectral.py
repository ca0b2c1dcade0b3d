"""The spectral mergers, panel by panel, against full SVDs in float64, and what holds exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmerge.methods import linalg, spectral
from distmerge.methods.spectral import Merge
from distmerge.methods.stages import Method, Panel, drive
from tests.support import spectral_reference as reference

properties = settings(settings.get_profile("math"), max_examples=100)

NAMES = ("tsv_m", "iso_c", "iso_cts", "star")
SHAPES = ((40, 130), (130, 40), (64, 64))
Make = Callable[[int, int, int], Method[Merge]]
Whole = Callable[[Sequence[Tensor]], Tensor]


def fast(name: str, **parameters: float) -> Make:
    make: Make = getattr(spectral, name)
    return partial(make, **parameters)


def plain(name: str, **parameters: float) -> Whole:
    whole: Whole = getattr(reference, name)
    return partial(whole, **parameters)


def panels(deltas: Sequence[Tensor], size: int) -> list[Panel]:
    rows, columns = deltas[0].shape[-2:]
    parts = (torch.split(x, size, dim=-1 if rows <= columns else -2) for x in deltas)
    return [Panel(part, torch.empty(0)) for part in zip(*parts, strict=True)]


def solved(make: Make, parts: Sequence[Panel], shape: Sequence[int], tasks: int) -> Merge:
    return drive(make(shape[-2], shape[-1], tasks), lambda: parts)


def merged(make: Make, deltas: Sequence[Tensor], size: int = 50) -> Tensor:
    parts, shape = panels(deltas, size), deltas[0].shape
    merge = solved(make, parts, shape, len(deltas))
    assert merge.fallback is None
    out = [merge.apply(part.deltas) for part in parts]
    assert all(x.dtype == torch.float32 for x in out)
    return torch.cat(out, dim=-1 if shape[-2] <= shape[-1] else -2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.double().norm())


def spectrum(sigma: Tensor, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """A matrix with these singular values, as far as float32 has them."""
    u = torch.linalg.qr(normal(rows, len(sigma), seed=2 * seed).double())[0]
    v = torch.linalg.qr(normal(columns, len(sigma), seed=2 * seed + 1).double())[0]
    return torch.einsum("ir,r,jr->ij", u, sigma, v).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16])
def test_it_is_what_full_svds_give(name: str, shape: tuple[int, int], tasks: int) -> None:
    deltas = list(normal(tasks, *shape, seed=tasks))
    assert off(merged(fast(name), deltas), plain(name)(deltas)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("tasks", [8, 16])
def test_there_may_be_more_tasks_than_directions(
    name: str, shape: tuple[int, int], tasks: int
) -> None:
    deltas = list(normal(tasks, *shape, seed=tasks))
    assert off(merged(fast(name), deltas), plain(name)(deltas)) < 1e-6


@pytest.mark.parametrize(("share", "alike"), [(0.86, 0.8), (0.79, 0.6), (0.69, 0.6), (0.5, 0.6)])
def test_iso_cts_deals_directions_out_as_the_authors_do(share: float, alike: float) -> None:
    """To two tasks, of ten: int(8.6) leaves 2, one each; int(7.9) leaves 3, and round(1.5) is 2."""
    deltas = list(normal(2, 10, 30))
    found = merged(fast("iso_cts", common_share=share), deltas)
    assert torch.equal(found, merged(fast("iso_cts", common_share=alike), deltas))


@st.composite
def mergers(draw: st.DrawFn) -> tuple[Make, Whole]:
    name, parameters = draw(
        st.sampled_from(NAMES[:2]).map(lambda name: (name, dict[str, float]()))
        | st.floats(0, 1).map(lambda share: ("iso_cts", {"common_share": share}))
        | st.floats(0.05, 1).map(lambda eta: ("star", {"eta": eta}))
    )
    return fast(name, **parameters), plain(name, **parameters)


@st.composite
def tasks_of_any_rank(draw: st.DrawFn) -> list[Tensor]:
    """Whole numbers times a power of two, so that a low rank is exact; some zero, some twice."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = 2.0 ** draw(st.sampled_from([0, -27, -100, 50]))
    deltas: list[Tensor] = []
    for _ in range(draw(st.integers(1, 16))):
        rank = draw(st.integers(0, min(rows, columns)))
        left = torch.randint(-4, 5, (rows, rank), generator=generator).float()
        deltas.append(
            left @ torch.randint(-4, 5, (rank, columns), generator=generator).float() * scale
        )
    if draw(st.booleans()):
        deltas.append(deltas[0] * draw(st.sampled_from([1.0, 3.0, -1.0])))
    return deltas


def well_posed(whole: Whole, deltas: Sequence[Tensor], expected: Tensor) -> bool:
    """Whether the result hangs on no tie: between singular values at a cut, say."""
    noise = 1e-10 * normal(len(deltas), *deltas[0].shape).double()
    return all(
        off(whole([d + sign * d.norm() * e for d, e in zip(deltas, noise, strict=True)]), expected)
        < 1e-7
        for sign in (1, -1)
    )


@properties
@given(mergers(), tasks_of_any_rank(), st.integers(1, 30))
def test_any_tasks_give_what_full_svds_give(
    merger: tuple[Make, Whole], deltas: list[Tensor], size: int
) -> None:
    make, whole = merger
    expected = whole(deltas)
    found = merged(make, deltas, size)
    size_of_tasks = float(torch.stack(deltas).double().norm())
    if float(expected.norm()) <= 1e-9 * size_of_tasks:  # none, or they cancel
        assert float(found.double().norm()) <= 1e-6 * size_of_tasks
        return
    assume(well_posed(whole, deltas, expected))
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e15])
def test_a_scale_goes_through(name: str, shape: tuple[int, int], scale: float) -> None:
    deltas = list(normal(3, *shape))
    found = merged(fast(name), [scale * d for d in deltas]).double() / scale
    assert off(found, merged(fast(name), deltas)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_the_tasks_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    deltas = list(normal(5, *shape))
    assert off(merged(fast(name), deltas[::-1]), merged(fast(name), deltas)) < 1e-6


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "star"])
def test_a_transposed_matrix_gives_the_transposed_result(name: str) -> None:
    deltas = list(normal(3, 40, 130))
    turned = merged(fast(name), [d.T.contiguous() for d in deltas])
    assert off(turned.T, merged(fast(name), deltas)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40, 1300), (1300, 40)])
def test_panels_of_any_size_agree_and_the_same_panels_to_the_bit(
    name: str, shape: tuple[int, int]
) -> None:
    deltas = list(normal(3, *shape))
    whole = merged(fast(name), deltas, 1300)
    for size in (1299, 512, 77):
        assert off(merged(fast(name), deltas, size), whole) < 1e-6
    elsewhere = [torch.cat([torch.zeros(1), d.flatten()])[1:].view(shape) for d in deltas]
    assert torch.equal(merged(fast(name), elsewhere, 1300), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(name: str, shape: tuple[int, int]) -> None:
    deltas = [normal(2, 3, *shape, seed=i) for i in range(3)]
    together = merged(fast(name), deltas)
    for i, j in [(0, 0), (1, 2)]:
        alone = merged(fast(name), [d[i, j] for d in deltas])
        assert off(together[i, j], alone) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_did_not_solve_applies_the_same(name: str) -> None:
    """All that it needs of the solver is in the solutions."""
    deltas = list(normal(3, 40, 130))
    parts = panels(deltas, 130)
    here, there = fast(name)(40, 130, 3), fast(name)(40, 130, 3)
    stage, same = next(here), next(there)
    found: list[Merge] = []
    while len(found) < 2:
        solution = stage.solve(stage.accumulate(parts[0]))
        for method in (here, there):
            try:
                same = method.send([x.clone() for x in solution])
            except StopIteration as end:
                found.append(end.value)
        stage = same
    assert torch.equal(found[0].apply(deltas), found[1].apply(deltas))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_delta_gives_none(name: str, shape: tuple[int, int]) -> None:
    assert not merged(fast(name), [torch.zeros(shape)] * 3).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_of_one_task_is_that_task(shape: tuple[int, int]) -> None:
    delta = normal(*shape)
    assert off(merged(fast("tsv_m"), [delta]), delta) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_takes_what_tasks_share_once(shape: tuple[int, int]) -> None:
    """The leading 1/K of it, and the mean of the tasks' strengths."""
    sigma = torch.linspace(4, 1, 40, dtype=torch.float64)
    delta = spectrum(sigma, *shape)
    own = min(shape) // 2
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    leading = u[:, :own] * s[:own] @ vt[:own]
    assert off(merged(fast("tsv_m"), [delta, delta]), leading) < 1e-6
    assert off(merged(fast("tsv_m"), [delta, 2 * delta]), 1.5 * leading) < 1e-6


def apart(tasks: int, size: int, length: int, *, seeds: int) -> list[Tensor]:
    """Tasks with row and column spaces of their own: blocks on a diagonal, `seeds` unlike ones."""
    deltas = [torch.zeros(tasks * size, tasks * length) for _ in range(tasks)]
    for i, delta in enumerate(deltas):
        block = normal(size, length, seed=i % seeds)
        delta[i * size : (i + 1) * size, i * length : (i + 1) * length] = block
    return deltas


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_tasks_that_differ_by_rounding_count_as_one(shape: tuple[int, int]) -> None:
    delta = spectrum(torch.linspace(4, 1, 8, dtype=torch.float64), *shape)
    other = delta * (1 + 1e-7 * normal(*shape))
    assert off(merged(fast("tsv_m"), [delta, other]), plain("tsv_m")([delta, delta])) < 1e-5


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_tsv_m_of_tasks_that_do_not_meet_is_their_sum(shape: tuple[int, int]) -> None:
    deltas = apart(4, *shape, seeds=4)
    assert off(merged(fast("tsv_m"), deltas), sum(deltas, torch.zeros(()))) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_leaves_a_flat_spectrum_alone(shape: tuple[int, int]) -> None:
    delta = spectrum(torch.full((min(shape),), 3.0, dtype=torch.float64), *shape)
    assert off(merged(fast("iso_c"), [0.25 * delta, 0.75 * delta]), delta) < 1e-6


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_iso_c_sets_as_many_singular_values_as_there_are(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randint(-4, 5, (40, rank), generator=generator).float()
    delta = left @ torch.randint(-4, 5, (rank, 130), generator=generator).float()
    found = torch.linalg.svdvals(merged(fast("iso_c"), [delta]).double())
    mean = float(torch.linalg.svdvals(delta.double()).mean())
    assert found[:rank].tolist() == pytest.approx([mean] * rank, rel=1e-6)
    assert float(found[rank:].sum()) < 1e-4 * mean


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_with_all_in_common_is_iso_c(shape: tuple[int, int]) -> None:
    deltas = list(normal(3, *shape))
    expected = merged(fast("iso_c"), deltas)
    assert off(merged(fast("iso_cts", common_share=1.0), deltas), expected) < 1e-6
    for share in (0, 0.5, 0.8):
        found = merged(fast("iso_cts", common_share=share), deltas[:1])
        assert off(found, merged(fast("iso_c"), deltas[:1])) < 1e-6


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_iso_cts_of_tasks_that_do_not_meet_is_iso_c(shape: tuple[int, int]) -> None:
    """Equally strong tasks: each has six of the 12 common directions, and its last two besides."""
    deltas = apart(2, *shape, seeds=1)
    expected = merged(fast("iso_c"), deltas)
    assert off(merged(fast("iso_cts", common_share=0.75), deltas), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_star_that_keeps_all_is_the_mean(shape: tuple[int, int]) -> None:
    deltas = list(normal(4, *shape))
    expected = torch.stack(deltas).double().mean(0)
    assert off(merged(fast("star", eta=1.0), deltas), expected) < 1e-6


@pytest.mark.parametrize("eta", [0.01, 0.4, 0.77, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_star_keeps_the_nuclear_norm(shape: tuple[int, int], eta: float) -> None:
    delta = normal(*shape)
    before = torch.linalg.svdvals(delta.double())
    after = torch.linalg.svdvals(merged(fast("star", eta=eta), [delta]).double())
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-5)
    rank = int((after > 1e-5 * after[0]).sum())
    assert float(before[:rank].sum()) >= eta * float(before.sum()) * (1 - 1e-12)
    assert float(before[: rank - 1].sum()) < eta * float(before.sum())


def test_star_counts_tasks_without_a_delta() -> None:
    delta = normal(40, 130)
    found = merged(fast("star"), [delta, torch.zeros(40, 130), torch.zeros(40, 130)])
    assert off(3 * found, merged(fast("star"), [delta])) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weak_directions_are_not_lost_in_the_strong(name: str, shape: tuple[int, int]) -> None:
    """Singular values over five powers of ten: float32 products alone would lose the last."""
    sigma = torch.logspace(0, -5, min(shape), dtype=torch.float64)
    deltas = [spectrum(sigma, *shape, seed=i) for i in range(2)]
    for some in (deltas, deltas[:1]):
        assert off(merged(fast(name), some), plain(name)(some)) < 2e-6


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_directions_that_are_not_resolved_come_out_as_zero(name: str) -> None:
    """And not as what rounding makes of them, at full strength."""
    delta = torch.zeros(30, 60)
    delta[:10, :20] = normal(10, 20)
    delta[10:, 20:] = 1e-9 * normal(20, 40)
    found = merged(fast(name), [delta])
    assert found[:10].any()
    assert not found[10:].any()


@pytest.mark.parametrize("name", ["tsv_m", "iso_cts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tasks_that_nearly_agree_are_told_apart(name: str, shape: tuple[int, int]) -> None:
    base = normal(*shape)
    deltas = [base + 1e-2 * noise for noise in normal(3, *shape, seed=1)]
    assert off(merged(fast(name), deltas), plain(name)(deltas)) < 1e-6


@pytest.mark.parametrize(
    ("name", "calls"), [("iso_c", 1), ("star", 3), ("tsv_m", 5), ("iso_cts", 6)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_eigendecomposition_that_fails_is_done_by_svd(
    name: str, calls: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them it is: one a task, and those for the common part and the polar factors."""
    deltas = list(normal(3, *shape))
    expected = merged(fast(name), deltas)
    eigenbasis = linalg.eigenbasis
    for failing in range(calls):
        numbers = iter(range(calls))

        def fails_once(matrix: Tensor, failing: int = failing) -> tuple[Tensor, Tensor]:
            if next(numbers) == failing:  # noqa: B023
                raise linalg.LinAlgError("no convergence")
            return eigenbasis(matrix)

        monkeypatch.setattr(linalg, "eigenbasis", fails_once)
        merge = solved(fast(name), panels(deltas, 200), shape, 3)
        assert merge.fallback is not None
        assert merge.fallback.startswith("svd")
        assert off(merge.apply(deltas), expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_an_error_not_a_result(name: str) -> None:
    deltas = list(normal(2, 40, 130))
    deltas[1][3, 5] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN"):
        merged(fast(name), deltas)
