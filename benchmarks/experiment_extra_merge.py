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
from transformers.utils import logging as transformers_logging

from benchmarks.extra_merge_page import (
    DECAYED_WINDOWS,
    EMA_FACTORS,
    UNIFORM_WINDOWS,
    WINDOWS,
    Candidate,
    Finding,
    Losses,
    best,
    write_page,
)
from benchmarks.training import (
    Text,
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
SPANS = [0, 0.05, 0.1, 0.2, 0.3, 0.5]
RANDOM_DIRECTIONS = 3
HELD_OUT_WINDOWS = 512  # in each half

AVERAGE = {"merge_method": "average", "trajectory": {"checkpoints": "step-*"}}
RECIPES: dict[str, dict[str, Any]] = {
    "uniform": {**AVERAGE, "sweep": {"trajectory.last": UNIFORM_WINDOWS}},
    "ema": {**AVERAGE, "sweep": {"trajectory.schedule.ema": EMA_FACTORS}},
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
    parser.add_argument("--parts", default="train,merge,measure")
    parser.add_argument("--corpora", default="dictionary,python")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    corpora, seeds = options.corpora.split(","), options.seeds.split(",")
    try:
        texts = {name: corpus(name) for name in corpora}
    except FileNotFoundError as error:
        sys.exit(str(error))
    runs = [Run(name, int(seed)) for seed in seeds for name in corpora]
    if "train" in options.parts:
        train(runs)
    if "merge" in options.parts:
        merge(runs)
    if "measure" in options.parts:
        command = shlex.join(["python", "-m", "benchmarks.experiment_extra_merge", *sys.argv[1:]])
        described = {name: describe(text) for name, text in texts.items()}
        write_page(options.results, [measure(run) for run in runs], command, described)


def describe(text: Text) -> str:
    """Sizes of a corpus, and a hash that tells whether two machines have the same text."""
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in text)).hexdigest()
    sizes = " + ".join(str(len(part)) for part in text)
    return f"{sizes} bytes (training, choosing, reporting), sha256 {digest[:16]}"


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


def measure(run: Run) -> Finding:
    """Measure every model of a run on all held-out windows."""
    text = corpus(run.corpus)
    halves = [spread_windows(part, HELD_OUT_WINDOWS) for part in (text.choose, text.report)]
    windows = torch.cat(halves)
    losses = {candidate: losses_of(path, windows) for candidate, path in models(run)}
    for candidate, path in random_models(run, losses):
        losses[candidate] = losses_of(path, windows)
    report = json.loads((run.merge("extrapolated") / "report/report.json").read_text())
    return Finding(run.corpus, run.seed, losses, report["trends"])


def losses_of(path: Path, windows: torch.Tensor) -> torch.Tensor:
    """A model's loss on each window, from an earlier call if it has been measured before."""
    files = sorted(path.glob("*.safetensors"))
    content = b"".join([*(file.read_bytes() for file in files), windows.numpy().tobytes()])
    # By content: a step of 0 is the average, so one evaluation serves both.
    known = RUNS / "losses" / f"{hashlib.sha256(content).hexdigest()}.pt"
    if not known.is_file():
        losses = model_losses(load(path), windows)
        print(f"{path.relative_to(RUNS)}: {losses.mean():.4f}", flush=True)
        known.parent.mkdir(exist_ok=True)
        torch.save(losses, known.with_suffix(".unfinished"))
        known.with_suffix(".unfinished").rename(known)
    found: torch.Tensor = torch.load(known)
    return found


def models(run: Run) -> Iterator[tuple[Candidate, Path]]:
    """All checkpoints to compare, trained or merged."""
    yield Candidate("last"), run.folder / f"step-{LAST:05d}"
    for candidate, (first, last) in decays().items():
        yield candidate, run.decay(first, last)
    for name in RECIPES:
        manifest = json.loads((run.merge(name) / "distmerge.json").read_text())
        for output in manifest["outputs"]:
            yield candidate_of(name, output), run.merge(name) / output


def candidate_of(recipe: str, output: str) -> Candidate:
    """What the name of a sweep's output says, such as window=8,direction=secant,span=0.1."""
    values = dict(value.split("=") for value in output.split(","))
    if "span" not in values:
        return Candidate(recipe, *map(float, values.values()))
    return Candidate(values["direction"], float(values["window"]), float(values["span"]))


def random_models(run: Run, losses: Losses) -> Iterator[tuple[Candidate, Path]]:
    """Steps in random directions, each as long as the best step that is not zero."""
    chosen = best(losses, [key for key in losses if key.method == "principal" and key.step])
    paths = dict(models(run))
    model = load(paths[chosen])
    end = torch.nn.utils.parameters_to_vector(model.parameters()).double()
    average = load(paths[Candidate("uniform", chosen.setting)])
    start = torch.nn.utils.parameters_to_vector(average.parameters()).double()
    generator = torch.Generator().manual_seed(run.seed)
    for number in range(RANDOM_DIRECTIONS):
        direction = torch.randn(len(start), generator=generator, dtype=torch.float64)
        moved = start + direction * ((end - start).norm() / direction.norm())
        torch.nn.utils.vector_to_parameters(moved.float(), model.parameters())
        path = run.folder / f"random-{number}"
        shutil.rmtree(path, ignore_errors=True)
        save(model, path)
        yield Candidate("random", number), path


if __name__ == "__main__":
    main()
