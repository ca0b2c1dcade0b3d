"""Task arithmetic, TIES and DARE against whole tensors, sorted, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.methods import masks, task_vectors, thresholds
from distmerge.methods.task_vectors import Block, Known, Merger, Method, TaskVectors
from tests.support.task_reference import deltas, kept, merged, rescaled

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
BLOCK = 98_304
METHODS: tuple[Method, ...] = get_args(Method)
properties = settings.get_profile("math")


def models(
    *shape: int, tasks: int = 3, dtype: torch.dtype = F32, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and fine-tuned models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    moves = [torch.randn(shape, generator=generator) * 3e-4 for _ in range(tasks)]
    return base.to(dtype), [(base + move).to(dtype) for move in moves]


def flat(
    base: torch.Tensor, tasks: Sequence[torch.Tensor], size: int = BLOCK
) -> Callable[[], Iterator[Block]]:
    """Passes over flat blocks."""
    row, rows = base.view(1, -1), [task.view(1, -1) for task in tasks]
    return lambda: (
        Block(s, size, row[:, s : s + size], [task[:, s : s + size] for task in rows])
        for s in range(0, base.numel(), size)
    )


def ties(weights: Sequence[float], density: float, *, normalize: bool = True) -> Merger:
    return Merger("ties", tuple(weights), (density,) * len(weights), normalize, False)


def dare(method: Method, density: float, *, rescale: bool = True, tasks: int = 3) -> Merger:
    keys = tuple(masks.key(7, i, "w") for i in range(tasks))
    return Merger(method, (0.5, 0.4, 0.3)[:tasks], (density,) * tasks, False, rescale, keys)


def find(merger: Merger, base: torch.Tensor, tasks: Sequence[torch.Tensor]) -> Known:
    (known,) = TaskVectors(CPU).find([merger], flat(base, tasks), base.numel())
    return known


def merge(merger: Merger, base: torch.Tensor, tasks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The merged task vector of a tensor, block by block."""
    vectors, known = TaskVectors(CPU), find(merger, base, tasks)
    out = torch.full(base.shape, torch.nan)
    row = out.view(1, -1)
    for block in flat(base, tasks)():
        place = row[:, block.start : block.start + block.base.numel()]
        assert vectors.merge(merger, known, block, place).isfinite()
    return out


def alone(task: torch.Tensor, base: torch.Tensor, density: float) -> torch.Tensor:
    """What TIES leaves of one task: where it is not zero, it was kept."""
    return merge(ties([1.0], density, normalize=False), base, [task])


def mask(key: int, density: float, elements: int) -> torch.Tensor:
    out = torch.empty(1, elements)
    masks.fill(out, key, density, start=0, stride=elements)
    return out[0]


def check_close(found: torch.Tensor, exact: torch.Tensor, terms: Sequence[torch.Tensor]) -> None:
    """Within what float32 loses on the terms."""
    size = torch.stack([term.abs() for term in terms]).sum(0)
    bound = (len(terms) + 4) * torch.finfo(F32).eps * size + torch.finfo(F32).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


def decided(products: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where rounding can't turn the sign of a sum."""
    stacked = torch.stack(list(products))
    total, size = stacked.sum(0).abs(), stacked.abs().sum(0)
    return (total == 0) | (total > (len(products) + 1) * torch.finfo(F32).eps * size)


# What is kept


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("elements", [1, 7, 5000, 300_001, 700_003])
def test_ties_keeps_exactly_the_largest(elements: int, dtype: torch.dtype, density: float) -> None:
    base, (task,) = models(elements, tasks=1, dtype=dtype)
    (delta,) = deltas(base, [task])
    expected = torch.where(kept(delta, density), delta, 0.0)
    assert torch.equal(alone(task, base, density).double(), expected)


def test_density_zero_keeps_nothing() -> None:
    base, tasks = models(500)
    for method in METHODS[1:]:
        assert not merge(dare(method, 0.0), base, tasks).any()


HARD = {
    "one magnitude": torch.tensor([1.0, -1.0]).repeat(200_000),
    "all zero": torch.zeros(400_000),
    "nearly all zero": torch.arange(400_000).remainder(9_999).eq(0).float(),
    "two magnitudes": torch.tensor([1.0, -2.0]).repeat(200_000),
    "two magnitudes, one after the other": torch.tensor([1.0, 2.0]).repeat_interleave(200_000),
    "sorted": torch.linspace(0, 1, 400_000),
    "all at the end": torch.cat([torch.zeros(390_000), torch.linspace(1, 2, 10_000)]),
    "from subnormal to huge": torch.logspace(-44, 33, 400_000, dtype=F64).float(),
    "periodic": torch.arange(400_000).remainder(4096).eq(7) + torch.linspace(0, 1e-3, 400_000),
}  # fmt: skip


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("delta", HARD.values(), ids=HARD)
def test_deltas_that_defy_sampling(delta: torch.Tensor, density: float) -> None:
    expected = torch.where(kept(delta.double(), density), delta, 0.0)
    assert torch.equal(alone(delta, torch.zeros_like(delta), density), expected)


@pytest.mark.parametrize("density", [0.1, 0.4, 0.6])
def test_sampling_and_histograms_agree(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    base, (task,) = models(400_000, tasks=1, dtype=BF16)
    sampled = find(ties([1.0], density), base, [task])
    monkeypatch.setattr(task_vectors, "_SMALL", 10**9)
    assert torch.equal(find(ties([1.0], density), base, [task]), sampled)
    assert sampled[0, 1] < 400_000, "values at the threshold are equal, in bfloat16"


def test_what_is_kept_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that promises little, and a range that holds too much after all."""
    base, (task,) = models(400_000, tasks=1)
    expected = find(ties([1.0], 0.5), base, [task])
    for capacity in (10, 3000):
        monkeypatch.setattr(thresholds, "_CAPACITY", capacity)
        assert torch.equal(find(ties([1.0], 0.5), base, [task]), expected)


def test_a_sample_that_misleads_costs_passes_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, (task,) = models(400_000, tasks=1)
    expected = find(ties([1.0], 0.5), base, [task])
    for wrong in (torch.full((9,), 1e-9), torch.full((9,), 1e9)):
        monkeypatch.setattr(task_vectors, "_sample", lambda *_, wrong=wrong: {0: wrong.clone()})
        assert torch.equal(find(ties([1.0], 0.5), base, [task]), expected)


def test_inputs_are_left_as_they_are() -> None:
    base, tasks = models(300_000)
    copies = [x.clone() for x in (base, *tasks)]
    for merger in (ties([1.0, 2.0, 3.0], 0.4), dare("dare_ties", 0.5)):
        merge(merger, base, tasks)
    assert all(torch.equal(a, b) for a, b in zip(copies, (base, *tasks), strict=True))


# What is merged


@st.composite
def cases(draw: st.DrawFn) -> tuple[Merger, torch.Tensor, list[torch.Tensor]]:
    count = draw(st.integers(1, 5))
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 60)))
    dtype = draw(st.sampled_from([BF16, F16, F32, F64]))
    weight = st.floats(0.125, 2, width=16) | st.sampled_from([-0.5, 0.0, 1.0])
    density = st.floats(0.02, 1) | st.sampled_from([0.5, 1.0])
    base, tasks = models(*shape, tasks=count, dtype=dtype, seed=draw(st.integers(0, 99)))
    merger = Merger(
        draw(st.sampled_from(METHODS)),
        tuple(draw(weight) for _ in range(count)),
        tuple(draw(density) for _ in range(count)),
        draw(st.booleans()),
        draw(st.booleans()),
        tuple(masks.key(3, i, "w") for i in range(count)),
    )
    return merger, base, tasks


def reference(
    merger: Merger, base: torch.Tensor, tasks: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The merged task vector, and the weighted terms that were added up."""
    left = []
    for i, delta in enumerate(deltas(base, tasks)):
        density, chosen = merger.densities[i], torch.ones_like(delta)
        if merger.method == "ties":
            chosen = kept(delta, density).double()
        elif merger.method.startswith("dare") and density < 1:
            chosen = mask(merger.keys[i], density, delta.numel()).view(delta.shape).double()
        left.append(rescaled(delta, chosen) if merger.rescale else delta * chosen)
    terms = [w * x for w, x in zip(merger.weights, left, strict=True)]
    elect = merger.method.endswith("ties")
    exact = merged(left, merger.weights, elect=elect, normalize=merger.normalize)
    return exact, terms


@properties
@given(cases())
def test_every_merger_does_what_is_written(
    case: tuple[Merger, torch.Tensor, list[torch.Tensor]],
) -> None:
    merger, base, tasks = case
    exact, terms = reference(*case)
    found = merge(merger, base, tasks)
    sure = decided(terms) if merger.method.endswith("ties") else torch.ones_like(exact) > 0
    # Dividing by weights that nearly cancel enlarges what was lost before.
    enlarged = max(1.0, 1 / min(_divisors(merger))) if merger.normalize else 1.0
    check_close(found[sure], exact[sure], [enlarged * term[sure] for term in terms])


def _divisors(merger: Merger) -> list[float]:
    """All sums of some of the weights that a sum may be divided by."""
    sums = [0.0]
    for weight in merger.weights:
        sums += [total + weight for total in sums]
    return [abs(total) for total in sums if abs(total) >= 1e-8] or [1.0]


def test_the_sign_is_that_of_the_weighted_sum() -> None:
    base = torch.zeros(1, 6)
    tasks = [
        torch.tensor([[1.0, -1.0, 2.0, 1.0, 0.0, -3.0]]),
        torch.tensor([[-2.0, -3.0, -2.0, 0.0, 0.0, 1.0]]),
    ]
    # In column 2 the sum is zero: that counts as plus. What is zero agrees with nobody.
    plain = merge(ties([1.0, 1.0], 1.0), base, tasks)
    assert plain.tolist() == [[-2.0, -2.0, 2.0, 1.0, 0.0, -3.0]]
    weighted = merge(ties([4.0, 1.0], 1.0), base, tasks)
    assert torch.equal(weighted, torch.tensor([[1.0, -7 / 5, 2.0, 1.0, 0.0, -3.0]]))
    summed = merge(ties([1.0, 1.0], 1.0, normalize=False), base, tasks)
    assert summed.tolist() == [[-2.0, -4.0, 2.0, 1.0, 0.0, -3.0]]


def test_weights_that_cancel_divide_by_one() -> None:
    base, tasks = torch.zeros(1, 1), [torch.ones(1, 1), -torch.ones(1, 1)]
    for method in METHODS:
        merger = Merger(method, (2.0, -2.0), (1.0, 1.0), True, False, (1, 2))
        assert merge(merger, base, tasks).item() == 4


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tasks_can_be_listed_in_any_order(dtype: torch.dtype, density: float) -> None:
    """Two tasks: a sum of two has no order."""
    base, tasks = models(70, 90, tasks=2, dtype=dtype)
    for weights in ([0.5, 0.5], [0.3, 0.9]):
        one = merge(ties(weights, density), base, tasks)
        other = merge(ties(weights[::-1], density), base, tasks[::-1])
        assert torch.equal(one, other)


def test_identical_tasks_leave_what_one_leaves() -> None:
    base, (task,) = models(400, 300, tasks=1, dtype=BF16)
    together = merge(ties([0.5, 0.5], 0.2), base, [task, task])
    assert torch.equal(together, alone(task, base, 0.2))


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_are_told(method: Method) -> None:
    base, tasks = models(1, 1000)
    merger, vectors, out = dare(method, 0.1), TaskVectors(CPU), torch.empty(1, 1000)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 1):
            spoilt = [base.clone(), tasks[0].clone()]
            spoilt[place][0, 900] = bad
            given_ = [spoilt[1], *tasks[1:]]
            (known,) = vectors.find([merger], flat(spoilt[0], given_), 1000)
            block = Block(0, 1000, spoilt[0], given_)
            assert not vectors.merge(merger, known, block, out).isfinite()


# However it is cut


@pytest.mark.parametrize("merger", [
    Merger("task_arithmetic", (0.5, 0.4, 0.3), (1.0,) * 3, True, False),
    ties([0.5, 0.4, 0.3], 0.3), ties([1.0, 1.0, 1.0], 1.0),
    ties([0.5, 0.4, 0.3], 0.3)._replace(rescale=True),
    dare("dare_linear", 0.4), dare("dare_ties", 0.7),
], ids=lambda m: f"{m.method}-{m.densities[0]}")  # fmt: skip
@pytest.mark.parametrize("width", [1, 17, 150, 203])
def test_panels_give_the_bits_of_flat_blocks(
    merger: Merger, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tasks = models(45, 203, dtype=BF16)  # on their grid the thresholds cut through ties
    expected, known = merge(merger, base, tasks), find(merger, base, tasks)
    for piece in (48 * 1024, 700, 40):
        monkeypatch.setattr(task_vectors, "_PIECE", piece)
        vectors, out = TaskVectors(CPU), torch.full_like(expected, torch.nan)
        for left in range(0, 203, width):
            part = slice(None), slice(left, left + width)
            block = Block(left, 203, base[part], [task[part] for task in tasks])
            vectors.merge(merger, known, block, out[part])
        assert torch.equal(out, expected)


def test_mergers_of_a_sweep_are_each_as_if_alone() -> None:
    base, tasks = models(300_000, dtype=BF16)
    sweep = [
        ties([0.5, 0.4, 0.3], 0.2), dare("dare_linear", 0.5), dare("dare_ties", 0.5),
        ties([1.0, 1.0, 1.0], 0.2)._replace(rescale=True), ties([0.5, 0.4, 0.3], 1.0),
        dare("dare_linear", 0.2), dare("dare_linear", 0.5)._replace(keys=(1, 2, 3)),
    ]  # fmt: skip
    together = TaskVectors(CPU).find(sweep, flat(base, tasks), base.numel())
    for merger, known in zip(sweep, together, strict=True):
        assert torch.equal(known, find(merger, base, tasks))


def test_passes_are_made_only_where_something_has_to_be_found() -> None:
    base, tasks = models(300_000)
    passes = 0

    def counted() -> Iterator[Block]:
        nonlocal passes
        passes += 1
        return flat(base, tasks)()

    vectors = TaskVectors(CPU)
    vectors.find([ties([1.0] * 3, 1.0), dare("dare_linear", 1.0)], counted, 300_000)
    vectors.find([dare("dare_linear", 0.5, rescale=False)], counted, 300_000)
    assert passes == 0
    vectors.find([ties([1.0] * 3, d) for d in (0.1, 0.5, 0.6)], counted, 300_000)
    assert passes <= 3


# Random masks


def test_masks_are_known_for_good() -> None:
    """Recorded: another version of numpy must make the same."""
    key = masks.key(42, 1, "model.layers.0.mlp.up_proj.weight")
    assert key == 15660279468206153610
    assert "".join(str(int(x)) for x in mask(key, 0.5, 24)) == "000110001110001000100000"


@properties
@given(
    st.integers(0, 10**12), st.integers(1, 9), st.integers(1, 50), st.integers(0, 40),
    st.floats(1e-6, 1),
)  # fmt: skip
def test_any_part_of_a_mask_can_be_made_alone(
    start: int, rows: int, columns: int, gap: int, density: float
) -> None:
    stride = columns + gap
    part, whole = torch.empty(rows, columns), torch.empty(1, rows * stride)
    masks.fill(part, 5, density, start=start, stride=stride)
    masks.fill(whole, 5, density, start=start, stride=whole.numel())
    assert torch.equal(part, whole.view(rows, stride)[:, :columns])


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.99999])
def test_a_mask_keeps_its_share(density: float) -> None:
    """Within five standard deviations: in all, in each lane of a word, and after what was kept."""
    elements = 1 << 20
    drawn = mask(masks.key(0, 0, "w"), density, elements)
    for part in (drawn, *drawn.view(-1, 4).T, drawn[1:][drawn[:-1] == 1]):
        share, spread = float(part.mean()), math.sqrt(density * (1 - density) / part.numel())
        assert abs(share - density) <= 5 * spread + 2**-17


def test_masks_of_other_seeds_models_and_tensors_are_independent() -> None:
    elements, density = 1 << 20, 0.3
    keys = [masks.key(*of) for of in ((0, 0, "w"), (1, 0, "w"), (0, 1, "w"), (0, 0, "v"))]
    drawn = torch.stack([mask(key, density, elements) for key in keys]) - density
    correlations = (drawn @ drawn.T) / (elements * density * (1 - density))
    off = correlations - correlations.diagonal().diag()
    assert off.abs().max() < 5 / math.sqrt(elements)


def test_keys_tell_apart_what_reads_alike() -> None:
    assert len({masks.key(*of) for of in ((1, 2, "w"), (12, 0, "w"), (1, 20, "w"))}) == 3


def test_the_mask_of_a_task_does_not_depend_on_the_others() -> None:
    base, tasks = models(60, 50)
    merger = dare("dare_linear", 0.5, rescale=False)
    alone_ = merger._replace(weights=(0.0, 0.4, 0.0))
    single = Merger("dare_linear", (0.4,), (0.5,), False, False, merger.keys[1:2])
    assert torch.equal(merge(alone_, base, tasks), merge(single, base, tasks[1:2]))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_rescaling_keeps_the_l1_norm(density: float) -> None:
    base, (task,) = models(200, 300, tasks=1)
    merger = dare("dare_linear", density, tasks=1)._replace(weights=(1.0,))
    norm = deltas(base, [task])[0].abs().sum()
    torch.testing.assert_close(merge(merger, base, [task]).double().abs().sum(), norm)
    plain = merge(merger._replace(rescale=False), base, [task])
    assert abs(float(plain.double().abs().sum() / norm) / density - 1) < 0.05
