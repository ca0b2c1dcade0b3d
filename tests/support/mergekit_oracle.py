"""mergekit as an oracle, in an environment of its own (benchmarks/mergekit_env.sh makes it)."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import yaml

MERGEKIT = Path(__file__).parents[2] / ".venv-mergekit" / "bin" / "mergekit-yaml"


def available() -> bool:
    """Tell whether mergekit's environment has been made."""
    return MERGEKIT.is_file()


def merge(config: dict[str, object], out: Path, *, timeout: float = 300) -> None:
    """Merge ``config`` into ``out`` with mergekit; AssertionError with its output if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "config.yml"
        recipe.write_text(yaml.safe_dump(config, sort_keys=False))
        # The test checkpoints have no tokenizer, and the card would only quote the config.
        flags = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
        _run([str(MERGEKIT), str(recipe), str(out), *flags], timeout)


def _run(command: list[str], timeout: float) -> None:
    # Local folders only: a misspelt path must fail at once, not be looked up on the Hub.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise AssertionError(f"mergekit took over {timeout} s:\n{expired.output}") from expired
    if done.returncode:
        raise AssertionError(f"mergekit failed with {done.returncode}:\n{done.stdout}")
