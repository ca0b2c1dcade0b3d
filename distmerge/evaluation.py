"""What a sweep's outputs are worth on held-out data: their loss, or what a command says."""

from __future__ import annotations

import gc
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from distmerge.command import command_environment, run_command
from distmerge.dist import World
from distmerge.errors import DistmergeError, RunError, SourceError
from distmerge.launchers import detect
from distmerge.log import LOGGER
from distmerge.output import MANIFEST
from distmerge.scoring import Measured
from distmerge.selection import Selection, read_texts

WINDOW = 2048
"""Tokens that a model sees at once, at most."""

LOGITS_BYTES = 1 << 28
"""Of float32 logits that are looked at together; one window's alone may take more."""

BATCH_TOKENS = 8192
"""In one batch, at most: activations take memory too."""

HINT = "; select: {command: ...} evaluates with any program of yours instead"


def measure_all(
    world: World, selection: Selection, models: Sequence[Path], *, use_gpu: bool
) -> list[Measured]:
    """Measure every model, shared among the ranks; all ranks get all results, in order.

    Candidate i goes to the (i mod n)-th of the ranks that can take part. Each loads a whole model.
    Raises what `measure` raises, and RunError where no rank sees the outputs.
    """
    able = _able(world, selection, models, use_gpu=use_gpu)

    def work() -> dict[int, Measured]:
        found = {}
        for number, model in enumerate(models):
            if able[number % len(able)] == world.rank:
                found[number] = measure(selection, model, world.check, use_gpu=use_gpu)
                place = f"{number + 1} of {len(models)}"
                score = found[number].score
                LOGGER.info("select: %s, %s: %s %.6g", model.name, place, selection.metric, score)
        return found

    parts = world.gather("select", work)
    results = {number: one for part in parts for number, one in part.items()}
    return [results[number] for number in range(len(models))]


def _able(
    world: World, selection: Selection, models: Sequence[Path], *, use_gpu: bool
) -> list[int]:
    """The ranks that see what they need, on one kind of device: others round differently."""
    sees = world.who_sees([model / MANIFEST for model in models])

    def look() -> str | None:
        text = selection.text
        if not (sees[world.rank] and (text is None or Path(text).expanduser().exists())):
            return None
        return "any" if text is None else _device_name(use_gpu=use_gpu)

    kinds = world.gather("select", look)

    def choose() -> list[int]:
        seen = [kind for kind in kinds if kind is not None]
        if not seen:
            raise RunError("select: no rank sees all outputs and the text")
        best = next((kind for kind in seen if kind != "cpu"), "cpu")
        return [rank for rank, kind in enumerate(kinds) if kind == best]

    return world.together("select", choose)


def measure(
    selection: Selection,
    model: Path,
    check: Callable[[], None] = lambda: None,
    *,
    use_gpu: bool = True,
) -> Measured:
    """Measure the checkpoint in the folder `model`. `check` is called often; it may raise.

    Raises SourceError for a text, tokenizer or model that can't be used, RunError for an
    evaluation or a command that fails.
    """
    if selection.command is not None:
        environment = command_environment(os.environ, torch.cuda.device_count())
        number = run_command(selection.command, model, environment=environment, check=check)
        return Measured(number=number)
    assert selection.text is not None
    try:
        return _measure_loss(selection.text, model, check, _device(use_gpu=use_gpu))
    finally:
        gc.collect()  # the model's modules refer to each other
        torch.cuda.empty_cache()


def tokenize(text: str, folder: Path) -> list[torch.Tensor]:
    """The tokens (int64) of each text at `text`, by the tokenizer in `folder`; none are added.

    Raises SourceError where there is no usable tokenizer, and where no text has two tokens.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    texts = read_texts(text)
    with _quiet():
        tokenizer = _loaded(AutoTokenizer, folder, "tokenizer")
        tokens = [_tokens(tokenizer, one) for one in texts]
    if max(len(one) for one in tokens) < 2:
        raise SourceError(f"select: {text} is too short: it takes two tokens to measure a loss")
    return tokens


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)


def _measure_loss(
    text: str, folder: Path, check: Callable[[], None], device: torch.device
) -> Measured:
    tokens = tokenize(text, folder)
    model = _load_model(folder, device)
    windows = list(_windows(tokens, _window(model)))
    with _quiet(), torch.inference_mode(), _explained(folder):
        _check_vocabulary(model, tokens, folder)
        _check_causal(model, windows[0], folder)
        losses = _losses(model, windows, check)
    return Measured(losses, tuple(len(window) - 1 for window in windows))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A model can fail in any way; say which it was, and what else there is."""
    try:
        yield
    except DistmergeError:
        raise
    except Exception as error:
        raise RunError(f"select: {folder} can't be evaluated: {_reason(error)}{HINT}") from error


def _check_vocabulary(model: Any, tokens: Sequence[torch.Tensor], folder: Path) -> None:
    largest = max(int(one.max()) for one in tokens if len(one))
    if largest >= (vocabulary := _vocabulary(model)):
        raise SourceError(
            f"select: the tokenizer in {folder} does not fit the model: token {largest} of a "
            f"vocabulary of {vocabulary}"
        )


def _vocabulary(model: Any) -> int:
    size: int = model.get_input_embeddings().weight.shape[0]
    return size


def _load_model(folder: Path, device: torch.device) -> Any:
    """The model on its device: as stored on a GPU, in float32 on a CPU."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    dtype = torch.float32 if device.type == "cpu" else "auto"
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with _quiet():
        model, info = _loaded(AutoModelForCausalLM, folder, "model", **options)
    if missing := sorted(info["missing_keys"]):
        raise SourceError(
            f"select: {folder} is not a causal language model: it lacks {missing[0]}{HINT}"
        )
    model.config.get_text_config().use_cache = False
    return model.to(device).eval()


def _loaded(kind: Any, folder: Path, what: str, **options: object) -> Any:
    try:
        return kind.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:
        raise SourceError(
            f"select: transformers can't load the {what} in {folder}: {_reason(error)}{HINT}"
        ) from error


def _reason(error: Exception) -> str:
    """On one line, and not the advice and lists that transformers adds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text, 240, placeholder=" ...").rstrip(".;:")


def _window(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, limit) if isinstance(limit, int) and limit > 0 else WINDOW


def _windows(tokens: Sequence[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Stretches of up to `size` tokens and the one after: every token but the first of a text is
    predicted once."""
    for text in tokens:
        for start in range(0, len(text) - 1, size):
            yield text[start : start + size + 1]


def _check_causal(model: Any, window: torch.Tensor, folder: Path) -> None:
    """A model that reads ahead (BERT) would know the answer. Nothing before the last token may
    depend on it."""
    tokens = window[:8].repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % _vocabulary(model)
    one, other = model(input_ids=tokens.to(model.device)).logits[:, :-1]
    noise = torch.finfo(one.dtype).eps ** 0.5 * one.abs().max()
    if (one - other).abs().max() > noise:
        raise SourceError(f"select: {folder} is not a causal language model: it reads ahead{HINT}")


def _losses(
    model: Any, windows: Sequence[torch.Tensor], check: Callable[[], None]
) -> tuple[float, ...]:
    """The summed loss of each window, in nats. Batches hold windows of one length: no padding."""
    lengths: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        lengths.setdefault(len(window), []).append(number)
    losses = [0.0] * len(windows)
    for length, numbers in lengths.items():
        rows = _rows(length - 1, _vocabulary(model))
        for start in range(0, len(numbers), rows):
            check()
            batch = numbers[start : start + rows]
            tokens = torch.stack([windows[number] for number in batch]).to(model.device)
            logits = model(input_ids=tokens[:, :-1]).logits
            for number, loss in zip(batch, _summed(logits, tokens[:, 1:]), strict=True):
                losses[number] = loss
    return tuple(losses)


def _rows(length: int, vocabulary: int) -> int:
    """How many windows of `length` tokens make a batch."""
    tokens = min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary))
    return max(1, tokens // length)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Cross-entropy [rows, length, vocabulary] to [rows], in float32 and summed in float64."""
    part = max(1, LOGITS_BYTES // (4 * logits.shape[-1]))
    parts = zip(
        torch.split(logits.flatten(0, 1), part), torch.split(targets.flatten(), part), strict=True
    )
    each = [cross_entropy(some.float(), wanted, reduction="none") for some, wanted in parts]
    sums: list[float] = torch.cat(each).double().view(targets.shape).sum(dim=1).tolist()
    return sums


def _device(*, use_gpu: bool) -> torch.device:
    if not use_gpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", detect(os.environ).local_rank % torch.cuda.device_count())


def _device_name(*, use_gpu: bool) -> str:
    device = _device(use_gpu=use_gpu)
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and advice of transformers between our lines."""
    from transformers.utils import logging  # noqa: PLC0415

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
