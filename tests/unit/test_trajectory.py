"""Which checkpoints of a run count, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmerge
from distmerge.document import Plain
from distmerge.errors import ConfigError, SourceError
from distmerge.schedules import select, step_of
from distmerge.spec import Rule
from distmerge.trajectory import Trajectory
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import average, write_run


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000-tokens4B", 1000),
        ("step-00700", 700),
        ("step_12", 12),
        ("steps=12", 12),
        ("Step12", 12),
        ("stage2-step5", 5),
        ("global_step300", 300),
        ("checkpoint-250", 250),
        ("ckpt-7", 7),
        ("iter_0001000", 1000),
        ("iteration9", 9),
        ("run2-00070", 70),
        ("7B", 7),
        ("main", None),
        ("", None),
    ],
)
def test_the_step_is_read_from_the_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


def taking(keys: dict[str, int]) -> Trajectory:
    return Trajectory(
        checkpoints="x",
        first=keys.get("first"),
        last=keys.get("last"),
        from_step=keys.get("from_step"),
        to_step=keys.get("to_step"),
        min_interval=keys.get("min_interval"),
    )


STEPS = [0, 100, 200, 300, 1000]


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        ({}, STEPS),
        ({"last": 2}, [300, 1000]),
        ({"last": 5}, STEPS),
        ({"first": 2}, [0, 100]),
        ({"from_step": 100}, [100, 200, 300, 1000]),
        ({"from_step": 101}, [200, 300, 1000]),
        ({"to_step": 300}, [0, 100, 200, 300]),
        ({"to_step": 299}, [0, 100, 200]),
        ({"from_step": 100, "to_step": 300}, [100, 200, 300]),
        ({"to_step": 300, "last": 2}, [200, 300]),
        ({"from_step": 200, "first": 2}, [200, 300]),
        ({"min_interval": 100}, STEPS),
        ({"min_interval": 101}, [100, 300, 1000]),
        ({"min_interval": 200}, [100, 300, 1000]),
        ({"min_interval": 300}, [0, 300, 1000]),
        ({"min_interval": 200, "to_step": 300}, [100, 300]),
        ({"min_interval": 200, "last": 2}, [300, 1000]),
        ({"min_interval": 200, "first": 2}, [100, 300]),
    ],
)
def test_selection(keys: dict[str, int], taken: list[int]) -> None:
    assert [STEPS[i] for i in select(STEPS, taking(keys))] == taken


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"last": 6}, "6 checkpoints are needed, 5 are left of 5 found .*0, 100, 200, 300, 1000"),
        ({"first": 6}, "6 checkpoints are needed"),
        ({"from_step": 1000}, "2 checkpoints are needed, 1 are left of 5 found"),
        ({"from_step": 5000}, "2 checkpoints are needed, 0 are left"),
        ({"last": 1, "to_step": 0}, "2 checkpoints are needed, 1 are left"),
        ({"min_interval": 200, "last": 4}, "4 checkpoints are needed, 3 are left"),
    ],
)
def test_too_few_checkpoints_are_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(STEPS, taking(keys))


def test_many_steps_are_shown_in_part() -> None:
    with pytest.raises(ConfigError, match=r"\(steps 0, 1, 2, 3, \.\.\., 98, 99\)"):
        select(range(100), taking({"last": 101}))


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=30, unique=True).map(sorted),
    st.integers(1, 300),
)
def test_min_interval_keeps_the_last_and_skips_no_more_than_it_must(
    steps: Sequence[int], interval: int
) -> None:
    try:
        taken = select(steps, taking({"min_interval": interval}))
    except ConfigError:
        assert steps[-1] - steps[0] < interval
        return
    assert taken[-1] == len(steps) - 1
    for before, after in pairwise(taken):
        assert steps[after] - steps[before] >= interval
        assert all(steps[after] - steps[i] < interval for i in range(before + 1, after))


def steps_of(recipe: dict[str, Plain]) -> list[int | None]:
    return [checkpoint.step for checkpoint in distmerge.plan(recipe).inputs]


@pytest.mark.parametrize("name", ["step-{}", "checkpoint-{}", "iter_{}", "step{}-tokens4B"])
def test_a_glob_is_taken_in_numeric_order(tmp_path: Path, name: str) -> None:
    pattern = write_run(tmp_path, [900, 80, 10000, 7], name)
    assert steps_of(average(pattern)) == [7, 80, 900, 10000]


def test_a_list_is_put_in_numeric_order_too(tmp_path: Path) -> None:
    write_run(tmp_path, [1, 2, 10])
    given_order = [str(tmp_path / f"step-{step}") for step in (10, 1, 2)]
    recipe = average(given_order, schedule={"weights": [0.5, 0.25, 0.125]})
    plan = distmerge.plan(recipe)
    assert steps_of(recipe) == [1, 2, 10]
    assert plan.tensors[0].rule.coefficients == ((0.5, 0.25, 0.125),)


def test_names_without_steps_keep_their_order(tmp_path: Path) -> None:
    for name in "cab":
        write_checkpoint(tmp_path / name, {"a": torch.ones(1)})
    given_order = [str(tmp_path / name) for name in "cab"]
    plan = distmerge.plan(average(given_order, last=2))
    assert [(c.folder.name, c.step) for c in plan.inputs] == [("a", None), ("b", None)]
    with pytest.raises(ConfigError, match="from_step, to_step, min_interval need steps"):
        distmerge.plan(average(given_order, min_interval=5))


def test_steps_come_from_the_folder_s_own_name(tmp_path: Path) -> None:
    pattern = write_run(tmp_path / "step-999", [1, 2])
    assert steps_of(average(pattern)) == [1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["step-5", "step-05"], "step 5 is there twice: .*step-05 and .*step-5"),
        (["step-5", "final"], "no step in the name of .*final; others have one"),
        (["step-5"], "2 checkpoints are needed, 1 are left of 1 found"),
    ],
)
def test_a_run_without_a_clear_order_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        write_checkpoint(tmp_path / name, {"a": torch.ones(1)})
    with pytest.raises(ConfigError, match=message):
        distmerge.plan(average(tmp_path / "*"))


def test_the_same_folder_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [1, 2])
    with pytest.raises(ConfigError, match="step 1 is there twice"):
        distmerge.plan(average([str(tmp_path / f"step-{step}") for step in (1, 1, 2)]))


def test_files_beside_the_checkpoints_do_not_matter(tmp_path: Path) -> None:
    pattern = write_run(tmp_path, [1, 2])
    (tmp_path / "step-log.txt").touch()
    assert steps_of(average(pattern)) == [1, 2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/nothing-*", "no checkpoint folder matches '.*nothing-\\*'$"),
        ("{}", "no checkpoint folder matches '.*'; did you mean .*/\\*\\?$"),
        ("{}/", "did you mean .*[^/]/\\*\\?$"),
        ("~nobody9/*", "can't be a path"),
        ("a\0b", "can't be a path"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused_with_a_hint(
    tmp_path: Path, pattern: str, message: str
) -> None:
    write_run(tmp_path, [1, 2])
    with pytest.raises((SourceError, ConfigError), match=message):
        distmerge.plan(average(pattern.format(tmp_path)))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 checkpoints are needed, 0 are left of 0 found"):
        distmerge.plan(average([]))


def test_the_base_model_of_a_trajectory_gives_the_config_and_no_weight(tmp_path: Path) -> None:
    pattern = write_run(tmp_path, [1, 2])
    base = write_checkpoint(tmp_path / "base", {"a": torch.ones(2)})
    plan = distmerge.plan({**average(pattern), "base_model": str(base)})
    assert (plan.donor, len(plan.inputs)) == (2, 3)
    assert plan.tensors[0].rule == Rule("sum", (0, 1), ((0.5, 0.5),))
    within = distmerge.plan({**average(pattern), "base_model": str(tmp_path / "step-1")})
    assert (within.donor, len(within.inputs)) == (0, 2)
