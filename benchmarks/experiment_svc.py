"""Does calibration help a merger whose lambda is tuned? SVC on images and text, both sides tuned.

    benchmarks/svc_inputs.sh
    python -m benchmarks.experiment_svc

fetches its inputs, fine-tunes small networks on shifted images and a real encoder on six text
tasks, merges them with distmerge, with SVC and without, measures it all on held-out examples and
writes benchmarks/results/experiment_svc. What an earlier call has finished is found in
runs/experiment-svc and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from transformers.utils import logging as transformers_logging

from benchmarks.svc_encoder import Texts
from benchmarks.svc_images import Shifted
from benchmarks.svc_numbers import (
    ALPHA,
    MERGERS,
    SCALES,
    Answers,
    Candidate,
    Finding,
    Measured,
    picks,
)
from benchmarks.svc_page import write_page

RUNS = Path("runs/experiment-svc")
RESULTS = Path("benchmarks/results/experiment_svc")
RANKS = 2

SWEEPS: dict[str, dict[str, Any]] = {
    "plain": {"sweep": {"parameters.lambda": SCALES}},
    "svc": {
        "calibrate": {"method": "svc"},
        "sweep": {"parameters.lambda": SCALES, "calibrate.alpha": ["auto", ALPHA]},
    },
}


class Suite(Protocol):
    """Tasks of one kind: how models are trained on them and measured."""

    name: str

    @property
    def seeds(self) -> Sequence[int]: ...

    def tasks(self) -> list[str]: ...

    def about(self) -> str: ...

    def train(self, seed: int, folder: Path) -> None:
        """Write `folder`/base and a checkpoint for each task, named after it."""

    def answers(self, model: Path, part: str) -> torch.Tensor:
        """Which examples of a part a model gets right: bool, (tasks, examples)."""


SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (Shifted("related"), Shifted("mixed"), Texts())
}


class Run(NamedTuple):
    """A suite's models of one seed."""

    suite: Suite
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.suite.name}-seed-{self.seed}"


def main() -> None:
    """Do all of it, or the parts named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default="train,measure,write")
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--mergers", default=",".join(MERGERS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # so that commands and results show no home
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    suites = [SUITES[name] for name in options.suites.split(",")]
    runs = [Run(suite, seed) for suite in suites for seed in suite.seeds]
    mergers = options.mergers.split(",")
    if "train" in options.parts:
        for run in runs:
            train(run)
    if "measure" in options.parts:
        for run in runs:
            for merger in mergers:
                measured(run, merger)
    if "write" in options.parts:
        command = shlex.join(["python", "-m", "benchmarks.experiment_svc", *sys.argv[1:]])
        described = {suite.name: suite.about() for suite in suites}
        write_page(options.results, [finding(run, mergers) for run in runs], command, described)


def train(run: Run) -> None:
    """Train what is missing; the folder gets its name once all its models are there."""
    if run.folder.is_dir():
        return
    unfinished = run.folder.with_name(f"unfinished-{run.folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    run.suite.train(run.seed, unfinished)
    unfinished.rename(run.folder)


def finding(run: Run, mergers: list[str]) -> Finding:
    """All that is measured of a run."""
    merges = {merger: measured(run, merger) for merger in mergers}
    return Finding(run.suite.name, run.seed, trained(run), merges)


def trained(run: Run) -> dict[str, torch.Tensor]:
    """What the base gets right on all tasks, and each fine-tune on its own, from the reports."""
    known = run.folder / "trained.pt"
    if not known.is_file():
        own = [
            report(run, run.folder / task)[number] for number, task in enumerate(run.suite.tasks())
        ]
        base = report(run, run.folder / "base")
        _keep({"base": base, "individual": torch.stack(own)}, known)
    found: dict[str, torch.Tensor] = torch.load(known)
    return found


def report(run: Run, model: Path) -> torch.Tensor:
    return run.suite.answers(model, "report")


def measured(run: Run, merger: str) -> Measured:
    """Merge and measure, or look up what an earlier call has measured.

    The merges themselves take gigabytes and are deleted: the recipes are kept beside the models.
    """
    known = run.folder / f"{merger}.pt"
    if not known.is_file():
        outputs = dict(merge(run, merger))
        choose = {one: run.suite.answers(path, "choose") for one, path in outputs.items()}
        chosen = dict.fromkeys(pick(choose) for pick in picks(merger).values())
        reported = {one: report(run, outputs[one]) for one in chosen}
        spectra = json.loads((merge_folder(run, merger, "svc") / "report/spectra.json").read_text())
        _keep([_plain(choose), _plain(reported), spectra], known)
        for folder in {path.parent for path in outputs.values()}:
            shutil.rmtree(folder)
        print(f"{run.folder.name} {merger}: {len(outputs)} merges measured", flush=True)
    choose, reported, spectra = torch.load(known)
    return Measured(_answers(choose), _answers(reported), spectra)


def _plain(answers: Answers) -> list[tuple[Any, torch.Tensor]]:
    return [(tuple(one), rows) for one, rows in answers.items()]


def _answers(kept: list[tuple[Any, torch.Tensor]]) -> Answers:
    return {Candidate(*one): rows for one, rows in kept}


def _keep(content: Any, path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    unfinished.rename(path)


def merge(run: Run, merger: str) -> Iterator[tuple[Candidate, Path]]:
    """Merge with the product's own command; yield what came out."""
    for sweep, recipe in SWEEPS.items():
        out = merge_folder(run, merger, sweep)
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(recipe_of(run, merger) | recipe, sort_keys=False))
        if not out.is_dir():
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "-m"]
            merge = ["distmerge", "merge", str(config), str(out)]
            subprocess.run([sys.executable, *launcher, *merge], check=True)
        for output in json.loads((out / "distmerge.json").read_text())["outputs"]:
            yield candidate_of(sweep != "plain", output), out / output


def merge_folder(run: Run, merger: str, sweep: str) -> Path:
    return run.folder / f"merge-{merger}-{sweep}"


def recipe_of(run: Run, merger: str) -> dict[str, Any]:
    """What all recipes of a merger have in common."""
    method = MERGERS[merger]
    own = {"parameters": method.of_each_model} if method.of_each_model else {}
    models = [{"model": str(run.folder / task), **own} for task in run.suite.tasks()]
    base = {"merge_method": merger, "base_model": str(run.folder / "base"), "models": models}
    return base | ({"parameters": method.parameters} if method.parameters else {})


def candidate_of(calibrated: bool, output: str) -> Candidate:
    """What the name of a sweep's output says, such as lambda=0.3,alpha=auto."""
    values = dict(value.split("=") for value in output.split(","))
    alpha = values.get("alpha", "auto")
    return Candidate(calibrated, float(values["lambda"]), None if alpha == "auto" else float(alpha))


if __name__ == "__main__":
    main()
