"""TIES and DARE-TIES of three models on a base, with distmerge and with mergekit, taking turns.

Beside seconds: in how many elements TIES keeps something here and nothing there. Both keep the
largest magnitudes; of those that are equal at the threshold, as 16-bit weights have them,
mergekit's sort takes any, and distmerge the ones with the lowest indices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from benchmarks.bench_average import Run, Work, about, execute, make_work, table, timed

METHODS = ("ties", "dare_ties")
DENSITY = 0.5


def works(options: argparse.Namespace, method: str) -> Work:
    """The inputs that the benchmark of averages uses: the first is the base."""
    work = make_work(options.workdir, options.size, options.workdir / "out", models=4)
    models = [
        {"model": str(each.resolve()), "parameters": {"weight": 1.0, "density": DENSITY}}
        for each in work.inputs[1:]
    ]
    config = {
        "merge_method": method,
        "base_model": str(work.inputs[0].resolve()),
        "models": models,
        "dtype": "bfloat16",
    }
    recipe = work.recipe.with_name(f"{method}.yml")
    recipe.write_text(yaml.safe_dump(config, sort_keys=False))
    return work._replace(recipe=recipe)


def runs(options: argparse.Namespace) -> Iterator[Run]:
    wanted = tuple(options.only.split(","))
    for turn in range(options.rounds):
        for method in METHODS:
            work = works(options, method)
            commands = [
                item
                for item in work.commands().items()
                if item[0] in ("distmerge-1", "distmerge-2", "mergekit")
                and item[0].startswith(wanted)
            ]
            first = turn % len(commands)
            for name, command in commands[first:] + commands[:first]:
                yield timed(method, "warm", name, command, work)


def differences(options: argparse.Namespace) -> dict[str, int]:
    """In how many elements one of two TIES merges keeps the base's value and the other does not.

    In float32, for mergekit computes in the dtype of the recipe: in bfloat16 its sums are others.
    """
    work = works(options, "ties")
    config = {**yaml.safe_load(work.recipe.read_text()), "dtype": "float32"}
    work.recipe.write_text(yaml.safe_dump(config, sort_keys=False))
    commands = work.commands()
    folders = [work.inputs[0]]
    for name in ("distmerge-1", "mergekit"):
        execute(commands[name])
        folders.append(work.out.with_name(f"out-{name}"))
        shutil.rmtree(folders[-1], ignore_errors=True)
        work.out.rename(folders[-1])
    found = {"elements": 0, "differing": 0}
    for tensors in zip(*map(_tensors, folders), strict=True):
        base, ours, theirs = (values.float() for _, values in tensors)
        found["elements"] += base.numel()
        found["differing"] += int(((ours == base) != (theirs == base)).sum())
    for folder in folders[1:]:
        shutil.rmtree(folder)
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """All tensors by name, one at a time."""
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as opened:
            yield name, opened.get_tensor(name)


def markdown(results: dict[str, Any]) -> str:
    facts = "\n".join(f"- {key}: {value}" for key, value in results["about"].items())
    found = results["differences"]
    parts = [
        "# TIES and DARE-TIES of three models on a base",
        "Whole processes, inputs in the page cache, medians; mergekit with its defaults, on both "
        f"cores. Density {DENSITY}.",
        facts,
    ]
    for method in METHODS:
        own = [run for run in results["runs"] if run["section"] == method]
        parts += [f"## {method}", table(own, results["torch_peak_bytes"])]
    share = 100 * found["differing"] / found["elements"]
    parts.append(
        f"Of {found['elements']:,} elements, {found['differing']:,} ({share:.4f} %) are changed by "
        "one of the two TIES merges and not by the other (both in float32): of magnitudes that are "
        "equal at the threshold mergekit's sort keeps any, distmerge the ones with lower indices."
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", default="0.85B", help="of the models, see synthetic.py")
    parser.add_argument("--only", default="", help="names, or their beginnings: distmerge")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--differences-only", action="store_true", help="keep the known seconds")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    torch = execute([".venv/bin/python", "-c", "import torch"])[1].bytes
    known = options.results / "ties.json"
    old = json.loads(known.read_bytes()) if options.differences_only else None
    results = old or {
        "about": about(options, "-m benchmarks.bench_ties", "4"),
        "torch_peak_bytes": torch,
        "runs": list(runs(options)),
    }
    results["differences"] = differences(options)
    known.write_text(json.dumps(results, indent=1) + "\n")
    (options.results / "ties.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
