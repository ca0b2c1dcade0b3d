"""Where each tensor comes from: tensors that not all inputs hold, integers, dtypes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmerge
from distmerge.config import Config, Missing
from distmerge.document import Plain
from distmerge.errors import ConfigError, MismatchError
from distmerge.matrices import Facts
from distmerge.rules import contents
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.resolve import Sources
from distmerge.spec import DTYPES, Rule, TensorSpec
from distmerge.sweep import Recipe, Variant
from distmerge.trajectory import Trajectory
from tests.support.checkpoints import read_output, write_checkpoint
from tests.unit.recipes import linear

Rules = dict[str, tuple[str, dict[int, float]]]


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    return write_checkpoint(folder, tensors)


def full(value: float) -> torch.Tensor:
    return torch.full((3,), float(value))


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """All hold x; the first two y, the first alone z, the last alone w."""
    return [
        write(tmp_path / "0", x=full(1), y=full(1), z=full(1)),
        write(tmp_path / "1", x=full(2), y=full(2)),
        write(tmp_path / "2", x=full(5), w=full(5)),
    ]


def rules(recipe: dict[str, Plain]) -> Rules:
    return {
        t.name: (t.rule.kind, dict(zip(t.rule.inputs, row, strict=False)))
        for t in distmerge.plan(recipe).tensors
        for row in t.rule.coefficients or [()]
    }


def approx(values: dict[int, float]) -> object:
    return pytest.approx(values, abs=1e-15)


WEIGHTS = (0.25, 0.25, 0.5)


def test_a_tensor_that_not_all_hold_is_an_error(three: list[Path]) -> None:
    with pytest.raises(MismatchError) as caught:
        rules(linear(dict(zip(three, WEIGHTS, strict=True))))
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:]] == ["y:", "z:", "w:"]
    assert "missing: donor or present would allow it" in str(caught.value)


def test_present_sums_what_is_there_and_keeps_the_sum_of_the_weights(three: list[Path]) -> None:
    found = rules(linear(dict(zip(three, WEIGHTS, strict=True)), missing="present"))
    assert found == {
        "x": ("sum", approx({0: 0.25, 1: 0.25, 2: 0.5})),
        "y": ("sum", approx({0: 0.5, 1: 0.5})),
        "z": ("sum", approx({0: 1})),
        "w": ("sum", approx({2: 1})),
    }
    plain: Plain = {"normalize": False}
    found = rules(linear(dict.fromkeys(three, 1), missing="present", parameters=plain))
    assert found["y"] == ("sum", approx({0: 1.5, 1: 1.5}))


def test_donor_takes_what_is_missing_somewhere_from_the_donor(three: list[Path]) -> None:
    pair = linear({three[0]: 1, three[1]: 3}, missing="donor")
    assert rules(pair) == {
        "x": ("sum", {0: 0.25, 1: 0.75}),
        "y": ("sum", {0: 0.25, 1: 0.75}),
        "z": ("sum", {0: 1.0}),
    }


def test_donor_does_not_help_where_the_donor_lacks_the_tensor(three: list[Path]) -> None:
    with pytest.raises(MismatchError, match=r"1 of 4 .*\n  w: not in .*/0, .*/1 "):
        rules(linear(dict.fromkeys(three, 1), missing="donor"))


def test_a_base_model_gives_tensors_that_it_alone_holds(three: list[Path]) -> None:
    recipe = linear({three[1]: 1, three[1].parent / "same": 1}, base_model=str(three[0]))
    write(three[1].parent / "same", x=full(3), y=full(3))
    assert rules(recipe) == {
        "x": ("sum", {0: 0.5, 1: 0.5}),
        "y": ("sum", {0: 0.5, 1: 0.5}),
        "z": ("sum", {2: 1.0}),
    }
    with pytest.raises(MismatchError, match=r"z: not in .*1, .*same"):
        rules({**recipe, "missing": "error"})


def test_a_base_model_need_not_hold_what_the_others_share(three: list[Path]) -> None:
    recipe = linear({three[0]: 1, three[1]: 1}, base_model=str(three[2]), missing="present")
    assert rules(recipe)["y"] == ("sum", {0: 0.5, 1: 0.5})


def test_the_copy_of_a_missing_tensor_is_exact(three: list[Path], tmp_path: Path) -> None:
    odd = torch.tensor([0.1, -0.0, 1e-45])
    write(three[0], x=full(1), z=odd)
    write(three[1], x=full(2))
    distmerge.merge(linear({three[0]: 1, three[1]: 1}, missing="donor"), tmp_path / "out")
    assert torch.equal(read_output(tmp_path / "out")["z"], odd)


def test_present_weights_that_sum_to_zero_name_the_tensor(three: list[Path]) -> None:
    recipe = linear(dict(zip(three, (1, -1, 3), strict=True)), missing="present")
    with pytest.raises(ConfigError, match="y in 2 inputs: the weights sum to zero"):
        rules(recipe)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64, torch.bool]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_that_agree_are_copied_whatever_the_weights_and_dtypes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    buffer = torch.tensor([1, 0, 1]).to(dtype)
    models = [write(tmp_path / str(i), x=full(i), n=buffer) for i in range(3)]
    recipe = linear(dict(zip(models, WEIGHTS, strict=True)), out_dtype="bfloat16")
    assert rules(recipe)["n"][0] == "equal"
    distmerge.merge(recipe, tmp_path / "out")
    merged = read_output(tmp_path / "out")
    assert merged["n"].dtype == dtype
    assert torch.equal(merged["n"], buffer)


def test_integers_that_differ_come_from_the_donor_if_asked(tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), x=full(i), n=torch.tensor([i])) for i in range(3)]
    recipe = linear(dict.fromkeys(models, 1), non_float="donor", base_model=str(models[1]))
    found = distmerge.plan(recipe).tensors
    assert {t.name: t.rule for t in found}["n"] == Rule("copy", (1,))
    distmerge.merge(recipe, tmp_path / "out")
    assert read_output(tmp_path / "out")["n"].tolist() == [1]


def test_an_integer_that_one_input_holds_is_copied(tmp_path: Path) -> None:
    models = [
        write(tmp_path / "0", x=full(1)),
        write(tmp_path / "1", x=full(1), n=torch.ones(1).int()),
    ]
    found = distmerge.plan(linear(dict.fromkeys(models, 1), missing="present")).tensors
    assert {t.name: t.rule for t in found}["n"] == Rule("copy", (1,))


@pytest.mark.parametrize(
    ("dtypes", "out_dtype", "expected"),
    [
        (("float32", "float32"), None, "F32"),
        (("bfloat16", "float32"), None, "BF16"),
        (("float32", "bfloat16"), None, "F32"),
        (("float64", "float16"), None, "F64"),
        (("float32", "float16"), "bfloat16", "BF16"),
        (("float16", "float16"), "float64", "F64"),
    ],
)
def test_the_output_has_the_donor_s_dtype_unless_the_recipe_has_one(
    tmp_path: Path, dtypes: tuple[str, str], out_dtype: str | None, expected: str
) -> None:
    models = [
        write(tmp_path / str(i), x=full(1.5).to(getattr(torch, d))) for i, d in enumerate(dtypes)
    ]
    plan = distmerge.plan(linear(dict.fromkeys(models, 1), out_dtype=out_dtype))
    assert [t.dtype.name for t in plan.tensors] == [expected]


@pytest.mark.parametrize(("donor", "expected"), [(0, "F32"), (1, "BF16"), (2, "F16")])
def test_the_donor_s_dtype_counts_wherever_it_stands(
    tmp_path: Path, donor: int, expected: str
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models = [write(tmp_path / str(i), x=full(1).to(dtype)) for i, dtype in enumerate(dtypes)]
    plan = distmerge.plan(linear(dict.fromkeys(models, 1), base_model=str(models[donor])))
    assert [t.dtype.name for t in plan.tensors] == [expected]


holders = st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=4)


@given(holders, st.sampled_from(["error", "donor", "present"]), st.data())
def test_no_tensor_is_lost_and_every_sum_keeps_its_weight(
    held: list[set[str]], missing: Missing, data: st.DataObject
) -> None:
    weights = tuple(data.draw(st.floats(0.1, 2)) for _ in held)
    opened = tuple(
        Checkpoint(
            label=str(i), folder=Path(), revision=None, step=None, files=(),
            tensors={n: TensorSpec(n, DTYPES["F32"], (1,), 0, 0, 4) for n in sorted(names)},
        )
        for i, names in enumerate(held)
    )  # fmt: skip
    donor = data.draw(st.integers(0, len(held) - 1))
    config = Config(merge_method="average", trajectory=Trajectory(checkpoints=()), missing=missing)
    everyone = tuple(range(len(opened)))
    sources = Sources(
        checkpoints=opened, donor=donor, inputs=(everyone,), rows=(weights,), facts=Facts()
    )
    recipe = Recipe(variants=(Variant("", {}, config),))
    everything = set.union(*held)
    try:
        found = contents(recipe, sources)
    except MismatchError:
        assert missing != "present"
        assert any(names != everything for names in held)
        return
    assert sorted(content.name for content in found) == sorted(everything)
    for content in found:
        rule = content.rule
        assert all(content.name in held[i] for i in rule.inputs)
        copied = missing == "donor" and rule.inputs == (donor,)
        total = 1.0 if copied and len(held) > 1 else math.fsum(weights)
        assert math.fsum(rule.coefficients[0]) == pytest.approx(total)
