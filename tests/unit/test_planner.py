"""The plan: jobs, their ranks, the digest, the budget. All on headers that no file holds."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmerge
from distmerge.assignment import assign
from distmerge.budget import Budget, buffer_bytes, step_elements
from distmerge.config import Config
from distmerge.errors import OutputError
from distmerge.log import parse_bytes
from distmerge.matrices import Facts
from distmerge.planner import Plan, build_plan
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.resolve import Sources
from distmerge.spec import BLOCK_ELEMENTS, DTYPES, JOB_ELEMENTS, TensorSpec
from distmerge.sweep import Recipe, Variant
from distmerge.trajectory import Trajectory
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import average, linear, write_run

Tensors = dict[str, tuple[str, int]]
"""dtype and number of elements by name."""


def checkpoint(tensors: Tensors) -> Checkpoint:
    specs, start = {}, 0
    for name, (dtype, elements) in tensors.items():
        size = elements * DTYPES[dtype].itemsize
        specs[name] = TensorSpec(name, DTYPES[dtype], (elements,), 0, start, size)
        start += size
    return Checkpoint(
        label="x", folder=Path("x"), revision=None, step=None, files=(), tensors=specs
    )


def planned(
    *inputs: Tensors,
    donor: int = 0,
    coefficients: tuple[float, ...] | None = None,
    out_dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Plan:
    found = tuple(checkpoint(tensors) for tensors in inputs)
    weights = coefficients or (1 / len(found),) * len(found)
    config = Config(
        merge_method="average", trajectory=Trajectory(checkpoints=()), out_dtype=out_dtype
    )
    everyone = tuple(range(len(found)))
    sources = Sources(
        checkpoints=found, donor=donor, inputs=(everyone,), rows=(weights,), facts=Facts()
    )
    recipe = Recipe(variants=(Variant("", {}, config),))
    return build_plan(recipe, sources, shard_bytes=shard_bytes)


tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(["F32", "BF16", "F64", "I64", "U8"]), st.integers(0, 10**9)),
    max_size=12,
)
RANKS = st.integers(1, 64)


@given(tensors)
def test_jobs_cut_every_tensor_without_gap_or_overlap(content: Tensors) -> None:
    plan = planned(content, content)
    covered = dict.fromkeys(range(len(plan.tensors)), 0)
    for job in plan.jobs:
        assert job.start == covered[job.tensor]
        assert job.start % BLOCK_ELEMENTS == 0
        assert 0 < job.stop - job.start <= JOB_ELEMENTS
        covered[job.tensor] = job.stop
    assert covered == {i: tensor.elements for i, tensor in enumerate(plan.tensors)}
    assert [job.tensor for job in plan.jobs] == sorted(job.tensor for job in plan.jobs)


@given(tensors, RANKS)
def test_ranks_share_the_jobs_in_contiguous_stretches(content: Tensors, ranks: int) -> None:
    plan = planned(content)
    shares = assign(plan, ranks)
    assert len(shares) == ranks
    assert [job for share in shares for job in share] == list(range(len(plan.jobs)))


@given(tensors, RANKS)
def test_every_rank_s_cost_is_within_one_job_of_the_mean(content: Tensors, ranks: int) -> None:
    plan = planned(content, content)
    costs = [plan.read_bytes(job) + plan.write_bytes(job) for job in plan.jobs]
    mean, largest = sum(costs) / ranks, max(costs, default=0)
    for rank, share in enumerate(assign(plan, ranks)):
        assert abs(sum(costs[job] for job in share) - mean) <= largest + 1e-6
        if share:
            assert abs(sum(costs[: share[-1] + 1]) - mean * (rank + 1)) <= largest / 2 + 1e-6


def test_more_ranks_than_jobs_leave_some_without_work() -> None:
    plan = planned({"a": ("F32", 10), "b": ("F32", 10)})
    shares = assign(plan, 64)
    assert sorted(len(share) for share in shares) == [0] * 62 + [1, 1]
    assert assign(planned({}), 3) == [[], [], []]


def test_nothing_in_a_plan_knows_the_number_of_ranks() -> None:
    assert [field.name for field in fields(Plan)] == [
        "inputs", "donor", "outputs", "tensors", "shards", "shard_bytes", "jobs", "widths",
        "digest",
    ]  # fmt: skip
    plan = planned({"a": ("F32", 10**8)})
    before = hash((plan.tensors, plan.shards, plan.jobs, plan.digest))
    for ranks in (1, 2, 7):
        assign(plan, ranks)
    assert hash((plan.tensors, plan.shards, plan.jobs, plan.digest)) == before


def test_a_job_reads_all_inputs_and_writes_one_output() -> None:
    plan = planned({"a": ("F32", 10)}, {"a": ("BF16", 10)}, out_dtype="float64")
    (job,) = plan.jobs
    assert (plan.read_bytes(job), plan.write_bytes(job)) == (10 * (4 + 2), 10 * 8)
    assert plan.main_dtype == "float64"


def test_the_main_dtype_is_that_of_most_bytes_and_no_integer() -> None:
    content: Tensors = {"a": ("F32", 10), "b": ("BF16", 15), "c": ("BF16", 15), "i": ("I64", 999)}
    assert planned(content).main_dtype == "bfloat16"
    assert planned({"i": ("I64", 9)}).main_dtype is None


BASE: Tensors = {"a": ("F32", 10), "b": ("F32", 20)}


def test_the_digest_is_the_same_for_the_same_merge() -> None:
    assert planned(BASE, BASE).digest == planned(dict(BASE), dict(BASE)).digest


@pytest.mark.parametrize(
    "other",
    [
        planned(BASE, BASE, coefficients=(0.5, 0.5000000000000001)),
        planned(BASE, BASE, coefficients=(0.25, 0.75)),
        planned(BASE, BASE, donor=1),
        planned(BASE, BASE, BASE, coefficients=(0.5, 0.5, 0)),
        planned(BASE, BASE, out_dtype="float16"),
        planned(BASE, BASE, out_dtype="bfloat16"),
        planned(BASE, BASE, shard_bytes=50),
        planned({"a": ("F32", 20), "b": ("F32", 10)}, {"a": ("F32", 20), "b": ("F32", 10)}),
        planned(dict(reversed(BASE.items())), BASE),
        planned({**BASE, "c": ("F32", 0)}, {**BASE, "c": ("F32", 0)}),
        planned({**BASE, "a": ("F32", 11)}, {**BASE, "a": ("F32", 11)}),
        planned({**BASE, "a": ("F16", 10)}, BASE),
    ],
    ids=[
        "one bit of a coefficient", "coefficients", "donor", "an input more", "a dtype",
        "another dtype", "shards",
        "shapes", "order", "an empty tensor", "one element", "donor's dtype",
    ],
)  # fmt: skip
def test_the_digest_tells_other_merges_apart(other: Plan) -> None:
    assert planned(BASE, BASE).digest != other.digest


def test_the_digest_knows_which_inputs_the_coefficients_belong_to() -> None:
    first = planned(BASE, BASE, BASE, coefficients=(0.5, 0.5, 0))
    second = planned(BASE, BASE, BASE, coefficients=(0.5, 0, 0.5))
    assert first.digest != second.digest


def test_the_digest_does_not_know_folders_or_time_stamps(tmp_path: Path) -> None:
    first = distmerge.plan(average(write_run(tmp_path / "here", [1, 2])))
    there = write_run(tmp_path / "there", [1, 2])
    os.utime(tmp_path / "there/step-1/model.safetensors", ns=(5, 5))
    second = distmerge.plan(average(there))
    assert first.digest == second.digest
    assert first.inputs[0].fingerprint != second.inputs[0].fingerprint


def test_the_digest_knows_the_headers_of_inputs_that_give_no_term(tmp_path: Path) -> None:
    for number in range(3):
        write_checkpoint(tmp_path / f"{number}", {"a": torch.ones(1)})
    write_checkpoint(tmp_path / "3", {"a": torch.ones(1), "b": torch.ones(1)})
    digests = {
        distmerge.plan(
            linear({tmp_path / "0": 1, tmp_path / "1": 1}, base_model=str(tmp_path / base),
                   parameters={"weight": [{"filter": "no", "value": 1}]})
        ).digest
        for base in ("2", "3")
    }  # fmt: skip
    assert len(digests) == 2


budgets = st.integers(0, 20 * 10**9)


@given(tensors, st.integers(1, 30), budgets)
def test_a_step_fits_the_budget_or_the_least_that_would_do_is_said(
    content: Tensors, count: int, budget: int
) -> None:
    plan = planned(*[content] * count)
    try:
        elements = step_elements(plan, budget)
    except OutputError as error:
        least = re.search(r"at least (.*)$", str(error))
        assert least is not None
        assert step_elements(plan, parse_bytes(least[1])) >= BLOCK_ELEMENTS
        return
    assert buffer_bytes(plan, Budget(budget, elements)) <= budget
    assert elements % BLOCK_ELEMENTS == 0
    assert 0 < elements <= JOB_ELEMENTS


def test_the_least_budget_is_not_rounded_down() -> None:
    """It was said with three digits: 1.02 GB where 1023 MB were needed."""
    plan = planned(BASE)
    for inputs in range(800, 900, 7):
        tensor = plan.tensors[0]
        rule = tensor.rule._replace(inputs=(0,) * inputs, coefficients=((1.0,) * inputs,))
        wide = replace(plan, tensors=(tensor._replace(rule=rule),))
        with pytest.raises(OutputError) as caught:
            step_elements(wide, 10**6)
        least = str(caught.value).rpartition("at least ")[2]
        assert step_elements(wide, parse_bytes(least)) == BLOCK_ELEMENTS


def test_a_larger_budget_takes_more_at_once_up_to_a_job() -> None:
    plan = planned(BASE, BASE)
    steps = [step_elements(plan, budget * 10**6) for budget in (5, 10, 50, 500, 50_000)]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    assert steps[-2:] == [JOB_ELEMENTS] * 2
