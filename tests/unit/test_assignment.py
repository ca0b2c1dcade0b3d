"""Matrices are dealt out by cost, batches of small ones stay whole, and the rest fills ranks up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmerge.assignment import assign, batches
from distmerge.document import Plain
from distmerge.matrices import BATCH_ELEMENTS, Facts
from distmerge.planner import Plan
from tests.unit.task_plans import Shapes, planned

CALIBRATE: Plain = {"method": "svc"}
OWN: Plain = {"weight": 1.0, "density": 0.5}

SIDES = st.integers(2, 4096)
CONTENT = st.dictionaries(
    st.integers(0, 99),
    st.one_of(
        st.tuples(SIDES, SIDES).map(lambda shape: ("{}.weight", shape)),
        st.tuples(st.integers(1, 50), SIDES, SIDES).map(lambda s: ("{}.experts.up_proj", s)),
        st.integers(1, 10**8).map(lambda size: ("{}.norm", (size,))),
        st.just(("{}.weight", (512, 512))),
    ),
    min_size=1,
    max_size=15,
)
RANKS = st.integers(1, 32)
METHODS = st.sampled_from(["task_arithmetic", "ties"])


def svc(content: dict[int, tuple[str, tuple[int, ...]]], method: str = "ties") -> Plan:
    """A calibrated merge of these tensors, with one matrix at least."""
    shapes: Shapes = {name.format(number): shape for number, (name, shape) in content.items()}
    return planned({"a.weight": (64, 64), **shapes}, method, own=OWN, calibrate=CALIBRATE)


def loads(plan: Plan, shares: Sequence[Sequence[int]]) -> list[float]:
    return [sum(plan.cost(plan.jobs[number]) for number in share) for share in shares]


def matrix_jobs(plan: Plan) -> list[int]:
    return [n for n, job in enumerate(plan.jobs) if plan.tensors[job.tensor].rule.cut]


@given(CONTENT, METHODS, RANKS, st.data())
def test_every_job_that_is_not_done_is_some_rank_s(
    content: dict[int, tuple[str, tuple[int, ...]]], method: str, ranks: int, data: st.DataObject
) -> None:
    plan = svc(content, method)
    every = range(len(plan.jobs))
    done = data.draw(st.sets(st.sampled_from(every)))
    shares = assign(plan, ranks, done)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == [number for number in every if number not in done]


@given(CONTENT, RANKS)
def test_no_rank_has_more_than_four_thirds_of_what_the_best_could(
    content: dict[int, tuple[str, tuple[int, ...]]], ranks: int
) -> None:
    """Graham's bound for the longest first, 4/3 - 1/(3 ranks). At best, the costliest piece is one
    rank's, all share evenly, and two of the ranks + 1 costliest pieces meet."""
    plan = svc(content, "task_arithmetic")
    dealt = [loads(plan, [batch])[0] for batch in batches(plan)]
    costs = sorted(dealt, reverse=True)
    least = max(costs[0], sum(costs) / ranks)
    if len(costs) > ranks:
        least = max(least, costs[ranks - 1] + costs[ranks])
    whole = set(matrix_jobs(plan))
    shares = [[n for n in share if n in whole] for share in assign(plan, ranks)]
    assert max(loads(plan, shares)) <= (4 / 3 - 1 / (3 * ranks)) * least * (1 + 1e-12)


@given(CONTENT, RANKS)
def test_what_is_no_matrix_fills_the_ranks_up_in_stretches(
    content: dict[int, tuple[str, tuple[int, ...]]], ranks: int
) -> None:
    plan = svc(content)
    whole = set(matrix_jobs(plan))
    rest = [number for number in range(len(plan.jobs)) if number not in whole]
    shares = assign(plan, ranks)
    stretches = [sorted(set(share) - whole) for share in shares]
    assert list(itertools.chain(*stretches)) == rest
    largest = max((plan.cost(plan.jobs[number]) for number in rest), default=0.0)
    before = loads(plan, [[n for n in share if n in whole] for share in shares])
    level = water_level(before, sum(plan.cost(plan.jobs[number]) for number in rest))
    for load, ready in zip(loads(plan, shares), before, strict=True):
        assert abs(load - max(ready, level)) <= largest + 1e-6 * (1 + level)


def water_level(grounds: Sequence[float], water: float) -> float:
    """Where the surface is when so much water has been poured over grounds of these heights."""
    low, high = min(grounds), max(grounds) + water
    for _ in range(100):
        middle = (low + high) / 2
        held = sum(max(0.0, middle - ground) for ground in grounds)
        low, high = (middle, high) if held < water else (low, middle)
    return high


@given(CONTENT, METHODS, RANKS)
def test_sums_and_copies_come_before_task_vectors_and_batches_stay_together(
    content: dict[int, tuple[str, tuple[int, ...]]], method: str, ranks: int
) -> None:
    plan = svc(content, method)
    together = {number: place for place, batch in enumerate(batches(plan)) for number in batch}
    for share in assign(plan, ranks, batched=True):
        kinds = [plan.on_tasks(plan.jobs[number]) for number in share]
        assert kinds == sorted(kinds)
        places = [together[number] for number in share if number in together]
        assert len(list(itertools.groupby(places))) == len(set(places))


@given(CONTENT, METHODS)
def test_batches_hold_small_matrices_of_one_shape(
    content: dict[int, tuple[str, tuple[int, ...]]], method: str
) -> None:
    plan = svc(content, method)
    found = batches(plan)
    assert sorted(itertools.chain(*found)) == matrix_jobs(plan)
    for batch in found:
        jobs = [plan.jobs[number] for number in batch]
        tensors = [plan.tensors[job.tensor] for job in jobs]
        if len(batch) == 1:
            continue
        assert len({tensor.shape for tensor in tensors}) == 1
        assert len({tensor.rule for tensor in tensors}) == 1
        assert sum(job.stop - job.start for job in jobs) <= BATCH_ELEMENTS
        assert method == "task_arithmetic", "the thresholds of a tensor are its own"


def test_alike_matrices_are_batched_and_those_of_other_weights_are_not() -> None:
    shapes = {f"layers.{n}.weight": (256, 256) for n in range(4)}
    alike = planned(shapes, "tsv_m")
    assert batches(alike) == [[0, 1, 2, 3]]
    weights: Plain = {"weight": [{"filter": "layers.1.", "value": 0.5}, {"value": 1}]}
    apart = planned(shapes, "task_arithmetic", own=weights, calibrate=CALIBRATE)
    assert batches(apart) == [[0, 2, 3], [1]]


def test_stacks_and_jobs_of_several_matrices_are_batches_by_themselves() -> None:
    stacks = planned({f"layers.{n}.experts.up_proj": (4, 32, 32) for n in range(3)}, "iso_c")
    assert batches(stacks) == [[0], [1], [2]]
    fused = {f"h.{n}.attn.c_attn.weight": (48, 48) for n in range(3)}
    split: Plain = {"method": "svc", "split": {"*c_attn*": 3}}
    columns = planned(fused, "task_arithmetic", own=OWN, calibrate=split, facts=Facts("gpt2"))
    assert batches(columns) == [[0], [1], [2]]
    rows = planned(fused, "task_arithmetic", own=OWN, calibrate=split)
    assert batches(rows) == [list(range(9))]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_assignment_is_a_function_of_the_plan(ranks: int) -> None:
    """Every rank makes it for itself, in a process of its own."""
    shapes = {f"layers.{n}.weight": (64 * (n % 3 + 1), 64) for n in range(9)}
    first, second = (planned(shapes, "iso_c") for _ in range(2))
    assert assign(first, ranks) == assign(second, ranks)


def test_a_matrix_that_costs_more_than_all_else_is_alone_on_its_rank() -> None:
    shapes = {"big.weight": (4096, 4096), **{f"{n}.weight": (64, 64 + n) for n in range(9)},
              "norm": (1000,)}  # fmt: skip
    plan = planned(shapes, "star")
    first, *others = assign(plan, 3)
    assert [plan.tensors[plan.jobs[number].tensor].name for number in first] == ["big.weight"]
    assert all(len(share) > 3 for share in others)


def test_many_small_sums_level_the_ranks() -> None:
    shapes = {"a.weight": (1024, 1024), "b.weight": (512, 512),
              **{f"{n}.norm": (1_000_000,) for n in range(600)}}  # fmt: skip
    plan = planned(shapes, "task_arithmetic", own=OWN, calibrate=CALIBRATE)
    found = loads(plan, assign(plan, 4))
    assert max(found) <= 1.02 * min(found)
