"""What resuming costs: the merge pass with journal and checksums, and without, in turns."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from unittest import mock

import distmerge
from benchmarks.bench_average import machine, set_cached
from benchmarks.floor import shards
from distmerge import passes
from distmerge.document import Plain


def seconds(recipe: dict[str, Plain], out: Path, *, journal: bool) -> float:
    """Of one merge pass: read, compute, write, sync, hash."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if journal:
        return distmerge.merge(recipe, out).pass_seconds
    # A rank that does not see the state of the attempt keeps no journal.
    with mock.patch.object(passes, "_own_name", return_value=None):
        return distmerge.merge(recipe, out).pass_seconds


def collect(folder: Path, rounds: int) -> list[dict[str, float]]:
    inputs = [folder / f"model-{number}" for number in range(3)]
    models: list[Plain] = [{"model": str(each), "parameters": {"weight": 1}} for each in inputs]
    recipe: dict[str, Plain] = {"merge_method": "linear", "models": models}
    found = []
    for number in range(rounds):
        for file in [file for each in inputs for file in shards(each)]:
            set_cached(file, warm=True)
        order = (True, False) if number % 2 else (False, True)
        run = {
            "with" if journal else "without": seconds(recipe, folder / "out", journal=journal)
            for journal in order
        }
        print({key: round(value, 2) for key, value in run.items()}, flush=True)
        found.append(run)
    shutil.rmtree(folder / "out")
    return found


def markdown(facts: dict[str, str], runs: list[dict[str, float]]) -> str:
    ratios = sorted(run["with"] / run["without"] for run in runs)
    lines = ["# The cost of journal and checksums", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| round | without, s | with, s | ratio |", "| ---: | ---: | ---: | ---: |"]
    for number, run in enumerate(runs, 1):
        ratio = run["with"] / run["without"]
        lines.append(f"| {number} | {run['without']:.2f} | {run['with']:.2f} | {ratio:.3f} |")
    lines += ["", f"Median ratio {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="paths are relative to the repository root")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="0.85B", help="of the models, see synthetic.py")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    folder = options.workdir / options.size
    make = [".venv/bin/python", "benchmarks/synthetic.py", str(folder), "--size", options.size]
    subprocess.run(make, check=True)
    runs = collect(folder, options.rounds)
    command = shlex.join(["python", "-m", "benchmarks.bench_journal", *sys.argv[1:]])
    models = f"3 of {options.size} in bfloat16, in the page cache; one rank"
    facts = {**machine(command), "models": models}
    name = options.results / "journal"
    name.with_suffix(".json").write_text(
        json.dumps({"about": facts, "runs": runs}, indent=1) + "\n"
    )
    name.with_suffix(".md").write_text(markdown(facts, runs))


if __name__ == "__main__":
    main()
