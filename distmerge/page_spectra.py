"""What the report's page says of merges of whole matrices; numbers: report_spectra.summed_up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distmerge.markup import count, float_cell, folded, name_cell, row, table, text, value_cell

MAX_LISTED = 200
"""Tensors that are listed for one kind of fall-back; report.json has all."""

MEANING = (
    "Calibration (SVC) multiplies each singular direction of a merged matrix by a gamma of its "
    "own. Where task vectors share a direction, the merger has counted it more than once: gamma is "
    "below 1 and damps it. Where they cancel each other, or were scaled down, gamma is above 1 and "
    "amplifies it, 1/alpha times at most. Gamma says nothing of how good the model is: that takes "
    "held-out data."
)

Numbers = dict[str, Any]


def matrices(spectra: Numbers | None) -> Iterator[str]:
    """The section on matrices, if there are any; all text is escaped."""
    if spectra is None:
        return
    outputs = spectra["outputs"]
    yield "<h2>Matrices</h2>"
    yield f"<p>{_counted(spectra)}</p>"
    if outputs:
        yield f"<p>{text(MEANING)}</p>"
        yield _totals(outputs)
        yield (
            '<p class="note">Shares are of the directions of all matrices; at the ceiling are so '
            "many at least. Quantiles are those of the matrix in the middle.</p>"
        )
    yield from _modules(spectra)
    yield from _fallbacks(spectra)


def _counted(spectra: Numbers) -> str:
    done = "calibrated" if spectra["outputs"] else "merged as a whole"
    found, missing = spectra["matrices"], spectra["missing"]
    lost = (
        f" Of {missing:,} more no numbers are left: an attempt that was stopped has merged them, "
        "on a rank that could not keep any."
    )
    return f"{_matrices(found)} {done}.{lost if missing else ''}"


def _matrices(number: int) -> str:
    return f"{number:,} {'matrix was' if number == 1 else 'matrices were'}"


def _totals(outputs: list[Numbers]) -> str:
    header = ["output", "alpha", "lambda", *_GAMMA, "at the ceiling, 1/alpha"]
    rows = [
        row(
            [
                name_cell(output["name"]),
                value_cell(output["alpha"]),
                value_cell("varies" if output["lambda"] is None else output["lambda"]),
                *_gamma_cells(output),
                _share_cell(output["ceiling"]),
            ]
        )
        for output in outputs
    ]
    return table(header, rows)


_GAMMA = ("median gamma", "5 % are below", "95 % are below", "damped", "amplified")


def _gamma_cells(gammas: Numbers | None) -> list[str]:
    if gammas is None:
        return [value_cell(None)] * len(_GAMMA)
    low, _, median, _, high = gammas["quantiles"]
    return [
        *(float_cell(x, ".3g") for x in (median, low, high)),
        *(_share_cell(gammas[key]) for key in ("damped", "amplified")),
    ]


def _share_cell(share: float) -> str:
    return f'<td class="number">{100 * share:.0f}&nbsp;%</td>'


def _modules(spectra: Numbers) -> Iterator[str]:
    """A table of the modules for each output that is shown, to open; one where there is none."""
    header = ["module", "layers", "matrices", "mean cosine of two tasks"]
    shown = [output for output in spectra["outputs"] if output["modules"]]
    for output in shown:
        rows = [
            row([*_module(module), *_gamma_cells(output["modules"].get(module["name"]))])
            for module in spectra["modules"]
        ]
        title = f"Module by module: {output['name']}" if output["name"] else "Module by module"
        yield folded(title, table([*header, *_GAMMA], rows))
    if not shown:
        rows = [row(_module(module)) for module in spectra["modules"]]
        yield folded("Module by module", table(header, rows))


def _module(module: Numbers) -> list[str]:
    return [
        name_cell(module["name"]),
        value_cell(module["layers"] or None),
        f'<td class="number">{module["matrices"]:,}</td>',
        float_cell(module["cosine"], ".3f"),
    ]


def _fallbacks(spectra: Numbers) -> Iterator[str]:
    """The tensors for each thing that was done where the usual way was not good enough."""
    found: dict[str, list[Numbers]] = {}
    for entry in spectra["fallbacks"]:
        found.setdefault(entry["fallback"], []).append(entry)
    if not found:
        yield "<p>No fall-back was needed: the usual way was good enough for every matrix.</p>"
        return
    yield f"<p>{count(len(spectra['fallbacks']), 'fall-back')}, as precise as the usual way:</p>"
    for why, entries in found.items():
        more = len(entries) - MAX_LISTED
        items = [f"<li>{_where(entry)}</li>" for entry in entries[:MAX_LISTED]]
        if more > 0:
            items.append(f"<li>and {more:,} more, in report.json</li>")
        yield folded(f"{why}: {len(entries):,}", f"<ul>{''.join(items)}</ul>")


def _where(entry: Numbers) -> str:
    start = f", from element {entry['start']:,} on" if entry["start"] else ""
    return f"{text(entry['tensor'])}{start}"
