"""Extra-Merge against its floors: the statistic pass, and five outputs from one read.

The floor of the statistic pass is the larger of two: reading every checkpoint once, and computing
T(T+1)/2 dot products of float64 vectors that lie in the cache. The floor of a sweep is one read of
all checkpoints and five writes. Contestants take turns in one run, so that a slow minute of the
machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.bench_average import execute, machine, set_cached
from benchmarks.floor import read_all, shards, write_one

STEPS = [0, 0.25, 0.5, 1, 2]
WINDOW = 4
DOT_ELEMENTS, DOT_ROUNDS = 16 * 1024, 300_000

Run = dict[str, Any]


class Work(NamedTuple):
    """The checkpoints, and where recipes and outputs go."""

    inputs: list[Path]
    folder: Path

    @property
    def files(self) -> list[Path]:
        return [file for each in self.inputs for file in shards(each)]

    @property
    def elements(self) -> int:
        return sum(file.stat().st_size for file in shards(self.inputs[0])) // 2  # bfloat16

    def recipe(self, steps: list[float]) -> Path:
        path = self.folder / f"extra-merge-{len(steps)}.yaml"
        trajectory = {"checkpoints": [str(each.resolve()) for each in self.inputs]}
        content = {
            "merge_method": "extra_merge",
            "trajectory": {**trajectory, "window": WINDOW},
            "parameters": {"step": steps},
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path


def merge(work: Work, steps: list[float], ranks: int) -> Run:
    """Run the command; what it says of its two passes, and what the whole process took."""
    out = work.folder / "out"
    torchrun = [".venv/bin/torchrun", f"--nproc-per-node={ranks}", "-m", "distmerge"]
    program = [".venv/bin/distmerge"] if ranks == 1 else torchrun
    command = [*program, "merge", str(work.recipe(steps)), str(out)]
    wall, peaks, text = execute(command)
    shutil.rmtree(out)
    statistic = re.search(r"\(statistic ([\d.]+) s\)", text)
    both = re.search(r"wrote .* in ([\d.]+) s", text)
    assert both is not None, text
    first = float(statistic[1]) if statistic else 0.0
    return {
        "statistic_s": first,
        "merge_s": float(both[1]) - first,
        "wall_s": wall,
        "peak_bytes": peaks.bytes,
        "command": shlex.join(command),
    }


def read_floor(work: Work, *, direct: bool) -> float:
    start = time.perf_counter()
    read_all(work.files, direct=direct)
    return time.perf_counter() - start


def write_floor(work: Work, *, direct: bool) -> float:
    """Five outputs of one checkpoint's size."""
    size = sum(file.stat().st_size for file in shards(work.inputs[0]))
    folder = work.folder / "floor"
    start = time.perf_counter()
    for number in range(len(STEPS)):
        write_one(folder / str(number), size, direct=direct)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def dots_floor(work: Work) -> float:
    """T(T+1)/2 dot products over all elements, at the speed of vectors that stay in the cache."""
    torch.set_num_threads(1)
    a, b = torch.randn(2, DOT_ELEMENTS, dtype=torch.float64)
    start = time.perf_counter()
    for _ in range(DOT_ROUNDS):
        torch.dot(a, b)
    each = (time.perf_counter() - start) / (DOT_ROUNDS * DOT_ELEMENTS)
    count = len(work.inputs)
    return each * work.elements * count * (count + 1) / 2


def one_round(work: Work, state: str) -> Iterator[Run]:
    """Everything once, with the inputs in the page cache (warm) or out of it (cold)."""

    def settle() -> None:
        os.sync()
        for file in work.files:
            set_cached(file, warm=state == "warm")

    for direct in (False, True):
        settle()
        kind = "direct" if direct else "buffered"
        read, write = read_floor(work, direct=direct), write_floor(work, direct=direct)
        yield {"contestant": f"floor-{kind}", "statistic_s": read, "merge_s": read + write}
    yield {"contestant": "floor-dots", "statistic_s": dots_floor(work)}
    for ranks in (1, 2):
        shutil.rmtree(work.folder / ".distmerge", ignore_errors=True)
        settle()
        yield {"contestant": f"one step, distmerge-{ranks}", **merge(work, [1], ranks)}
        settle()
        # The statistic of the run before is known: this one reads once.
        yield {"contestant": f"five steps, distmerge-{ranks}", **merge(work, list(STEPS), ranks)}


def collect(work: Work, rounds: int) -> list[Run]:
    runs: list[Run] = []
    for number in range(rounds):
        for state in ("cold", "warm"):
            for run in one_round(work, state):
                runs.append({"round": number, "state": state, **run})
                shown = {key: round(value, 2) for key, value in run.items() if key.endswith("_s")}
                print(f"{number} {state:5} {run['contestant']:24} {shown}", flush=True)
    return runs


def about(work: Work) -> dict[str, str]:
    command = shlex.join(["python", "-m", "benchmarks.bench_extra_merge", *sys.argv[1:]])
    checkpoints = f"{len(work.inputs)} of {work.elements / 1e9:.2f}B parameters in bfloat16"
    return {
        **machine(command),
        "checkpoints": f"{checkpoints}, window {WINDOW}, steps {STEPS}",
    }


def markdown(facts: dict[str, str], runs: list[Run]) -> str:
    parts = ["# Extra-Merge: the statistic pass, and five outputs from one read", LEGEND.rstrip()]
    parts.append("\n".join(f"- {key}: {value}" for key, value in facts.items()))
    for state in ("cold", "warm"):
        parts += [f"## Inputs {'on disk' if state == 'cold' else 'in the page cache'}"]
        parts += [table([run for run in runs if run["state"] == state])]
    return "\n\n".join(parts) + "\n"


LEGEND = """\
Seconds are medians over the rounds, with the least and the most; ratios are medians of the ratios
within each round. The statistic's floor is the larger of one read (the faster way) and the dot
products, which one core computes; the merge pass's is one read and five writes, each way.
"""


def table(runs: list[Run]) -> str:
    names = list(dict.fromkeys(run["contestant"] for run in runs))
    head = ["", "statistic s", "/ floor", "merge pass s", "/ buffered", "/ direct", "process s"]
    rows = [[*head, "peak MB"], ["---"] + ["---:"] * len(head)]
    floors = [_floors(runs, number) for number in sorted({run["round"] for run in runs})]
    for name in names:
        group = [run for run in runs if run["contestant"] == name]
        sweep = name.startswith("five")
        rows.append(
            [
                name,
                _spread(group, "statistic_s"),
                ""
                if sweep or "floor" in name
                else _ratio(group, "statistic_s", floors, "statistic"),
                _spread(group, "merge_s"),
                _ratio(group, "merge_s", floors, "buffered") if sweep else "",
                _ratio(group, "merge_s", floors, "direct") if sweep else "",
                _spread(group, "wall_s"),
                str(max(run.get("peak_bytes", 0) for run in group) // 10**6 or ""),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _floors(runs: list[Run], number: int) -> dict[str, float]:
    by_name = {run["contestant"]: run for run in runs if run["round"] == number}
    read = min(by_name[f"floor-{kind}"]["statistic_s"] for kind in ("buffered", "direct"))
    return {
        "statistic": max(read, by_name["floor-dots"]["statistic_s"]),
        "buffered": by_name["floor-buffered"]["merge_s"],
        "direct": by_name["floor-direct"]["merge_s"],
    }


def _ratio(group: list[Run], key: str, floors: list[dict[str, float]], floor: str) -> str:
    ratios = [run[key] / each[floor] for run, each in zip(group, floors, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _spread(group: list[Run], key: str) -> str:
    values = [run[key] for run in group if run.get(key)]
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="paths are relative to the repository root")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="0.85B", help="of the models, see synthetic.py")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    folder = options.workdir / options.size
    make = [".venv/bin/python", "benchmarks/synthetic.py", str(folder), "--size", options.size]
    subprocess.run([*make, "--models", str(options.checkpoints)], check=True)
    work = Work([folder / f"model-{n}" for n in range(options.checkpoints)], options.workdir)
    runs, facts = collect(work, options.rounds), about(work)
    options.results.mkdir(parents=True, exist_ok=True)
    name = options.results / "extra_merge"
    name.with_suffix(".json").write_text(
        json.dumps({"about": facts, "runs": runs}, indent=1) + "\n"
    )
    name.with_suffix(".md").write_text(markdown(facts, runs))


if __name__ == "__main__":
    main()
