"""Errors before the merge pass: found by all ranks or by one, printed once, nothing touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import distmerge
from distmerge import cli, engine, monitor, pipeline
from distmerge.errors import MismatchError, PeerError, RunError
from distmerge.sources.resolve import Sources, open_sources, pinned
from distmerge.sweep import Recipe as SweptRecipe
from distmerge.sweep import load_recipe
from tests.dist import cases
from tests.dist.cases import Recipe, Tensors
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import Outcome, observe_ranks

RANKS = 3


def command(arguments: list[str]) -> None:
    mock.patch.object(cli, "LEAVE_LAST", 0).start()  # no launcher stops us
    sys.argv[:] = ["distmerge", "merge", *arguments]
    cli.main()


def merge_by_command(recipe: Recipe, folder: Path, *more: str) -> list[Outcome[None]]:
    """What the command does on three ranks; the output would be folder/work/out."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(folder / "recipe.yaml"), str(folder / "work" / "out"), *more]
    return observe_ranks(command, RANKS, arguments, timeout=30)


def check_printed_once(outcomes: list[Outcome[None]], message: str) -> None:
    """Exit code 2 everywhere; rank 0 alone prints the error, and all it prints is one line."""
    told = "\n".join(outcome.describe() for outcome in outcomes)
    assert [outcome.exit_code for outcome in outcomes] == [2] * RANKS, told
    assert [bool(outcome.stderr) for outcome in outcomes] == [True, False, False], told
    printed = outcomes[0].stderr
    assert printed.startswith("error: "), told
    assert printed.count("error:") == 1
    assert message in printed


@pytest.fixture
def steps(tmp_path: Path) -> Recipe:
    (tmp_path / "work").mkdir()
    return cases.write_steps(tmp_path / "in", cases.small, count=2)


def test_inputs_that_do_not_fit(steps: Recipe, tmp_path: Path) -> None:
    """Every rank finds this out by itself."""
    write_checkpoint(tmp_path / "in" / "step-2", {"first": torch.zeros(3)})
    outcomes = merge_by_command(steps, tmp_path)
    check_printed_once(outcomes, "the inputs do not fit: 2 of 2 tensors differ")
    assert not list((tmp_path / "work").iterdir())


def test_an_input_that_is_missing(tmp_path: Path) -> None:
    """The hosts' first ranks find this out."""
    missing = tmp_path / "missing" / "model"
    outcomes = merge_by_command(
        {"merge_method": "linear", "models": [{"model": str(missing)}]}, tmp_path
    )
    check_printed_once(outcomes, f"{missing}: no such folder")


def test_a_recipe_with_an_unknown_key(steps: Recipe, tmp_path: Path) -> None:
    """The first rank finds this out."""
    outcomes = merge_by_command({**steps, "out_dtypes": "float32"}, tmp_path)
    check_printed_once(outcomes, "unknown key; did you mean 'out_dtype'?")


def test_an_output_that_exists(steps: Recipe, tmp_path: Path) -> None:
    precious = tmp_path / "work" / "out" / "precious"
    precious.parent.mkdir()
    precious.write_text("do not delete")
    check_printed_once(merge_by_command(steps, tmp_path), "it exists and is not empty")
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["out", "precious"]


def test_a_budget_that_is_too_small(steps: Recipe, tmp_path: Path) -> None:
    outcomes = merge_by_command(steps, tmp_path, "--memory", "1MB")
    check_printed_once(outcomes, "--memory 1 MB is too little for this recipe")
    assert not list((tmp_path / "work").iterdir())


def test_a_word_that_the_command_line_does_not_know(steps: Recipe, tmp_path: Path) -> None:
    """Every rank prints this: none has met another yet."""
    outcomes = merge_by_command(steps, tmp_path, "--assemble", "both")
    assert [outcome.exit_code for outcome in outcomes] == [2] * RANKS


def test_an_input_with_nan_is_reported_by_the_first_rank_for_the_one_that_read_it(
    steps: Recipe, tmp_path: Path
) -> None:
    poisoned = cases.small(torch.Generator().manual_seed(0))
    poisoned["second"][-1] = torch.nan
    write_checkpoint(tmp_path / "in" / "step-1", poisoned, shards=2)
    outcomes = merge_by_command(steps, tmp_path)
    check_printed_once(outcomes, "tensor second holds 1 NaN or Inf")
    assert outcomes[0].stderr.startswith(f"error: rank {RANKS - 1} on ")
    assert not list((tmp_path / "work").iterdir())


def command_with_fault(arguments: list[str]) -> None:
    cases.cut()
    mock.patch.object(monitor, "INTERVAL", 0.2).start()
    if os.environ["RANK"] == "1":
        injected = ValueError("injected")
        mock.patch.object(engine, "weighted_sums", side_effect=injected).start()
    command(arguments)


def test_a_failure_is_a_line_of_the_first_rank_and_a_traceback_where_it_happened(
    steps: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(steps))
    arguments = [str(tmp_path / "recipe.yaml"), str(tmp_path / "work" / "out")]
    first, failed, other = observe_ranks(command_with_fault, RANKS, arguments, timeout=30)
    assert [outcome.exit_code for outcome in (first, failed, other)] == [1, 1, 1]
    (told,) = [line for line in first.stderr.splitlines() if line.startswith("error: rank 1 on ")]
    assert told.endswith(", merge: ValueError: injected")
    assert "Traceback (most recent call last)" in failed.stderr
    assert failed.stderr.endswith("ValueError: injected\n")
    assert other.stderr == ""
    assert not (tmp_path / "work" / "out").exists()


def merge_with_other_view(recipe: Recipe, out: Path, other: Recipe) -> None:
    """Rank 1's host has other files under the same names."""

    def open_others(_: SweptRecipe, *, local_only: bool, stream_remote: bool) -> Sources:
        recipe = pinned(load_recipe(other))
        return open_sources(recipe, local_only=local_only, stream_remote=stream_remote)

    if os.environ["RANK"] == "1":
        mock.patch.object(pipeline, "open_sources", open_others).start()
    distmerge.merge(recipe, out)


def longer(random: torch.Generator) -> Tensors:
    return {**cases.small(random), "third": torch.zeros(1)}


def as_observed(
    fn: Callable[..., None], recipe: Recipe, folder: Path, *args: object
) -> list[Outcome[None]]:
    outcomes = observe_ranks(fn, RANKS, recipe, folder / "work" / "out", *args, timeout=30)
    assert not list((folder / "work").iterdir())
    return outcomes


def test_a_rank_that_sees_other_inputs_has_another_plan(steps: Recipe, tmp_path: Path) -> None:
    """All find out before a file is made."""
    other = cases.write_steps(tmp_path / "other", longer, count=2)
    outcomes = as_observed(merge_with_other_view, steps, tmp_path, other)
    for outcome in outcomes:
        assert type(outcome.error) is RunError, outcome.describe()
        assert "rank 1 has another plan than rank 0" in str(outcome.error)
        assert outcome.error.reported == (outcome.rank > 0)


def test_a_rank_whose_inputs_do_not_fit_stops_all(steps: Recipe, tmp_path: Path) -> None:
    other = cases.write_steps(tmp_path / "other", cases.small, count=2)
    write_checkpoint(tmp_path / "other" / "step-2", {"first": torch.zeros(3)})
    outcomes = as_observed(merge_with_other_view, steps, tmp_path, other)
    for outcome in outcomes:
        kind = MismatchError if outcome.rank == 1 else PeerError
        assert type(outcome.error) is kind, outcome.describe()
        assert "the inputs do not fit" in str(outcome.error)
        assert outcome.error.exit_code == 2
        assert outcome.error.reported == (outcome.rank > 0)
