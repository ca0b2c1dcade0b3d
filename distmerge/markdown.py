"""Markdown in which strangers' text can do nothing: code spans, fences, tables, folds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from html import escape as escape_html

from distmerge.log import printable

MAX_NAME = 200
"""Characters of a name that are shown."""


def code(text: str) -> str:
    """`text` as a code span, in which nothing has a meaning; '' for ''."""
    shown = printable(text, MAX_NAME)
    ticks = _ticks(shown, 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}" if shown else ""


def escaped(text: str) -> str:
    """`text` as Markdown that shows just that."""
    return re.sub(r"([\\`*_{}\[\]<>#~$&!])", r"\\\1", printable(text))


def fence(text: str, language: str) -> str:
    """Lines as they are but for control characters, in a fence that they can't close."""
    shown = "".join(c for c in text if unicodedata.category(c) != "Cc" or c in "\n\t").rstrip("\n")
    ticks = _ticks(shown, 3)
    return f"{ticks}{language}\n{shown}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """Backticks, more than stand together anywhere in `text`."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells end at bars, even in code spans."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines
    )


def folded(title: str, *blocks: str) -> str:
    """Blocks of Markdown that the reader opens."""
    heading = f"<details>\n<summary>{escape_html(printable(title, MAX_NAME))}</summary>"
    return "\n\n".join([heading, *blocks, "</details>"])
