"""Held-out loss of real models of transformers, against a plain computation in float64."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, T5Config
from transformers.utils import logging

from distmerge import evaluation
from distmerge.errors import DistmergeError, PeerError, SourceError
from distmerge.evaluation import measure
from distmerge.scoring import Measured, scores
from distmerge.selection import Selection
from distmerge.stream import single_threaded
from tests.support.language import (
    WINDOW,
    exact_losses,
    save_byte_tokenizer,
    save_language_model,
)

LONG = ("Ein Text mit Umlauten: ä, ö, ü. " * 5).encode()
SHORT = b"A window and a bit: " + b"abc " * 14


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """And a quick garbage collection: without all that torch and transformers have loaded."""
    gc.freeze()
    with single_threaded():
        yield
    gc.unfreeze()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of two texts, and of what is none."""
    folder = tmp_path / "held-out"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_bytes(SHORT)
    (folder / "a.md").write_bytes(LONG)
    (folder / "c").write_bytes(b"")
    (folder / "more" / "d.txt").write_bytes(b"x")
    (folder / "e.bin").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden").write_bytes(b"not this")
    return folder


def by_loss(text: Path) -> Selection:
    return Selection(metric="loss", text=str(text))


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_a_plain_computation(tmp_path: Path, text: Path, tied: bool) -> None:
    model = save_language_model(tmp_path / "model", tied=tied)

    measured = measure(by_loss(text), model)

    losses, counts = exact_losses(model, [LONG, SHORT])
    assert measured.counts == tuple(counts)
    assert sum(counts) == len(LONG) + len(SHORT) - 2, "each token but the first is predicted once"
    assert counts.count(WINDOW) >= 2
    assert len(set(counts)) > 1
    assert measured.losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("budget", "tokens"), [(1, 8192), (1 << 28, 1), (100_000, 8192)])
def test_batches_do_not_change_the_loss(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, budget: int, tokens: int
) -> None:
    model = save_language_model(tmp_path / "model")
    whole = measure(by_loss(text), model)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", budget)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", tokens)
    small = measure(by_loss(text), model)
    assert small.losses == pytest.approx(whole.losses, rel=1e-6)
    assert small.counts == whole.counts


def test_measuring_again_gives_the_same_bits(tmp_path: Path, text: Path) -> None:
    model = save_language_model(tmp_path / "model")
    assert measure(by_loss(text), model) == measure(by_loss(text), model)


def test_a_window_is_no_longer_than_ours_or_the_models(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_language_model(tmp_path / "model")
    edit_config(model, max_position_embeddings=4096)
    assert measure(by_loss(text), model).counts == (len(LONG) - 1, len(SHORT) - 1)
    monkeypatch.setattr(evaluation, "WINDOW", 50)
    assert measure(by_loss(text), model).counts == (
        50,
        50,
        50,
        len(LONG) - 151,
        50,
        len(SHORT) - 51,
    )


def test_the_model_that_wrote_the_text_is_best(tmp_path: Path) -> None:
    """What a model finds likely itself, others find less so."""
    folders = [save_language_model(tmp_path / f"step={n}", seed=n) for n in range(3)]
    (tmp_path / "text").write_bytes(sample(folders[2]))
    selection = by_loss(tmp_path / "text")
    measured = [measure(selection, folder) for folder in folders]
    values = [{"step": n} for n in range(3)]
    found = scores(selection, [f.name for f in folders], [{**v} for v in values], measured)
    assert found["best"] == "step=2"
    assert str(found["verdict"]).startswith("step=2 beats the average (step=0) by ")


def sample(folder: Path, length: int = 300) -> bytes:
    """ASCII that the model makes, each byte from those before it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = [65]
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([written[-WINDOW // 2 :]])).logits[0, -1, :128]
        written.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return bytes(written)


def test_a_model_of_nan_has_no_finite_loss(tmp_path: Path, text: Path) -> None:
    model = save_language_model(tmp_path / "model")
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    assert math.isnan(measure(by_loss(text), model).score)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


class Bad(NamedTuple):
    """`spoil` changes a sound model."""

    message: str
    spoil: Callable[[Path], object]


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def no_head(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))


def encoder(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=256, num_attention_heads=2, max_position_embeddings=64, **sizes)
    config.initializer_range = 0.3
    (folder / "config.json").unlink()
    BertForMaskedLM(config).save_pretrained(folder)


def no_decoder(folder: Path) -> None:
    T5Config().save_pretrained(folder)


def foreign(folder: Path) -> None:
    """Code in the folder, which would leave a mark."""
    mark = folder / "ran"
    (folder / "modeling.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Model: pass\n")
    names = {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model"}
    edit_config(folder, auto_map=names, model_type="nobody-knows-it")


def few_words(folder: Path) -> None:
    save_language_model(folder, vocabulary=100)


BAD = {
    "no tokenizer": Bad("can't load the tokenizer", no_tokenizer),
    "no weights": Bad("can't load the model", lambda f: (f / "model.safetensors").unlink()),
    "no config": Bad("can't load the", lambda folder: (folder / "config.json").unlink()),
    "cut off": Bad("can't load the model", cut_off),
    "pickled": Bad("can't load the model", pickled),
    "no head": Bad("not a causal language model: it lacks lm_head.weight", no_head),
    "encoder": Bad("not a causal language model: it reads ahead", encoder),
    "encoder and decoder": Bad("can't load the model", no_decoder),
    "code of its own": Bad("can't load the", foreign),
    "few words": Bad("the tokenizer in .* does not fit the model: token 195 of a", few_words),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_evaluated_is_named(tmp_path: Path, text: Path, case: str) -> None:
    model = save_language_model(tmp_path / "model")
    BAD[case].spoil(model)

    with pytest.raises(SourceError, match=BAD[case].message) as caught:
        measure(by_loss(text), model)

    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert case == "few words" or "{command: ...}" in str(caught.value)
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"x", "too short"), (b" \n", "is empty"), (b"\xff", "not text in UTF-8")],
)
def test_a_text_must_hold_something(tmp_path: Path, content: bytes, message: str) -> None:
    model = save_language_model(tmp_path / "model")
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        measure(by_loss(tmp_path / "text"), model)


def test_what_fails_in_the_model_is_told(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise RuntimeError("out of memory\nbuy more")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    with pytest.raises(DistmergeError, match="can't be evaluated: out of memory buy more; select"):
        measure(by_loss(text), save_language_model(tmp_path / "model"))


def test_nothing_of_a_model_stays(tmp_path: Path, text: Path) -> None:
    """Neither memory nor settings of transformers; also where it was broken off."""
    model = save_language_model(tmp_path / "model")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def stop() -> None:
        raise PeerError("another rank failed")

    measure(by_loss(text), model)
    with pytest.raises(PeerError, match="another rank failed"):
        measure(by_loss(text), model, stop)

    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is LlamaForCausalLM]


def test_the_tokenizer_adds_nothing(tmp_path: Path, text: Path) -> None:
    save_byte_tokenizer(tmp_path)
    found = [bytes(one.tolist()) for one in evaluation.tokenize(str(text), tmp_path)]
    assert found == [LONG, SHORT, b"", b"x"]


@pytest.mark.gpu
def test_a_gpu_measures_nearly_the_same(tmp_path: Path, text: Path) -> None:
    """In bfloat16, as stored; the CPU takes float32."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    model = save_language_model(tmp_path / "model")
    there: Measured = measure(by_loss(text), model)
    here = measure(by_loss(text), model, use_gpu=False)
    assert there.counts == here.counts
    assert there.losses != here.losses
    assert there.score == pytest.approx(here.score, rel=0.02)
