"""The output folder: checked before, filled under a temporary name, renamed when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import huggingface_hub
import safetensors
import torch

from distmerge.document import Plain
from distmerge.errors import OutputError
from distmerge.log import format_bytes
from distmerge.planner import FORMAT, Plan, output_terms
from distmerge.sources.checkpoint import INDEX, Checkpoint
from distmerge.sources.sidecars import config_with_dtype, read_sidecar, sidecars
from distmerge.version import __version__

MANIFEST = "distmerge.json"
OUTPUTS = "outputs"
"""In the manifest of a sweep: the folders of its outputs, each with a manifest of its own."""

REPLACED = "-replaced"
"""Ending of the folder with what OUT held before, until the new one has its name."""

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


def create_folders(temporary: Path, plan: Plan) -> None:
    """The folder that gets OUT's name, and one in it for each output; they may be there already.

    Raises OutputError unless the disk has room for what is not there yet.
    """
    _keep_shards(temporary, plan)
    there = sum(_taken(temporary / file.name) for file in plan.files)
    needed = plan.output_bytes - there + _SPARE
    try:
        free = shutil.disk_usage(temporary.parent).free
        if free < needed:
            raise OutputError(
                f"{temporary.parent}: {format_bytes(needed)} are needed, "
                f"{format_bytes(free)} are free"
            )
        temporary.mkdir(exist_ok=True)
        for output in plan.outputs:
            (temporary / output.name).mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{temporary.parent}: can't be written: {error.strerror}") from error


def _keep_shards(temporary: Path, plan: Plan) -> None:
    """Of what an earlier attempt left, the shards: what a kill cut short must not get OUT's name,
    and the rest is soon made."""
    kept = {temporary / file.name for file in plan.files}
    for folder, _, names in os.walk(temporary):
        for path in (Path(folder, name) for name in names):
            if path not in kept:
                path.unlink()


def _taken(path: Path) -> int:
    """Bytes of the disk that a file has; a sparse one has fewer than its size."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return min(found.st_blocks * 512, found.st_size)


def write_sidecars(temporary: Path, plan: Plan, *, cast: bool) -> dict[str, Plain]:
    """Copy the donor's config, tokenizer and code into every output; returns their sizes and
    hashes by name.

    `cast` says that the recipe set an output dtype. Raises SourceError for a damaged config.json.
    """
    donor = plan.inputs[plan.donor].folder
    files: dict[str, Plain] = {}
    for name in sidecars(donor):
        if name == Path("config.json") and plan.main_dtype is not None:
            content = config_with_dtype(donor / name, plan.main_dtype, everywhere=cast)
        else:
            content = read_sidecar(donor, name)
        for output in plan.outputs:
            folder = temporary / output.name
            for parent in reversed(name.parents[:-1]):
                (folder / parent).mkdir(exist_ok=True)
            files[str(name)] = _write(folder / name, content)
    return files


def complete(
    temporary: Path,
    plan: Plan,
    files: Mapping[str, Plain],
    shards: Sequence[Plain],
    recipes: Sequence[Plain],
    device: str = "cpu",
) -> None:
    """Add the manifests and, last in each output, the index, without which nothing loads.

    `files` describes, by name, what stands in every output beside the shards, `shards` the files
    of the plan in order, `recipes` how each output came about, `device` on what.
    """
    for number, output in enumerate(plan.outputs):
        first = plan.file(number, 0)
        named = {shard.name: shards[first + n] for n, shard in enumerate(plan.shards)}
        beside = {**files, **named}
        manifest = partial(_manifest, plan, number, recipes[number], versions(device))
        _complete_one(temporary / output.name, plan.index, manifest, beside)
    if len(plan.outputs) > 1:
        names: list[Plain] = [output.name for output in plan.outputs]
        _write_json(temporary / MANIFEST, {"format": FORMAT, "plan": plan.digest, OUTPUTS: names})
    _sync_folder(temporary)


def _complete_one(
    folder: Path,
    index: bytes | None,
    manifest: Callable[[Mapping[str, Plain]], dict[str, Plain]],
    files: Mapping[str, Plain],
) -> None:
    indexed = {} if index is None else {INDEX: described(_sha256(index), len(index))}
    _write_json(folder / MANIFEST, manifest({**files, **indexed}))
    if index is not None:
        _write(folder / INDEX, index)
    _sync_folder(folder)


def described(sha256: str, num_bytes: int) -> dict[str, Plain]:
    """A file as the manifest lists it."""
    return {"sha256": sha256, "bytes": num_bytes}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest(
    plan: Plan,
    number: int,
    recipe: Plain,
    made_with: dict[str, Plain],
    files: Mapping[str, Plain],
) -> dict[str, Plain]:
    """Nothing that changes from run to run, and nothing of the other outputs: the same merge gives
    the same manifest."""
    output = plan.outputs[number]
    return {
        "format": FORMAT,
        "recipe": recipe,
        "coefficients": _coefficients(plan, number),
        "inputs": [_input(plan.inputs[i]) for i in output.inputs],
        "donor": output.inputs.index(plan.donor),
        "plan": output.digest,
        "shard_bytes": plan.shard_bytes,
        "versions": made_with,
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


def _coefficients(plan: Plan, number: int) -> list[Plain]:
    """Each distinct set of coefficients, by input, with the tensors that it holds for.

    The most frequent set stands first and for all tensors that no other set names, unless some
    come of task vectors.
    """
    groups: dict[tuple[tuple[int, float], ...], list[Plain]] = {}
    terms = cache(lambda rule: tuple(output_terms(rule, number).items()))
    for tensor in plan.tensors:
        if tensor.rule.kind == "sum":
            groups.setdefault(terms(tensor.rule), []).append(tensor.name)
    place = {i: n for n, i in enumerate(plan.outputs[number].inputs)}
    listed: list[Plain] = []
    for group, names in sorted(groups.items(), key=lambda entry: -len(entry[1])):
        by_input: dict[str, Plain] = {str(place[i]): value for i, value in group}
        alone = listed or any(tensor.rule.kind == "tasks" for tensor in plan.tensors)
        listed.append({"by_input": by_input, "tensors": names if alone else "all others"})
    return listed


def versions(device: str = "cpu") -> dict[str, Plain]:
    """Of all that can change a byte of the output; `device` is what matrices were solved on."""
    return {
        "device": device,
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
    old = out.parent / f"{temporary.name}{REPLACED}"
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    temporary.rename(out)
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes) -> dict[str, Plain]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return described(_sha256(content), len(content))


def replace_text(path: Path, content: str) -> None:
    """Write a file that people may be reading: the old one stands until the new one is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def replace_link(path: Path, target: str) -> None:
    """Let the link `path` lead to `target` beside it, whatever it led to before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # a kill may have left it, and in containers numbers recur
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(path)


def _write_json(path: Path, content: Mapping[str, Plain]) -> dict[str, Plain]:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 has lone surrogates; escaped like this they are JSON.
    return _write(path, text.encode(errors="backslashreplace"))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
