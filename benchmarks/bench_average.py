"""Average three checkpoints with distmerge, with mergekit and with no arithmetic at all.

They take turns in one run, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

MIB = 1 << 20
SAMPLE_S, TIMEOUT_S = 0.02, 1800
MERGEKIT = ".venv-mergekit/bin"
VERSIONS = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sep=', ')"
SECTIONS = {
    "main": "All contestants",
    "large": "The larger model, for its memory",
    "compute": "One rank against two: inputs cached, output in memory, one core for each rank",
}
LEGEND = """\
Seconds are of the whole process; "on disk" adds a sync after it, since not all contestants wait
for the disk; "merge pass" is distmerge's own figure. Inputs are dropped from the page cache first
(cold) or read just before (warm). Peak is the highest VmHWM of any one process; "anonymous" is
what remains without the pages of mapped files, "beyond torch" without what `import torch` takes.
"""

Run = dict[str, Any]  # one timed run, as it goes into the JSON


class Work(NamedTuple):
    """The inputs of one comparison, the recipe that all contestants get, and their output."""

    inputs: list[Path]
    recipe: Path
    out: Path

    @property
    def files(self) -> list[Path]:
        return [file for folder in self.inputs for file in sorted(folder.glob("*.safetensors"))]

    def commands(self) -> dict[str, list[str]]:
        recipe, out, inputs = str(self.recipe), str(self.out), [str(each) for each in self.inputs]
        merge = ["merge", recipe, out, "--overwrite"]
        torchrun = [".venv/bin/torchrun", "--nproc-per-node=2", "-m", "distmerge"]
        # There is no tokenizer, and mergekit would spend time looking for it.
        mergekit = [f"{MERGEKIT}/mergekit-yaml", recipe, out, "--quiet", "--no-copy-tokenizer"]
        floor = [".venv/bin/python", "benchmarks/floor.py", *inputs, f"{out}/floor"]
        return {
            "distmerge-1": [".venv/bin/distmerge", *merge],
            "distmerge-2": [*torchrun, *merge],
            "mergekit": mergekit,
            "mergekit-async": [*mergekit, "--async-write"],  # may well beat its default
            "floor-buffered": floor,
            "floor-direct": [*floor, "--direct"],
        }


@dataclass
class Peaks:
    """The highest memory that any one process of a tree was seen to have had."""

    bytes: int = 0
    anonymous: int = 0

    def sample(self, root: int) -> None:
        for status in map(_status, _tree(root)):
            # VmHWM is a high-water mark, so that sampling can miss the last moments only.
            self.bytes = max(self.bytes, status["VmHWM"])
            self.anonymous = max(self.anonymous, status["RssAnon"] + status["RssShmem"])


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in _text(Path(f"/proc/{pid}/task/{pid}/children")).split():
        yield from _tree(int(child))


def _status(pid: int) -> Counter[str]:  # a counter: a process that is ending has no such lines
    pairs = (line.split(":", 1) for line in _text(Path(f"/proc/{pid}/status")).splitlines())
    return Counter({key: int(size[:-2]) * 1024 for key, size in pairs if size.endswith("kB")})


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process ended meanwhile
        return ""


def execute(command: list[str]) -> tuple[float, Peaks, str]:
    """Run a command; return its wall seconds, its memory and what it printed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env |= {} if command[0].startswith(MERGEKIT) else {"OMP_NUM_THREADS": "1"}
    peaks = Peaks()
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        with subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SAMPLE_S)
                peaks.sample(process.pid)
                if time.perf_counter() > start + TIMEOUT_S:
                    process.terminate()
            wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} gave {process.returncode}:\n{text[-4000:]}")
    return wall, peaks, text


def timed(section: str, state: str, name: str, command: list[str], work: Work) -> Run:
    """One fair run: nothing left to write back, the inputs in the page cache or out of it."""
    os.sync()
    for file in work.files:
        set_cached(file, warm=state == "warm")
    wall, peaks, text = execute(command)
    start = time.perf_counter()
    os.sync()
    settled = wall + time.perf_counter() - start
    own = json.loads(text) if name.startswith("floor") else _merge_pass(text)
    shutil.rmtree(work.out)
    print(f"{section:8}{state:6}{name:15}{wall:8.2f} s {peaks.bytes / MIB:7.0f} MiB", flush=True)
    run = {"section": section, "state": state, "contestant": name, "command": shlex.join(command)}
    seconds = {"wall_s": wall, "on_disk_s": settled, **own}
    return {**run, **seconds, "peak_bytes": peaks.bytes, "anonymous_bytes": peaks.anonymous}


def set_cached(file: Path, *, warm: bool) -> None:
    with file.open("rb", buffering=0) as stream:
        if not warm:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while warm and stream.read(MIB):
            pass


def _merge_pass(printed: str) -> dict[str, float]:
    """What distmerge says of itself: reading, computing, writing, syncing and hashing."""
    found = re.search(r"wrote .* in ([\d.]+) s \(", printed)
    return {"pass_s": float(found[1])} if found else {}


def make_work(workdir: Path, size: str, out: Path, *, models: int = 3) -> Work:
    """Write the models that are missing, and the recipe; fails if the disk is too small."""
    folder = workdir / size
    script = [".venv/bin/python", "benchmarks/synthetic.py", str(folder), "--size", size]
    script += ["--models", str(models)]
    subprocess.run(script, check=True)
    inputs = [folder / f"model-{number}" for number in range(models)]
    entries = [{"model": str(each.resolve()), "parameters": {"weight": 1.0}} for each in inputs]
    config = {"merge_method": "linear", "dtype": "bfloat16", "models": entries}
    work = Work(inputs, folder / "linear.yml", out)
    work.recipe.write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.rmtree(out, ignore_errors=True)
    needed = sum(file.stat().st_size for file in work.files) / 2.5  # one of three, and some
    if shutil.disk_usage(out.parent).free < needed:
        raise OSError(f"{out.parent} lacks the {needed / 1e9:.1f} GB for the output")
    return work


def run_main(options: argparse.Namespace) -> Iterator[Run]:
    work = make_work(options.workdir, options.size, options.workdir / "out")
    wanted = tuple(options.only.split(","))
    commands = [item for item in work.commands().items() if item[0].startswith(wanted)]
    for turn in range(options.rounds):
        first = turn % len(commands)  # nobody always runs first, or always after the same one
        for state in ("warm", "cold"):
            for name, command in commands[first:] + commands[:first]:
                yield timed("main", state, name, command, work)


def run_large(options: argparse.Namespace) -> Iterator[Run]:
    work = make_work(options.workdir, options.large_size, options.workdir / "out")
    yield timed("large", "cold", "distmerge-1", work.commands()["distmerge-1"], work)


def run_compute(options: argparse.Namespace) -> Iterator[Run]:
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        work = make_work(options.workdir, options.size, Path(memory) / "out")
        for _ in range(options.rounds):
            for ranks in range(1, len(cores) + 1):
                command = work.commands()[f"distmerge-{ranks}"]
                # A file's sha256 can't be shared out: give each rank files of its own.
                command = [*command, "--shard-size", "500MB"]
                pinned = ["taskset", "-c", ",".join(cores[:ranks]), *command]
                yield timed("compute", "warm", f"distmerge-{ranks}", pinned, work)


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Run the sections asked for; one that this machine has no room for leaves a note instead."""
    runs, notes = list[Run](), list[str]()
    for name in options.sections.split(","):
        section = {"main": run_main, "large": run_large, "compute": run_compute}[name]
        try:
            runs.extend(section(options))
        except (OSError, subprocess.CalledProcessError) as error:
            notes.append(f"{SECTIONS[name]}: left out. {error}")
            print(notes[-1], flush=True)
    torch = execute([".venv/bin/python", "-c", "import torch"])[1].bytes
    found = about(options, "benchmarks/bench_average.py", "3")
    found["models"] += f"; larger: 3 of {options.large_size}"
    return {"about": found, "notes": notes, "torch_peak_bytes": torch, "runs": runs}


def about(options: argparse.Namespace, script: str, models: str) -> dict[str, str]:
    """The machine, the versions and the command: what it takes to judge or repeat the numbers."""
    return {
        **machine(f"python {script} {shlex.join(sys.argv[1:])}".strip()),
        "models": f"{models} of {options.size} in bfloat16",
        "memory": output_of("sed", "-n", "s/^MemTotal: *//p", "/proc/meminfo"),
        "filesystem": output_of("df", "--output=fstype", str(options.workdir)).split()[-1],
        "mergekit, torch": output_of(f"{MERGEKIT}/python", "-c", VERSIONS, "mergekit", "torch"),
    }


def machine(command: str) -> dict[str, str]:
    """What every benchmark says of where, when and how it ran."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "cpu": output_of("sed", "-n", "s/^model name.*: //p;T;q", "/proc/cpuinfo"),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "distmerge, torch": output_of(".venv/bin/python", "-c", VERSIONS, "distmerge", "torch"),
    }


def output_of(*command: str) -> str:
    code, text = subprocess.getstatusoutput(shlex.join(command))
    return "unknown" if code else text


def markdown(results: dict[str, Any]) -> str:
    about = "\n".join(f"- {key}: {value}" for key, value in results["about"].items())
    torch = results["torch_peak_bytes"]
    parts = ["# Averaging three checkpoints", LEGEND.rstrip(), about, *results["notes"]]
    parts.append(f"`import torch` alone peaks at {torch // MIB} MiB.")
    for section, title in SECTIONS.items():
        for state in ("warm", "cold"):
            runs = [r for r in results["runs"] if (r["section"], r["state"]) == (section, state)]
            parts += [f"## {title} ({state})", table(runs, torch)] if runs else []
    return "\n\n".join(parts) + "\n"


def table(runs: list[Run], torch_bytes: int) -> str:
    """One row for each contestant; the last columns divide its median by those of its rivals."""
    names = sorted({run["contestant"] for run in runs})
    groups = {name: [run for run in runs if run["contestant"] == name] for name in names}
    medians = {name: _median(group, "wall_s") for name, group in groups.items()}
    rivals = [name for name in names if not name.startswith("distmerge")] or names[:1]
    head = ["", "median s", "min-max s", "on disk s", "merge pass s"]
    head += ["peak MiB", "beyond torch", "anonymous", *(f"/ {rival}" for rival in rivals)]
    rows = [head, ["---:"] * len(head)]
    for name, group in groups.items():
        ratios = [f"{medians[name] / medians[rival]:.2f}" for rival in rivals]
        rows.append([name, *_cells(group, torch_bytes), *ratios])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(group: list[Run], torch_bytes: int) -> list[str]:
    walls = [run["wall_s"] for run in group]
    seconds = [_median(group, key) for key in ("wall_s", "on_disk_s", "pass_s")]
    total, *others = (f"{value:.2f}" if value else "" for value in seconds)
    peak = max(run["peak_bytes"] for run in group)
    sizes = [peak, peak - torch_bytes, max(run["anonymous_bytes"] for run in group)]
    mib = [str(round(size / MIB)) for size in sizes]
    return [total, f"{min(walls):.2f}-{max(walls):.2f}", *others, *mib]


def _median(group: list[Run], key: str) -> float:
    return float(median(run.get(key, 0.0) for run in group))


def main() -> None:
    parser = argparse.ArgumentParser(description="paths are relative to the repository root")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="0.85B", help="of the models, see synthetic.py")
    parser.add_argument("--large-size", default="3.4B")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--only", default="", help="names, or their beginnings: floor,mergekit")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    options.results.mkdir(parents=True, exist_ok=True)
    results = collect(options)
    (options.results / "average.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.results / "average.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
