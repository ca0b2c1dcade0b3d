"""The statistic: sums without rounding, modules, its file, and the cache beside the output."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import distmerge
from distmerge import gram as grams
from distmerge.document import Plain
from distmerge.errors import NonFiniteError
from distmerge.gram import Gram, load, modules, save
from distmerge.pipeline import MergeResult
from distmerge.planner import Plan
from distmerge.statistic import exact, rounded, total
from tests.support.checkpoints import write_checkpoint
from tests.support.drawing import without_drawing
from tests.support.trajectories import gram_of, walk

finite = st.floats(allow_nan=False, allow_infinity=False)
EDGES = [0.0, 5e-324, -5e-324, 2.2e-308, 2.225073858507201e-308, 1.0, -1.5, math.pi, 1.7e308]


@given(finite)
def test_every_finite_number_comes_back(value: float) -> None:
    assert rounded(exact(value)) == value


@pytest.mark.parametrize("value", EDGES)
def test_numbers_at_the_edges_come_back(value: float) -> None:
    assert rounded(exact(value)) == value
    assert exact(5e-324) == 1


@given(st.lists(st.floats(-1e290, 1e290)), st.randoms(use_true_random=False))
def test_sums_are_rounded_once_in_any_order(values: list[float], order: random.Random) -> None:
    shuffled = list(values)
    order.shuffle(shuffled)
    assert rounded(sum(map(exact, shuffled))) == math.fsum(values)


def test_what_is_lost_in_float64_is_kept() -> None:
    assert rounded(exact(1e300) + exact(1e-300) + exact(-1e300)) == 1e-300


def test_a_sum_that_float64_does_not_hold_is_told() -> None:
    with pytest.raises(NonFiniteError, match="overflows float64"):
        rounded(2 * exact(1.7e308))


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.mlp.up.weight",
    "model.layers.11.mlp.up.weight",
    "model.layers.11.norm",
    "model.norm.weight",
    "lm_head.weight",
    "scale",
    "h.3",
]
FINE = [
    "model.embed_tokens", "model.layers.0.self_attn", "model.layers.0.self_attn",
    "model.layers.0.mlp", "model.layers.11.mlp", "model.layers.11", "model.norm", "lm_head",
    "scale", "h",
]  # fmt: skip
BY_LAYER = [
    "model.embed_tokens", "model.layers.0", "model.layers.0", "model.layers.0", "model.layers.11",
    "model.layers.11", "model.norm", "lm_head", "scale", "h",
]  # fmt: skip
COARSE = ["model.layers" if name.startswith("model.layers") else name for name in FINE]


def test_tensors_are_counted_to_the_parts_of_layers() -> None:
    assert modules(NAMES, 24) == FINE


@pytest.mark.parametrize(
    ("most", "expected"),
    [(9, FINE), (8, BY_LAYER), (7, BY_LAYER), (6, COARSE), (5, COARSE), (0, COARSE)],
)
def test_where_there_are_too_many_they_are_counted_to_larger_modules(
    monkeypatch: pytest.MonkeyPatch, most: int, expected: list[str]
) -> None:
    """`most` modules, of four products each for two checkpoints."""
    monkeypatch.setattr(grams, "MODULE_PAIRS", 4 * most)
    assert modules(NAMES, 2) == expected


def test_a_model_of_many_layers_is_kept_within_bounds() -> None:
    names = [f"model.layers.{i}.mlp.experts.{k}.w" for i in range(100) for k in range(100)]
    assert len(set(modules(names, 24))) == 100
    assert set(modules(names, 200)) == {"model.layers"}


@pytest.fixture(autouse=True)
def no_drawing() -> Iterator[None]:
    with without_drawing():
        yield


SIZES = {"model.layers.0.mlp.up": 40, "model.layers.0.mlp.down": 30, "model.norm.weight": 5}


def write_walk(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """Checkpoints that drift, two of whose tensors are in one module."""
    for step, point in enumerate(walk(count, sum(SIZES.values()), seed=seed, drift=1.0).float()):
        parts = torch.split(point, list(SIZES.values()))
        write_checkpoint(folder / f"step-{step}", dict(zip(SIZES, parts, strict=True)))
    return folder


def recipe(folder: Path, step: Plain = 1, window: int = 2) -> dict[str, Plain]:
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(folder / "step-*"), "window": window},
        "parameters": {"step": step},
    }


def merge(folder: Path, out: Path, step: Plain = 1, window: int = 2) -> MergeResult:
    return distmerge.merge(recipe(folder, step, window), out)


def kept(out: Path) -> Path:
    """The only file in the cache beside `out`."""
    (path,) = (out.parent / ".distmerge").iterdir()
    return path


def files(out: Path) -> dict[str, bytes]:
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return distmerge.plan(recipe(write_walk(tmp_path / "run", count=3)))


def test_the_sums_of_all_ranks_are_added_in_any_order(plan: Plan) -> None:
    """A rank may have had no tensor of a module, or no tensor at all."""

    def pairs(*values: float) -> list[int]:
        return [exact(value) for value in values]

    parts = [
        {"model.layers.0.mlp": pairs(1e16, 2, 0, 4, 0, 0)},
        {},
        {"model.layers.0.mlp": pairs(1, 1, 0, 1, 0, 0), "model.norm": pairs(1, 0.5, 0, 1, 0, 0)},
        {"model.layers.0.mlp": pairs(-1e16, 0, 0, 0, 0, 0)},
    ]
    found = total(plan, parts)
    assert found.modules == ("model.layers.0.mlp", "model.norm")
    assert found.elements == (70, 5)
    assert found.by_module.tolist() == [
        [[1, 3, 0], [3, 5, 0], [0, 0, 0]], [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]],
    ]  # fmt: skip
    assert found.matrix.tolist() == [[2, 3.5, 0], [3.5, 6, 0], [0, 0, 0]]
    for order in ((3, 2, 1, 0), (1, 0, 3, 2)):
        other = total(plan, [parts[i] for i in order])
        assert torch.equal(other.matrix, found.matrix)
        assert torch.equal(other.by_module, found.by_module)


def test_a_module_that_nobody_had_stands_still(plan: Plan) -> None:
    assert not total(plan, [{}]).matrix.any()


def test_the_statistic_of_a_merge_is_that_of_its_checkpoints(tmp_path: Path) -> None:
    result = merge(write_walk(tmp_path / "run"), tmp_path / "out")
    found = load(tmp_path / "out/report/gram.safetensors")
    points = walk(6, 75, drift=1.0).float()
    torch.testing.assert_close(found.matrix, gram_of(list(points)), rtol=1e-12, atol=0)
    assert (found.modules, found.elements) == (("model.layers.0.mlp", "model.norm"), (70, 5))
    for part, points_of_it in zip(found.by_module, torch.split(points, [70, 5], 1), strict=True):
        torch.testing.assert_close(part, gram_of(list(points_of_it)), rtol=1e-12, atol=0)
    assert result.statistic_seconds > 0


def test_names_and_shards_do_not_change_a_bit(tmp_path: Path) -> None:
    """The sums over tensors are exact, so that their order can't show."""
    for name, order, shards in (("a", (0, 1, 2), 1), ("b", (2, 0, 1), 2)):
        for step, point in enumerate(walk(6, sum(SIZES.values()), drift=1.0).float()):
            parts = torch.split(point, list(SIZES.values()))
            tensors = {f"{new}.{i}": parts[i] for new, i in zip("xyz", order, strict=True)}
            write_checkpoint(tmp_path / name / f"step-{step}", tensors, shards=shards)
        merge(tmp_path / name, tmp_path / name / "out")
    one, other = (load(tmp_path / name / "out/report/gram.safetensors") for name in "ab")
    assert torch.equal(one.matrix, other.matrix)
    assert (one.modules, one.elements) == (("x", "y", "z"), (40, 30, 5))
    assert (other.modules, other.elements) == (("x", "z", "y"), (5, 30, 40))
    assert torch.equal(one.by_module, other.by_module[[2, 1, 0]])


def some_gram() -> Gram:
    matrix = gram_of(list(walk(4, 30)))
    return Gram(
        matrix=matrix,
        by_module=torch.stack([matrix / 4, matrix * 3 / 4]),
        modules=("a", "ü\n"),
        elements=(10, 20),
    )


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    before = some_gram()
    save(before, tmp_path / "g")
    after = load(tmp_path / "g")
    assert torch.equal(after.matrix, before.matrix)
    assert torch.equal(after.by_module, before.by_module)
    assert (after.modules, after.elements) == (before.modules, before.elements)
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_whoever_may_read_the_output_may_read_the_statistic(tmp_path: Path) -> None:
    save(some_gram(), tmp_path / "g")
    (tmp_path / "other").touch()
    assert (tmp_path / "g").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_can_t_be_saved_leaves_none_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save(some_gram(), tmp_path / "none" / "g")
    (tmp_path / "g").mkdir()
    with pytest.raises(IsADirectoryError):
        save(some_gram(), tmp_path / "g")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def another(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path)


def without_tensors(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path, metadata={"distmerge": "{}"})


def without_names(path: Path) -> None:
    found = load(path)
    tensors = {"gram": found.matrix, "modules": found.by_module}
    save_file(tensors, path, metadata={"distmerge": "{}"})


def with_odd_names(path: Path) -> None:
    save_file({"gram": torch.ones(1), "modules": torch.ones(1)}, path, metadata={"distmerge": "[]"})


DAMAGES: list[Callable[[Path], object]] = [
    truncate, another, without_tensors, without_names, with_odd_names,
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 1000),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_computed_again(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    run = write_walk(tmp_path / "run")
    first = merge(run, tmp_path / "out")
    path, content = kept(tmp_path / "out"), kept(tmp_path / "out").read_bytes()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = merge(run, tmp_path / "again")
    assert f"{path}: can't be used" in caplog.text
    assert "the statistic is computed again" in caplog.text
    assert again.read_bytes == first.read_bytes
    assert files(tmp_path / "again") == files(tmp_path / "out")
    assert path.read_bytes() == content


def test_with_a_cache_the_inputs_are_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the step, the window and the sweep are."""
    run = write_walk(tmp_path / "run")
    first = merge(run, tmp_path / "a" / "out")
    assert first.read_bytes == 2 * 6 * 75 * 4
    with caplog.at_level(logging.INFO):
        second = merge(run, tmp_path / "a" / "second")
    assert "the inputs are read once" in caplog.text
    assert (second.read_bytes, second.statistic_seconds) == (6 * 75 * 4, 0)
    assert files(tmp_path / "a" / "second") == files(tmp_path / "a" / "out")
    other = merge(run, tmp_path / "a" / "other", [0, 2], window=3)
    assert other.read_bytes == 6 * 75 * 4
    merge(run, tmp_path / "b" / "other", [0, 2], window=3)
    assert files(tmp_path / "a" / "other") == files(tmp_path / "b" / "other")


def test_another_selection_has_a_statistic_of_its_own(tmp_path: Path) -> None:
    run = write_walk(tmp_path / "run")
    merge(run, tmp_path / "out")
    for key, value in (("trajectory.last", 5), ("parameters.exclude", ["model.norm.*"])):
        overrides = [f"{key}={value}"]
        found = distmerge.merge(recipe(run), tmp_path / "new", overrides=overrides)
        assert found.statistic_seconds > 0
        (tmp_path / "new").rename(tmp_path / f"done-{key}")
    assert len(list((tmp_path / ".distmerge").iterdir())) == 3


@pytest.mark.parametrize("in_place", [True, False])
def test_an_input_with_other_content_is_noticed_whatever_its_times_say(
    tmp_path: Path, in_place: bool
) -> None:
    run = write_walk(tmp_path / "run")
    merge(run, tmp_path / "out")
    path = run / "step-2/model.safetensors"
    before, content = path.stat(), (write_walk(tmp_path / "other", seed=1) / "step-2").glob("*")
    (new,) = content
    if in_place:
        path.write_bytes(new.read_bytes())
    else:
        new.rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    merge(run, tmp_path / "again")
    merge(run, tmp_path / "apart" / "out")
    assert files(tmp_path / "again") == files(tmp_path / "apart" / "out")
    assert len(list((tmp_path / ".distmerge").iterdir())) == 2


@pytest.mark.parametrize("what", ["no folder", "no file"])
def test_a_cache_that_can_t_be_written_costs_nothing(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_walk(tmp_path / "run")
    cache = tmp_path / "a" / ".distmerge"
    cache.parent.mkdir()
    if what == "no folder":
        cache.touch()
    else:
        grams.cache_path(tmp_path / "a" / "out", distmerge.plan(recipe(run)), "cpu").mkdir(
            parents=True
        )
    merge(run, tmp_path / "a" / "out")
    assert ".safetensors: can't be written: " in caplog.text
    merge(run, tmp_path / "b" / "out")
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")


def test_a_failed_merge_may_leave_the_statistic_and_nothing_else(tmp_path: Path) -> None:
    """What was computed is right: the next attempt need not compute it again."""
    run = write_walk(tmp_path / "run")
    large = {**recipe(run, 1e9), "out_dtype": "float16"}
    with pytest.raises(NonFiniteError):
        distmerge.merge(large, tmp_path / "work" / "out")
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".distmerge"]
    assert merge(run, tmp_path / "work" / "out").statistic_seconds == 0
