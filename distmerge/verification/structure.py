"""What an output's headers, index and config say, held against its manifest and its plan.

Reads no tensor. Each function gives what it found, as lines for people.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from distmerge.errors import SourceError
from distmerge.output import MANIFEST
from distmerge.planner import Plan
from distmerge.sources.checkpoint import INDEX, read_index
from distmerge.sources.header import Header, read_header
from distmerge.spec import TensorSpec
from distmerge.verification.manifest import Finding, Manifest, some

CONFIG = "config.json"
BEST = "best"

LATER = frozenset({MANIFEST, "README.md", ".gitattributes"})
"""Files that the manifest does not list: itself, and what publishing adds."""

LATER_FOLDERS = frozenset({"report", ".cache", ".git"})

Headers = dict[str, Header]
"""By the file's name; of those that are there and sound."""


class Structure(NamedTuple):
    """What is sound in one output: its files that are there at their size, and their headers.

    `whole` says that no shard is missing among them.
    """

    files: tuple[str, ...]
    headers: Headers
    whole: bool

    @property
    def tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        """File and description of every tensor, in the order of the files."""
        for name, header in self.headers.items():
            for spec in sorted(header.tensors.values(), key=attrgetter("start", "name")):
                yield name, spec


def look_at(manifest: Manifest, twin: Structure | None) -> tuple[Structure, list[Finding]]:
    """What is there of an output, and what is wrong with the rest.

    `twin` is another output of the same sweep: its headers are mostly the same.
    """
    problems = {name: _misfit(manifest.folder / name, n) for name, (_, n) in manifest.files.items()}
    found = [manifest.finding(name, problem) for name, problem in problems.items() if problem]
    files = tuple(name for name, problem in problems.items() if problem is None)
    headers: Headers = {}
    for name in (name for name in manifest.shards if problems[name] is None):
        path = manifest.folder / name
        try:
            headers[name] = read_header(path, twin=twin.headers.get(name) if twin else None)
        except SourceError as error:
            found.append(manifest.finding(name, str(error).removeprefix(f"{path}: ")))
    if not manifest.shards:
        found.append(manifest.finding(MANIFEST, "it lists no safetensors file"))
    whole = bool(headers) and len(headers) == len(manifest.shards)
    structure = Structure(files, headers, whole)
    found += some(_extra(manifest.folder, manifest.files, frozenset(), manifest))
    found += some(_twice(manifest, structure))
    found += some(_index(manifest, structure))
    found += _config(manifest, structure)
    return structure, found


def look_around(out: Path, names: Collection[str]) -> list[Finding]:
    """What is wrong with the folder of a sweep around its outputs `names`."""
    found = some(_extra(out, (), {*names, BEST}, None))
    path = out / BEST
    if os.path.lexists(path):
        outputs = {os.path.realpath(out / name) for name in names}
        if not path.is_symlink() or os.path.realpath(path) not in outputs:
            found.append(Finding(BEST, "it is not a link to one of the outputs"))
    return found


def _misfit(path: Path, num_bytes: int) -> str | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing; the manifest lists it"
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a file"
    if status.st_size != num_bytes:
        return f"it has {status.st_size} bytes; the manifest says {num_bytes}"
    return None


def _extra(
    folder: Path, listed: Collection[str], folders: Collection[str], manifest: Manifest | None
) -> Iterator[Finding]:
    """Files that nobody lists."""
    for here, subfolders, names in os.walk(folder):
        at = Path(here).relative_to(folder)
        left_out: Collection[str] = ()
        if at == Path():
            subfolders[:] = [d for d in subfolders if d not in LATER_FOLDERS and d not in folders]
            left_out = {*LATER, *folders}
        subfolders.sort()
        links = [d for d in subfolders if (Path(here) / d).is_symlink()]
        for name in sorted([*names, *links]):
            inside = str(at / name)
            if name not in left_out and inside not in listed:
                where = manifest.place(inside) if manifest else inside
                yield Finding(where, "it is there, but no manifest lists it")


def _twice(manifest: Manifest, structure: Structure) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for file, spec in structure.tensors:
        if seen.setdefault(spec.name, file) != file:
            yield manifest.finding(file, f"{seen[spec.name]} holds it too", tensor=spec.name)


def _index(manifest: Manifest, structure: Structure) -> Iterator[Finding]:
    """Where the index does not say what the headers say."""
    path = manifest.folder / INDEX
    if INDEX not in manifest.files:
        if len(manifest.shards) > 1:
            yield manifest.finding(INDEX, "several shards need an index, and the manifest has none")
        return
    if not path.is_file():
        return  # told already
    try:
        weight_map = read_index(manifest.folder)
        total = json.loads(path.read_bytes())["metadata"]["total_size"]
    except SourceError as error:
        yield manifest.finding(INDEX, str(error).removeprefix(f"{path}: "))
        return
    except (TypeError, KeyError):
        weight_map, total = read_index(manifest.folder), None
    size = sum(spec.nbytes for _, spec in structure.tensors)
    if structure.whole and total != size:
        yield manifest.finding(INDEX, f"total_size is {total}; the shards hold {size} bytes")
    yield from _weight_map(manifest, structure, weight_map)


def _weight_map(
    manifest: Manifest, structure: Structure, weight_map: Mapping[str, str]
) -> Iterator[Finding]:
    held = {spec.name: file for file, spec in structure.tensors}
    for name, file in weight_map.items():
        if file not in manifest.shards:
            what = f"it is said to be in {file!r}, which is not one of the shards"
            yield manifest.finding(INDEX, what, tensor=name)
        elif file in structure.headers and name not in structure.headers[file].tensors:
            yield manifest.finding(INDEX, f"it is not in {file}", tensor=name)
    for name, file in held.items():
        if name not in weight_map:
            yield manifest.finding(INDEX, f"it is in {file}, and not in the index", tensor=name)


def main_dtype(specs: Iterator[TensorSpec]) -> str | None:
    """The torch name of the float dtype that most bytes have, as Plan.main_dtype."""
    totals: dict[str, int] = {}
    for spec in specs:
        if spec.dtype.kind == "float":
            name = spec.dtype.torch_name
            totals[name] = totals.get(name, 0) + spec.nbytes
    return max(totals, key=totals.__getitem__, default=None)


def _config(manifest: Manifest, structure: Structure) -> Iterator[Finding]:
    """Where config.json names another dtype than that of the tensors."""
    dtype = main_dtype(spec for _, spec in structure.tensors)
    path = manifest.folder / CONFIG
    if CONFIG not in manifest.files or not path.is_file():
        return
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield manifest.finding(CONFIG, f"not JSON ({error})")
        return
    if not isinstance(config, dict):
        yield manifest.finding(CONFIG, "not a JSON object")
        return
    if dtype is None or not structure.whole:
        return
    said = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    for key, value in (said or {"torch_dtype": None}).items():
        if value != dtype:
            yield manifest.finding(CONFIG, f"{key} is {value!r}; the tensors are {dtype}")


def compare_with_plan(
    manifest: Manifest, structure: Structure, plan: Plan
) -> tuple[dict[str, str], list[Finding]]:
    """The tensors that stand where `plan` puts them, with their files, and what is wrong with the
    others."""
    sound: dict[str, str] = {}
    found: list[Finding] = []
    files = [shard.name for shard in plan.shards]
    planned = {tensor.name: files[tensor.shard] for tensor in plan.tensors}
    for tensor in plan.tensors:
        file = files[tensor.shard]
        header = structure.headers.get(file)
        spec = header.tensors.get(tensor.name) if header else None
        if spec is None:
            if header or file not in manifest.files:
                what = "it is not there, as the recipe and its inputs would have it"
                found.append(manifest.finding(file, what, tensor=tensor.name))
        elif (spec.dtype, spec.shape, spec.start) != (tensor.dtype, tensor.shape, tensor.offset):
            what = (
                f"{spec.dtype.name} {list(spec.shape)} at byte {spec.start}; from the inputs comes "
                f"{tensor.dtype.name} {list(tensor.shape)} at byte {tensor.offset}"
            )
            found.append(manifest.finding(file, what, tensor=tensor.name))
        else:
            sound[tensor.name] = file
    extra = (
        manifest.finding(file, "the inputs do not hold it, or it belongs elsewhere", tensor=name)
        for file, (name, *_) in structure.tensors
        if planned.get(name) != file
    )
    return sound, some(chain(found, extra))
