"""OUT/report: the page, the plots and the numbers of a run, made from what lies in OUT.

gram.safetensors (the statistic), spectra.json (what became of matrices) and scores.json (the
choice) are primary, as are the manifests; report.json, the plots and report.html follow from them
and can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distmerge import gram as grams
from distmerge.config import Config, parse_config
from distmerge.document import load
from distmerge.errors import DistmergeError, OutputError
from distmerge.gram import Gram
from distmerge.manifest import output_names, read
from distmerge.mergers import MERGERS
from distmerge.methods.extrapolate import Trend, cosines, null_shares, plane
from distmerge.output import MANIFEST, replace_link, replace_text
from distmerge.planner import Plan
from distmerge.report_spectra import kept, summed_up
from distmerge.sweep import swept_values
from distmerge.trend import Setting, find_trends, setting

FOLDER = "report"
GRAM = "gram.safetensors"
SCORES = "scores.json"
SPECTRA = "spectra.json"
NUMBERS = "report.json"
PAGE = "report.html"
BEST = "best"

TITLES = {
    "average": "Average",
    "extra_merge": "Extra-Merge",
    "linear": "Weighted sum",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE with TIES",
    "expo": "ExPO",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "star": "STAR",
}
"""What people call them."""

MAX_SHOWN = 4
"""Outputs whose matrices are shown module by module, where none was chosen."""

Numbers = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """One output: its name, the inputs that its manifest lists, which of these is the donor, its
    recipe."""

    name: str
    inputs: list[dict[str, Any]]
    donor: int
    recipe: dict[str, Any]

    @property
    def config(self) -> Config:
        """The recipe; its checkpoints may be gone, and nobody asks for them here."""
        trajectory = {**self.recipe["trajectory"], "checkpoints": "-"}
        return parse_config(load({**self.recipe, "trajectory": trajectory, "base_model": "-"}))


def make(out: Path) -> Path:
    """Write report.json, the plots and report.html into `out`/report; returns the page.

    Raises OutputError where `out` is not what a merge left, or its statistic is damaged.
    """
    from distmerge import page, plots  # noqa: PLC0415 - only here, for matplotlib takes a second

    found = numbers(out)
    folder = _folder(out)
    replace_text(folder / NUMBERS, json.dumps(found, indent=1) + "\n")
    drawn = plots.draw(found, folder)
    replace_text(folder / PAGE, page.html(found, drawn, folder))
    return folder / PAGE


def clear(out: Path) -> None:
    """Remove what a kill has left of files that were being replaced."""
    for path in [*out.glob(f".{BEST}.*"), *(out / FOLDER).glob(".*")]:
        path.unlink(missing_ok=True)


def keep_spectra(out: Path, plan: Plan, spectra: Sequence[Numbers]) -> None:
    """Write what became of every matrix, if the plan has any, into the report of `out`."""
    if content := kept(plan, spectra):
        replace_text(_folder(out) / SPECTRA, json.dumps(content, indent=0) + "\n")


def keep_scores(out: Path, scores: dict[str, Any]) -> None:
    """Write the scores of a choice, and let OUT/best lead to what was chosen."""
    replace_text(_folder(out) / SCORES, json.dumps(scores, indent=2) + "\n")
    replace_link(out / BEST, scores["best"])


def _folder(out: Path) -> Path:
    """OUT/report, made if need be. Raises OutputError where it would lead elsewhere."""
    folder = out / FOLDER
    if folder.is_symlink():
        raise OutputError(f"{folder}: it is a link; a report must lie in the folder itself")
    folder.mkdir(exist_ok=True)
    return folder


def numbers(out: Path) -> Numbers:
    """All that the report shows, from the files in `out`. Raises OutputError."""
    outputs = _outputs(out)
    try:
        method = outputs[0].recipe["merge_method"]
        gram = grams.load(out / FOLDER / GRAM) if method == "extra_merge" else None
        scores = out / FOLDER / SCORES
        found = _numbers(outputs, method, gram)
        found["scores"] = json.loads(scores.read_bytes()) if scores.is_file() else None
        found["spectra"] = _spectra(out / FOLDER / SPECTRA, found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DistmergeError) as error:
        raise OutputError(f"{out}: no report can be made: {error}") from error
    return found


def _outputs(out: Path) -> list[_Made]:
    made = []
    for name in output_names(out):
        manifest = read(out / name)
        try:
            inputs, donor, recipe = manifest["inputs"], manifest["donor"], manifest["recipe"]
        except KeyError as error:
            raise OutputError(f"{out / name / MANIFEST}: {error} is missing") from error
        made.append(_Made(name=name, inputs=inputs, donor=donor, recipe=recipe))
    return made


def _numbers(outputs: Sequence[_Made], method: str, gram: Gram | None) -> Numbers:
    base, checkpoints = _base(outputs), _checkpoints(outputs)
    listed: list[Numbers] = [
        {"name": made.name, "values": swept_values(made.name), "trend": None, "coefficients": []}
        for made in outputs
    ]
    trends: list[Numbers] = []
    if gram is not None:
        checkpoints = checkpoints[: len(gram.matrix)]
        trends = _trends(outputs, listed, gram, checkpoints)
    elif method == "average":
        for made, entry in zip(outputs, listed, strict=True):
            entry["coefficients"] = _weights(made, checkpoints)
    labels = _labels([entry["model"] for entry in checkpoints])
    return {
        "title": _title(outputs[0].recipe, len(checkpoints)),
        "method": method,
        "base": base,
        "checkpoints": [
            {"label": label, "step": entry["step"]}
            for label, entry in zip(labels, checkpoints, strict=True)
        ],
        "outputs": listed,
        "trends": trends,
    }


def _title(recipe: dict[str, Any], count: int) -> str:
    calibrated = " + SVC" if recipe.get("calibrate") else ""
    what = "checkpoint" if "trajectory" in recipe else "model"
    several = "" if count == 1 else "s"
    return f"{TITLES[recipe['merge_method']]}{calibrated} of {count} {what}{several}"


def _on_tasks(outputs: Sequence[_Made]) -> bool:
    return outputs[0].recipe["merge_method"] in MERGERS


def _base(outputs: Sequence[_Made]) -> str | None:
    """What is subtracted from the models to get task vectors, if there are any."""
    made = outputs[0]
    return Path(made.inputs[made.donor]["model"]).name if _on_tasks(outputs) else None


def _checkpoints(outputs: Sequence[_Made]) -> list[dict[str, Any]]:
    """The inputs of all outputs, each once, in ascending order where they have steps; the models
    beside the base, as the recipe lists them."""
    if _on_tasks(outputs):
        made = max(outputs, key=lambda one: len(one.inputs))
        return [entry for number, entry in enumerate(made.inputs) if number != made.donor]
    found = {entry["folder"]: entry for made in outputs for entry in made.inputs}
    entries = list(found.values())
    if all(entry["step"] is not None for entry in entries):
        entries.sort(key=lambda entry: entry["step"])
    return entries


def _labels(models: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell all of them apart."""
    parts = [Path(model).parts for model in models]
    for depth in range(1, max(map(len, parts), default=0)):
        labels = ["/".join(some[-depth:]) for some in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(models)


def _spectra(path: Path, found: Numbers) -> Numbers | None:
    """About the chosen output, else about the first few."""
    if not path.is_file():
        return None
    names: list[str] = [output["name"] for output in found["outputs"]]
    best = found["scores"]["best"] if found["scores"] else None
    shown = [best] if best in names else names[:MAX_SHOWN]
    tasks = [checkpoint["label"] for checkpoint in found["checkpoints"]]
    return summed_up(json.loads(path.read_bytes()), tasks, names, shown)


def _weights(made: _Made, checkpoints: Sequence[dict[str, Any]]) -> list[float]:
    weights = made.recipe["trajectory"]["schedule"]["weights"]
    own = [entry["folder"] for entry in made.inputs]
    by_folder = dict(zip(own, weights, strict=False))
    return [by_folder.get(entry["folder"], 0.0) for entry in checkpoints]


def _trends(
    outputs: Sequence[_Made],
    listed: Sequence[Numbers],
    gram: Gram,
    checkpoints: Sequence[dict[str, Any]],
) -> list[Numbers]:
    """The numbers of each trend; fills in which output belongs to which."""
    configs = [made.config for made in outputs]
    trends = find_trends(configs, gram.matrix, [entry["model"] for entry in checkpoints])
    order = list(trends)
    for config, entry in zip(configs, listed, strict=True):
        key = setting(config)
        assert config.extrapolation is not None, "find_trends has looked"
        intervals = config.extrapolation.intervals(len(trends[key].merging))
        entry["trend"] = order.index(key)
        entry["coefficients"] = list(trends[key].coefficients(intervals))
    steps = [entry["step"] for entry in checkpoints]
    return [
        {
            **_described(key, trends[key], steps),
            "plane": _plane(gram, trends[key], number, listed),
            "cosines": _cosines(gram, trends[key]),
            "modules": _modules(gram, trends[key]),
        }
        for number, key in enumerate(order)
    ]


def _described(key: Setting, trend: Trend, steps: Sequence[int | None]) -> Numbers:
    last = [int(row.nonzero()[-1]) for row in trend.merging]
    null_raw, null_merged = null_shares(trend.merging)
    return {
        "label": str(key),
        "window": key.window,
        "stride": key.stride,
        "direction": key.direction,
        "merged_steps": [number if steps[i] is None else steps[i] for number, i in enumerate(last)],
        "explained": {
            "raw": trend.raw.tolist(),
            "merged": trend.merged.tolist(),
            "null_raw": null_raw.tolist(),
            "null_merged": null_merged.tolist(),
        },
        "interval": trend.length,
    }


def _plane(gram: Gram, trend: Trend, number: int, listed: Sequence[Numbers]) -> Numbers:
    own = [i for i, entry in enumerate(listed) if entry["trend"] == number]
    rows = torch.tensor([listed[i]["coefficients"] for i in own], dtype=torch.float64)
    eye = torch.eye(len(gram.matrix), dtype=torch.float64)
    return {
        "axes": ["along the direction", "leading component across it"],
        "raw": plane(gram.matrix, trend, eye).tolist(),
        "merged": plane(gram.matrix, trend, trend.merging).tolist(),
        "outputs": [
            {"output": i, "at": at}
            for i, at in zip(own, plane(gram.matrix, trend, rows).tolist(), strict=True)
        ],
    }


def _cosines(gram: Gram, trend: Trend) -> Numbers:
    eye = torch.eye(len(gram.matrix), dtype=torch.float64)
    return {
        "raw": cosines(gram.matrix, eye).tolist(),
        "merged": cosines(gram.matrix, trend.merging).tolist(),
    }


def _modules(gram: Gram, trend: Trend) -> list[Numbers]:
    """How far a step of one merge interval moves each module."""
    squares = torch.einsum("t,mtu,u->m", trend.interval, gram.by_module, trend.interval)
    norms = squares.clamp(min=0).sqrt().tolist()
    return [
        {"name": name, "elements": elements, "norm": norm}
        for name, elements, norm in zip(gram.modules, gram.elements, norms, strict=True)
    ]
