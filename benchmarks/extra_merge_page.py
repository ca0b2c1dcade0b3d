"""What experiment_extra_merge.py found, as numbers (JSON), plots (PNG) and one page (Markdown)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.extra_merge_plots import draw
from benchmarks.training import paired


class Candidate(NamedTuple):
    """A model to compare: how it was made, of which window (or other setting), how far."""

    method: str
    setting: float | None = None
    step: float | None = None

    def __str__(self) -> str:
        number = "" if self.setting is None else f" {self.setting:g}"
        return self.method + number + ("" if self.step is None else f", step {self.step:g}")


Losses = dict[Candidate, torch.Tensor]
"""Loss of each candidate on each window of held-out text; the first half is there to choose."""

Numbers = dict[str, Any]  # what goes into the JSON

WINDOWS = [4, 6, 8, 16]  # that are extrapolated from
DECAYED_WINDOWS = [8, 16]
# With few averages to choose from, a step could win merely by filling a gap between them.
UNIFORM_WINDOWS = [4, 6, 8, 12, 16]
EMA_FACTORS = [0.1, 0.15, 0.2, 0.3, 0.4]
AVERAGES = [
    *(Candidate("uniform", window) for window in UNIFORM_WINDOWS),
    *(Candidate("ema", factor) for factor in EMA_FACTORS),
    *(Candidate("wsm", window) for window in WINDOWS),
]
PLACE = re.compile(r"^## Reading\n.*?(?=^## )", re.DOTALL | re.MULTILINE)


class Finding(NamedTuple):
    """One run: its corpus and seed, its losses, and the trends that distmerge reported of it."""

    corpus: str
    seed: int
    losses: Losses
    trends: list[dict[str, Any]]


Pick = Callable[[Losses], Candidate]


class Row(NamedTuple):
    """One line of the comparison: a kind for its colour, and which candidate stands for it."""

    label: str
    kind: str
    pick: Pick


def choosing(losses: torch.Tensor) -> torch.Tensor:
    """The windows that methods, windows and steps are chosen by."""
    return losses[: len(losses) // 2]


def reporting(losses: torch.Tensor) -> torch.Tensor:
    """The windows that are reported."""
    return losses[len(losses) // 2 :]


def best(losses: Losses, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest loss on the windows that choose."""
    return min(candidates, key=lambda one: choosing(losses[one]).mean().item())


def always(candidate: Candidate) -> Pick:
    """A choice that is the same in every run."""
    return lambda _: candidate


def best_average(losses: Losses) -> Candidate:
    return best(losses, AVERAGES)


def best_step(losses: Losses, direction: str, window: float | None = None) -> Candidate:
    """The best step in a direction; of one window, or of all. A step of 0 is among them."""
    found = [one for one in losses if one.method == direction and window in (None, one.setting)]
    return best(losses, found)


def rows() -> list[Row]:
    """All lines of the comparison, in the order of the table."""
    fixed = [
        ("last checkpoint", "trained", Candidate("last")),
        *((f"uniform average of {w}", "average", Candidate("uniform", w)) for w in UNIFORM_WINDOWS),
        *((f"EMA {a}", "average", Candidate("ema", a)) for a in EMA_FACTORS),
        *((f"WSM minus-sqrt of {w}", "average", Candidate("wsm", w)) for w in WINDOWS),
    ]
    decays = [("over the window of", "decay within"), ("after it, as long as", "decay after")]
    unlike = [
        ("random direction, same length", "random", Candidate("random")),
        *(
            (f"decay {words} {window}", "decay", Candidate(method, window))
            for words, method in decays
            for window in DECAYED_WINDOWS
        ),
    ]
    return [
        *(Row(label, kind, always(candidate)) for label, kind, candidate in fixed),
        Row("best average (chosen)", "average", best_average),
        Row("Extra-Merge, principal", "beyond", partial(best_step, direction="principal")),
        Row("Extra-Merge, secant", "beyond", partial(best_step, direction="secant")),
        *(Row(label, kind, always(candidate)) for label, kind, candidate in unlike),
    ]


def compare(findings: list[Finding], pick: Pick, baseline: Pick) -> Numbers:
    """Mean loss over the seeds, the difference to a baseline, its standard error and its spread.

    The error is that over windows, of the mean over seeds; how much training runs differ among
    themselves is not in it: that is what `by_seed` shows.
    """
    chosen = [pick(finding.losses) for finding in findings]
    pairs = [
        (reporting(f.losses[one]), reporting(f.losses[baseline(f.losses)]))
        for f, one in zip(findings, chosen, strict=True)
    ]
    losses, references = (torch.stack(part) for part in zip(*pairs, strict=True))
    difference, error = paired(losses.mean(dim=0), references.mean(dim=0))
    return {
        "chosen": [str(one) for one in chosen],
        "loss": losses.mean().item(),
        "difference": difference,
        "error": error,
        "by_seed": (losses - references).mean(dim=1).tolist(),
    }


def summary(findings: list[Finding]) -> Numbers:
    """All numbers of one corpus."""
    methods = [
        {"label": row.label, "kind": row.kind, **compare(findings, row.pick, best_average)}
        for row in rows()
    ]
    steps = [one for one in findings[0].losses if one.method in ("principal", "secant")]
    sweep = [
        {
            "direction": one.method,
            "window": one.setting,
            "span": one.step,
            **compare(findings, always(one), best_average),
        }
        for one in steps
    ]
    windows = [window_summary(findings, window) for window in WINDOWS]
    return {"seeds": len(findings), "methods": methods, "windows": windows, "sweep": sweep}


def window_summary(findings: list[Finding], window: int) -> Numbers:
    """What a step adds to the average of one window, and how straight its trajectory is."""
    average = always(Candidate("uniform", window))
    steps = {
        name: compare(findings, partial(best_step, direction=name, window=window), average)
        for name in ("principal", "secant")
    }
    trends = [
        trend["explained"]
        for finding in findings
        for trend in finding.trends
        if trend["window"] == window and trend["direction"] == "principal"
    ]
    shares = {
        kind: [explained[kind][0] for explained in trends]
        for kind in ("merged", "null_merged", "raw", "null_raw")
    }
    loss = compare(findings, average, average)["loss"]
    return {"window": window, "average": loss, **steps, "first_component": shares}


def write_page(results: Path, findings: list[Finding], command: str, texts: dict[str, str]) -> None:
    """Write JSON, plots and page; the reading, which a person writes, is kept as it is."""
    names = list(dict.fromkeys(finding.corpus for finding in findings))
    for finding in findings:
        draws = [loss for one, loss in finding.losses.items() if one.method == "random"]
        finding.losses[Candidate("random")] = torch.stack(draws).mean(dim=0)
    corpora = {name: summary([one for one in findings if one.corpus == name]) for name in names}
    numbers = {"about": about(command, texts), "corpora": corpora}
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(results, corpora)
    page = results / "README.md"
    old = PLACE.search(page.read_text()) if page.is_file() else None
    page.write_text(markdown(numbers, old[0] if old else "## Reading\n\nNot written yet.\n"))


def about(command: str, texts: dict[str, str]) -> dict[str, str]:
    """The machine, the versions and the command: what it takes to judge or repeat the numbers."""
    names = ("distmerge", "torch", "transformers", "tokenizers", "numpy")
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "cpu": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, one used",
        "kernel": platform.release(),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{name} {importlib.metadata.version(name)}" for name in names]
        ),
        **{f"corpus {name}": text for name, text in texts.items()},
    }


SETUP = """\
A byte-level Llama of 0.84M parameters is trained on two corpora with three seeds each: 1600 steps
of 16 x 128 bytes at a constant rate of 2e-3 after 100 steps of warm-up, with a checkpoint every 32
steps from step 640 on (31 of them). All merges are made by `distmerge merge` with `sweep:`; those
that extrapolate (48 a run) come from one recipe and one read of the checkpoints, by two ranks.

Held-out text is 1024 snippets from all over the part of a corpus that is not trained on, dealt out
to two halves of 512 windows of 128 bytes: method, window and step are chosen on one, all that
stands below is measured on the other. Steps are shares of the span of the merged trajectory, from 0
(the average itself) to 0.5. The decays fall linearly to 0 from a saved state of the same run: over
its last 224 or 480 steps, which are what windows of 8 and 16 span (no more text than the last
checkpoint has seen), or over as many steps after it (14 % or 30 % more training). The random
direction is isotropic over all weights, starts at the chosen window's average and is as long as the
best step that is not 0; its loss is the mean of three draws."""

LEGEND = """\
Loss in nats per byte, mean over the seeds. Differences are to the best average, which is chosen
for each seed; the standard error is over held-out windows, paired; "seeds" is the smallest and the
largest difference among the seeds. In the plot, large dots are means with their standard errors and
small ones single seeds."""

BEYOND = """\
Here differences are to the uniform average of the same window; steps are chosen for each seed.
"Merged" is the share of the variance of the merged checkpoints that lies along their first
component, "raw" that of the checkpoints themselves; each is followed by what a random walk of as
many checkpoints gives under the same window. The plot is of the principal direction; what lies far
above is cut off and stands in results.json."""


def markdown(numbers: Numbers, reading: str) -> str:
    """The page."""
    parts = ["# Extra-Merge against averages and real decays", SETUP, reading.rstrip()]
    parts += ["## Methods", LEGEND, "![methods](methods.png)"]
    for name, found in numbers["corpora"].items():
        parts += [f"### {name.capitalize()}, {found['seeds']} seeds", methods_table(found)]
    parts += [
        "## What a step adds to each window's own average",
        BEYOND,
        "![steps](steps.png)",
    ]
    for name, found in numbers["corpora"].items():
        parts += [f"### {name.capitalize()}", windows_table(found)]
    about = "\n".join(f"- {key}: {value}" for key, value in numbers["about"].items())
    return "\n\n".join([*parts, "## About this run", about]) + "\n"


def methods_table(found: Numbers) -> str:
    lines = [["", "loss", "vs best average", "std. err.", "seeds", "chosen (by seed)"]]
    for row in found["methods"]:
        spread = f"{min(row['by_seed']):+.4f} to {max(row['by_seed']):+.4f}"
        choice = "; ".join(row["chosen"]) if len(set(row["chosen"])) > 1 else row["chosen"][0]
        chooses = row["label"].startswith(("best", "Extra"))
        lines.append(
            [
                row["label"],
                *(f"{row['loss']:.4f}", f"{row['difference']:+.4f}", f"{row['error']:.4f}"),
                *(spread, choice if chooses else ""),
            ]
        )
    return _table(lines)


def windows_table(found: Numbers) -> str:
    head = "window, average, steps chosen, principal, secant, merged, random walk, raw, random walk"
    lines = [head.split(", ")]
    for row in found["windows"]:
        steps = [choice.rpartition(" ")[2] for choice in row["principal"]["chosen"]]
        differences = [
            f"{row[name]['difference']:+.4f} +- {row[name]['error']:.4f}"
            for name in ("principal", "secant")
        ]
        shares = [f"{sum(part) / len(part):.3f}" for part in row["first_component"].values()]
        lines.append(
            [str(row["window"]), f"{row['average']:.4f}", ", ".join(steps), *differences, *shares]
        )
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
