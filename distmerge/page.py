"""The report as one HTML file that needs nothing else: pictures inside, no script, no links."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.markup import count, float_cell, folded, name_cell, row, table, text, value_cell
from distmerge.page_spectra import matrices

if TYPE_CHECKING:
    from distmerge.plots import Plot

Numbers = dict[str, Any]

MAX_NAMES = 16
"""Models that are named in the summary."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --soft: #5c6370; --line: #d9dce1;
  --paper: #f6f7f8; --card: #fff; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #a3a9b5; --line: #3a3e46;
  --paper: #17191c; --card: #202327; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
.verdict { margin: 1rem 0; padding: .8rem 1rem; border-left: 4px solid var(--accent);
  background: var(--card); border-radius: 0 6px 6px 0; }
.verdict p { margin: 0; } .verdict p + p, figcaption, .note { color: var(--soft); }
.verdict p + p, .note { font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
.words { min-width: 7rem; max-width: 22rem; text-align: right; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card);
  min-width: 7rem; max-width: 22rem; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.best td { font-weight: 600; }
.mark { display: inline-block; padding: 0 .5em; border: 1px solid currentColor;
  border-radius: 1em; color: var(--accent); font-size: .8rem; font-weight: 400; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: 0 0 1.6rem; padding: .8rem; border-radius: 6px; background: #fff;
  border: 1px solid var(--line); }
figure img { display: block; width: 100%; max-width: 900px; height: auto; margin: 0 auto; }
figcaption { margin-top: .6rem; color: #4a4f59; font-size: .9rem; }
"""


def html(numbers: Numbers, plots: Sequence[Plot], folder: Path) -> str:
    """The page for `numbers` (the content of report.json) and the `plots` that lie in `folder`.

    All text is escaped: names come from strangers' files. Raises OSError where a plot's file
    can't be read.
    """
    title = escape(str(numbers["title"]))
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        *_verdict(numbers["scores"]),
        *_summary(numbers),
        *_outputs(numbers),
        *matrices(numbers["spectra"]),
        *_pictures(plots, folder),
        *_modules(numbers["trends"]),
        "</body>\n</html>\n",
    ]
    # A file name that is not valid UTF-8 leaves lone surrogates, which no file can hold.
    return "\n".join(parts).encode("utf-8", "replace").decode()


def _verdict(scores: Numbers | None) -> list[str]:
    """What the selection says, and on which data."""
    if scores is None:
        return []
    if scores["metric"] == "command":
        by = f"the command <code>{text(scores['command'])}</code>"
    else:
        by = text(scores["metric"])
    on = f" on {text(scores['text'])}" if scores["text"] else ""
    sizes = [f"{scores[key]:,} {key}" for key in ("tokens", "windows") if scores[key] is not None]
    size = f" ({', '.join(sizes)})" if sizes else ""
    better = "lower is better" if scores["goal"] == "min" else "higher is better"
    return [
        f'<div class="verdict"><p>{text(scores["verdict"])}</p>',
        f"<p>Scored by {by}{on}{size}; {better}.</p></div>",
    ]


def _summary(numbers: Numbers) -> list[str]:
    """What went in, what came out, and how far the steps reach, in a few sentences."""
    outputs = count(len(numbers["outputs"]), "output")
    first = f"{_read(numbers)} {outputs} by <code>{text(numbers['method'])}</code>."
    items = [f"<li>{_of_trend(trend)}</li>" for trend in numbers["trends"]]
    return [f"<p>{first}</p>", *(["<ul>", *items, "</ul>"] if items else [])]


def _read(numbers: Numbers) -> str:
    """What was read: of checkpoints the first and the last, of models their names."""
    checkpoints = numbers["checkpoints"]
    labels = [text(one["label"]) for one in checkpoints]
    if numbers["base"] is not None:
        return f"{_listed(labels)} merged into {text(numbers['base'])}."
    first, last = (
        label if one["step"] is None else f"step {text(one['step'])}"
        for label, one in ((labels[n], checkpoints[n]) for n in (0, -1))
    )
    return f"{count(len(checkpoints), 'checkpoint')} read, from {first} to {last}."


def _listed(labels: list[str]) -> str:
    shown = ", ".join(labels[:MAX_NAMES])
    more = f" and {len(labels) - MAX_NAMES} more" if len(labels) > MAX_NAMES else ""
    return f"{count(len(labels), 'model')} ({shown}{more})"


def _of_trend(trend: Numbers) -> str:
    """One merge interval, and the first component beside the random walk's."""
    shares = trend["explained"]
    merged, null = shares["merged"][:1], shares["null_merged"][:1]
    first = f"{text(trend['label'])}: one merge interval is {trend['interval']:.4g} long (L2)"
    if not merged or not null:
        return f"{first}."
    return (
        f"{first}; the first component holds {100 * merged[0]:.0f}&nbsp;% of the variance of the "
        f"merged checkpoints, and {100 * null[0]:.0f}&nbsp;% of that of a random walk under the "
        "same window."
    )


def _outputs(numbers: Numbers) -> list[str]:
    """The table of outputs and their scores, and what each is made of."""
    scores = numbers["scores"] or {"candidates": [], "baseline": None, "best": None}
    candidates = {c["name"]: c for c in scores["candidates"]}
    outputs = {output["name"]: output for output in numbers["outputs"]}
    rows = {**candidates, **outputs}  # values by name; an output's own come before a candidate's
    keys = list(dict.fromkeys(key for one in rows.values() for key in one["values"]))
    names = [*outputs, *(name for name in candidates if name not in outputs)]
    header = ["output", *keys]
    if candidates:
        header += ["score", "difference to the baseline", "standard error", ""]
    decimals = _decimals(candidates.values())
    body = []
    for name in names:
        cells = [name_cell(name), *(value_cell(rows[name]["values"].get(key)) for key in keys)]
        if candidates:
            cells += [*_scored(candidates.get(name), decimals), _marks(name, scores)]
        body.append(row(cells, "best" if name == scores["best"] else ""))
    unit = scores.get("unit")
    note = [f'<p class="note">Scores in {text(unit)}.</p>'] if candidates and unit else []
    return ["<h2>Outputs</h2>", table(header, body), *note, *_coefficients(numbers)]


def _decimals(candidates: Iterable[Numbers]) -> int:
    """Six digits of the largest score, at least two of them behind the point."""
    scores = [abs(c["score"]) for c in candidates if c["score"] is not None]
    largest = max((score for score in scores if math.isfinite(score)), default=0.0)
    return max(2, 5 - math.floor(math.log10(max(largest, 1.0))))


def _scored(candidate: Numbers | None, decimals: int) -> list[str]:
    if candidate is None:
        return [value_cell(None)] * 3
    formats = {"score": f".{decimals}f", "difference": f"+.{decimals}f", "error": f".{decimals}f"}
    return [float_cell(candidate[key], pattern) for key, pattern in formats.items()]


def _marks(name: str, scores: Numbers) -> str:
    marks = [mark for mark in ("baseline", "best") if scores[mark] == name]
    return f"<td>{' '.join(f'<span class=mark>{mark}</span>' for mark in marks)}</td>"


def _coefficients(numbers: Numbers) -> list[str]:
    """One column for each output; the reader opens it."""
    outputs = [output for output in numbers["outputs"] if output["coefficients"]]
    if not outputs:
        return []
    header = ["checkpoint", "training step", *(output["name"] or "weight" for output in outputs)]
    body = []
    for number, checkpoint in enumerate(numbers["checkpoints"]):
        weights = (float_cell(output["coefficients"][number], "+.6f") for output in outputs)
        body.append(row([name_cell(checkpoint["label"]), value_cell(checkpoint["step"]), *weights]))
    return [folded("The weight of each checkpoint in each output", table(header, body))]


def _pictures(plots: Sequence[Plot], folder: Path) -> Iterable[str]:
    if plots:
        yield "<h2>Plots</h2>"
    for plot in plots:
        data = base64.b64encode((folder / plot.name).read_bytes()).decode()
        yield (
            f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{text(plot.caption)}</figcaption></figure>"
        )


def _modules(trends: list[Numbers]) -> Iterable[str]:
    """Where a step moves the weights, as a table for each trend."""
    header = ["module", "parameters", "L2 norm of a step", "RMS per parameter"]
    found = [trend for trend in trends if trend["modules"]]
    if found:
        yield "<h2>Modules</h2>"
    for trend in found:
        body = [
            row(
                [
                    name_cell(module["name"]),
                    f'<td class="number">{module["elements"]:,}</td>',
                    float_cell(module["norm"], ".4g"),
                    float_cell(_rms(module), ".3e"),
                ]
            )
            for module in trend["modules"]
        ]
        yield folded(f"A step of one merge interval: {trend['label']}", table(header, body))


def _rms(module: Numbers) -> float | None:
    return module["norm"] / math.sqrt(module["elements"]) if module["elements"] else None
