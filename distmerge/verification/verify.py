"""Whether an output is whole, sound, and what its recipe makes of its inputs.

manifests -> headers, index, inputs (rank 0) -> sha256, NaN (all ranks) -> some tensors again
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distmerge.dist import World
from distmerge.document import Plain
from distmerge.errors import OutputError
from distmerge.manifest import output_names
from distmerge.meeting import join
from distmerge.output import MANIFEST
from distmerge.planner import Plan
from distmerge.reference import as_path
from distmerge.stream import single_threaded
from distmerge.verification.manifest import Finding, Manifest, read_manifest
from distmerge.verification.provenance import (
    Opened,
    compare_headers,
    find_copies,
    look_up,
    notes,
    try_plan,
    with_coefficients,
)
from distmerge.verification.recompute import merge_again, other_versions, parse_share, sample
from distmerge.verification.scan import Scanned, scan_all
from distmerge.verification.structure import Structure, compare_with_plan, look_around, look_at


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was looked at, and what is off. `notes` say what could not be looked at, and why.

    `bytes` are those of the `files` that were read; `recomputed` counts the tensors that were
    merged again, drawn with `seed` (None where none was asked for).
    """

    out: Path
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    outputs: int
    files: int
    bytes: int
    tensors: int
    recomputed: int
    seed: int | None
    ranks: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether nothing is off."""
        return not self.findings

    def as_plain(self) -> dict[str, Plain]:
        """For JSON."""
        return {
            "out": str(self.out),
            "sound": self.sound,
            "findings": [{"where": f.where, "what": f.what} for f in self.findings],
            "notes": [{"where": f.where, "what": f.what} for f in self.notes],
            "outputs": self.outputs,
            "files": self.files,
            "bytes": self.bytes,
            "tensors": self.tensors,
            "recomputed": self.recomputed,
            "seed": self.seed,
            "ranks": self.ranks,
            "seconds": self.seconds,
        }


class _Looked(NamedTuple):
    """What rank 0 tells the others of an output: its files that are there, how many tensors these
    hold, and the tensors to merge again with the files that hold them."""

    manifest: Manifest
    files: tuple[str, ...]
    tensors: int
    again: dict[str, str]

    def to_merge(self, unreadable: Collection[str]) -> frozenset[str]:
        """The tensors to merge again whose files can be read."""
        place = self.manifest.place
        return frozenset(n for n, file in self.again.items() if place(file) not in unreadable)


class _Wanted(NamedTuple):
    """The share of tensors to merge again, the seed that the user gave for drawing them, and
    whether inputs stay on the Hub."""

    share: float
    seed: int | None
    stream_remote: bool


def verify(
    out: str | Path,
    *,
    recompute: str | None = None,
    seed: int | None = None,
    stream_remote: bool = False,
    progress: bool = False,
) -> Verification:
    """Check all that a merge left in `out`; call it on every rank, or in one process alone.

    Files against the manifest (all of them, by sha256), headers, index, shapes and dtypes against
    the inputs, no NaN or Inf, and no copy of a single input. With `recompute`, 'all' or a share
    as '1%' of the tensors is merged again and compared to the byte; `seed` draws others. For that,
    inputs on the Hub are downloaded, or read by ranges with `stream_remote`.

    Returns the findings, on every rank. Raises OutputError where `out` is not what a merge left,
    ConfigError for a bad share, and what a merge raises where inputs or outputs can't be read.
    """
    started = time.monotonic()
    share = None if recompute is None else parse_share(recompute)
    target = as_path(str(out))
    with join(use_cuda=False) as world, single_threaded():
        wanted = None if share is None else _Wanted(share, seed, stream_remote)
        looked, found, drawn = world.on_first(
            "check the headers", lambda: _look(world, target, wanted)
        )
        sees = world.who_sees([target / MANIFEST])
        able = [rank for rank, there in enumerate(sees) if there]
        shown = progress and world.rank == 0
        problems, unreadable = _read(world, looked, able, shown=shown)
        found += problems
        again = [each.to_merge(unreadable) for each in looked]
        for each, names in zip(looked, again, strict=True):
            if names:
                found += merge_again(
                    world, each.manifest, names, able, stream_remote=stream_remote, shown=shown
                )
        ranks = world.size
    return Verification(
        out=target,
        findings=tuple(finding for finding in found if not finding.note),
        notes=tuple(finding for finding in found if finding.note),
        outputs=len(looked),
        files=sum(len(each.files) for each in looked),
        bytes=sum(each.manifest.files[name].num_bytes for each in looked for name in each.files),
        tensors=sum(each.tensors for each in looked),
        recomputed=sum(map(len, again)),
        seed=drawn,
        ranks=ranks,
        seconds=time.monotonic() - started,
    )


def _look(
    world: World, out: Path, wanted: _Wanted | None
) -> tuple[list[_Looked], list[Finding], int | None]:
    """All that needs no reading of whole files, and the seed that draws the tensors."""
    names = output_names(out)
    manifests, found = _manifests(out, names)
    if wanted is not None and wanted.seed is None and manifests:
        wanted = wanted._replace(seed=int(manifests[0].plan[:8], 16))
    looked: list[_Looked] = []
    opened: Opened = {}
    twin: Structure | None = None
    for manifest in manifests:
        world.check()
        twin, problems = look_at(manifest, twin)
        found += problems
        again, problems = _compare(world, manifest, twin, wanted, opened)
        found += problems
        looked.append(_Looked(manifest, twin.files, sum(1 for _ in twin.tensors), again))
    if names != [""]:
        found += look_around(out, names)
    found += notes(opened, compared=wanted is not None)
    return looked, list(dict.fromkeys(found)), wanted and wanted.seed


def _manifests(out: Path, names: Sequence[str]) -> tuple[list[Manifest], list[Finding]]:
    """Raises OutputError for the only output; one of many is a finding."""
    if names == [""]:
        return [read_manifest(out, "")], []
    manifests: list[Manifest] = []
    found: list[Finding] = []
    for name in names:
        try:
            manifests.append(read_manifest(out, name))
        except OutputError as error:
            path = out / name / MANIFEST
            what = str(error).removeprefix(f"{path}: ")
            found.append(Finding(f"{name}/{MANIFEST}", what))
    return manifests, found


def _compare(
    world: World,
    manifest: Manifest,
    structure: Structure,
    wanted: _Wanted | None,
    opened: Opened,
) -> tuple[dict[str, str], list[Finding]]:
    """An output against its inputs; also the tensors to merge again."""
    found: list[Finding] = []
    plan: Plan | None = None
    if wanted is not None:
        # May bring inputs from the Hub.
        plan, found = try_plan(manifest, insist=True, stream_remote=wanted.stream_remote)
    inputs = look_up(manifest, opened, plan)
    if wanted is None and len(inputs) == len(manifest.inputs):
        plan, found = try_plan(manifest, insist=False)
    again: dict[str, str] = {}
    if plan is None:
        found += compare_headers(manifest, structure, inputs)
    else:
        sound, problems = compare_with_plan(manifest, structure, plan)
        found += problems
        found += with_coefficients(plan, manifest)[1]
        if wanted is not None:
            names = [t.name for t in plan.tensors if t.elements and t.name in sound]
            drawn = sample(names, wanted.share, f"{wanted.seed} {manifest.name}")
            again = {name: sound[name] for name in names if name in drawn}
            found += other_versions(manifest)
    if structure.whole:
        found += find_copies(manifest, inputs, check=world.check)
    return again, found


def _read(
    world: World, looked: Sequence[_Looked], able: Sequence[int], *, shown: bool
) -> tuple[list[Finding], set[str]]:
    """What is wrong with the bytes of the files, and the files that could not be read."""
    files = [(each.manifest, name) for each in looked for name in each.files]
    paths = [(manifest.folder / name, manifest.files[name].num_bytes) for manifest, name in files]
    known = {
        file.sha256: each.manifest.place(name)
        for each in looked
        for name, file in each.manifest.files.items()
    }
    found: list[Finding] = []
    unreadable: set[str] = set()
    results = scan_all(world, paths, able, shown=shown)
    for (manifest, name), scanned in zip(files, results, strict=True):
        if scanned.problem:
            unreadable.add(manifest.place(name))
            found.append(manifest.finding(name, scanned.problem))
        else:
            found += _told(manifest, name, scanned, known)
    return found, unreadable


def _told(
    manifest: Manifest, name: str, scanned: Scanned, known: Mapping[str, str]
) -> Iterator[Finding]:
    expected = manifest.files[name].sha256
    if scanned.sha256 != expected:
        whose = known.get(scanned.sha256)
        what = f"its sha256 is {scanned.sha256[:16]}...; the manifest says {expected[:16]}..."
        yield manifest.finding(name, what + (f" (it is {whose})" if whose else ""))
    for tensor, (count, first) in scanned.nonfinite.items():
        what = f"{count} NaN or Inf, the first is element {first}"
        yield manifest.finding(name, what, tensor=tensor)
