"""Checkpoints of one run have the same headers: what was read once is not read again."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from distmerge import collector
from distmerge.errors import SourceError
from distmerge.sources.checkpoint import open_checkpoint
from tests.support.checkpoints import write_checkpoint

TENSORS = {"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(3)}


def test_the_same_headers_are_shared(tmp_path: Path) -> None:
    first = open_checkpoint(write_checkpoint(tmp_path / "1", TENSORS, shards=2), label="1")
    folder = write_checkpoint(tmp_path / "2", TENSORS, shards=2)
    second = open_checkpoint(folder, label="2", twin=first)
    assert second.tensors == open_checkpoint(folder, label="2").tensors
    assert all(second.tensors[name] is first.tensors[name] for name in TENSORS)
    assert [file.path.parent for file in second.files] == [folder, folder]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_another_header_is_read_for_itself(tmp_path: Path, shards: int) -> None:
    """The last of three shards is one of the same header as the first, but another file."""
    first = open_checkpoint(write_checkpoint(tmp_path / "1", TENSORS, shards=2), label="1")
    renamed = {"c": torch.ones(3), "a": torch.ones(3), "d": torch.ones(2, 5)}
    folder = write_checkpoint(tmp_path / "2", renamed, shards=shards)
    alone = open_checkpoint(folder, label="2")
    assert open_checkpoint(folder, label="2", twin=first).tensors == alone.tensors


def test_a_file_shorter_than_its_twin_is_refused(tmp_path: Path) -> None:
    first = open_checkpoint(write_checkpoint(tmp_path / "1", TENSORS), label="1")
    folder = write_checkpoint(tmp_path / "2", TENSORS)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SourceError, match="truncated"):
        open_checkpoint(folder, label="2", twin=first)


@collector.paused()
def fail_while_paused() -> None:
    assert not gc.isenabled()
    raise ZeroDivisionError


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            fail_while_paused()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
