"""Does averaging the last checkpoints of a run make a better model? The story behind `make demo`.

    python benchmarks/demo.py train        trains a small language model and keeps late checkpoints
    distmerge merge configs/average.yaml runs/demo/merged
    python benchmarks/demo.py evaluate     compares the merge with the checkpoints it came from

The text is the Python standard library's own source, which every machine has, read byte by byte.
"""

import argparse
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

RUN = Path("runs/demo")
MERGED = RUN / "merged"
CONFIG = Path("configs/average.yaml")

CONTEXT = 128
BATCH = 8
WARMUP = 100
LEARNING_RATE = 2e-3
CHECKPOINT_STEPS = range(700, 1001, 30)
WINDOWS = 256
CORPUS_BYTES = 16_000_000


def main() -> None:
    """Run one of the two halves of the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("half", choices=["train", "evaluate"])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers_logging.disable_progress_bar()
    halves = {"train": train, "evaluate": evaluate}
    halves[parser.parse_args().half]()


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on and the bytes held out, 95 to 5."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = sorted(p for p in stdlib.rglob("*.py") if installed.isdisjoint(p.parts))
    # Shuffled, so that the held-out end is not merely the last packages of the alphabet.
    random.Random(0).shuffle(files)
    text = bytearray(b"".join(path.read_bytes() for path in files)[:CORPUS_BYTES])
    data = torch.frombuffer(text, dtype=torch.uint8)
    cut = len(data) * 95 // 100
    return data[:cut], data[cut:]


def train() -> None:
    """Train once, keeping checkpoints; a second call finds them and has nothing to do."""
    wanted = {step: RUN / f"step-{step:05d}" for step in CHECKPOINT_STEPS}
    if sorted(RUN.glob("step-*")) == list(wanted.values()):
        print(f"{len(wanted)} checkpoints are already in {RUN}; remove that folder to train again.")
        return
    # What an interrupted run left would otherwise mix with this one, and so would an old merge.
    shutil.rmtree(RUN, ignore_errors=True)
    torch.manual_seed(0)
    model = new_model()
    text, _ = corpus()
    for step in training(model, text, max(wanted)):
        if step in wanted:
            save(model, wanted[step])
    print(f"Saved {len(wanted)} checkpoints in {RUN}.")


def training(model: LlamaForCausalLM, text: torch.Tensor, steps: int) -> Iterator[int]:
    """Train the model, yielding the number of every step once it is done."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    # The rate never decays: averaging is to do what a decay would otherwise have done.
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    progress = tqdm(range(1, steps + 1), desc="train", unit="step", mininterval=2)
    for step in progress:
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        loss = window_losses(model, windows_at(starts, text)).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        yield step


def windows_at(starts: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cut one window of context, and the byte that follows it, at each start."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def new_model() -> LlamaForCausalLM:
    """Build a byte-level Llama of 0.84 million parameters."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        # Every byte is text: none is set aside as a special token.
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def window_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return each window's mean loss in nats per byte."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1)


def save(model: LlamaForCausalLM, path: Path) -> None:
    """Save one checkpoint in shards, under its own name only once it is whole."""
    # The name must not match `step-*`: an interrupted save is no checkpoint to merge.
    unfinished = path.with_name(f"unfinished-{path.name}")
    model.save_pretrained(unfinished, max_shard_size="1500KB")
    unfinished.rename(path)


def evaluate() -> None:
    """Print the held-out loss of the last checkpoint, of all that were merged, and of the merge."""
    checkpoints = merged_checkpoints()
    _, text = corpus()
    # Evenly spread: the same windows for every model, and none overlaps another.
    windows = windows_at(torch.linspace(0, len(text) - CONTEXT - 1, WINDOWS).long(), text)
    singles = torch.stack([held_out_losses(path, windows) for path in checkpoints])
    last, merge = singles[-1], held_out_losses(MERGED, windows)
    rows = {
        f"last checkpoint ({checkpoints[-1].name})": last,
        f"mean of the {len(singles)} single checkpoints": singles.mean(dim=0),
        f"merge of the {len(singles)} checkpoints": merge,
    }
    print(f"Held-out loss over {WINDOWS} windows of {CONTEXT} bytes:\n")
    print(f"{'':36}{'nats/byte':>11}{'vs last':>11}{'std. err.':>11}")
    for label, losses in rows.items():
        difference, error = paired(losses, last)
        print(f"{label:36}{losses.mean():11.4f}{difference:+11.4f}{error:11.4f}")
    print(f"\n{verdict(*paired(merge, last))}")


def merged_checkpoints() -> list[Path]:
    """Return the checkpoints that the configuration merges, oldest first."""
    if not RUN.is_dir():
        sys.exit(f"no {RUN} here: run `python benchmarks/demo.py train` first")
    trajectory = yaml.safe_load(CONFIG.read_text())["trajectory"]
    pattern = Path(trajectory["checkpoints"])
    found = sorted(pattern.parent.glob(pattern.name))
    if not found:
        sys.exit(f"no checkpoints match {pattern}: run `python benchmarks/demo.py train` first")
    if not MERGED.is_dir():
        sys.exit(f"no merge at {MERGED}: run `distmerge merge {CONFIG} {MERGED}` first")
    return found[-trajectory["last"] :]


@torch.inference_mode()
def held_out_losses(path: Path, windows: torch.Tensor) -> torch.Tensor:
    """Return one model's mean loss on each window."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return torch.cat([window_losses(model, part) for part in windows.chunk(8)])


def paired(losses: torch.Tensor, baseline: torch.Tensor) -> tuple[float, float]:
    """Return the mean difference over windows and its standard error."""
    # Windows differ in difficulty far more than models do; pairing takes that out.
    difference = losses - baseline
    return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def verdict(difference: float, error: float) -> str:
    """Say what the comparison of merge and last checkpoint shows, and no more."""
    size = f"{abs(difference):.4f} +/- {error:.4f} nats per byte"
    if abs(difference) < 2 * error:
        return f"The merge and the last checkpoint cannot be told apart: they differ by {size}."
    if difference < 0:
        return f"The merge beats the last checkpoint by {size}."
    return f"The merge is worse than the last checkpoint by {size}."


if __name__ == "__main__":
    main()
