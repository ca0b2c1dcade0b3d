"""What the user can mend: one clear message, exit code 2, and nothing left on the disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.errors import (
    ConfigError,
    MismatchError,
    NonFiniteError,
    SourceError,
    UserError,
)
from distmerge.pipeline import Options
from tests.support.checkpoints import raw_file, read_output, write_checkpoint, write_index
from tests.unit.recipes import average, linear, write_run
from tests.unit.refusals import Recipe, half, refusal, write_pair


class Case(NamedTuple):
    """`spoil` changes the two sound inputs and returns the recipe that fails on them."""

    error: type[UserError]
    message: str
    spoil: Callable[[Path, Path], Recipe]


def second_holds(tensors: dict[str, torch.Tensor]) -> Callable[[Path, Path], Recipe]:
    def spoil(first: Path, second: Path) -> Recipe:
        write_checkpoint(second, tensors)
        return half(first, second)

    return spoil


def both_hold(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **more: Plain
) -> Callable[[Path, Path], Recipe]:
    def spoil(first: Path, second: Path) -> Recipe:
        write_checkpoint(first, ours)
        write_checkpoint(second, theirs)
        return {**half(first, second), **more}

    return spoil


def gone(first: Path, second: Path) -> Recipe:
    shutil.rmtree(second)
    return half(first, second)


def not_on_the_hub(first: Path, second: Path) -> Recipe:
    return linear({first: 1, Path("nobody/nothing"): 1})


def a_file(first: Path, second: Path) -> Recipe:
    return linear({first: 1, second / "model.safetensors": 1})


def only_bin(first: Path, second: Path) -> Recipe:
    (second / "model.safetensors").rename(second / "pytorch_model.bin")
    return half(first, second)


def no_index(first: Path, second: Path) -> Recipe:
    (second / "model.safetensors").rename(second / "model-1.safetensors")
    shutil.copy(second / "model-1.safetensors", second / "model-2.safetensors")
    return half(first, second)


def index_outside(first: Path, second: Path) -> Recipe:
    write_index(second, {"x": "../first/model.safetensors"})
    return half(first, second)


def truncated(first: Path, second: Path) -> Recipe:
    os.truncate(second / "model.safetensors", (second / "model.safetensors").stat().st_size - 1)
    return half(first, second)


def corrupted(first: Path, second: Path) -> Recipe:
    with (second / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\0\0")
    return half(first, second)


def packed(first: Path, second: Path) -> Recipe:
    for folder in (first, second):
        raw_file(
            folder / "model.safetensors",
            {"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
            bytes(4),
        )
    return half(first, second)


def damaged_config(first: Path, second: Path) -> Recipe:
    (first / "config.json").write_text("{")
    return half(first, second)


def too_few(first: Path, second: Path) -> Recipe:
    return average(write_run(first.parent / "run", [1, 2, 3]), last=4)


FP8 = {"x": torch.ones(4).to(torch.float8_e4m3fn), "y": torch.ones(2, 2)}
SHORT = {"x": torch.ones(4)}
OTHER = {"x": torch.ones(4), "y": torch.ones(4)}
INT32 = {"x": torch.ones(4, dtype=torch.int32), "y": torch.ones(2, 2)}
INT64 = {"x": torch.ones(4, dtype=torch.int64), "y": torch.ones(2, 2)}
TWOS = {"x": torch.full((4,), 2, dtype=torch.int32), "y": torch.ones(2, 2)}
FALSE = {"x": torch.zeros(4, dtype=torch.bool)}
TRUE = {"x": torch.ones(4, dtype=torch.bool)}
NAN = {"x": torch.tensor([1.0, float("nan"), 1.0, float("nan")]), "y": torch.ones(2, 2)}
INF = {"x": torch.tensor([1.0, 1.0, 1.0, float("-inf")]), "y": torch.ones(2, 2)}
LARGE = {"x": torch.tensor([1.0, 70_000.0, 1.0, 70_000.0])}

CASES: dict[str, Case] = {
    "missing folder": Case(SourceError, r"^/.*/second: no such folder$", gone),
    "no such repository": Case(SourceError, "^nobody/nothing: no such folder,", not_on_the_hub),
    "a file": Case(SourceError, "it is a file: name the folder that holds it", a_file),
    "no safetensors": Case(SourceError, "found pytorch_model.bin: convert it", only_bin),
    "no index": Case(SourceError, "2 safetensors files .* but no .*index", no_index),
    "index": Case(SourceError, "which is not the name of a file in this folder", index_outside),
    "truncated": Case(SourceError, r"second/model.safetensors: .*truncated\?$", truncated),
    "corrupted": Case(SourceError, "second/model.safetensors: .*header is not JSON", corrupted),
    "config": Case(SourceError, "first/config.json: not JSON", damaged_config),
    "missing": Case(MismatchError, r"1 of 2 .*\n  y: not in .*second ", second_holds(SHORT)),
    "missing in the first": Case(MismatchError, "y: not in /.*first ", both_hold(SHORT, OTHER)),
    "shape": Case(MismatchError, r"y: \[2, 2\] in .*first, \[4\] in .*second", second_holds(OTHER)),
    "fp8": Case(MismatchError, "x: dtype F8_E4M3 in /.*second can't be merged", second_holds(FP8)),
    "fp8 everywhere": Case(MismatchError, "x: dtype F8_E4M3 in /.*first", both_hold(FP8, FP8)),
    "fp4": Case(MismatchError, "x: dtype F4 in /.*first can't be merged", packed),
    "float and integer": Case(MismatchError, "x: F32 in /.*first, I32 in", second_holds(INT32)),
    "two integer dtypes": Case(MismatchError, "x: I32 in .*, I64 in", both_hold(INT32, INT64)),
    "integers": Case(MismatchError, r"x \(I32\) differs between .*second; .* non_float: donor",
                     both_hold(INT32, TWOS)),
    "bools": Case(MismatchError, r"x \(BOOL\) differs", both_hold(TRUE, FALSE)),
    "NaN": Case(NonFiniteError, "second/model.safetensors: tensor x holds 2 NaN or Inf in elements "
                "0 to 3; pass --allow-nonfinite", second_holds(NAN)),
    "Inf": Case(NonFiniteError, "second/model.safetensors: tensor x holds 1", second_holds(INF)),
    "NaN twice": Case(NonFiniteError, "first/model.safetensors: tensor", both_hold(NAN, INF)),
    "overflow": Case(NonFiniteError, "x: 2 values overflow float16; set a wider out_dtype",
                     both_hold(LARGE, LARGE, out_dtype="float16")),
    "zero sum": Case(ConfigError, "tensor x: the weights sum to zero",
                     lambda first, second: linear({first: 1, second: -1})),
    "no weight": Case(ConfigError, "no weight for /.*second, tensor x",
                      lambda first, second: linear({first: 1, second: None})),
    "too few": Case(ConfigError, "4 checkpoints are needed, 3 are left of 3 .*1, 2, 3", too_few),
    "unknown key": Case(ConfigError, "wieght: unknown key; did you mean 'weight'",
                        lambda *pair: {**half(*pair), "parameters": {"wieght": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mistake_is_told_and_leaves_nothing(tmp_path: Path, case: Case) -> None:
    recipe = case.spoil(*write_pair(tmp_path))
    error = refusal(recipe, tmp_path / "work/out")
    assert type(error) is case.error
    assert re.search(case.message, str(error)), str(error)
    assert len(str(error).splitlines()) <= 2


def test_ten_differences_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "1", {f"t{i}": torch.ones(2) for i in range(15)})
    second = write_checkpoint(
        tmp_path / "2", {f"t{i}": torch.ones(2 if i < 3 else 3) for i in range(15)}
    )
    head, *listed, rest = str(refusal(half(first, second), tmp_path / "out")).splitlines()
    assert head == "the inputs do not fit: 12 of 15 tensors differ"
    assert len(listed) == 10
    assert all(f"[2] in {first}, [3] in {second}" in line for line in listed)
    assert rest == "  ... and 2 more"


def test_a_recipe_that_is_not_there_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: can't be read: No such file"):
        distmerge.merge(tmp_path / "gone.yaml", tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "count"),
    [((NAN, INF), 3), ((NAN, NAN), 4), ((LARGE, LARGE), 2), ((NAN, LARGE), 2)],
    ids=["both", "twice", "overflow", "NaN before overflow"],
)
def test_allow_nonfinite_goes_on_and_counts(
    tmp_path: Path, values: tuple[dict[str, torch.Tensor], ...], count: int
) -> None:
    first, second = (
        write_checkpoint(tmp_path / str(i), {"x": held["x"]}) for i, held in enumerate(values)
    )
    recipe = {**half(first, second), "out_dtype": "float16"}
    options = Options(allow_nonfinite=True)
    assert distmerge.merge(recipe, tmp_path / "out", options=options).nonfinite == count
    assert not read_output(tmp_path / "out")["x"].isfinite().all()


@pytest.mark.parametrize("place", [0, 98_303, 98_304, 150_000, 199_999])
def test_one_nan_anywhere_is_found(tmp_path: Path, place: int) -> None:
    first, second = (
        write_checkpoint(tmp_path / name, {"x": torch.zeros(200_000)}) for name in "ab"
    )
    spoiled = torch.zeros(200_000)
    spoiled[place] = float("nan")
    write_checkpoint(second, {"x": spoiled})
    message = str(refusal(half(first, second), tmp_path / "out"))
    assert f"{second}/model.safetensors: tensor x holds 1 NaN or Inf" in message
