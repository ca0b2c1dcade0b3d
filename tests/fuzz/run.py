"""Fuzz one target with atheris: python -m tests.fuzz.run header 1000000

Starts from the corpus, ends after so many inputs, and fails at the first that the target raises
on, that takes 10 s, or for which the process takes more than 2 GB. The last line counts them.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

atheris = importlib.import_module("atheris")  # it has no types, and mypy need not find it

SOURCES = ["distmerge.sources.header", "distmerge.sources.checkpoint", "distmerge.document",
           "distmerge.sweep", "distmerge.config", "distmerge.gram", "json"]  # fmt: skip

WORDS = (
    '"dtype":"F32"', '"shape":[', '"data_offsets":[0,4]', '"__metadata__":{', '"F4"', "[0]", "{}",
    "null", "NaN", "1e9", "-1", "9223372036854775808", "\\u0000", "\\ud800", '"weight_map":{',
    "merge_method: ", "trajectory: ", "checkpoints: ", "models:", "sweep: ", "select: ", "<<: *a",
    "&a ", "*a", "!!int ", "!!binary ", "0x", "1:1", "? ", "- ", "\n  ", "'", ": |\n", "%YAML",
)  # fmt: skip
"""Parts of the formats that chance alone rarely finds."""

with atheris.instrument_imports(include=SOURCES):
    from tests.fuzz.corpus import FOUND, SEEDS
    from tests.fuzz.targets import TARGETS


VALUES: tuple[Any, ...] = (
    0, 1, 3, 4, 8, 255, -1, 2**31, 2**63 - 1, 2**63, 2**64, 0.5, 1e300, True, None, "", "F32",
    "F64", "BF16", "U8", "F4", "BOOL", "f32", "\x1b[m", "\ud800", [], {}, [0],
    [0, 4], [4, 8], [1, 2, 2],
)  # fmt: skip


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time another value somewhere in the JSON, else other bytes."""
    random = Random(seed)
    try:
        value = json.loads(data[2:])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value or random.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    container = random.choice(list(containers(value)))
    key = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
    if isinstance(container, dict) and random.random() < 0.3:
        container[random.choice(["a", "b", "__metadata__", "more"])] = container[key]
    elif type(container[key]) is int and random.random() < 0.5:
        container[key] += random.choice([-4, -1, 1, 4])
    else:
        container[key] = random.choice(VALUES)
    return (data[:1] + bytes([random.choice([data[1], 0, 4, 8, 16])]) + json.dumps(value).encode())[
        :max_size
    ]


def containers(value: Any) -> Iterator[Any]:
    """All lists and objects in `value` that hold something."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def main(target: str, runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus, work = Path(folder, "corpus"), Path(folder, "work")
        corpus.mkdir()
        work.mkdir()
        for name, data in (SEEDS[target] | FOUND[target]).items():
            (corpus / name.replace(" ", "-")).write_bytes(data)
        seen = accepted = 0
        started = time.monotonic()

        def one(data: bytes) -> None:
            nonlocal seen, accepted
            accepted += TARGETS[target](data, work)
            seen += 1
            if seen == runs:
                seconds = time.monotonic() - started
                print(f"{target}: {seen} inputs, {accepted} accepted, {seconds:.0f} s", flush=True)

        words = Path(folder, "words")
        quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
        words.write_text("".join(f'"{word}"\n' for word in quoted))
        limits = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", f"-dict={words}",
                  f"-artifact_prefix={tempfile.gettempdir()}/"]  # fmt: skip
        atheris.Setup([sys.argv[0], f"-runs={runs}", *limits, str(corpus)], one,
                      custom_mutator=mutate)  # fmt: skip
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
