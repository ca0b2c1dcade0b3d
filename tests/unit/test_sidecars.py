"""What stands beside the weights: which files come along, and whose; config.json's dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.errors import SourceError
from distmerge.sources.sidecars import config_with_dtype, sidecars
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import average, linear, write_run

COPIED = [
    "LICENSE",
    "NOTICE.txt",
    "README.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
]
LEFT = [
    ".gitattributes",
    ".cache/x.json",
    "__pycache__/x.py",
    "adapter_config.json",
    "consolidated.safetensors",
    "distmerge.json",
    "events.out.tfevents.1",
    "global_step5/zero.pt",
    "global_step5/args.json",
    "model.safetensors.index.json.bak",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "sub/model.safetensors",
    "sub/config.json",
    "sub/deeper/notes.json",
    "trainer_state.json",
    "training_args.bin",
]


def write_files(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name, "torch_dtype": "float32"}, indent=1))


def test_config_tokenizer_and_code_come_along_and_nothing_else(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "donor", {"a": torch.ones(1)})
    write_files(donor, COPIED + LEFT)
    assert sorted(map(str, sidecars(donor))) == sorted(COPIED)
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    ours = {"model.safetensors", "distmerge.json"}
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert found | {"LICENSE"} == {*COPIED, *ours}
    for name in COPIED:
        assert (tmp_path / "out" / name).read_bytes() == (donor / name).read_bytes()


def test_a_linked_file_is_copied_as_a_file(tmp_path: Path) -> None:
    """The Hub's cache is a folder of links."""
    donor = write_checkpoint(tmp_path / "models--a/snapshots/c0ffee", {"a": torch.ones(1)})
    (tmp_path / "models--a/blobs").mkdir()
    (tmp_path / "models--a/blobs/b10b").write_text('{"torch_dtype": "float32"}')
    (donor / "config.json").symlink_to("../../blobs/b10b")
    distmerge.merge(linear({donor: 1}), tmp_path / "out")
    copied = tmp_path / "out/config.json"
    assert not copied.is_symlink()
    assert copied.read_text() == '{"torch_dtype": "float32"}'


def donor_of(recipe: dict[str, Plain], out: Path) -> str:
    distmerge.merge(recipe, out)
    return str(json.loads((out / "config.json").read_text())["name"])


def test_the_donor_is_the_base_model_else_the_first_or_of_a_run_the_last(tmp_path: Path) -> None:
    pattern = write_run(tmp_path, [1, 2, 10])
    steps = [tmp_path / f"step-{step}" for step in (1, 2, 10)]
    for step in steps:
        (step / "config.json").write_text(json.dumps({"name": step.name}))
    assert donor_of(linear(dict.fromkeys(steps, 1)), tmp_path / "first") == "step-1"
    assert donor_of(average(pattern), tmp_path / "last") == "step-10"
    assert donor_of(average(pattern, first=2), tmp_path / "chosen") == "step-2"
    for recipe in (linear(dict.fromkeys(steps[::2], 1)), average(pattern, last=2)):
        name = recipe["merge_method"]
        based: dict[str, Plain] = {**recipe, "base_model": str(steps[1])}
        assert donor_of(based, tmp_path / f"{name}-base") == "step-2"


BF16 = "bfloat16"
PARTS = {"text_config": {"torch_dtype": "float32", "deep": {"dtype": "float16"}}, "n": [1, None]}
CAST_PARTS = {"text_config": {"torch_dtype": BF16, "deep": {"dtype": BF16}}, "n": [1, None]}
OTHER_PARTS = {"quantization": {"dtype": "int8"}, "vision_config": {"torch_dtype": None}}


@pytest.mark.parametrize(
    ("config", "everywhere", "expected"),
    [
        ({"torch_dtype": "float32"}, False, {"torch_dtype": BF16}),
        ({"dtype": "float32"}, False, {"dtype": BF16}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            False,
            {"dtype": BF16, "torch_dtype": BF16},
        ),
        ({"dtype": None}, False, {"dtype": BF16}),
        ({"hidden_size": 4}, False, {"hidden_size": 4, "torch_dtype": BF16}),
        ({"dtype": "float32", **PARTS}, False, {"dtype": BF16, **PARTS}),
        ({"dtype": "float32", **PARTS}, True, {"dtype": BF16, **CAST_PARTS}),
        ({"dtype": "float32", **OTHER_PARTS}, True, {"dtype": BF16, **OTHER_PARTS}),
    ],
)
def test_the_config_says_the_true_dtype(
    tmp_path: Path, config: dict[str, object], everywhere: bool, expected: dict[str, object]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    changed = json.loads(config_with_dtype(path, BF16, everywhere=everywhere))
    assert list(changed.items()) == list(expected.items())


def test_a_config_that_is_true_already_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{  "torch_dtype":"bfloat16", "name": "\u00fc" }')
    assert config_with_dtype(path, BF16, everywhere=True) == path.read_bytes()


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "[" * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(SourceError, match=r"config\.json: not (a )?JSON"):
        config_with_dtype(path, BF16, everywhere=False)


@pytest.mark.parametrize(
    ("out_dtype", "expected"), [(None, ("float32", "float16")), (BF16, (BF16, BF16))]
)
def test_parts_keep_their_dtype_unless_the_recipe_casts_all(
    tmp_path: Path, out_dtype: str | None, expected: tuple[str, str]
) -> None:
    tensors = {"text": torch.ones(9), "vision": torch.ones(3, dtype=torch.float16)}
    config = {"dtype": "bfloat16", "vision_config": {"dtype": "float16"}}
    donor = write_checkpoint(tmp_path / "donor", tensors, config=config)
    distmerge.merge(linear({donor: 1}, out_dtype=out_dtype), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["dtype"], written["vision_config"]["dtype"]) == expected
