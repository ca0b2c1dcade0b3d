"""The output's bytes depend on nothing but the recipe, the inputs and the shards' size.

The reference is one process with the default budget. All files count, the manifest included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import distmerge
from distmerge.assembly import AssembleMode
from distmerge.pipeline import Options
from distmerge.budget import SLOTS, step_elements
from distmerge.planner import Plan
from distmerge.sources.reader import ReadMode
from distmerge.spec import BLOCK_ELEMENTS, JOB_ELEMENTS, PAGE
from tests.dist import cases
from tests.dist.cases import Recipe, Tensors, fingerprints
from tests.support.checkpoints import read_output
from tests.support.ranks import run_ranks

DIRECT_OR_GATHER = pytest.mark.parametrize("assemble", ["direct", "gather"])


class Reference(NamedTuple):
    """A merge by one process."""

    recipe: Recipe
    files: dict[str, str]
    tensors: Tensors


def refer(
    recipe: Recipe, folder: Path, merge: Callable[..., object] = cases.merge_cut
) -> Reference:
    run_ranks(merge, 1, recipe, folder / "one", Options())
    return Reference(recipe, fingerprints(folder / "one"), read_output(folder / "one"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("mixed")
    return refer(cases.write_steps(folder, cases.mixed), folder)


def check(
    reference: Reference, out: Path, ranks: int, options: Options,
    merge: Callable[..., object] = cases.merge_cut,
) -> None:  # fmt: skip
    run_ranks(merge, ranks, reference.recipe, out, options)
    assert fingerprints(out) == reference.files


def check_average(found: Tensors, inputs: list[Tensors]) -> None:
    """The mean of floats, up to rounding; all others as they are."""
    assert set(found) == set(inputs[0])
    for name, tensor in found.items():
        given = [tensors[name] for tensors in inputs]
        if tensor.is_floating_point():
            mean = torch.stack([x.double() for x in given]).mean(dim=0)
            torch.testing.assert_close(tensor, mean.to(tensor.dtype))
        else:
            assert torch.equal(tensor, given[0])


def test_reference_is_the_average(reference: Reference) -> None:
    assert list(reference.files) == ["config.json", "distmerge.json", "model.safetensors"]
    inputs = [cases.mixed(torch.Generator().manual_seed(step)) for step in range(3)]
    check_average(reference.tensors, inputs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@DIRECT_OR_GATHER
def test_any_number_of_ranks_writes_the_same_bytes(
    reference: Reference, tmp_path: Path, ranks: int, assemble: AssembleMode
) -> None:
    check(reference, tmp_path / "out", ranks, Options(assemble=assemble))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_any_way_of_reading_gives_the_same_bytes(
    reference: Reference, tmp_path: Path, ranks: int, read: ReadMode
) -> None:
    check(reference, tmp_path / "out", ranks, Options(read=read))


def merge_with_block(recipe: Recipe, out: Path, options: Options, block: int) -> None:
    cases.cut(block=block, job=2 * block)
    distmerge.merge(recipe, out, options=options)


@pytest.mark.parametrize(("block", "ranks"), [(4096, 1), (3 * 4096, 2), (16 * 4096, 2)])
def test_any_block_and_job_size_gives_the_same_bytes(
    reference: Reference, tmp_path: Path, block: int, ranks: int
) -> None:
    run_ranks(merge_with_block, ranks, reference.recipe, tmp_path / "out", Options(), block)
    assert fingerprints(tmp_path / "out") == reference.files


@pytest.mark.parametrize("shard_size", ["1kB", "100kB", "300kB"])
@DIRECT_OR_GATHER
def test_any_shard_size_gives_the_same_tensors(
    reference: Reference, tmp_path: Path, shard_size: str, assemble: AssembleMode
) -> None:
    """And with shards of one size, the same bytes again."""
    options = Options(shard_size=shard_size, assemble=assemble)
    alone = refer_with(reference.recipe, tmp_path / "one", options)
    many = refer_with(reference.recipe, tmp_path / "three", options, ranks=3)
    assert many == alone
    assert sum(name.endswith(".safetensors") for name in many) > 1
    found = read_output(tmp_path / "three")
    assert {n: t.dtype for n, t in found.items()} == {
        n: t.dtype for n, t in reference.tensors.items()
    }
    assert all(torch.equal(found[name], reference.tensors[name]) for name in found)


def refer_with(recipe: Recipe, out: Path, options: Options, ranks: int = 1) -> dict[str, str]:
    run_ranks(cases.merge_cut, ranks, recipe, out, options)
    return fingerprints(out)


def one(random: torch.Generator) -> Tensors:
    return {"weight": torch.randn(3, generator=random).bfloat16()}


def tiny(random: torch.Generator) -> Tensors:
    return {
        f"t{number:03}": torch.randn(number % 8, generator=random).to(
            torch.bfloat16 if number % 3 else torch.float32
        )
        for number in range(400)
    }


def nothing(random: torch.Generator) -> Tensors:
    return {"empty": torch.empty(0, 3)}


@pytest.mark.parametrize("make", [one, tiny, nothing])
@DIRECT_OR_GATHER
def test_ranks_that_have_little_or_nothing_to_do_change_no_byte(
    tmp_path: Path, make: Callable[[torch.Generator], Tensors], assemble: AssembleMode
) -> None:
    """More ranks than jobs (or no job at all), and more tensors than the ranks can count."""
    recipe = cases.write_steps(tmp_path / "in", make, shards=1)
    check(refer(recipe, tmp_path), tmp_path / "out", 4, Options(assemble=assemble))


@pytest.mark.parametrize("read", ["mmap", "pread"])
@DIRECT_OR_GATHER
def test_items_at_odd_addresses_of_the_inputs_change_no_byte(
    tmp_path: Path, read: ReadMode, assemble: AssembleMode
) -> None:
    reference = refer(cases.write_misaligned(tmp_path / "in"), tmp_path)
    check(reference, tmp_path / "out", 3, Options(read=read, assemble=assemble))


def large(random: torch.Generator) -> Tensors:
    return {
        "embedding": torch.randn(2 * JOB_ELEMENTS + 5, generator=random).bfloat16(),
        "norm": torch.randn(1001, generator=random).bfloat16(),
        "head": torch.randn(JOB_ELEMENTS // 2 + 7, generator=random).bfloat16(),
    }


@pytest.fixture(scope="module")
def large_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Tensors of millions of elements, merged with the true constants."""
    folder = tmp_path_factory.mktemp("large")
    return refer(cases.write_steps(folder, large, count=2), folder, cases.merge)


def test_large_reference_is_the_average(large_reference: Reference) -> None:
    inputs = [large(torch.Generator().manual_seed(step)) for step in range(2)]
    check_average(large_reference.tensors, inputs)


def least_budget(plan: Plan, blocks: int) -> int:
    """The smallest budget with which a rank holds `blocks` blocks of two bf16 inputs at once."""
    return SLOTS * (6 * blocks * BLOCK_ELEMENTS + 3 * 2 * PAGE)


@pytest.mark.parametrize(
    ("blocks", "ranks", "assemble"),
    [(1, 3, "direct"), (1, 2, "gather"), (5, 2, "direct"), (5, 4, "gather"), (64, 3, "gather")],
)
def test_any_memory_budget_gives_the_same_bytes(
    large_reference: Reference, tmp_path: Path, blocks: int, ranks: int, assemble: AssembleMode
) -> None:
    """With 1 block at once, a job is cut into 64 steps; with 5, the last step is a shorter one."""
    plan = distmerge.plan(large_reference.recipe)
    budget = least_budget(plan, blocks)
    assert len(plan.jobs) == 5
    assert step_elements(plan, budget) == blocks * BLOCK_ELEMENTS
    options = Options(memory=str(budget), assemble=assemble)
    check(large_reference, tmp_path / "out", ranks, options, cases.merge)


def test_a_budget_under_the_least_is_refused(large_reference: Reference) -> None:
    plan = distmerge.plan(large_reference.recipe)
    with pytest.raises(distmerge.OutputError, match="needs at least"):
        step_elements(plan, least_budget(plan, 1) - SLOTS)
