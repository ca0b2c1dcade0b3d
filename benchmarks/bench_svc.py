"""Task arithmetic with SVC at one and two ranks against fusion-bench: speed beside error.

Whole runs go from checkpoints to a checkpoint; "alone" is the calibration of single matrices that
lie in memory. Contestants take turns in one run, so that a slow minute of the machine hits all of
them. The reference of all errors is an SVD in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.bench_average import VERSIONS, execute, machine, output_of, set_cached
from benchmarks.svc_layers import Shape, matrices, write_missing

PEER = ".venv-fusion-bench/bin/python"
SCALE, ALPHA = 0.3, 0.25
ALONE = ("self_attn.k_proj", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
"""Of the first layer: all shapes that there are."""

Run = dict[str, Any]


class Work(NamedTuple):
    """The base and the tasks, and where recipes, outputs and the reference go."""

    models: list[Path]
    shape: Shape
    folder: Path

    @property
    def names(self) -> list[str]:
        return [name for name, _ in matrices(self.shape)]

    @property
    def alone(self) -> list[str]:
        return [f"model.layers.0.{part}.weight" for part in ALONE]

    @property
    def arguments(self) -> list[str]:
        numbers = ["--scale", str(SCALE), "--alpha", str(ALPHA)]
        return [*map(str, self.models), "--out", str(self.folder / "out"), *numbers]

    def recipe(self, out_dtype: str) -> Path:
        base, *tasks = (str(each.resolve()) for each in self.models)
        content = {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": task, "parameters": {"weight": 1.0}} for task in tasks],
            "parameters": {"lambda": SCALE},
            "calibrate": {"method": "svc", "alpha": ALPHA},
            "out_dtype": out_dtype,
        }
        path = self.folder / f"{out_dtype}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def merge(self, ranks: int, out_dtype: str = "bfloat16") -> list[str]:
        torchrun = [".venv/bin/torchrun", f"--nproc-per-node={ranks}", "-m", "distmerge"]
        program = [".venv/bin/distmerge"] if ranks == 1 else torchrun
        return [*program, "merge", str(self.recipe(out_dtype)), str(self.folder / "out")]

    def peer(self, threads: int, *arguments: str) -> list[str]:
        program = ["env", f"OMP_NUM_THREADS={threads}", PEER, "benchmarks/fusion_bench_svc.py"]
        return [*program, *self.arguments, *arguments]


def one_round(work: Work) -> Iterator[Run]:
    """Everything once, with the inputs in the page cache."""
    for ranks in (1, 2):
        yield {"contestant": f"distmerge-{ranks}", **whole(work, work.merge(ranks))}
        yield {"contestant": f"peer, threads: {ranks}", **whole(work, work.peer(ranks))}
    ours = [".venv/bin/python", "-m", "benchmarks.svc_alone", *work.arguments]
    yield {"contestant": "alone", **alone(work, [*ours, "--alone", *work.alone])}
    yield {"contestant": "alone, peer", **alone(work, work.peer(1, "--alone", *work.alone))}


def whole(work: Work, command: list[str]) -> Run:
    """Seconds and memory of a program, what it says of itself, and the error of its output."""
    for model in work.models:
        set_cached(model / "model.safetensors", warm=True)
    os.sync()
    before = cpu_seconds()
    wall, peaks, text = execute(command)
    cpu = cpu_seconds() - before
    ours = re.search(r"wrote .* in ([\d.]+) s", text)
    own = {"pass_s": float(ours[1])} if ours else json.loads(text.splitlines()[-1])
    out = work.folder / "out"
    error = error_of(work, out / "model.safetensors")
    shutil.rmtree(out)
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        **own,
        "peak_bytes": peaks.bytes,
        "error": error,
        "command": shlex.join(command),
    }


def cpu_seconds() -> float:
    """User and system time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def alone(work: Work, command: list[str]) -> Run:
    """Seconds and error of each matrix."""
    text = execute(command)[2]
    out = work.folder / "out"
    errors = {}
    with safe_open(out, framework="pt") as found, _reference(work) as expected:
        for name in work.alone:
            exact = expected.get_tensor(name)
            errors[name] = float((found.get_tensor(name) - exact).norm() / exact.norm())
    out.unlink()
    seconds = json.loads(text.splitlines()[-1])
    return {"seconds": seconds, "errors": errors, "command": shlex.join(command)}


def error_of(work: Work, output: Path) -> float:
    """Relative error of the calibrated deltas of all matrices together (Frobenius)."""
    off = norm = 0.0
    base = work.models[0] / "model.safetensors"
    with (
        safe_open(output, framework="pt") as merged,
        safe_open(base, framework="pt") as before,
        _reference(work) as expected,
    ):
        for name in work.names:
            delta = merged.get_tensor(name).double() - before.get_tensor(name).double()
            exact = expected.get_tensor(name).double()
            off += float((delta - exact).square().sum())
            norm += float(exact.square().sum())
    return float((off / norm) ** 0.5)


def _reference(work: Work) -> Any:
    return safe_open(work.folder / "reference.safetensors", framework="pt")


def write_reference(work: Work) -> None:
    """The calibrated deltas by an SVD in float64, kept in float32: its rounding is 6e-8."""
    path = work.folder / "reference.safetensors"
    if path.exists():
        return
    found = {}
    for name in work.names:
        base, *tasks = (_read(model, name).double() for model in work.models)
        found[name] = by_svd([task - base for task in tasks]).float()
    save_file(found, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def by_svd(deltas: list[Tensor]) -> Tensor:
    """SVC as its paper writes it (arXiv 2602.05536, algorithm 1), float64."""
    merged = SCALE * sum(deltas, torch.zeros_like(deltas[0]))
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=False)
    response = u.T @ merged
    strengths = torch.stack(
        [(response * (u.T @ d)).sum(1) / (u.T @ d).square().sum(1) for d in deltas]
    )
    gamma = len(deltas) / strengths.clamp(min=ALPHA).sum(0)
    calibrated: Tensor = (u * (gamma * sigma)) @ vh
    return calibrated


def _read(folder: Path, name: str) -> Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def collect(work: Work, rounds: int) -> list[Run]:
    runs: list[Run] = []
    for number in range(rounds):
        for run in one_round(work):
            runs.append({"round": number, **run})
            seconds = run.get("wall_s") or sum(run["seconds"].values())
            print(f"{number} {run['contestant']:18} {seconds:8.2f} s", flush=True)
    exact = whole(work, work.merge(1, "float32"))
    return [*runs, {"round": None, "contestant": "distmerge-1, out_dtype float32", **exact}]


def about(work: Work) -> dict[str, str]:
    hidden, kv, intermediate, layers = work.shape
    size = f"hidden {hidden}, keys and values {kv}, MLP {intermediate}, layers {layers}"
    packages = ("fusion-bench", "torch", "transformers")
    return {
        **machine(shlex.join(["python", "-m", "benchmarks.bench_svc", *sys.argv[1:]])),
        ", ".join(packages): output_of(PEER, "-c", VERSIONS, *packages),
        "layers": f"{size}, bfloat16; base and {len(work.models) - 1} tasks",
        "recipe": f"task arithmetic, lambda {SCALE}, SVC with alpha {ALPHA}",
    }


LEGEND = """\
Seconds are medians over the rounds, with the least and the most; ratios are medians of the ratios
within each round. A process is all from start to exit; a pass is reading, computing and writing,
by each program's own clock, without the start of Python, of torchrun and the imports; ours hashes
and syncs its output too. CPU is user and system time of all processes. Peak is the highest VmHWM
of any one process. The error is that of the calibrated deltas in the output, relative to those by
an SVD in float64; outputs in bfloat16 have its rounding, and the peer also rounds what it
calibrates. Inputs are in the page cache. Ranks have one thread each.
"""


def markdown(facts: dict[str, str], work: Work, runs: list[Run]) -> str:
    parts = ["# Task arithmetic with SVC, against fusion-bench", LEGEND.rstrip()]
    parts.append("\n".join(f"- {key}: {value}" for key, value in facts.items()))
    parts += ["## Whole runs", whole_table(runs)]
    parts += ["## The calibration alone, in memory, one thread", alone_table(work, runs)]
    parts += ["## What was to be reached", targets(runs)]
    return "\n\n".join(parts) + "\n"


def whole_table(runs: list[Run]) -> str:
    head = ["", "process s", "peer's / this", "pass s", "peer's / this", "CPU s", "peak MB"]
    head.append("error")
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    peer = group(runs, "peer, threads: 1")
    for name in dict.fromkeys(run["contestant"] for run in runs if "wall_s" in run):
        own = group(runs, name)
        timed = own[0]["round"] is not None
        cells = [name]
        for key in ("wall_s", "pass_s"):
            cells += [spread([run[key] for run in own]), ratio(peer, own, key) if timed else ""]
        cells.append(spread([run["cpu_s"] for run in own]))
        cells.append(f"{max(run['peak_bytes'] for run in own) / 1e6:.0f}")
        rows.append([*cells, f"{max(run['error'] for run in own):.1e}"])
    return table(rows)


def alone_table(work: Work, runs: list[Run]) -> str:
    head = ["", "this s", "peer s", "peer's / this", "error", "peer's error"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    ours, theirs = group(runs, "alone"), group(runs, "alone, peer")
    sizes = dict(matrices(work.shape))
    for name in work.alone:
        m, n = sizes[name]
        mine, yours = ([run["seconds"][name] for run in each] for each in (ours, theirs))
        ratios = [b / a for a, b in zip(mine, yours, strict=True)]
        errors = [f"{max(run['errors'][name] for run in each):.1e}" for each in (ours, theirs)]
        rows.append([f"{m} x {n}", spread(mine), spread(yours), spread(ratios), *errors])
    return table(rows)


def targets(runs: list[Run]) -> str:
    one, two = group(runs, "distmerge-1"), group(runs, "distmerge-2")
    peer, exact = group(runs, "peer, threads: 1"), group(runs, "distmerge-1, out_dtype float32")
    share = max(r["peak_bytes"] for r in one + two) / max(r["peak_bytes"] for r in peer)
    rows = [
        ["", "wanted", "process", "pass"],
        ["---", "---:", "---:", "---:"],
        ["faster than the peer", "4", ratio(peer, one, "wall_s"), ratio(peer, one, "pass_s")],
        ["2 ranks faster than 1", "1.8", ratio(one, two, "wall_s"), ratio(one, two, "pass_s")],
        ["share of the peer's memory", "below 0.2", f"{share:.2f}", ""],
        ["error", "below 1e-5", f"{exact[0]['error']:.1e}", ""],
    ]
    return table(rows)


def group(runs: list[Run], name: str) -> list[Run]:
    return [run for run in runs if run["contestant"] == name]


def ratio(above: list[Run], below: list[Run], key: str) -> str:
    return spread([a[key] / b[key] for a, b in zip(above, below, strict=True)])


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="paths are relative to the repository root")
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("hidden", 2048), ("kv", 512), ("intermediate", 7168), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench/svc"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    subprocess.run(["benchmarks/fusion_bench_env.sh"], check=True)
    shape = Shape(options.hidden, options.kv, options.intermediate, options.layers)
    folder = options.workdir / shape.name
    work = Work(write_missing(folder, shape), shape, folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    write_reference(work)
    runs, facts = collect(work, options.rounds), about(work)
    options.results.mkdir(parents=True, exist_ok=True)
    name = options.results / "svc"
    name.with_suffix(".json").write_text(
        json.dumps({"about": facts, "runs": runs}, indent=1) + "\n"
    )
    name.with_suffix(".md").write_text(markdown(facts, work, runs))


if __name__ == "__main__":
    main()
