"""`select:` in a recipe, and what is found out about it before the merge."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from distmerge.document import Plain, load
from distmerge.errors import ConfigError, SourceError
from distmerge.selection import Selection, check, parse_selection, read_texts


def parsed(**keys: Plain) -> Selection:
    return parse_selection(load(keys))


def test_a_loss_takes_a_text() -> None:
    assert parsed(metric="loss", text="a.txt") == Selection(metric="loss", text="a.txt")


def test_a_command_is_split_as_a_shell_would() -> None:
    found = parsed(command="python 'my eval.py' --model={model}/x {model}", goal="max")
    arguments = ("python", "my eval.py", "--model={model}/x", "{model}")
    assert found == Selection(metric="command", command=arguments, goal="max")
    assert found.command_line == "python 'my eval.py' --model={model}/x {model}"


@pytest.mark.parametrize(
    "keys",
    [
        {"metric": "loss", "text": "a b.txt"},
        {"command": "x {model}", "goal": "min"},
        {"command": "x 'a b'{model}\"'\" '' $HOME", "goal": "max"},
    ],
)
def test_what_it_says_of_itself_means_the_same(keys: dict[str, Plain]) -> None:
    found = parsed(**keys)
    assert parse_selection(load(found.as_plain())) == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "expected either {metric: loss, text: ...} or {command"),
        ({"metric": "loss", "command": "x {model}"}, "expected either"),
        ({"text": "a"}, "expected either"),
        ({"metric": "los", "text": "a"}, "metric: expected one of loss; got 'los' (did you mean"),
        ({"metric": "loss"}, "text is missing"),
        ({"metric": "loss", "text": ""}, "text: expected text"),
        ({"metric": "loss", "text": ["a"]}, "text: expected text"),
        ({"metric": "loss", "text": "a", "goal": "min"}, "goal: it belongs to command"),
        ({"metric": "loss", "txt": "a"}, "txt: unknown key; did you mean 'text'?"),
        ({"command": "x {model}"}, "goal is missing: min or max"),
        ({"command": "x {model}", "goal": "most"}, "goal: expected one of min, max"),
        ({"command": "x {model}", "goal": "min", "text": "a"}, "text: it belongs to metric"),
        ({"command": "x model", "goal": "min"}, "command: write {model} where"),
        ({"command": " ", "goal": "min"}, "command: write {model} where"),
        ({"command": "x 'a {model}", "goal": "min"}, "can't be split into arguments: No closing"),
        ({"command": ["x", "{model}"], "goal": "min"}, "command: expected text"),
    ],
)
def test_a_mistake_is_told_with_its_place(keys: dict[str, Plain], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(**keys)
    assert message in str(caught.value)


def test_texts_of_a_folder_come_in_order_without_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b.txt": b"b", "a.txt": "ä\r\n".encode(), "z/a.txt": b"z", ".c": b"c", ".git/d": b"d",
        "e.bin": b"\xff",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    assert read_texts(str(tmp_path)) == ["ä\r\n", "b", "z"]
    assert read_texts(str(tmp_path / ".c")) == ["c"]


def by_loss(path: Path | str) -> Selection:
    return Selection(metric="loss", text=str(path))


def test_a_sound_text_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path, tmp_path / "a.txt", "~/a.txt"):
        check(by_loss(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "can't be read: No such file"),
        ("empty", "empty is empty"),
        ("blank", "blank is empty"),
        ("binary", "binary is not text in UTF-8"),
        ("folder", "no file with text .UTF-8. in the folder"),
        ("empties", "empties is empty"),
        ("a\0b", "can't be read"),
        ("~nobody-of-that-name/x", "can't be read"),
    ],
)
def test_a_text_that_is_none_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\xff")
    (tmp_path / "empties").mkdir()
    (tmp_path / "empties" / "a").touch()
    with pytest.raises(SourceError, match=message):
        check(by_loss(name if name.startswith("~") else tmp_path / name))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "needs transformers: pip install 'distmerge.eval.'"),
        ("4.57.1", "4.57.1 is installed"),
    ],
)
def test_the_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    def look(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr(metadata, "version", look)
    with pytest.raises(ConfigError, match=message):
        check(by_loss(tmp_path / "a.txt"))


def test_the_program_must_be_there(tmp_path: Path) -> None:
    def check_command(*arguments: str) -> None:
        check(Selection(metric="command", command=arguments))

    assert shutil.which("sh")
    check_command("sh", "{model}")
    check_command("{model}/run")
    (tmp_path / "script").write_text("no program")
    for program in ("no-such-program", str(tmp_path / "script"), str(tmp_path)):
        with pytest.raises(ConfigError, match=f"there is no program '{program}' to run"):
            check_command(program, "{model}")
