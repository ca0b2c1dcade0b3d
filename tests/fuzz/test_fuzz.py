"""A few seconds of every target; with `make test-slow`, a million headers."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus import FOUND, SEEDS, as_header, entry
from tests.fuzz.targets import TARGETS, header
from tests.support.processes import REPOSITORY, environment

CASES = [(target, name) for target, cases in FOUND.items() for name in cases]
SOUND = [(target, name) for target, cases in SEEDS.items() for name in cases]

EXAMPLES = settings(
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize(("target", "name"), CASES, ids=map("-".join, CASES))
def test_what_was_found_once_is_refused(tmp_path: Path, target: str, name: str) -> None:
    assert not TARGETS[target](FOUND[target][name], tmp_path)


@pytest.mark.parametrize(("target", "name"), SOUND, ids=map("-".join, SOUND))
def test_the_fuzzers_begin_with_what_is_sound(tmp_path: Path, target: str, name: str) -> None:
    refused = {("index", "none")}
    assert TARGETS[target](SEEDS[target][name], tmp_path) == ((target, name) not in refused)


@EXAMPLES
@given(st.data())
@pytest.mark.parametrize("target", TARGETS)
def test_some_bytes_changed(tmp_path: Path, target: str, data: st.DataObject) -> None:
    start = data.draw(st.sampled_from(list(SEEDS[target].values())))
    changed = bytearray(start)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed)))
        new = data.draw(st.binary(max_size=4) | st.sampled_from(PARTS))
        changed[place : place + data.draw(st.integers(0, 8))] = new
    TARGETS[target](bytes(changed), tmp_path)


PARTS = [b'"', b"[", b"{", b"}", b"\\u0000", b"\\ud800", b"-0", b"1e9", b"NaN", b"9" * 30, b"*a",
         b"&a ", b"!!int ", b"<<: ", b": ", b"\n", b"0x", b"1:1"]  # fmt: skip

leaves = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([None, True, 0.5, 2**31, 2**62, 2**63, 2**64, "F32", "F4", "U8", [0, 4], []]),
    st.text(max_size=4),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "U8", "F4"]) | values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | values,
    },
    optional={"more": values},
)
names = st.sampled_from(["a", "b", "../x", "__metadata__", ""]) | st.text(max_size=3)


@EXAMPLES
@given(st.dictionaries(names, entries | values, max_size=4), st.integers(0, 32))
def test_headers_of_any_values(tmp_path: Path, content: dict[str, Any], size: int) -> None:
    header(as_header(content, size), tmp_path)


@EXAMPLES
@given(st.dictionaries(names, values, max_size=4))
def test_indexes_of_any_values(tmp_path: Path, content: dict[str, Any]) -> None:
    TARGETS["index"](json.dumps({"weight_map": content}).encode(), tmp_path)


@EXAMPLES
@given(st.dictionaries(
    st.sampled_from(["merge_method", "models", "trajectory", "sweep", "select", "dtype"]) | names,
    st.sampled_from(["average", "linear", "extra_merge", "x"]) | values,
))  # fmt: skip
def test_recipes_of_any_values(tmp_path: Path, content: dict[str, Any]) -> None:
    TARGETS["recipe"](json.dumps(content).encode(), tmp_path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**8, 10**6, 9])
def test_a_claimed_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    data = b"\0" + length.to_bytes(8, "little") + b"{"
    header(data, tmp_path)
    tracemalloc.start()
    try:
        assert not header(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300_000


def test_claimed_sizes_allocate_nothing(tmp_path: Path) -> None:
    data = as_header({"a": entry(0, 2**50, shape=[2**48]), "b": entry(2**50, 2**62)})
    header(data, tmp_path)
    tracemalloc.start()
    try:
        assert not header(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("target", "runs"),
    [("header", 1_000_000), ("index", 200_000), ("recipe", 100_000), ("gram", 100_000)],
)
def test_a_million_inputs(tmp_path: Path, target: str, runs: int) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("pip install atheris (it has no wheels for some systems and Pythons)")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", target, str(runs)],
        cwd=REPOSITORY,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"{target}: {runs} inputs, [1-9]", done.stdout), done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**21  # kB
