"""HTML for the report's page: escaped text, cells, tables, what the reader may open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    return escape(str(value))


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def name_cell(name: str) -> str:
    return f"<td>{text(name) if name else 'this folder'}</td>"


def value_cell(value: object) -> str:
    """A cell for a swept value or a step: a number, any text, or a dash for nothing."""
    if value is None:
        return '<td class="number">&ndash;</td>'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{f"{value:g}" if isinstance(value, float) else value}</td>'
    return f'<td class="words">{text(value)}</td>'


def float_cell(value: float | None, pattern: str) -> str:
    return value_cell(None) if value is None else f'<td class="number">{value:{pattern}}</td>'


def row(cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(cells)}</tr>' if kind else f"<tr>{''.join(cells)}</tr>"


def table(header: Sequence[str], rows: Iterable[str]) -> str:
    first, *others = (text(cell) for cell in header)
    cells = f"<th>{first}</th>" + "".join(f'<th class="number">{cell}</th>' for cell in others)
    lines = "\n".join(rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>\n{content}</details>"
