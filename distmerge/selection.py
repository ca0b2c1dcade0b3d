"""The recipe's `select:`: which output of a sweep does best on held-out data.

select: {metric: loss, text: held-out.txt}                # a file, or a folder of files
select: {command: "python eval.py {model}", goal: min}    # the last number that it prints
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, cast

from distmerge.document import Node, Plain
from distmerge.errors import ConfigError, SourceError

MODEL = "{model}"
"""What stands in a command for the folder of an output."""

GOALS = ("min", "max")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """How to choose: by the loss on `text`, or by the number that `command` prints."""

    metric: Literal["loss", "command"]
    text: str | None = None
    command: tuple[str, ...] | None = None
    goal: Literal["min", "max"] = "min"

    @property
    def command_line(self) -> str | None:
        """The command as a line that is split into the same arguments again."""
        return None if self.command is None else " ".join(map(_quoted, self.command))

    def as_plain(self) -> dict[str, Plain]:
        """What the recipe says: `parse_selection` makes the same selection of it."""
        if self.metric == "loss":
            return {"metric": "loss", "text": self.text}
        return {"command": self.command_line, "goal": self.goal}


def _quoted(argument: str) -> str:
    """As shlex.quote, but {model} stays readable."""
    parts = [shlex.quote(part) if part else "" for part in argument.split(MODEL)]
    return MODEL.join(parts) if argument else "''"


def parse_selection(node: Node) -> Selection:
    """Read `select:`. Raises ConfigError with file, line and key."""
    keys = node.mapping(("metric", "text", "command", "goal"))
    if ("metric" in keys) == ("command" in keys):
        node.fail("expected either {metric: loss, text: ...} or {command: ..., goal: min or max}")
    return _parse_loss(node, keys) if "metric" in keys else _parse_command(node, keys)


def _parse_loss(node: Node, keys: dict[str, Node]) -> Selection:
    keys["metric"].choice(("loss",))
    if "goal" in keys:
        keys["goal"].fail("it belongs to command; of losses the smallest is the best")
    if "text" not in keys:
        node.fail("text is missing: a file or a folder with held-out text")
    return Selection(metric="loss", text=keys["text"].text())


def _parse_command(node: Node, keys: dict[str, Node]) -> Selection:
    if "text" in keys:
        keys["text"].fail("it belongs to metric: loss; name the text in the command")
    if "goal" not in keys:
        node.fail("goal is missing: min or max, which is the better number")
    goal = keys["goal"].choice(GOALS)
    try:
        command = tuple(shlex.split(keys["command"].text()))
    except ValueError as error:
        keys["command"].fail(f"can't be split into arguments: {error}")
    if not any(MODEL in argument for argument in command):
        keys["command"].fail(f"write {MODEL} where the folder of the output belongs")
    return Selection(metric="command", command=command, goal=cast(Literal["min", "max"], goal))


def check(selection: Selection) -> None:
    """Find out early what would fail only after the merge.

    Raises ConfigError for a program or package that is missing, SourceError for the text.
    """
    if selection.command is not None:
        program = selection.command[0]
        if MODEL not in program and shutil.which(program) is None:
            raise ConfigError(f"select: there is no program {program!r} to run")
    if selection.text is not None:
        _check_transformers()
        read_texts(selection.text)


def _check_transformers() -> None:
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "select: metric: loss needs transformers: pip install 'distmerge[eval]'"
        ) from None
    if int(version.split(".")[0]) < 5:
        raise ConfigError(
            f"select: metric: loss needs transformers 5, and {version} is installed: "
            "pip install 'distmerge[eval]'"
        )


def read_texts(text: str) -> list[str]:
    """The texts at `text`: of the file, or of a folder's files, at any depth, sorted by path.

    In a folder, hidden files and those that are not UTF-8 are left out.
    Raises SourceError for what can't be read, and where there is no text at all.
    """
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            texts = [found for file in _files(path) if (found := _decoded(file)) is not None]
        else:
            texts = [path.read_bytes().decode()]
    except UnicodeDecodeError as error:
        raise SourceError(f"select: {text} is not text in UTF-8") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"select: {text} can't be read: {reason}") from error
    if not texts:
        raise SourceError(f"select: there is no file with text (UTF-8) in the folder {text}")
    if not any(map(str.strip, texts)):
        raise SourceError(f"select: {text} is empty")
    return texts


def _files(folder: Path) -> list[Path]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    shown = (file for file in found if not any(part.startswith(".") for part in file.parts))
    return [folder / file for file in sorted(shown)]


def _decoded(file: Path) -> str | None:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError:
        return None
