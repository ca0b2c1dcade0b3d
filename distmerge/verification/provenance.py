"""An output against its inputs, as far as they are still there: plan, coefficients, copies.

Reads headers, and of the tensors no more than it takes to see that the output is no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain

import torch

from distmerge.errors import DistmergeError, PeerError, RunError, SourceError
from distmerge.output import MANIFEST
from distmerge.planner import Plan, build_plan, output_terms, solved
from distmerge.sources.checkpoint import Checkpoint, open_checkpoint
from distmerge.sources.reader import Inputs
from distmerge.sources.resolve import open_sources, pinned
from distmerge.spec import FLOATS, PAGE, DType, OutputTensor, Rule, TensorSpec
from distmerge.storage import aligned_buffer
from distmerge.sweep import load_recipe
from distmerge.verification.manifest import Finding, Given, Manifest, some
from distmerge.verification.structure import Structure

CHUNK = 4 * 2**20
"""Bytes that are compared at once."""


Opened = dict[Given, Checkpoint | str]
"""Inputs that were looked at: as they were when they were merged, or why they are not."""


def look_up(manifest: Manifest, opened: Opened, plan: Plan | None) -> list[Checkpoint]:
    """The inputs that are as they were, in `plan` or on this host; adds to `opened` what is not
    known there yet."""
    known = {checkpoint.fingerprint: checkpoint for checkpoint in plan.inputs} if plan else {}
    found: list[Checkpoint] = []
    for given in manifest.inputs:
        if given not in opened:
            same = known.get(given.fingerprint)
            opened[given] = (
                replace(same, label=given.label)
                if same
                else _opened(given, found[-1] if found else None)
            )
        now = opened[given]
        if isinstance(now, Checkpoint):
            found.append(now)
    return found


def notes(opened: Opened, *, compared: bool) -> list[Finding]:
    """On the inputs that are not as they were; `compared` all the same?"""
    left_out = "" if compared else "; the output was not compared with it"
    return [
        Finding(given.label, f"{found}{left_out}", note=True)
        for given, found in opened.items()
        if isinstance(found, str)
    ]


def _opened(given: Given, twin: Checkpoint | None) -> Checkpoint | str:
    """The input, or why it is not what was merged."""
    try:
        if not given.folder.is_dir():
            return f"there is no {given.folder} here"
        if given.commit and not any(given.folder.glob("*.safetensors")):
            return "its weights are not on this host; --recompute gets them from the Hub"
        found = open_checkpoint(given.folder, label=given.label, revision=given.commit, twin=twin)
    except (SourceError, OSError, ValueError) as error:
        return f"it can't be read any more ({error})"
    if found.fingerprint != given.fingerprint:
        return "its files have changed since (sizes, headers or time stamps)"
    return found


def plan_again(manifest: Manifest, *, local_only: bool, stream_remote: bool) -> Plan:
    """The plan of the manifest's recipe, from the headers that its inputs have now.

    With `local_only` nothing is fetched from the Hub, with `stream_remote` no weights. Raises
    DistmergeError.
    """
    recipe = pinned(load_recipe(manifest.recipe))
    sources = open_sources(recipe, local_only=local_only, stream_remote=stream_remote)
    return build_plan(recipe, sources, shard_bytes=manifest.shard_bytes)


def try_plan(
    manifest: Manifest, *, insist: bool, stream_remote: bool = False
) -> tuple[Plan | None, list[Finding]]:
    """The plan, if it can be had and is the manifest's; else what is in the way.

    `insist` says that the user wants the inputs used, from the Hub if need be.
    """
    try:
        plan = plan_again(manifest, local_only=not insist, stream_remote=stream_remote)
    except DistmergeError as error:
        note = isinstance(error, SourceError) and not insist
        what = f"its recipe can't be planned again: {error}"
        return None, [Finding(manifest.place(MANIFEST), what, note)]
    if plan.digest == manifest.plan:
        return plan, []
    what = (
        f"its recipe and inputs now make the plan {plan.digest[:16]}, but it says "
        f"{manifest.plan[:16]}: inputs, manifest or the version of distmerge have changed"
    )
    return None, [manifest.finding(MANIFEST, what)]


def with_coefficients(plan: Plan, manifest: Manifest) -> tuple[Plan, list[Finding]]:
    """`plan` with the coefficients that the manifest gives where a statistic found them, and
    where the manifest contradicts the recipe."""
    moved = next((tensor for tensor in plan.tensors if tensor.rule.kind == "trend"), None)
    if moved is not None:
        terms = manifest.terms(moved.name)
        plan = solved(plan, [[terms.get(i, 0.0) for i in moved.rule.inputs]])
    return plan, some(_contradictions(plan, manifest))


def _contradictions(plan: Plan, manifest: Manifest) -> Iterator[Finding]:
    expected: dict[Rule, dict[int, float]] = {}
    for tensor in plan.tensors:
        rule = tensor.rule
        if rule.kind != "sum":
            continue
        if rule not in expected:
            expected[rule] = output_terms(rule, 0)
        if manifest.terms(tensor.name) != expected[rule]:
            what = "the coefficients are not those of the recipe"
            yield manifest.finding(MANIFEST, what, tensor=tensor.name)


def without_agreement(plan: Plan) -> Plan:
    """`plan` where integers are taken from one input and not compared with the others again."""

    def alone(tensor: OutputTensor) -> OutputTensor:
        rule = tensor.rule
        copied = Rule("copy", rule.inputs[:1]) if rule.kind == "equal" else rule
        return tensor._replace(rule=copied)

    return replace(plan, tensors=tuple(map(alone, plan.tensors)))


def compare_headers(
    manifest: Manifest, structure: Structure, inputs: Sequence[Checkpoint]
) -> list[Finding]:
    """Shapes and dtypes against the inputs that are there, for want of a plan."""
    return some(
        chain.from_iterable(_compare(manifest, structure, checkpoint) for checkpoint in inputs)
    )


def _compare(manifest: Manifest, structure: Structure, given: Checkpoint) -> Iterator[Finding]:
    for file, spec in structure.tensors:
        twin = given.tensors.get(spec.name)
        if twin is None:
            continue
        if spec.shape != twin.shape:
            what = f"its shape is {list(spec.shape)}; in {given.label} it is {list(twin.shape)}"
            yield manifest.finding(file, what, tensor=spec.name)
        elif spec.dtype not in _dtypes(manifest, twin):
            what = f"its dtype is {spec.dtype.name}; in {given.label} it is {twin.dtype.name}"
            yield manifest.finding(file, what, tensor=spec.name)


def _dtypes(manifest: Manifest, spec: TensorSpec) -> Sequence[DType]:
    """What may come of an input's tensor: the recipe's dtype, else another input's may count."""
    if spec.dtype.kind != "float":
        return [spec.dtype]
    given = manifest.recipe.get("out_dtype") or manifest.recipe.get("dtype")
    return [FLOATS[given]] if isinstance(given, str) and given in FLOATS else list(FLOATS.values())


def find_copies(
    manifest: Manifest, inputs: Sequence[Checkpoint], *, check: Callable[[], None]
) -> Iterator[Finding]:
    """The inputs whose float tensors are all in the output as they are, unless the recipe says so.

    `check` is called between reads.
    """
    try:
        output = open_checkpoint(manifest.folder, label=str(manifest.folder))
    except SourceError:
        return  # told already
    floats = [s for s in output.tensors.values() if s.dtype.kind == "float" and s.nbytes]
    meant = [{i: 1.0} for i in range(len(manifest.inputs))]
    if not floats or any(all(manifest.terms(s.name) == one for s in floats) for one in meant):
        return
    for given in inputs:
        try:
            if _is_copy(output, floats, given, check):
                what = f"all float tensors are those of the input {given.label}, byte for byte"
                yield Finding(manifest.name or str(manifest.folder), what)
        except PeerError:
            raise
        except (SourceError, RunError) as error:
            yield Finding(given.label, f"{error}; is the output a copy of it?", note=True)


def _is_copy(
    output: Checkpoint, floats: Sequence[TensorSpec], given: Checkpoint, check: Callable[[], None]
) -> bool:
    for spec in floats:
        twin = given.tensors.get(spec.name)
        if twin is None or (twin.dtype, twin.shape) != (spec.dtype, spec.shape):
            return False
    buffers = [aligned_buffer(CHUNK + 2 * PAGE, pinned=False) for _ in range(2)]
    with closing(Inputs([output, given], "auto")) as inputs:
        for spec in floats:
            twin = given.tensors[spec.name]
            for start in range(0, spec.nbytes, CHUNK):
                check()
                size = min(CHUNK, spec.nbytes - start)
                ours = inputs.reader(0, spec.file).read(spec.start + start, size, buffers[0])
                theirs = inputs.reader(1, twin.file).read(twin.start + start, size, buffers[1])
                if not torch.equal(ours, theirs):
                    return False
    return True
