"""The output folder: checked before, filled under a temporary name, renamed when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import huggingface_hub
import safetensors
import torch

from distmerge.document import Plain
from distmerge.errors import OutputError
from distmerge.log import format_bytes
from distmerge.planner import FORMAT, Plan
from distmerge.sources.checkpoint import INDEX, Checkpoint
from distmerge.sources.sidecars import config_with_dtype, sidecars
from distmerge.version import __version__

MANIFEST = "distmerge.json"
_SPARE = 64 * 2**20
"""Bytes beyond the shards that must be free: tokenizer, index, file system."""


def check_target(out: Path, inputs: Iterable[Checkpoint], *, overwrite: bool) -> None:
    """Raise OutputError unless `out` may be written (or replaced, with `overwrite`)."""
    for checkpoint in inputs:
        folder = checkpoint.folder.resolve()
        if out == folder or folder in out.parents:
            raise OutputError(f"{out}: it lies inside the input {folder}; choose another folder")
        if out in folder.parents:
            raise OutputError(f"{out}: the input {folder} lies inside it; choose another folder")
    if os.path.lexists(out):
        _check_replaceable(out, overwrite=overwrite)


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    if not out.is_dir():
        raise OutputError(f"{out}: it exists and is not a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out}: it exists and is not empty; --overwrite replaces it")
    if not (out / MANIFEST).is_file():
        raise OutputError(
            f"{out}: it holds no {MANIFEST}, so distmerge did not write it and will not delete it"
        )


def create_folder(out: Path, plan: Plan, token: str) -> Path:
    """The temporary folder beside `out`, on a disk with enough room. Raises OutputError."""
    temporary = out.parent / f".{out.name}.distmerge-{token}"
    needed = plan.output_bytes + _SPARE
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise OutputError(
                f"{out.parent}: {format_bytes(needed)} are needed, {format_bytes(free)} are free"
            )
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"{out.parent}: can't be written: {error.strerror}") from error
    return temporary


def discard(temporary: Path) -> None:
    """Remove what a failed attempt has written; other ranks may be doing the same."""
    shutil.rmtree(temporary, ignore_errors=True)


def leftovers(out: Path) -> list[Path]:
    """Temporary folders of earlier attempts that were killed."""
    return sorted(out.parent.glob(f".{out.name}.distmerge-*"))


def write_sidecars(temporary: Path, plan: Plan, *, cast: bool) -> dict[str, Plain]:
    """Copy the donor's config, tokenizer and code; returns their sizes and hashes by name.

    `cast` says that the recipe set an output dtype. Raises SourceError for a damaged config.json.
    """
    donor = plan.inputs[plan.donor].folder
    files: dict[str, Plain] = {}
    for name in sidecars(donor):
        if name == Path("config.json") and plan.main_dtype is not None:
            content = config_with_dtype(donor / name, plan.main_dtype, everywhere=cast)
        else:
            content = (donor / name).read_bytes()
        files[str(name)] = _write(temporary / name, content)
    return files


def complete(temporary: Path, plan: Plan, files: Mapping[str, Plain], recipe: Plain) -> None:
    """Add the manifest and, last, the index, without which nothing loads.

    `files` describes the shards and what else is there, by name.
    """
    index = plan.index
    indexed = {} if index is None else {INDEX: described(_sha256(index), len(index))}
    manifest = _manifest(plan, recipe, {**files, **indexed})
    _write(
        temporary / MANIFEST,
        (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(),
    )
    if index is not None:
        _write(temporary / INDEX, index)
    _sync_folder(temporary)


def described(sha256: str, num_bytes: int) -> dict[str, Plain]:
    """A file as the manifest lists it."""
    return {"sha256": sha256, "bytes": num_bytes}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest(plan: Plan, recipe: Plain, files: Mapping[str, Plain]) -> dict[str, Plain]:
    """Nothing that changes from run to run: the same merge gives the same manifest."""
    return {
        "format": FORMAT,
        "recipe": recipe,
        "coefficients": _coefficients(plan),
        "inputs": [_input(checkpoint) for checkpoint in plan.inputs],
        "donor": plan.donor,
        "plan": plan.digest,
        "versions": versions(),
        "files": dict(sorted(files.items())),
    }


def _input(checkpoint: Checkpoint) -> dict[str, Plain]:
    return {
        "model": checkpoint.label,
        "folder": str(checkpoint.folder),
        "commit": checkpoint.revision,
        "step": checkpoint.step,
        "bytes": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint,
    }


def _coefficients(plan: Plan) -> list[Plain]:
    """Each distinct set of coefficients, by input, with the tensors that it holds for.

    The most frequent set stands first and for all tensors that no other set names.
    """
    groups: dict[tuple[tuple[int, ...], tuple[float, ...]], list[Plain]] = {}
    for tensor in plan.tensors:
        if tensor.rule.kind == "sum":
            groups.setdefault((tensor.rule.inputs, tensor.rule.coefficients), []).append(
                tensor.name
            )
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    listed: list[Plain] = []
    for number, ((inputs, values), names) in enumerate(ordered):
        by_input: dict[str, Plain] = {
            str(i): value for i, value in zip(inputs, values, strict=True)
        }
        listed.append({"by_input": by_input, "tensors": names if number else "all others"})
    return listed


def versions() -> dict[str, Plain]:
    """Of all that can change a byte of the output."""
    return {
        "distmerge": __version__,
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def rename(temporary: Path, out: Path) -> None:
    """Give the complete folder its name; what `out` held before goes once that has worked."""
    old = out.parent / f"{temporary.name}-replaced"
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    temporary.rename(out)
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes) -> dict[str, Plain]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return described(_sha256(content), len(content))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
