"""Plan the average of mixtures of experts with 1T parameters each, from their headers alone.

The inputs are sparse files: sound headers, and data that takes up no room on the disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

MIB = 1 << 20
LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 61, 1090, 3072, 1632, 128 * 1024
SHARDS, RANKS = 160, 256
TARGET = "Wanted: under 10 s for the whole process, and under 1 GB (954 MiB), for three inputs."
LEGEND = """\
"api" is `distmerge.plan` and `assign` for all ranks, in a fresh process; "command" is `distmerge
plan --ranks`, which describes every rank as well. Seconds are of the whole process, with the
imports; "CPU" is what it had of a processor, which a busy machine changes less; "planning" is
`distmerge.plan` alone and "assign" the dealing out. Peak is the highest resident memory (VmHWM).
Headers are in the page cache. Checkpoints of one run have the same headers, and each is checked
once; "unlike" are three whose headers differ, as those of unrelated models.
"""

Run = dict[str, Any]  # one timed run, as it goes into the JSON


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model, in the order of its layers."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (HIDDEN, INNER)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_model(folder: Path, metadata: dict[str, str]) -> None:
    """Write config, sparse shards and index; a model whose index is there already stays."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "synthetic", "dtype": "bfloat16"}')
    tensors = list(shapes())
    size = -(-len(tensors) // SHARDS)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        group = tensors[number * size : (number + 1) * size]
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        _write_shard(folder / name, group, metadata)
        weight_map |= {tensor: name for tensor, _ in group}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))


def _write_shard(
    path: Path, group: list[tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in group:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_recipes(workdir: Path, inputs: int) -> dict[str, Path]:
    """Recipes for the average of 1 to `inputs` alike models, and of as many unlike ones."""
    alike = [workdir / f"step-{number}" for number in range(1, inputs + 1)]
    unlike = [workdir / f"unlike-{number}" for number in range(1, inputs + 1)]
    for folder in [*alike, *unlike]:
        saved_by = {"saved by": folder.name} if folder in unlike else {}
        write_model(folder, {"format": "pt", **saved_by})
    cases = {str(count): alike[:count] for count in range(1, inputs + 1)}
    cases[f"{inputs} unlike"] = unlike
    return {case: _write_recipe(workdir, case, folders) for case, folders in cases.items()}


def _write_recipe(workdir: Path, case: str, folders: list[Path]) -> Path:
    names = [str(folder) for folder in folders]
    if len(names) > 1:
        recipe: Run = {"merge_method": "average", "trajectory": {"checkpoints": names}}
    else:  # a trajectory has two checkpoints at least
        models = [{"model": names[0], "parameters": {"weight": 1.0}}]
        recipe = {"merge_method": "linear", "models": models}
    path = workdir / f"{case.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def measure(recipe: str, ranks: int) -> Run:
    """Plan and deal out, in this process; the seconds that each takes."""
    import distmerge  # noqa: PLC0415
    from distmerge.assignment import assign  # noqa: PLC0415

    start = time.perf_counter()
    plan = distmerge.plan(recipe)
    planned = time.perf_counter()
    assigned = assign(plan, ranks)
    ended = time.perf_counter()
    assert sum(map(len, assigned)) == len(plan.jobs)
    return {
        "plan_s": planned - start,
        "assign_s": ended - planned,
        "tensors": len(plan.tensors),
        "jobs": len(plan.jobs),
        "output_bytes": plan.output_bytes,
        "digest": plan.digest,
    }


def timed(kind: str, recipe: Path, ranks: int) -> Run:
    """A fresh process: its wall seconds, its peak memory and what it measured itself."""
    command = {
        "api": [sys.executable, __file__, "--measure", str(recipe), "--ranks", str(ranks)],
        "command": [sys.executable, "-m", "distmerge", "plan", str(recipe), "--ranks", str(ranks)],
    }[kind]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} gave {process.returncode}")
    own = json.loads(text) if kind == "api" else {}
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024
    return {"kind": kind, "wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, **own}


def collect(options: argparse.Namespace) -> Run:
    """All runs, in turns, so that a slow minute of the machine hits all of them."""
    recipes = write_recipes(options.workdir, options.inputs)
    runs, loads = list[Run](), [os.getloadavg()[0]]
    for _ in range(options.rounds):
        for inputs, recipe in recipes.items():
            for kind in ("api", "command"):
                run = {"inputs": inputs, **timed(kind, recipe, options.ranks)}
                runs.append(run)
                size = run["peak_bytes"] / MIB
                print(f"{inputs:10}{kind:8}{run['wall_s']:7.2f} s {size:6.0f} MiB", flush=True)
        loads.append(os.getloadavg()[0])
    load = ", ".join(f"{each:.1f}" for each in loads)
    noise = f"load average before the rounds and after each: {load} (it would be 1 with us alone)"
    return {"about": {**about(options), "noise": noise}, "runs": runs}


def about(options: argparse.Namespace) -> dict[str, str]:
    """The machine, the versions and the command: what it takes to judge or repeat the numbers."""
    tensors = list(shapes())
    parameters = sum(math.prod(shape) for _, shape in tensors)
    processor = subprocess.getoutput("sed -n 's/^model name.*: //p;T;q' /proc/cpuinfo")
    versions = [f"{n} {importlib.metadata.version(n)}" for n in ("distmerge", "torch")]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "benchmarks/bench_plan.py", *sys.argv[1:]]),
        "inputs": f"each {parameters:,} parameters in {len(tensors):,} tensors, bfloat16, "
        f"{SHARDS} shards; {options.ranks} ranks",
        "cpu": f"{processor}, {os.cpu_count()} cores",
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
    }


def markdown(results: Run) -> str:
    about = "\n".join(f"- {key}: {value}" for key, value in results["about"].items())
    parts = ["# Planning for a trillion parameters", f"{TARGET}\n\n{LEGEND.rstrip()}", about]
    return "\n\n".join([*parts, table(results["runs"])]) + "\n"


def table(runs: list[Run]) -> str:
    """One row for each number of inputs and each way; medians, and the range of the seconds."""
    head = ["inputs", "", "median s", "min-max s", "CPU s", "planning s", "assign s", "peak MiB"]
    rows = [head, ["---:"] * len(head)]
    for inputs, kind in dict.fromkeys((run["inputs"], run["kind"]) for run in runs):
        group = [run for run in runs if (run["inputs"], run["kind"]) == (inputs, kind)]
        walls = [run["wall_s"] for run in group]
        row = [inputs, kind, f"{median(walls):.2f}", f"{min(walls):.2f}-{max(walls):.2f}"]
        for key in ("cpu_s", "plan_s", "assign_s"):
            row.append(f"{median(run[key] for run in group):.2f}" if key in group[0] else "")
        rows.append([*row, str(round(max(run["peak_bytes"] for run in group) / MIB))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=3, help="measure 1 to so many inputs")
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench-plan"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--measure", metavar="RECIPE", help="plan it in this process, print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.ranks)))
        return
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    options.results.mkdir(parents=True, exist_ok=True)
    results = collect(options)
    (options.results / "plan.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.results / "plan.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
