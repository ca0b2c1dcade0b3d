"""Inputs that change while they are read: there is an error with the file's name, and no output."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distmerge.errors import SourceError
from distmerge.sources import fault
from distmerge.sources.checkpoint import open_checkpoint
from distmerge.sources.reader import Inputs, open_reader
from tests.support.checkpoints import write_checkpoint
from tests.support.processes import BIN, environment, run
from tests.unit.refusals import half


def shrink(path: Path) -> None:
    os.truncate(path, 200)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def touch(path: Path) -> None:
    time.sleep(0.02)  # file systems count time in ticks
    path.touch()


def replace(path: Path) -> None:
    time.sleep(0.02)
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [shrink, grow, touch, replace, remove]


def an_input(folder: Path) -> tuple[Inputs, Path]:
    write_checkpoint(folder, {"x": torch.ones(100_000)})
    opened = open_checkpoint(folder, label="it")
    return Inputs([opened], "auto"), folder / "model.safetensors"


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_the_plan_is_not_read(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    inputs, path = an_input(tmp_path)
    change(path)
    with pytest.raises(SourceError, match=r"model\.safetensors: it (was changed|can't be read)"):
        inputs.reader(0, 0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_after_it_was_read_is_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    inputs, path = an_input(tmp_path)
    inputs.reader(0, 0)
    inputs.check_unchanged()
    change(path)
    with pytest.raises(SourceError, match=r"model\.safetensors: it (was changed|can't be read)"):
        inputs.check_unchanged()
    inputs.close()


@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_a_file_that_shrank_is_named_by_the_next_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    reader = open_reader(path, mode)  # type: ignore[arg-type]
    buffer = torch.empty(200_000, dtype=torch.uint8)
    os.truncate(path, 200)
    with pytest.raises(SourceError, match=f"{path}: it ends at byte 200, inside a tensor"):
        reader.read(50_000, 10_000, buffer)
    reader.close()


def test_a_mapped_file_that_shrinks_under_a_view_does_not_end_the_process(tmp_path: Path) -> None:
    fault.forget()
    path = tmp_path / "x"
    path.write_bytes(b"\1" * 1_000_000)
    reader = open_reader(path, "mmap")
    view = reader.read(0, 1_000_000, torch.empty(0))
    assert not fault.is_lost(path)
    os.truncate(path, 5000)
    assert int(view.sum()) == 5000  # zeros, where the kernel would send SIGBUS
    assert fault.is_lost(path)
    with pytest.raises(SourceError, match=r"x: it ends at byte 5000|x: a part of it is gone"):
        reader.read(0, 1_000_000, torch.empty(0))
    reader.close()
    fault.forget()


BUS_ERROR = """
import mmap, os, sys
import torch
from pathlib import Path
from distmerge.sources import fault
path = Path(sys.argv[1])
path.write_bytes(bytes(8192))
with path.open("r+b") as file:
    ours, other = (mmap.mmap(file.fileno(), 8192) for _ in range(2))
fault.watch(ours, path)
os.truncate(path, 0)
print(ours[5000], flush=True)
other[5000]
"""


def test_a_bus_error_that_is_not_ours_stays_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUS_ERROR, tmp_path / "x"],
        env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("0\n", -7)


CHANGING = """
import os

path, change, write, written = os.environ["CHANGED"], os.environ["CHANGE"], os.pwrite, 0

def changing(descriptor, data, offset):
    global written
    written += len(data)
    if written > 5_000_000:
        os.pwrite = write
        os.truncate(path, 9_000_000) if change == "shrink" else os.utime(path)
    return write(descriptor, data, offset)

os.pwrite = changing
"""
"""A sitecustomize: after 5 MB of output an input changes."""


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("change", ["shrink", "touch"])
def test_a_merge_whose_input_changes_leaves_nothing(tmp_path: Path, mode: str, change: str) -> None:
    tensors = {f"x{i}": torch.ones(1_000_000) for i in range(8)}
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(CHANGING)
    changed = tmp_path / "second/model.safetensors"
    hook = {"PYTHONPATH": str(tmp_path / "hook"), "CHANGED": str(changed), "CHANGE": change}
    first = write_checkpoint(tmp_path / "first", tensors)
    second = write_checkpoint(tmp_path / "second", tensors)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(half(first, second)))
    command: list[str | Path] = [
        BIN / "distmerge",
        "merge",
        "--read",
        mode,
        recipe,
        tmp_path / "work/out",
    ]

    done = run(command, environment(**hook))

    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: {changed}: "), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work/out").exists()
