"""Programs that tests need beside Python: found, or installed once where that harms nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

import pytest

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def require(programs: Sequence[str], packages: Sequence[str], untested: str) -> None:
    """Skip the test, loudly, where `programs` are missing and can't be had.

    Root gets them from Debian's `packages`, except where CI is set: what a CI machine has is said
    in its own configuration.
    """
    if not _missing(programs):
        return
    told = "CI installs nothing" if "CI" in os.environ else _install(tuple(packages))
    if missing := _missing(programs):
        pytest.skip(
            f"NOT TESTED: {untested}; {', '.join(missing)} missing here ({told}): "
            f"apt-get install {' '.join(packages)}"
        )


def _missing(programs: Sequence[str]) -> list[str]:
    return [name for name in programs if shutil.which(name, path=PATH) is None]


@cache
def _install(packages: tuple[str, ...]) -> str:
    """Tried once in a test run; says how it went."""
    if os.geteuid():
        return "only root can install them"
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command],
            env=env, capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        if done.returncode:
            return f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}"
    return "apt-get has installed the packages"
