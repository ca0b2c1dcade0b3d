"""Does a step beyond the average help? Extra-Merge against averages and real decays.

    python -m benchmarks.experiment_extra_merge

trains six small runs (two corpora, three seeds), merges their checkpoints with distmerge, measures
it all on held-out text and writes benchmarks/results/experiment_extra_merge. What an earlier call
has finished is found in runs/experiment-extra-merge and not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.extra_merge_page import Candidate, Finding, Losses, best, write_page
from benchmarks.training import (
    Trainer,
    constant_rate,
    corpus,
    decaying_rate,
    load,
    model_losses,
    save,
    spread_windows,
)

RUNS = Path("runs/experiment-extra-merge")
RESULTS = Path("benchmarks/results/experiment_extra_merge")

BATCH = 16
STEPS, EVERY = range(640, 1601, 32), 32
LAST = STEPS[-1]
WINDOWS = [4, 8, 16]
SPANS = [0, 0.05, 0.1, 0.2, 0.3, 0.5]
# A decay takes as many steps as one of these windows spans, within the window or after it.
DECAYED_WINDOWS = [8, 16]
RANDOM_DIRECTIONS = 3
HELD_OUT_WINDOWS = 512  # in each half

AVERAGE = {"merge_method": "average", "trajectory": {"checkpoints": "step-*"}}
RECIPES: dict[str, dict[str, Any]] = {
    "uniform": {**AVERAGE, "sweep": {"trajectory.last": WINDOWS}},
    "ema": {**AVERAGE, "sweep": {"trajectory.schedule.ema": [0.1, 0.2]}},
    "wsm": {
        "merge_method": "average",
        "trajectory": {"checkpoints": "step-*", "schedule": {"wsm": "minus-sqrt"}},
        "sweep": {"trajectory.last": WINDOWS},
    },
    "extrapolated": {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": "step-*", "window": WINDOWS[0], "schedule": "uniform"},
        "parameters": {"step": {"span": SPANS}},
        "sweep": {
            "trajectory.window": WINDOWS,
            "parameters.direction": ["principal", "secant"],
        },
    },
}
RANKS = {"extrapolated": 2}  # the others are merged by one


class Run(NamedTuple):
    """One training run at a constant rate, the decays that branch off it, and its merges."""

    corpus: str
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.corpus}-seed-{self.seed}"

    def state(self, step: int) -> Path:
        return self.folder / f"state-{step:05d}.pt"

    def decay(self, first: int, last: int) -> Path:
        return self.folder / f"decay-{first:05d}-{last:05d}"

    def merge(self, name: str) -> Path:
        return self.folder / f"merge-{name}"


def main() -> None:
    """Do all of it, or the parts named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = {"train": train, "merge": merge, "measure": measure}
    parser.add_argument("--parts", default=",".join([*parts, "page"]))
    parser.add_argument("--corpora", default="dictionary,python")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    corpora, seeds = options.corpora.split(","), [int(seed) for seed in options.seeds.split(",")]
    try:
        texts = {name: corpus(name) for name in corpora}
    except FileNotFoundError as error:
        sys.exit(str(error))
    runs = [Run(name, seed) for seed in seeds for name in corpora]
    for part, work in parts.items():
        if part in options.parts:
            work(runs)
    if "page" in options.parts:
        command = shlex.join(["python", "-m", "benchmarks.experiment_extra_merge", *sys.argv[1:]])
        sizes = {
            name: f"{sum(len(part) for part in text)} bytes, sha256 {_digest(text)}"
            for name, text in texts.items()
        }
        write_page(options.results, [finding(run) for run in runs], command, sizes)


def _digest(text: tuple[torch.Tensor, ...]) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in text)).hexdigest()[:16]


def train(runs: list[Run]) -> None:
    """Train what is missing: first the runs, then the decays within them, then those after them."""
    for run in runs:
        if not run.folder.is_dir():
            train_run(run)
    for first, last in decays().values():
        for run in runs:
            if not run.decay(first, last).is_dir():
                train_decay(run, first, last)


def decays() -> dict[Candidate, tuple[int, int]]:
    """The decays by the window they compare with: from which step to which."""
    spans = {window: (window - 1) * EVERY for window in DECAYED_WINDOWS}
    within = {Candidate("decay within", w): (LAST - steps, LAST) for w, steps in spans.items()}
    after = {Candidate("decay after", w): (LAST, LAST + steps) for w, steps in spans.items()}
    return within | after


def train_run(run: Run) -> None:
    """Train at a constant rate; the folder gets its name once the run is complete."""
    unfinished = run.folder.with_name(f"unfinished-{run.folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    branches = {first for first, _ in decays().values()}
    trainer = Trainer(corpus(run.corpus).train, batch=BATCH, seed=run.seed)
    for step in trainer.steps(1, LAST, constant_rate, run.folder.name):
        if step in STEPS:
            save(trainer.model, unfinished / f"step-{step:05d}")
        if step in branches:
            trainer.save_state(unfinished / run.state(step).name)
    unfinished.rename(run.folder)


def train_decay(run: Run, first: int, last: int) -> None:
    """Go on from step `first` of a run, on the same text, with a rate that falls until `last`."""
    out = run.decay(first, last)
    trainer = Trainer(corpus(run.corpus).train, batch=BATCH, seed=run.seed)
    trainer.load_state(run.state(first))
    name = f"{run.folder.name} {out.name}"
    for _ in trainer.steps(first + 1, last, decaying_rate(first + 1, last), name):
        pass
    save(trainer.model, out)


def merge(runs: list[Run]) -> None:
    """Merge with the product's own command what has not been merged yet."""
    for run in runs:
        for name, recipe in RECIPES.items():
            if not run.merge(name).is_dir():
                run_distmerge(run, name, recipe)


def run_distmerge(run: Run, name: str, recipe: dict[str, Any]) -> None:
    """Write the recipe beside the run's checkpoints and carry it out."""
    pattern = {"trajectory": {**recipe["trajectory"], "checkpoints": f"{run.folder}/step-*"}}
    config = run.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**recipe, **pattern}, sort_keys=False))
    launcher = ["torch.distributed.run", f"--nproc-per-node={RANKS.get(name, 1)}", "-m"]
    command = [*(launcher if name in RANKS else []), "distmerge", "merge"]
    subprocess.run([sys.executable, "-m", *command, config, run.merge(name)], check=True)


def measure(runs: list[Run]) -> None:
    """Measure every model of every run on all held-out windows, once."""
    for run in runs:
        if not (run.folder / "losses.pt").is_file():
            losses = run_losses(run)
            torch.save({tuple(key): value for key, value in losses.items()}, _losses(run))


def _losses(run: Run) -> Path:
    return run.folder / "losses.pt"


def finding(run: Run) -> Finding:
    """What a run gave: its losses by candidate, and the trends that distmerge reported."""
    losses = {Candidate(*key): value for key, value in torch.load(_losses(run)).items()}
    report = json.loads((run.merge("extrapolated") / "report/report.json").read_text())
    return Finding(run.corpus, run.seed, losses, report["trends"])


def run_losses(run: Run) -> Losses:
    """The loss of each candidate on each window; the first half of the windows chooses."""
    text = corpus(run.corpus)
    halves = [spread_windows(part, HELD_OUT_WINDOWS) for part in (text.choose, text.report)]
    windows = torch.cat(halves)
    known: dict[str, torch.Tensor] = {}  # a step of 0 is the average: one evaluation for both
    losses: Losses = {}
    for candidate, path in models(run):
        content = b"".join(file.read_bytes() for file in sorted(path.glob("*.safetensors")))
        digest = hashlib.sha256(content).hexdigest()
        if digest not in known:
            known[digest] = model_losses(load(path), windows)
        losses[candidate] = known[digest]
        print(f"{run.folder.name} {path.name}: {losses[candidate].mean():.4f}", flush=True)
    for candidate, model in random_models(run, losses):
        losses[candidate] = model_losses(model, windows)
    return losses


def models(run: Run) -> Iterator[tuple[Candidate, Path]]:
    """All checkpoints to compare, trained or merged."""
    yield Candidate("last"), run.folder / f"step-{LAST:05d}"
    for candidate, (first, last) in decays().items():
        yield candidate, run.decay(first, last)
    for name in RECIPES:
        out = run.merge(name)
        for output in json.loads((out / "report/report.json").read_text())["outputs"]:
            values = output["values"]
            setting = values["window"] if "window" in values else next(iter(values.values()))
            method = values.get("direction", name)
            yield Candidate(method, setting, values.get("span")), out / output["name"]


def random_models(run: Run, losses: Losses) -> Iterator[tuple[Candidate, LlamaForCausalLM]]:
    """Steps in random directions, each as long as the best step that is not zero."""
    steps = [key for key in losses if key.method == "principal" and key.step]
    chosen = best(losses, steps)
    paths = dict(models(run))
    start, end = (
        torch.nn.utils.parameters_to_vector(load(path).parameters()).double()
        for path in (paths[Candidate("uniform", chosen.setting)], paths[chosen])
    )
    generator = torch.Generator().manual_seed(run.seed)
    for number in range(RANDOM_DIRECTIONS):
        direction = torch.randn(len(start), generator=generator, dtype=torch.float64)
        model = load(paths[chosen])
        moved = start + direction * ((end - start).norm() / direction.norm())
        torch.nn.utils.vector_to_parameters(moved.float(), model.parameters())
        yield Candidate("random", number), model


if __name__ == "__main__":
    main()
