"""The YAML reader: strict, bounded, and able to say where."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from distmerge import document
from distmerge.document import Node, Plain, load
from distmerge.errors import ConfigError


def loaded(folder: Path, text: str | bytes, *overrides: str) -> Node:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, overrides=overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [1, 2.5, true, null, x]", {"a": [1, 2.5, True, None, "x"]}),
        ("a: {b: {c: 1}}", {"a": {"b": {"c": 1}}}),
        ("1: 2\nyes: 3", {"1": 2, "yes": 3}),
        ("a: 2001-01-01", {"a": "2001-01-01"}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: {<<: [{p: 1}, {p: 2, q: 2}]}", {"a": {"p": 1, "q": 2}}),
        ("a: &x {<<: {p: 1}, p: 2}\nb: *x", {"a": {"p": 2}, "b": {"p": 2}}),
    ],
)
def test_yaml_becomes_plain_values(tmp_path: Path, text: str, value: Plain) -> None:
    assert loaded(tmp_path, text).value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("a: 1\nb: [", "line 2: "),
        ("a: 1\n---\nb: 2\n", "another document"),
        (b"\xff\xfe", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' stands here twice"),
        ("x: {a: 1, a: 1}", "line 1: 'a' stands here twice"),
        ("a: 1\n? [1, 2]\n: 3", "line 2: a key must be text"),
        ("? {a: 1}\n: 3", "line 1: a key must be text"),
        ("a: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("a: *nowhere", "undefined alias"),
        ("a: 2001-99-99", "month must be in"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: &a [*a]", "nested too deeply"),
        ("[" * 1000, "nested too deeply"),
    ],
)
def test_what_is_no_sound_document_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch x']",
        "a: !!python/name:os.system",
        "a: !!python/object:object {}",
        "a: !mine 3",
        "a: !mine [3]",
        "a: !mine {b: 3}",
        "a: !!set {b}",
        "!mine {a: 1}",
    ],
)
def test_tags_are_refused_and_run_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"r\.yaml.*line 1.* tag "):
        loaded(tmp_path, text)
    assert not (tmp_path / "x").exists()


def test_a_missing_recipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: can't be read: No such file"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load(tmp_path)


def test_aliases_of_aliases_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_NODES", 10_000)
    letters = "abcdefghijklmnop"
    bomb = "a: &a [1, 1, 1, 1]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise(letters)
    )
    started = time.monotonic()
    with pytest.raises(ConfigError, match="more than 10000 values"):
        loaded(tmp_path, bomb)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=1", {"a": 1, "b": {"c": 2}, "l": [{"x": 1}, {"x": 2}]}),
        ("b.c=[1, x]", {"a": 0, "b": {"c": [1, "x"]}, "l": [{"x": 1}, {"x": 2}]}),
        ("b.d.e=1", {"a": 0, "b": {"c": 2, "d": {"e": 1}}, "l": [{"x": 1}, {"x": 2}]}),
        ("l.1.x=9", {"a": 0, "b": {"c": 2}, "l": [{"x": 1}, {"x": 9}]}),
        ("new=", {"a": 0, "b": {"c": 2}, "l": [{"x": 1}, {"x": 2}], "new": None}),
        ("b=a=b", {"a": 0, "b": "a=b", "l": [{"x": 1}, {"x": 2}]}),
    ],
)
def test_an_override_sets_one_value(tmp_path: Path, override: str, value: Plain) -> None:
    text = "a: 0\nb: {c: 2}\nl: [{x: 1}, {x: 2}]"
    assert loaded(tmp_path, text, override).value == value


def test_of_two_overrides_the_later_counts(tmp_path: Path) -> None:
    assert loaded(tmp_path, "a: {b: 1}", "a.b=2", "a.b=3", "a.c=4").value == {"a": {"b": 3, "c": 4}}


def test_overrides_leave_the_caller_s_mapping_alone() -> None:
    given: dict[str, Plain] = {"a": {"b": 1}}
    assert load(given, overrides=["a.b=2"]).value == {"a": {"b": 2}}
    assert given == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "write --set key=value"),
        ("=1", "write --set key=value"),
        ("a=[", "--set a=\\[.*not valid YAML"),
        ("a={b: 1, b: 2}", "'b' stands here twice"),
        ("a={[1]: 2}", "a key must be text"),
        ("a=!mine {}", "tag"),
        ("a=!!python/name:os.system", "tag"),
        ("a=2001-99-99", "not valid YAML: month"),
        ("a.x=1", "there is nothing to set at 'x'"),
        ("l.7=1", "there is nothing to set at 7"),
        ("l.x=1", "there is nothing to set at 'x'"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, "a: 0\nl: [1]", override)
    assert str(caught.value).startswith(f"--set {override}")


def test_a_message_says_where_a_value_came_from(tmp_path: Path) -> None:
    root = loaded(tmp_path, "a:\n  b: [1,\n      2]\nc: 1", "c=x")
    second = root.mapping("ac")["a"].mapping("b")["b"].items()[1]
    with pytest.raises(ConfigError, match=r"r\.yaml line 3, a\.b\[1\]: no$"):
        second.fail("no")
    with pytest.raises(ConfigError, match=r"r\.yaml --set, c: no$"):
        root.mapping("ac")["c"].fail("no")
    with pytest.raises(ConfigError, match=r"^config, a\.b: no$"):
        load({"a": {"b": 1}}).mapping("a")["a"].mapping("b")["b"].fail("no")


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "'0.001'"])
def test_a_number_may_be_written_in_every_usual_way(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text).number() == 0.001


@pytest.mark.parametrize(
    "text", ["x", "[1]", "{a: 1}", ".nan", ".inf", "nan", "-inf", "1e999", "1" + "0" * 400, "''"]
)
def test_what_is_no_finite_number_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="line 1: expected a finite number; got "):
        loaded(tmp_path, text).number()


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ConfigError, match=r"got 'x{59}\.\.\.$"):
        Node("x" * 500, (), load({}).origin).boolean()
