"""Do averaging and a step beyond it make a better model? The story behind `make demo`.

    python -m benchmarks.demo train        trains a small language model and keeps late checkpoints
    distmerge merge configs/average.yaml runs/demo/merged
    distmerge merge configs/extra_merge.yaml runs/demo/extrapolated
    python -m benchmarks.demo evaluate     compares both merges with the checkpoints they came from

The text is the Python standard library's own source, which every machine has, read byte by byte.
The second merge chooses its step by one part of the held-out text; `evaluate` reports another part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
import yaml
from transformers.utils import logging as transformers_logging

from benchmarks.training import (
    CONTEXT,
    Trainer,
    constant_rate,
    corpus,
    load,
    model_losses,
    paired,
    save,
    spread_windows,
)

RUN = Path("runs/demo")
CHOOSE, REPORT = RUN / "choose.txt", RUN / "report.txt"
AVERAGED, AVERAGE_RECIPE = RUN / "merged", Path("configs/average.yaml")
EXTRAPOLATED, EXTRAPOLATE_RECIPE = RUN / "extrapolated", Path("configs/extra_merge.yaml")

BATCH = 8
CHECKPOINT_STEPS = range(550, 1001, 15)
WINDOWS = 512


def main() -> None:
    """Run one of the two halves of the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("half", choices=["train", "evaluate"])
    # Half of the cores: threads that wait for each other on busy ones take many times as long.
    torch.set_num_threads(max(1, min(4, len(os.sched_getaffinity(0)) // 2)))
    transformers_logging.disable_progress_bar()
    halves = {"train": train, "evaluate": evaluate}
    halves[parser.parse_args().half]()


def train() -> None:
    """Train once, keeping checkpoints; a second call finds them and has nothing to do."""
    wanted = [RUN / f"step-{step:05d}" for step in CHECKPOINT_STEPS]
    # Text and tokenizers too: a run that an earlier version of this script left may lack them.
    needed = [CHOOSE, REPORT, *(path / "tokenizer.json" for path in wanted)]
    if sorted(RUN.glob("step-*")) == wanted and all(path.is_file() for path in needed):
        print(f"{len(wanted)} checkpoints are already in {RUN}; remove that folder to train again.")
        return
    # What an interrupted run left would otherwise mix with this one, and so would an old merge.
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    text = corpus("python")
    CHOOSE.write_bytes(text.choose.numpy().tobytes())
    REPORT.write_bytes(text.report.numpy().tobytes())
    trainer = Trainer(text.train, batch=BATCH, seed=0)
    for step in trainer.steps(1, max(CHECKPOINT_STEPS), constant_rate):
        if step in CHECKPOINT_STEPS:
            save(trainer.model, RUN / f"step-{step:05d}")
    print(f"Saved {len(wanted)} checkpoints in {RUN}.")


def evaluate() -> None:
    """Print the loss on text that neither training nor the choice of a step has seen."""
    checkpoints = merged_checkpoints()
    best = (EXTRAPOLATED / "best").resolve()
    windows = spread_windows(torch.tensor(bytearray(REPORT.read_bytes())), WINDOWS)
    singles = torch.stack([model_losses(load(path), windows) for path in checkpoints])
    last, average, beyond = (
        singles[-1],
        *(model_losses(load(path), windows) for path in (AVERAGED, best)),
    )
    rows = {
        f"last checkpoint ({checkpoints[-1].name})": last,
        f"mean of the {len(singles)} single checkpoints": singles.mean(dim=0),
        f"average of the {len(singles)} checkpoints": average,
        f"extrapolated ({best.name})": beyond,
    }
    print(f"Held-out loss over {WINDOWS} windows of {CONTEXT} bytes of {REPORT}:\n")
    print(f"{'':36}{'nats/byte':>11}{'vs last':>11}{'std. err.':>11}")
    for label, losses in rows.items():
        difference, error = paired(losses, last)
        print(f"{label:36}{losses.mean():11.4f}{difference:+11.4f}{error:11.4f}")
    print(f"\n{verdict('The average', 'the last checkpoint', *paired(average, last))}")
    print(beyond_verdict(best.name, *paired(beyond, average)))
    print("One small run with one seed: a demonstration, not evidence.")
    print(f"\nPlots and numbers of the extrapolation: {EXTRAPOLATED}/report/report.html")


def merged_checkpoints() -> list[Path]:
    """Return the checkpoints that were averaged, oldest first; exit where a part is missing."""
    trajectory = yaml.safe_load(AVERAGE_RECIPE.read_text())["trajectory"]
    pattern = Path(trajectory["checkpoints"])
    found = sorted(pattern.parent.glob(pattern.name))
    if not found or not REPORT.is_file():
        sys.exit(f"no trained run in {RUN}: run `python -m benchmarks.demo train` first")
    for recipe, out, proof in (
        (AVERAGE_RECIPE, AVERAGED, AVERAGED),
        (EXTRAPOLATE_RECIPE, EXTRAPOLATED, EXTRAPOLATED / "best"),
    ):
        if not proof.is_dir():
            sys.exit(f"no merge at {proof}: run `distmerge merge {recipe} {out}` first")
    return found[-trajectory["last"] :]


def verdict(one: str, other: str, difference: float, error: float) -> str:
    """Say what a comparison shows, and no more."""
    size = f"{abs(difference):.4f} +/- {error:.4f} nats per byte"
    if abs(difference) < 2 * error:
        return f"{one} and {other} cannot be told apart: they differ by {size}."
    if difference < 0:
        return f"{one} beats {other} by {size}."
    return f"{one} is worse than {other} by {size}."


def beyond_verdict(name: str, difference: float, error: float) -> str:
    """Say whether the step beyond the average was worth it."""
    if float(name.rpartition("=")[2]) == 0:
        return f"No step beyond the average was better on {CHOOSE}, so the average itself was kept."
    return verdict(f"The step beyond it ({name})", "the average", difference, error)


if __name__ == "__main__":
    main()
