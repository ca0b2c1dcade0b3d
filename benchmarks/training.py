"""A small language model and its training on real text: what the demo and the experiment share.

The model is a Llama of 0.84 million parameters that reads bytes. Its learning rate stays constant
unless a run is told to decay it: averaging is to do what a decay would otherwise have done.
"""

from __future__ import annotations

import gzip
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CONTEXT = 128
WARMUP = 100
LEARNING_RATE = 2e-3
TRAINING_CHARACTERS = 15_200_000
SNIPPETS, SNIPPET_CHARACTERS = 1024, 256
DICTIONARY = Path("/usr/share/dictd/gcide.dict.dz")

Rate = Callable[[int], float]  # the learning rate of a step; steps are counted from 1


class Text(NamedTuple):
    """A corpus as bytes: what is trained on, and two held-out parts to choose and to report by."""

    train: torch.Tensor
    choose: torch.Tensor
    report: torch.Tensor


def corpus(name: str) -> Text:
    """Read a corpus; short snippets from all over the part that is not trained on are held out.

    Raises:
        FileNotFoundError: the corpus is not on this machine; the message says how to get it.
    """
    pieces = {"python": _standard_library, "dictionary": _dictionary}[name]()
    # Shuffled, so that what is not trained on is not merely the last pages of the alphabet.
    random.Random(0).shuffle(pieces)
    text = "".join(pieces)
    cut = min(TRAINING_CHARACTERS, len(text) // 2)
    # A long stretch is one file or two, and those may be odd ones; both parts get every kind.
    starts = [cut + (len(text) - cut) * i // SNIPPETS for i in range(SNIPPETS)]
    snippets = [text[start : start + SNIPPET_CHARACTERS] for start in starts]
    parts = [text[:cut], "".join(snippets[::2]), "".join(snippets[1::2])]
    return Text(*(torch.frombuffer(bytearray(p.encode()), dtype=torch.uint8) for p in parts))


def _standard_library() -> list[str]:
    """The Python standard library's own source, which every machine has; a piece is a file."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = sorted(p for p in stdlib.rglob("*.py") if installed.isdisjoint(p.parts))
    # A few test files are no UTF-8 on purpose.
    return [path.read_text("utf-8", errors="ignore") for path in files]


def _dictionary() -> list[str]:
    """The Collaborative International Dictionary of English; a piece is 64 Ki characters."""
    if not DICTIONARY.is_file():
        raise FileNotFoundError(
            f"no dictionary at {DICTIONARY}: install it with `apt-get install dict-gcide` (Debian "
            "and Ubuntu), or do without this corpus (--corpora python)"
        )
    with gzip.open(DICTIONARY, "rt", encoding="utf-8", errors="ignore") as stream:
        text = stream.read()
    size = 1 << 16
    return [text[start : start + size] for start in range(0, len(text), size)]


def new_model() -> LlamaForCausalLM:
    """Build the model, with fresh weights from torch's global generator."""
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose token i is byte i, whatever the text."""
    # Byte-level tokenizers write each byte as a printable character: printable bytes of Latin-1
    # as themselves, the others, in order, as the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in printable else next(others)): b for b in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class Trainer:
    """A model in training, with all that its next step depends on."""

    def __init__(self, text: torch.Tensor, *, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.text, self.batch = text, batch
        self.model = new_model()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1
        )
        self.generator = torch.Generator().manual_seed(seed)  # of the order of the text

    def steps(self, first: int, last: int, rate: Rate, name: str = "train") -> Iterator[int]:
        """Train from step `first` to step `last`, yielding each number once its step is done."""
        progress = tqdm(range(first, last + 1), desc=name, unit="step", mininterval=2)
        for step in progress:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step)
            starts = torch.randint(
                len(self.text) - CONTEXT, (self.batch,), generator=self.generator
            )
            loss = window_losses(self.model, windows_at(starts, self.text)).mean()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            yield step

    def save_state(self, path: Path) -> None:
        """Keep everything that another run needs to go on from here, in one file."""
        state = [self.model.state_dict(), self.optimizer.state_dict(), self.generator.get_state()]
        torch.save(state, path)

    def load_state(self, path: Path) -> None:
        """Go on from where the state was saved: the same text comes next."""
        model, optimizer, generator = torch.load(path)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.generator.set_state(generator)


def constant_rate(step: int) -> float:
    """Warm up, then stay."""
    return LEARNING_RATE * min(1.0, step / WARMUP)


def decaying_rate(first: int, last: int) -> Rate:
    """Fall in a straight line from the constant rate before step `first` to nearly 0 at `last`."""
    return lambda step: LEARNING_RATE * (last + 1 - step) / (last + 2 - first)


def windows_at(starts: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cut one window of context, and the byte that follows it, at each start."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def spread_windows(text: torch.Tensor, count: int) -> torch.Tensor:
    """Cut windows at equal distances: the same for every model, and none overlaps another."""
    return windows_at(torch.linspace(0, len(text) - CONTEXT - 1, count).long(), text)


def window_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return each window's mean loss in nats per byte."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1)


@torch.inference_mode()
def model_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return a model's mean loss on each window, in float64."""
    return torch.cat([window_losses(model, part) for part in torch.split(windows, 32)]).double()


def load(path: Path) -> LlamaForCausalLM:
    """Load a saved model in float32, as it was trained."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def paired(losses: torch.Tensor, baseline: torch.Tensor) -> tuple[float, float]:
    """Return the mean difference over windows and its standard error."""
    # Windows differ in difficulty far more than models do; pairing takes that out.
    difference = losses - baseline
    return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


def save(model: LlamaForCausalLM, path: Path) -> None:
    """Save one checkpoint in shards, under its own name only once it is whole."""
    # The name must not match `step-*`: an interrupted save is no checkpoint to merge.
    unfinished = path.with_name(f"unfinished-{path.name}")
    model.save_pretrained(unfinished, max_shard_size="1500KB")
    byte_tokenizer().save_pretrained(unfinished)
    unfinished.rename(path)
