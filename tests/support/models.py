"""Tiny real models of several architectures, made by transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 128

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}

FAMILIES: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)), torch.bfloat16),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)), torch.float32),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=4)),
        torch.bfloat16,
    ),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**_T5)), torch.bfloat16),
    "bert": (lambda: BertForMaskedLM(BertConfig(**_BERT)), torch.float32),
}
"""How to make a model of each family, and the dtype that it is saved in."""


def save_variants(family: str, folder: Path, count: int = 3) -> list[Any]:
    """Make models that differ in all their weights, and save each in folder/step-N, in shards."""
    make, dtype = FAMILIES[family]
    models = []
    for number in range(1, count + 1):
        torch.manual_seed(number)
        model = make()
        with torch.no_grad():  # fresh biases and norms are all zeros or ones
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.to(dtype).save_pretrained(folder / f"step-{number}", max_shard_size="60KB")
        models.append(model)
    return models


def logits(model: Any) -> torch.Tensor:
    """What `model` says to a few fixed tokens."""
    tokens = torch.arange(24).reshape(2, 12) * 5 % VOCABULARY
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens, **more).logits
    return result
