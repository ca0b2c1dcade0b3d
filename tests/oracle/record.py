"""Record mergekit's results for the recipes of task_cases on three tiny models.

    PYTHONPATH=. .venv-mergekit/bin/python -m tests.oracle.record

makes recorded/ anew: the models A, B and C, and cases.safetensors with all results, whose tensors
are named CASE/TENSOR. The file's metadata has the versions.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
from mergekit.merge import run_merge  # type: ignore[import-not-found]
from mergekit.options import MergeOptions  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle.task_cases import CASES

RECORDED = Path(__file__).parent / "recorded"


def write_models(folder: Path) -> None:
    """Three Llamas near each other."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for seed, name in enumerate("ABC", start=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        (folder / name / "model.safetensors").chmod(0o644)


def main() -> None:
    """Make everything anew."""
    shutil.rmtree(RECORDED, ignore_errors=True)
    write_models(RECORDED)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            config = MergeConfiguration.model_validate(case.recipe(RECORDED))
            out = Path(scratch) / name
            run_merge(config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False))
            for tensor, values in load_file(out / "model.safetensors").items():
                results[f"{name}/{tensor}"] = values
    versions = {name: version(name) for name in ("mergekit", "torch", "transformers")}
    save_file(results, RECORDED / "cases.safetensors", metadata=versions)
    (RECORDED / "cases.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
