"""distmerge.json, found again: nothing in it is trusted, for anybody may have written it."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from distmerge.errors import OutputError
from distmerge.output import MANIFEST, OUTPUTS
from distmerge.planner import FORMAT


def output_names(out: Path) -> list[str]:
    """The folders of the outputs in `out`; [''] where it is one.

    Raises OutputError where `out` is not what a merge left.
    """
    content = read(out)
    names = content.get(OUTPUTS, [""])
    if OUTPUTS in content and not _are_folders(names):
        raise OutputError(f"{out / MANIFEST}: {OUTPUTS} is not a list of folders")
    return list(names)


def _are_folders(names: object) -> bool:
    return isinstance(names, list) and all(
        isinstance(name, str) and name and is_inside(name) and "/" not in name for name in names
    )


def read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`. Raises OutputError where there is none that we know."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise OutputError(
            f"{path}: can't be read: {error.strerror}; is {folder} an output of distmerge?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise OutputError(f"{path}: not a JSON object")
    if content.get("format") != FORMAT:
        raise OutputError(
            f"{path}: its format is {content.get('format')!r} and this distmerge knows {FORMAT}; "
            "verify it with the version that made it"
        )
    return content


def is_inside(name: str) -> bool:
    """Whether `name` is the plain path of something in a folder, not of anything outside."""
    path = PurePosixPath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return (
        str(path) == name
        and name != "."
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
    )
