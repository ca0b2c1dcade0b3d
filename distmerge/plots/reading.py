"""Questions that several plots ask of a report's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distmerge.plots.canvas import MAX_PANELS, is_number, number

Numbers = dict[str, Any]

MEANING = {
    "step": "step (merge intervals beyond the last merge)",
    "span": "step (share of the merged span)",
    "window": "window (checkpoints in one merge)",
    "last": "last (checkpoints averaged)",
}
"""Swept keys that need a word more on an axis: a step of the merge is not one of training."""


def shown(numbers: Numbers) -> tuple[list[Numbers], str]:
    """The trends that get a panel, and what to add to the title where some do not."""
    trends = numbers["trends"]
    if len(trends) <= MAX_PANELS:
        return trends, ""
    return trends[:MAX_PANELS], f" (first {MAX_PANELS} of {len(trends)} trends)"


def calibrated(numbers: Numbers) -> tuple[list[Numbers], list[str], str]:
    """The outputs whose matrices are told module by module, what tells them apart, and what to add
    to the title where others are not shown."""
    spectra = numbers["spectra"]
    found = [output for output in spectra["outputs"] if output["modules"]] if spectra else []
    if len(found) == 1:
        note = f" ({found[0]['name']})" if len(spectra["outputs"]) > 1 else ""
        return found, [""], note
    by_name = {output["name"]: output for output in numbers["outputs"]}
    left = len(found) < len(spectra["outputs"]) if found else False
    note = f" (first {len(found)} of {len(spectra['outputs'])} outputs)" if left else ""
    return found, told_apart([by_name[output["name"]] for output in found])[1], note


def steps(numbers: Numbers) -> tuple[list[float], str]:
    """The checkpoints' training steps, or their numbers where a step is missing; which it is."""
    found = [checkpoint["step"] for checkpoint in numbers["checkpoints"]]
    if all(is_number(step) for step in found):
        return found, "training step"
    return [i + 1 for i in range(len(found))], "checkpoint number"


def swept(entries: Sequence[Numbers]) -> list[str]:
    """The keys of `values` that differ between the entries, in their order of appearance."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry["values"]))
    return [key for key in keys if len({value_of(entry, key) for entry in entries}) > 1]


def short(key: str) -> str:
    """'window' for 'trajectory.window'"""
    return key.rpartition(".")[2] or key


def meaning(key: str) -> str:
    return MEANING.get(short(key), key)


def value_of(entry: Numbers, key: str) -> str:
    return number(entry["values"].get(key, "none"))


def told_apart(entries: Sequence[Numbers]) -> tuple[str, list[str]]:
    """What tells outputs (or candidates) from each other, and each one's text for it.

    The swept key and its values where there is one; names or 'key=value, ...' where there are
    more; an empty key where there is nothing to tell apart.
    """
    keys = swept(entries)
    if len(keys) == 1:
        return keys[0], [value_of(entry, keys[0]) for entry in entries]
    if keys:
        texts = [", ".join(f"{short(k)}={value_of(entry, k)}" for k in keys) for entry in entries]
        return ", ".join(short(key) for key in keys), texts
    return "", [entry["name"] or "output" for entry in entries]


def in_order(entries: Sequence[Numbers], key: str) -> list[str]:
    """The distinct values of `key`: by size where they are numbers, else as they come."""
    found = {value_of(entry, key): entry["values"].get(key) for entry in entries}
    if all(is_number(value) for value in found.values()):
        return sorted(found, key=lambda name: float(found[name] or 0))
    return list(found)


def is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(float(value))  # type: ignore[arg-type]
