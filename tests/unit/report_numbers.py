"""Numbers of reports as a run makes them, from simulated training: a random walk with drift."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = dict[str, Any]
Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

DIMENSIONS = 200

STRANGE = (
    '<script>alert("x")</script>',
    'a & b $x_1$ "quoted"',
    "very-long-" + "x" * 120,
    "\N{CJK UNIFIED IDEOGRAPH-540D}\N{CJK UNIFIED IDEOGRAPH-524D}",
    "_hidden",
    "one $ and a back\\slash",
    "new\nline",
    "https://example.org/a",
    "lone \udc80 surrogate",
    "",
    "%s {0}",
)
"""Names that a stranger may give to files and tensors."""


def extrapolated(
    count: int = 11,
    *,
    windows: Sequence[int] = (3,),
    steps: Sequence[float] = (0, 0.5, 1),
    modules: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Numbers:
    """The report of an Extra-Merge of `count` checkpoints, one trend for each window.

    With `labels`, the checkpoints bear them and no training steps.
    """
    rng = np.random.default_rng(0)
    walk = np.cumsum(
        0.05 * rng.normal(size=(count, DIMENSIONS)) + 0.02 * rng.normal(size=DIMENSIONS), axis=0
    )
    checkpoints = [
        {"label": labels[i % len(labels)], "step": None}
        if labels
        else {"label": f"step-{700 + 100 * i:05}", "step": 700 + 100 * i}
        for i in range(count)
    ]
    pairs = list(itertools.product(range(len(windows)), steps))
    outputs: list[Numbers] = []
    trends = [_trend(walk, window, modules, checkpoints) for window in windows]
    for number, step in pairs:
        at = trends[number]["plane"]["merged"][-1]
        trends[number]["plane"]["outputs"].append(
            {"output": len(outputs), "at": [at[0] + step * trends[number]["interval"], at[1]]}
        )
        values = {"window": windows[number]} if len(windows) > 1 else {}
        outputs.append(_output({**values, "step": step}, number, count, windows[number], rng))
    if len(outputs) == 1:
        outputs[0]["name"] = ""
    return {
        "title": f"Extra-Merge of {count} checkpoints",
        "method": "extra_merge",
        "base": None,
        "checkpoints": checkpoints,
        "outputs": outputs,
        "trends": trends,
        "scores": _scores(outputs, rng) if len(outputs) > 1 else None,
        "spectra": None,
    }


def averaged(values: Mapping[str, Sequence[object]], *, goal: str = "min") -> Numbers:
    """The report of a sweep over an average, scored by a command: no trends, no errors."""
    rng = np.random.default_rng(1)
    combinations = [dict(zip(values, c, strict=True)) for c in itertools.product(*values.values())]
    outputs = [_output(combination, None, 12, 4, rng) for combination in combinations]
    scores = _scores(outputs, rng)
    for candidate in scores["candidates"]:
        candidate["error"] = None
    scores |= {"metric": "command", "goal": goal, "unit": "", "text": None, "tokens": None}
    scores |= {"command": "python eval.py {model}", "windows": None}
    return {
        "title": "Average of 12 checkpoints",
        "method": "average",
        "base": None,
        "checkpoints": [{"label": f"c{i}", "step": 1000 * i} for i in range(12)],
        "outputs": outputs,
        "trends": [],
        "scores": scores,
        "spectra": None,
    }


def strange() -> Numbers:
    """Every text of the report is one that must be escaped, shortened or replaced."""
    numbers = extrapolated(
        steps=range(len(STRANGE)), labels=STRANGE, modules=[*STRANGE, *llama(3), *STRANGE]
    )
    found = zip(numbers["outputs"], numbers["scores"]["candidates"], STRANGE, strict=True)
    for output, candidate, name in found:
        output["name"] = candidate["name"] = name
        output["values"] = candidate["values"] = {"$k<b>": name}
    numbers["title"] = numbers["trends"][0]["label"] = STRANGE[0]
    numbers["trends"][0]["plane"]["axes"] = [STRANGE[1], STRANGE[4]]
    for key in ("verdict", "unit", "text", "metric", "best"):
        numbers["scores"][key] = STRANGE[0]
    numbers["scores"]["baseline"] = STRANGE[1]
    return numbers


def llama(layers: int, kinds: Sequence[str] = ("self_attn", "mlp", "input_layernorm")) -> list[str]:
    """Module names of a model; a kind of '' stands for the whole layer."""
    inside = [f"model.layers.{i}.{kind}".rstrip(".") for i in range(layers) for kind in kinds]
    return ["model.embed_tokens", *inside, "model.norm", "lm_head"]


def _output(
    values: Numbers, trend: int | None, count: int, window: int, rng: np.random.Generator
) -> Numbers:
    weights = np.zeros(count)
    weights[-window:] = 1 / window
    weights += (noise := 0.01 * rng.normal(size=count)) - noise.mean()
    name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())
    return {"name": name, "values": values, "trend": trend, "coefficients": weights.tolist()}


def _trend(
    walk: Matrix, window: int, modules: Sequence[str], checkpoints: list[Numbers]
) -> Numbers:
    rng = np.random.default_rng(2)
    count = len(walk)
    merge = np.array(
        [np.eye(count)[j : j + window].mean(axis=0) for j in range(count - window + 1)]
    )
    merged, null = merge @ walk, np.cumsum(rng.normal(size=walk.shape), axis=0)
    axes = np.linalg.svd(walk - walk.mean(axis=0), full_matrices=False)[2][:2]
    axes[0] *= np.sign(axes[0] @ (merged[-1] - merged[0]))
    plane = {
        "axes": ["first component", "second component"],
        "raw": (walk @ axes.T).tolist(),
        "merged": (merged @ axes.T).tolist(),
        "outputs": [],
    }
    ends = [c["step"] or number + 1 for number, c in enumerate(checkpoints[window - 1 :])]
    return {
        "label": f"window {window}, stride 1",
        "window": window,
        "stride": 1,
        "direction": "principal",
        "merged_steps": ends,
        "plane": plane,
        "explained": {
            "raw": _shares(walk),
            "merged": _shares(merged),
            "null_raw": _shares(null),
            "null_merged": _shares(merge @ null),
        },
        "cosines": {"raw": _cosines(walk), "merged": _cosines(merged)},
        "interval": float(axes[0] @ (merged[-1] - merged[0]) / (len(merged) - 1)),
        "modules": [
            {"name": name, "elements": 1000 + i, "norm": float(rng.uniform(1e-4, 2e-4))}
            for i, name in enumerate(modules or llama(4))
        ],
    }


def _shares(points: Matrix) -> list[float]:
    squares = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)[: len(points) - 1] ** 2
    shares: list[float] = (squares / squares.sum()).tolist()
    return shares


def _cosines(points: Matrix) -> list[list[float]]:
    steps = np.diff(points, axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    cosines: list[list[float]] = (steps @ steps.T).tolist()
    return cosines


def _scores(outputs: list[Numbers], rng: np.random.Generator) -> Numbers:
    candidates = [
        {
            "name": output["name"],
            "values": output["values"],
            "score": 1.2314 + difference,
            "difference": difference,
            "error": 3e-4 if difference else 0.0,
        }
        for output, difference in zip(
            outputs, [0.0, *(0.002 * rng.normal(size=len(outputs) - 1))], strict=True
        )
    ]
    best = min(candidates, key=lambda candidate: float(candidate["score"]))
    assert math.isfinite(float(best["score"]))
    return {
        "metric": "loss",
        "goal": "min",
        "unit": "nats per token",
        "text": "held-out.txt",
        "command": None,
        "tokens": 65536,
        "windows": 512,
        "candidates": candidates,
        "baseline": candidates[0]["name"],
        "best": best["name"],
        "verdict": f"{best['name']} is the best; not established.",
    }
