"""OUT, the disk and the options: what is refused, before or during a merge, without a trace."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import distmerge
from distmerge import cli
from distmerge.errors import ConfigError, OutputError, UserError
from distmerge.pipeline import Options
from tests.support.checkpoints import linear_recipe, read_output, write_checkpoint, write_recipe
from tests.unit.refusals import half, refusal, tree, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


def not_empty(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link_to_a_full_folder(out: Path) -> None:
    not_empty(out.with_name("target"))
    out.symlink_to(out.with_name("target"))


def a_link_to_a_file(out: Path) -> None:
    a_file(out.with_name("target"))
    out.symlink_to(out.with_name("target"))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (not_empty, "out: it exists and is not empty"),
        (a_file, "out: it exists and is not a folder"),
        (a_link_to_a_full_folder, "target: it exists and is not empty"),
        (a_link_to_a_file, "target: it exists and is not a folder"),
    ],
)
def test_what_distmerge_did_not_write_is_never_replaced(
    tmp_path: Path,
    pair: tuple[Path, Path],
    occupy: Callable[[Path], None],
    message: str,
    overwrite: bool,
) -> None:
    out = tmp_path / "work/out"
    out.parent.mkdir()
    occupy(out)
    if overwrite:
        message = message.replace(
            "it exists and is not empty",
            "it holds no distmerge.json, so distmerge did not write it",
        )
    error = refusal(half(*pair), out, Options(overwrite=overwrite))
    assert isinstance(error, OutputError)
    assert message in str(error)


def test_the_way_out_is_named_where_there_is_one(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    distmerge.merge(half(*pair), tmp_path / "work/out")
    assert "--overwrite replaces it" in str(refusal(half(*pair), tmp_path / "work/out"))


def test_an_empty_folder_may_be_filled(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "out").mkdir()
    distmerge.merge(half(*pair), tmp_path / "out")
    assert set(read_output(tmp_path / "out")) == {"x", "y"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("first", "lies inside the input"),
        ("first/out", "lies inside the input"),
        ("second/deep/out", "lies inside the input"),
        ("first/../second/out", "lies inside the input"),
        (".", "the input .*first lies inside it"),
    ],
)
def test_out_and_inputs_must_not_hold_each_other(
    tmp_path: Path, pair: tuple[Path, Path], out: str, message: str, overwrite: bool
) -> None:
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=message):
        distmerge.merge(half(*pair), tmp_path / out, options=Options(overwrite=overwrite))
    assert tree(tmp_path) == before


def test_a_link_does_not_hide_that_out_lies_in_an_input(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(OutputError, match="lies inside the input"):
        distmerge.merge(half(*pair), tmp_path / "link/out")
    with pytest.raises(OutputError, match="lies inside the input"):
        distmerge.merge(half(tmp_path / "link", pair[1]), pair[0] / "out")


def test_too_little_space_is_told_before_the_merge(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    message = str(refusal(half(*pair), tmp_path / "work/out"))
    assert message == f"{tmp_path}/work: 67.1 MB are needed, 1 MB are free"


def test_a_disk_that_is_full_after_all_is_told(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "no space left for model.safetensors" in str(refusal(half(*pair), tmp_path / "work/out"))


def test_out_under_a_file_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        distmerge.merge(half(*pair), tmp_path / "file/out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(memory="1MB"), "--memory 1 MB is too little .* at least 4MB"),
        (Options(memory="much"), "not a size: 'much'; write for example 5GB"),
        (Options(shard_size="-1"), "not a size: '-1'"),
        (Options(shard_size="1XB"), "not a size: '1XB'"),
        (Options(shard_size="5i"), "not a size: '5i'; write for example 64MiB"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], options: Options, message: str
) -> None:
    refused = refusal(half(*pair), tmp_path / "work/out", options)
    with pytest.raises(UserError, match=message):
        raise refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    message = str(refusal(half(*pair), tmp_path / "work/out", Options(device="cuda")))
    assert "there is no CUDA device here; use --device cpu" in message


def test_out_that_can_be_no_path_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="can't be a path"):
        distmerge.merge(half(*pair), "~nobody9/out")


def test_left_overs_of_which_nothing_is_known_are_named_and_removed(
    tmp_path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "work/.out.distmerge-12345678"
    old.mkdir(parents=True)
    distmerge.merge(half(*pair), tmp_path / "work/out")
    assert f"{old}: removed; nothing is known of it" in caplog.text
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distmerge", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_ends_with_one_line_and_code_2(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", linear_recipe(dict.fromkeys(pair, 0.5)))
    write_checkpoint(pair[1], {"x": torch.ones(4)})
    ended = run("merge", recipe, tmp_path / "work/out")
    assert (ended.returncode, ended.stdout) == (2, "")
    first, second = ended.stderr.splitlines()
    assert first == "error: the inputs do not fit: 1 of 2 tensors differ"
    assert second.startswith(f"  y: not in {pair[1]} ")
    assert list((tmp_path).glob("work*")) == []


def test_the_command_ends_with_code_0_when_all_went_well(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", linear_recipe(dict.fromkeys(pair, 0.5)))
    ended = run("merge", recipe, tmp_path / "out", "--set", "out_dtype=bfloat16")
    assert (ended.returncode, ended.stderr) == (0, "")
    first, second = ended.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/out: 2 tensors in 1 shard, ")
    assert "1 rank, peak memory" in second
    assert read_output(tmp_path / "out")["x"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "Missing argument 'CONFIG'"),
        (["merge", "r.yaml"], "Missing argument 'OUT'"),
        (["merge", "r.yaml", "out", "--device", "tpu"], "'tpu' is not one of"),
        (["merge", "r.yaml", "out", "--wrong"], "No such option"),
        (["plan", "r.yaml", "--ranks", "0"], "0 is not in the range"),
        (["average"], "No such command"),
    ],
)
def test_a_mistyped_command_is_code_2(arguments: list[str], message: str) -> None:
    ended = CliRunner().invoke(cli.cli, arguments)
    assert ended.exit_code == 2
    assert message in ended.output
