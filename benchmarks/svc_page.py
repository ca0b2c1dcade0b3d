"""What experiment_svc.py found, as numbers (JSON), plots (PNG) and one page (Markdown)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.svc_numbers import (
    ALPHA,
    MERGERS,
    SCALES,
    Finding,
    Numbers,
    summary,
)
from benchmarks.svc_plots import draw

PLACE = re.compile(r"^## Reading\n.*?(?=^## )", re.DOTALL | re.MULTILINE)


def write_page(
    results: Path, findings: list[Finding], command: str, described: dict[str, str]
) -> None:
    """Write JSON, plots and page; the reading, which a person writes, is kept as it is."""
    names = list(dict.fromkeys(finding.suite for finding in findings))
    suites = {name: summary([one for one in findings if one.suite == name]) for name in names}
    numbers = {"about": about(command, described), "suites": suites}
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(results, suites)
    page = results / "README.md"
    old = PLACE.search(page.read_text()) if page.is_file() else None
    page.write_text(markdown(numbers, old[0] if old else "## Reading\n\nNot written yet.\n"))


def about(command: str, described: dict[str, str]) -> dict[str, str]:
    """The machine, the versions and the command: what it takes to judge or repeat the numbers."""
    names = ("distmerge", "torch", "transformers", "tokenizers", "numpy")
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "cpu": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "versions": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{name} {importlib.metadata.version(name)}" for name in names]
        ),
        **{f"data of {name}": text for name, text in described.items()},
    }


SETUP = f"""\
SVC rescales the directions of a merged weight (docs/methods.md). It was published with gains over
mergers at one lambda each; the objection is that a better lambda might have given as much. So here
lambda is tuned without SVC and with it: on the same examples, from the same {len(SCALES)} values
between {SCALES[0]} and {SCALES[-1]}. What is reported is measured on other examples.

**Images** are Fashion-MNIST. A perceptron of 269,322 parameters learns 55,000 of them (1200 steps
of 128, Adam); from there six are tuned on shifted ones (400 steps of 128, 12,000 images, the last
layer frozen). *Related* shifts are rotations by 30 to 105 degrees. *Mixed* ones are rotations by 90
and 180 degrees, inversion, mirroring with inversion, moving by 6 pixels, and transposing at 40 %
contrast. A seed draws base and fine-tunes anew. 5000 training images that no network saw choose,
the 10,000 test images report, each under all six shifts.

**Text** is all-MiniLM-L6-v2, a pretrained encoder of 22.7 million parameters, tuned on six tasks:
section (10 classes) and interface (2) of a Debian package from its one-line description, WordNet's
files for nouns (10) and verbs (8) from a definition, spam from the first 240 characters of a mail,
and genre (7) of 35 words from the Brown corpus, split by document. Each has 2400 texts to train on,
240 to choose and 960 to report by, cut at 32 tokens. A head is a logistic regression on the
pretrained encoder, frozen after that; embeddings are frozen too. AdamW at 1e-4, 2 epochs of batches
of 32; the one seed orders texts and draws dropout. Measured in bfloat16.

All merges come from `distmerge merge` on two ranks, a sweep at a time. TIES and DARE keep a density
of 0.2. alpha is `auto`, which is 1/6 and for tsv_m 1. Where alpha is tuned too, {ALPHA} is tried
beside it at every lambda."""

TUNED = """\
Accuracy in %, the mean over tasks and seeds, on the examples that report; differences in points.
The first error is one standard error over examples, paired, of the mean over seeds; the second, in
brackets, is one over the seeds. "Seeds" is the smallest and the largest difference among them. The
last row chooses the merger too, on both sides. In the plot bars are errors over examples, small
dots single seeds."""

UNTUNED = """\
The same at one lambda for both sides, as people who tune nothing take it. "Over lambda" is the
lowest and the highest accuracy among the ten values, on the examples that choose, mean over seeds:
how much there is to lose by a bad guess. In the plot, what lies 3 points below the base is cut
off."""

GAMMAS = """\
What SVC multiplies each direction of the merged weight by, as the merge's own report gives it: task
arithmetic, alpha 1/6, the first seed. Over-accumulated directions have gamma below 1. The dotted
line is the bound 1/alpha = 6."""


def markdown(numbers: Numbers, reading: str) -> str:
    """The page."""
    suites = numbers["suites"]
    parts = ["# SVC against mergers whose lambda is tuned", SETUP, reading.rstrip()]
    parts += ["## Tuned against tuned", TUNED, "![tuned](tuned.png)"]
    for name, found in suites.items():
        parts += [heading(name, found), _table(tuned_rows(found))]
    parts += ["## Nothing tuned", UNTUNED, "![lambda](lambda.png)"]
    for name, found in suites.items():
        parts += [f"### {title(name)}", _table(untuned_rows(found))]
    parts += ["## Gamma", GAMMAS, "![gammas](gammas.png)"]
    described = "\n".join(f"- {key}: {value}" for key, value in numbers["about"].items())
    return "\n\n".join([*parts, "## About this run", described]) + "\n"


def title(suite: str) -> str:
    return suite.replace("-", ", ").capitalize()


def heading(name: str, found: Numbers) -> str:
    """A suite's name, and between what bounds its merges are to be seen."""
    base, own = (percent(found["trained"][kind]) for kind in ("base", "individual"))
    count = len(found["seeds"])
    seeds = "one seed" if count == 1 else f"{count} seeds"
    size = f"{found['tasks']} tasks of {found['examples']} examples, {seeds}"
    return f"### {title(name)}\n\n{size}. The base has {base}, fine-tunes on their own tasks {own}."


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def difference(found: Numbers) -> str:
    """A difference with both errors, in points."""
    seeds = found["seed_error"]
    brackets = "" if seeds is None else f" ({percent(seeds)})"
    return f"{100 * found['difference']:+.2f} +- {percent(found['error'])}{brackets}"


def spread(values: list[float]) -> str:
    """The smallest and the largest difference among the seeds, where there are several."""
    if len(values) == 1:
        return ""
    return f"{100 * min(values):+.2f} to {100 * max(values):+.2f}"


def tuned_rows(found: Numbers) -> Iterator[list[str]]:
    yield [
        *("", "plain", "with SVC", "difference", "seeds"),
        *("lambda", "lambda of SVC", "alpha tuned too", "difference"),
    ]
    for merger, row in found["mergers"].items():
        right, compared, chosen = row["accuracy"], row["compared"], row["chosen"]
        yield [
            *(merger, percent(right["tuned"]), percent(right["tuned SVC"])),
            *(difference(compared["tuned"]), spread(compared["tuned"]["by_seed"])),
            *(scales(chosen["tuned"]), scales(chosen["tuned SVC"])),
            *(percent(right["tuned SVC and alpha"]), difference(compared["alpha"])),
        ]
    best = found["best"]
    yield [
        *("best, chosen", percent(best["accuracy"]["plain"]), percent(best["accuracy"]["SVC"])),
        *(difference(best), spread(best["by_seed"])),
        *(", ".join(dict.fromkeys(best["chosen"][kind])) for kind in ("plain", "SVC")),
        *("", ""),
    ]


def scales(chosen: list[dict[str, Any]]) -> str:
    """The lambdas that were chosen, by seed."""
    values = [f"{one['scale']:g}" for one in chosen]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def untuned_rows(found: Numbers) -> Iterator[list[str]]:
    yield [
        *("", "lambda", "plain", "with SVC", "difference"),
        *("plain over lambda", "SVC over lambda"),
    ]
    for merger, row in found["mergers"].items():
        right = row["accuracy"]
        yield [
            *(merger, f"{MERGERS[merger].default:g}"),
            *(percent(right["untuned"]), percent(right["untuned SVC"])),
            difference(row["compared"]["untuned"]),
            *(over_lambda(row["curve"][kind]) for kind in ("plain", "SVC")),
        ]


def over_lambda(curve: list[list[float]]) -> str:
    means = [sum(seeds) / len(seeds) for seeds in curve]
    return f"{percent(min(means))} to {percent(max(means))}"


def _table(rows: Iterator[list[str]]) -> str:
    head = next(rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])
