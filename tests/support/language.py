"""Language models of bytes: tiny, with random weights, and with a real tokenizer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 64
"""Tokens that such a model sees at once."""

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


def save_language_model(
    folder: Path, seed: int = 0, *, vocabulary: int = 256, tied: bool = False
) -> Path:
    """A Llama of two layers, in bfloat16; its tokens are the bytes of a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """GPT-2's way to write bytes as characters, and nothing merged: the ids are the bytes."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    characters = {byte: chr(byte) for byte in _PRINTABLE}
    characters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def exact_losses(folder: Path, texts: Sequence[bytes]) -> tuple[list[float], list[int]]:
    """Summed loss (nats) and number of targets by window, in float64 and one window at a time."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses, counts = [], []
    for text in texts:
        for start in range(0, len(text) - 1, WINDOW):
            window = torch.tensor(list(text[start : start + WINDOW + 1]))
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            likely = logits.log_softmax(dim=-1)[range(len(window) - 1), window[1:]]
            losses.append(-likely.sum().item())
            counts.append(len(window) - 1)
    return losses, counts
