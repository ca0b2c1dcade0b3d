"""Text for the SVC experiment: a pretrained MiniLM fine-tuned on six tasks of real English texts.

The encoder is all-MiniLM-L6-v2 with 22.7 million parameters. A task's head is a logistic regression
on the pretrained encoder's features and never changes afterwards: what fine-tuning gains, and
merging keeps or loses, is in the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from benchmarks.svc_texts import INPUTS, Example, Task, digest, tasks

ENCODER, HEADS = INPUTS / "encoder", INPUTS.parent / "heads"
TOKENS = 32
FROZEN = ("embeddings.", "pooler.")  # the heads do not use the pooler
EPOCHS, BATCH, WARMUP, LEARNING_RATE = 2, 32, 20, 1e-4
RIDGE = 0.1  # times half the square of a head's weights, divided by the number of examples
EVALUATED_BATCH = 96

Encoder = Any  # transformers is not typed


class Batch(NamedTuple):
    """Texts of about one length: which of a task's they are, their tokens and classes."""

    places: torch.Tensor
    tokens: Any
    labels: torch.Tensor


class Texts:
    """The suite as experiment_svc.py asks for it."""

    name = "text"
    seeds = (0,)

    def tasks(self) -> list[str]:
        return [task.name for task in tasks()]

    def about(self) -> str:
        """What the numbers depend on beside the code."""
        return (
            f"Debian's package lists, WordNet 3.0, SpamAssassin's mails, Brown; sha256 {digest()}"
        )

    def train(self, seed: int, folder: Path) -> None:
        """Write the base and the fine-tuned encoders; a seed orders texts and draws dropout."""
        AutoModel.from_pretrained(ENCODER).save_pretrained(folder / "base")
        for task in tasks():
            encoder = AutoModel.from_pretrained(folder / "base")
            fine_tune(encoder, head_of(task), task.train, seed, f"text, seed {seed}: {task.name}")
            encoder.save_pretrained(folder / task.name)

    def answers(self, model: Path, part: str) -> torch.Tensor:
        """Tell which texts an encoder gets right with each task's head: bool, (tasks, texts)."""
        encoder = AutoModel.from_pretrained(model).eval()
        numbered = enumerate(tasks())
        return torch.stack([right_answers(encoder, head_of(t), n, part) for n, t in numbered])


def features(encoder: Encoder, tokens: Any) -> torch.Tensor:
    """Return the mean of a text's last hidden states, at length 1: (texts, width)."""
    states = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return normalize((states * mask).sum(dim=1).float() / mask.sum(dim=1))


@torch.inference_mode()
def held_out_features(encoder: Encoder, tokens: Any) -> torch.Tensor:
    """The same where nothing is trained, in bfloat16: several times as fast on recent CPUs."""
    with torch.autocast("cpu", torch.bfloat16):
        return features(encoder, tokens)


@torch.inference_mode()
def right_answers(encoder: Encoder, head: torch.nn.Linear, task: int, part: str) -> torch.Tensor:
    batches = held_out(task, part)
    right = torch.empty(sum(len(batch.labels) for batch in batches), dtype=torch.bool)
    for batch in batches:
        scores = head(held_out_features(encoder, batch.tokens))
        right[batch.places] = scores.argmax(dim=1) == batch.labels
    return right


@cache
def held_out(task: int, part: str) -> list[Batch]:
    """A part of a task as tokens, read by all models alike."""
    return list(by_length(getattr(tasks()[task], part)))


def by_length(examples: list[Example]) -> Iterator[Batch]:
    """Batches of texts of like length, so that little is padding."""
    order = torch.tensor(sorted(range(len(examples)), key=lambda n: len(examples[n][0])))
    for places in torch.split(order, EVALUATED_BATCH):
        yield Batch(places, *tokenized([examples[n] for n in places.tolist()]))


def tokenized(examples: list[Example]) -> tuple[Any, torch.Tensor]:
    texts, labels = map(list, zip(*examples, strict=True))
    cut: dict[str, Any] = {"truncation": True, "max_length": TOKENS, "padding": True}
    return tokenizer()(texts, **cut, return_tensors="pt"), torch.tensor(labels)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ENCODER)


def head_of(task: Task) -> torch.nn.Linear:
    """A task's head: the same for all seeds, fitted once."""
    path = HEADS / f"{task.name}.safetensors"
    if not path.is_file():
        HEADS.mkdir(parents=True, exist_ok=True)
        head = fitted_head(AutoModel.from_pretrained(ENCODER).eval(), task)
        save_file(head.state_dict(), path)
    state = load_file(path)
    head = torch.nn.Linear(state["weight"].shape[1], task.classes).requires_grad_(False)
    head.load_state_dict(state)
    return head


def fitted_head(encoder: Encoder, task: Task) -> torch.nn.Linear:
    """Fit a logistic regression to what the encoder, as it is, tells of the task's texts."""
    batches = list(by_length(task.train))
    inputs = torch.cat([held_out_features(encoder, batch.tokens) for batch in batches]).double()
    labels = torch.cat([batch.labels for batch in batches])
    head = torch.nn.Linear(inputs.shape[1], task.classes, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = RIDGE / 2 * head.weight.square().sum() / len(labels)
        value = cross_entropy(head(inputs), labels) + penalty
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head.float()


def fine_tune(
    encoder: Encoder, head: torch.nn.Linear, examples: list[Example], seed: int, name: str
) -> None:
    """Train the encoder's layers under a head that stays as it is."""
    torch.manual_seed(seed)  # of dropout
    for tensor, parameter in encoder.named_parameters():
        parameter.requires_grad_(not tensor.startswith(FROZEN))
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    encoder.train()
    steps = list(epochs(len(examples), seed))
    for step, places in enumerate(tqdm(steps, desc=name, unit="step", mininterval=2), 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(step / WARMUP, 1 - (step - 1) / len(steps))
        tokens, labels = tokenized([examples[n] for n in places])
        torch.autograd.backward(cross_entropy(head(features(encoder, tokens)), labels))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    encoder.requires_grad_(False)


def epochs(count: int, seed: int) -> Iterator[list[int]]:
    """Whole batches of a new order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(count, generator=generator)[: count // BATCH * BATCH]
        yield from order.view(-1, BATCH).tolist()
