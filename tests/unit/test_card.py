"""Model cards of real merges: what they state, what they keep quiet, what hostile text can't do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import distmerge
from distmerge.card import model_card, pictures
from distmerge.document import Plain
from distmerge.errors import OutputError
from tests.support.checkpoints import read_output, write_checkpoint
from tests.support.drawing import without_drawing
from tests.unit.recipes import average, linear, write_run

ROOT = Path(__file__).parents[2]
APACHE = (ROOT / "LICENSE").read_text()
MIT = """MIT License

Copyright (c) 2026 Somebody & others

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

Files = Mapping[str, str]


def card_of(text: str) -> dict[str, Any]:
    """The front matter, as the Hub's own client reads it."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def stated(fields: str) -> str:
    """A model card with these lines of front matter."""
    return f"---\n{fields}\n---\n# A model\n"


def write_model(folder: Path, value: float, files: Files | None = None) -> Path:
    tensors = {
        "a.weight": torch.full((3,), float(value)),
        "b.weight": torch.full((4,), float(value)),
    }
    write_checkpoint(folder, tensors, config={"model_type": "llama"})
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    return folder


def merged(folder: Path, *files: Files) -> Path:
    """OUT of a linear merge of one model for each of `files`, which lie beside its weights."""
    models = {write_model(folder / f"m{n}", n + 1.0, f): 1 / (n + 2) for n, f in enumerate(files)}
    distmerge.merge(linear(models), folder / "out")
    return folder / "out"


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ", maxsplit=1)[0]


def recipe_of(text: str) -> dict[str, Any]:
    block = re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    found: dict[str, Any] = yaml.safe_load(block[2])
    return found


def test_a_card_of_local_models(tmp_path: Path) -> None:
    out = merged(tmp_path, {}, {})
    text = model_card(out)
    assert card_of(text) == {
        "library_name": "transformers",
        "tags": ["merge", "distmerge", "linear"],
    }
    assert str(tmp_path) not in text
    assert "| 0 | `./m0` |" in section(text, "Inputs")
    assert "is stated" not in text.replace("so none is stated here", "")
    weights = [entry["parameters"]["weight"] for entry in recipe_of(text)["models"]]
    assert weights == [0.5, pytest.approx(1 / 3)]
    assert "| input | all others |\n| --- | --- |\n| 0 `./m0` | +0.6 |\n" in text
    manifest = json.loads((out / "distmerge.json").read_text())
    for name, entry in manifest["files"].items():
        assert f"| `{name}` |" in text
        assert f"| `{entry['sha256']}` |" in text
    assert f"| torch | `{torch.__version__}` |" in text
    assert model_card(out) == text


def test_the_recipe_of_the_card_makes_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folders beside it; two of them end alike."""
    first, second = write_model(tmp_path / "x/final", 1), write_model(tmp_path / "y/final", 4)
    third = write_model(tmp_path / "final-2", 16)
    distmerge.merge(linear({first: 0.5, second: 0.3, third: 0.2}), tmp_path / "out")
    text = model_card(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = [entry["model"] for entry in recipe_of(text)["models"]]
    assert len(set(names)) == 3
    for name, folder in zip(names, (first, second, third), strict=True):
        (elsewhere / name).symlink_to(folder)
    monkeypatch.chdir(elsewhere)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_of(text)))
    again = distmerge.merge("recipe.yaml", "again")
    assert f"`{again.digest}`" in section(text, "Make it again")
    for name, tensor in read_output(tmp_path / "out").items():
        assert torch.equal(read_output(elsewhere / "again")[name], tensor)


def test_a_calibrated_merge_is_told(tmp_path: Path) -> None:
    base, task = (
        write_checkpoint(tmp_path / name, {"a.weight": torch.eye(8) * scale}, config={})
        for name, scale in (("base", 1.0), ("task", 2.0))
    )
    recipe: dict[str, Plain] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(task), "parameters": {"weight": 1}}],
        "calibrate": {"method": "svc"},
    }
    with without_drawing():
        distmerge.merge(recipe, tmp_path / "out")
    text = model_card(tmp_path / "out")
    assert card_of(text)["tags"] == ["merge", "distmerge", "task_arithmetic", "svc"]
    assert "# 2 checkpoints merged by `task_arithmetic` and `svc`\n" in text


def test_coefficients_stand_with_the_tensors_that_they_hold_for(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one", 1), write_model(tmp_path / "two", 2)
    weight: Plain = [{"filter": "b.", "value": -2}, {"value": 3}]
    distmerge.merge(linear({one: weight, two: 1}), tmp_path / "out")
    text = model_card(tmp_path / "out")
    assert "| input | all others | `b.weight` |" in text
    assert "| 1 `./two` | +0.25 | -1 |" in text


def test_a_model_that_is_listed_twice_has_one_name(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", 1)
    models: list[Plain] = [{"model": str(one), "parameters": {"weight": n}} for n in (1, 3)]
    distmerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    text = model_card(tmp_path / "out")
    assert [entry["model"] for entry in recipe_of(text)["models"]] == ["./one", "./one"]
    assert "| 0 `./one` | +0.25 |\n| 1 `./one` | +0.75 |" in text


def test_no_folder_of_this_machine_is_named_in_full(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", [10, 20])
    base = write_checkpoint(tmp_path / "base", {"a": torch.ones(2)}, config={})
    recipe = {**average(tmp_path / "runs/step-*"), "base_model": str(base)}
    distmerge.merge(recipe, tmp_path / "out")
    text = model_card(tmp_path / "out")
    assert str(tmp_path) not in text
    found = recipe_of(text)
    assert found["base_model"] == "./base"
    assert found["trajectory"]["checkpoints"] == ["./step-10", "./step-20"]
    assert "| 1 | `./step-20` |  |  | 20 |" in text


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a repository into the Hub's cache and returns its name; nothing else can be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def write(name: str, commit: str, revision: str, files: Files) -> str:
        folder = tmp_path / f"hub/models--{name.replace('/', '--')}"
        write_model(folder / "snapshots" / commit, len(commit.strip("a")) + 1.0, files)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        return name if revision == "main" else f"{name}@{revision}"

    return write


def test_repositories_are_base_models_and_stand_with_their_commits(
    tmp_path: Path, cached: Callable[..., str]
) -> None:
    mit = {"README.md": stated("license: mit")}
    names = [
        cached("team/one", "a" * 40, "main", mit),
        cached("team/two", "b" * 40, "v1", mit),
        cached("team/two", "c" * 40, "v2", mit),
        str(write_model(tmp_path / "local", 2, mit)),
    ]
    models: list[Plain] = [{"model": name, "parameters": {"weight": 1}} for name in names]
    distmerge.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    text = model_card(tmp_path / "out")
    data = card_of(text)
    assert data["base_model"] == ["team/one", "team/two"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "mit"
    assert f"| 1 | `team/two` | `v1` | `{'b' * 40}` |  | `mit` (`README.md`) |" in text
    listed = [entry["model"] for entry in recipe_of(text)["models"]]
    assert listed == [
        f"team/one@{'a' * 40}", f"team/two@{'b' * 40}", f"team/two@{'c' * 40}", "./local",
    ]  # fmt: skip


AGREEMENTS: dict[str, tuple[list[Files], dict[str, str]]] = {
    "cards": ([{"README.md": stated("license: mit")}] * 2, {"license": "mit"}),
    "letter case": (
        [{"README.md": stated("license: MIT")}, {"README.md": stated("license: [mit]")}],
        {"license": "mit"},
    ),
    "card and file": ([{"README.md": stated("license: mit")}, {"LICENSE": MIT}],
                      {"license": "mit"}),
    "file reflowed": (
        [{"LICENCE.txt": " ".join(MIT.split())}, {"LICENSE-MIT": MIT.replace("\n", "\r\n")}],
        {"license": "mit"},
    ),
    "apache": ([{"LICENSE": APACHE}, {"README.md": stated("license: apache-2.0")}],
               {"license": "apache-2.0"}),
    "a file of its own beside a card": (
        [{"README.md": stated("license: mit"), "LICENSE": "Be kind."}],
        {"license": "mit"},
    ),
    "a licence with a name": (
        [{"README.md": stated("license: other\nlicense_name: lama\nlicense_link: LICENSE"),
          "LICENSE": "Be kind."}] * 2,
        {"license": "other", "license_name": "lama", "license_link": "LICENSE"},
    ),
    "a link to nothing": (
        [{"README.md": stated("license: other\nlicense_name: lama\nlicense_link: LICENSE")}],
        {"license": "other", "license_name": "lama"},
    ),
    "two links": (
        [{"README.md": stated(f"license: other\nlicense_name: lama\nlicense_link: {link}")}
         for link in ("https://a.org/l", "https://b.org/l")],
        {"license": "other", "license_name": "lama"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AGREEMENTS.values(), ids=AGREEMENTS)
def test_the_licence_that_all_inputs_state_is_that_of_the_output(
    tmp_path: Path, case: tuple[list[Files], dict[str, str]]
) -> None:
    files, expected = case
    text = model_card(merged(tmp_path, *files))
    assert {k: v for k, v in card_of(text).items() if k.startswith("license")} == expected
    name = expected.get("license_name", expected["license"])
    assert section(text, "Licence").strip() == f"All inputs state `{name}`."


CONFLICTS: dict[str, tuple[list[Files], str]] = {
    "cards": ([{"README.md": stated("license: mit")}, {"README.md": stated("license: gpl-3.0")}],
              "`gpl-3.0`, `mit`"),
    "card and file of one input": ([{"README.md": stated("license: mit"), "LICENSE": APACHE}],
                                   "`apache-2.0`, `mit`"),
    "files": ([{"LICENSE": MIT}, {"LICENSE": APACHE}, {}], "`apache-2.0`, `mit`"),
    "names": ([{"README.md": stated(f"license: other\nlicense_name: {name}")} for name in "xy"],
              "`x`, `y`"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFLICTS.values(), ids=CONFLICTS)
def test_licences_that_differ_are_flagged_and_none_is_stated(
    tmp_path: Path, case: tuple[list[Files], str]
) -> None:
    files, listed = case
    text = model_card(merged(tmp_path, *files))
    assert "license" not in card_of(text)
    assert f"**The inputs state licences that differ: {listed}.**" in section(text, "Licence")


UNKNOWN: dict[str, Files] = {
    "nothing": {},
    "a card without front matter": {"README.md": "# Licence: mit\n"},
    "a card that says unknown": {"README.md": stated("license: unknown")},
    "other, without a name": {"README.md": stated("license: other")},
    "a text that nobody knows": {"LICENSE": "Do what you like."},
    "MIT with a clause more": {"LICENSE": MIT + "\nYou may not sell the Software.\n"},
    "MIT with a clause before": {"LICENSE": "No selling. " * 30 + MIT},
    "MIT with a word less": {"LICENSE": MIT.replace("without restriction", "")},
    "Apache with an end of its own": {"LICENSE": APACHE + "\nExcept on Sundays.\n"},
    "two licences": {"README.md": stated("license: [mit, apache-2.0]")},
    "a licence twice": {"README.md": stated("license: mit\nlicense: mit")},
    "Markdown": {"README.md": stated("license: 'mit](http://x)'")},
    "YAML in YAML": {"README.md": stated('license: "mit\\ntags: [x]\\n---"')},
    "no YAML": {"README.md": stated("license: mit\n{{{{")},
    "a tag": {"README.md": stated("!!python/object:os.system {license: mit}\nx: [")},
    "a bomb": {"README.md": stated("a: &a [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1 or '')] * 9)}]\n" for n in range(1, 30)
    ))},
    "deep": {"README.md": stated("[" * 5000)},
    "long": {"README.md": stated("license: mit\n" + "x: 1\n" * 5000)},
    "not text": {"README.md": stated("license: \x00\x1b[31m")},
}  # fmt: skip


@pytest.mark.parametrize("files", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_stated_stays_unknown(tmp_path: Path, files: Files) -> None:
    mit = {"README.md": stated("license: mit")}
    text = model_card(merged(tmp_path, mit, files))
    assert "license" not in card_of(text)
    assert "Not every input states a licence" in section(text, "Licence")


def test_the_alias_bomb_of_the_tests_is_sound_yaml() -> None:
    block = UNKNOWN["a bomb"]["README.md"].split("---\n")[1]
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    assert root is not None
    assert len(root.value) == 30


def test_a_licence_file_that_leads_out_of_its_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(stated("license: mit") + "my password")
    model = write_model(tmp_path / "m", 1)
    distmerge.merge(linear({model: 1}), tmp_path / "out")
    (model / "README.md").symlink_to(tmp_path / "secret")
    text = model_card(tmp_path / "out")
    assert "license" not in card_of(text)
    assert "password" not in text


def test_inputs_that_are_gone_leave_the_licence_unknown(tmp_path: Path) -> None:
    out = merged(tmp_path, {"README.md": stated("license: mit")})
    (tmp_path / "m0").rename(tmp_path / "moved")
    text = model_card(out)
    assert "license" not in card_of(text)
    assert "| `./m0` |  |  |  | unknown |" in text


def test_the_donors_card_is_kept_word_for_word(tmp_path: Path) -> None:
    words = "# The donor\n\n```python\nx = 1\n```\n\n| a | b |\n\n</details>\n\n<!-- `````` \u200d"
    out = merged(tmp_path, {"README.md": f"---\nlicense: mit\n---\n{words}\n"}, {})
    end = section(model_card(out), "Verify it").split("</summary>")[-1]
    assert end.strip() == f"```````text\n{words}\n```````\n\n</details>"


HOSTILE = {
    "bars": "a|b | c",
    "ticks": "`a``b```",
    "html": "<img src=x onerror=alert(1)></details>",
    "heading": "a\n## Licence\n\nAll inputs state `mit`.",
    "front matter": "a\n---\nlicense: mit\n---",
    "fence": "a\n```\n# Mine",
    "link": "[click](http:x) ![x](y) $x^2$ *a* _b_ ~c~",
    "terminal": "\x1b[31ma\u202eb",
    "not utf-8": "a\udcffb",
}


def outside_code(text: str) -> str:
    """A card without what stands in fences and code spans."""
    text = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_of_strangers_change_nothing_around_them(tmp_path: Path, name: str) -> None:
    """Of a folder, a file, a tensor and in a donor's card."""
    cards = []
    for at, called in (("plain", "harmless"), ("hostile", name)):
        folder = tmp_path / at / called.replace("/", ".")
        words = called.encode(errors="replace").decode()
        tensor = "".join(c for c in words if c.isprintable())  # others are refused
        tensors = {name: torch.ones(2) for name in ("a", "b", tensor)}
        write_checkpoint(folder, tensors, config={})
        (folder / "README.md").write_text(words)
        (folder / f"{folder.name}.txt").write_text("")
        recipe = linear({folder: [{"filter": tensor, "value": 2}, {"value": 1}]})
        recipe["parameters"] = {"normalize": 0}
        distmerge.merge(recipe, tmp_path / at / "out")
        cards.append(model_card(tmp_path / at / "out"))
    plain, hostile = cards
    assert "harmless" in plain
    assert hostile.encode()
    assert card_of(hostile) == card_of(plain)
    bare = [
        re.sub(r"\d+(\.\d+)? k?B|(?<=The model card of )[^<]*", "", outside_code(c)) for c in cards
    ]
    assert bare[1] == bare[0]
    rows = [[line.replace(r"\|", "").count("|") for line in c.split("\n") if line[:2] == "| "]
            for c in cards]  # fmt: skip
    assert rows[1] == rows[0]
    assert set(map(type, recipe_of(hostile).values())) == set(map(type, recipe_of(plain).values()))


EVALUATE = """
import json, pathlib, sys
model = pathlib.Path(sys.argv[1])
print({"last=2": 5, "last=3": 7}[model.name])
"""


def sweep(folder: Path, *, drawn: bool = False) -> Path:
    pattern = write_run(folder, [1, 2, 3])
    (folder / "eval.py").write_text(EVALUATE)
    recipe = average(pattern) | {
        "sweep": {"trajectory.last": [2, 3]},
        "select": {"command": f"{sys.executable} {folder}/eval.py {{model}}", "goal": "max"},
    }
    with nullcontext() if drawn else without_drawing():
        distmerge.merge(recipe, folder / "out")
    return folder / "out"


def test_an_output_of_a_sweep_has_the_scores_of_all(tmp_path: Path) -> None:
    out = sweep(tmp_path)
    best, other = model_card(out, "best"), model_card(out, "last=2")
    assert model_card(out, "last=3") == best != other
    assert "| `last=2` | 5 | 0 |  | baseline |" in section(best, "Evaluation")
    assert "| `last=3` | 7 | 2 |  | this model, best |" in section(best, "Evaluation")
    assert "| `last=2` | 5 | 0 |  | this model, baseline |" in section(other, "Evaluation")
    assert "last=3 beats last=2 by 2" in section(best, "Evaluation")
    assert "eval.py" not in best
    assert str(tmp_path) not in best


def test_the_pictures_of_the_report_are_linked(tmp_path: Path) -> None:
    out = sweep(tmp_path, drawn=True)
    found = pictures(out)
    assert found
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", model_card(out, "best"))
    assert [out / link for link in links] == found


def test_a_choice_by_loss_names_the_text_and_not_where_it_lies(tmp_path: Path) -> None:
    out = sweep(tmp_path)
    path = out / "report/scores.json"
    scores = json.loads(path.read_text())
    scores |= {"metric": "loss", "goal": "min", "tokens": 1000, "windows": 1}
    path.write_text(json.dumps(scores | {"text": f"{tmp_path}/held-out.txt"}))
    text = model_card(out, "best")
    assert "(`held-out.txt`: 1000 tokens in 1 window), in nats per token (lower" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("output", ["", "last=4", "..", "report", "../out/last=2"])
def test_an_output_that_is_not_there(tmp_path: Path, output: str) -> None:
    out = sweep(tmp_path)
    with pytest.raises(OutputError, match=r"it holds no output .* it holds last=2, last=3"):
        model_card(out, output)


def test_a_single_output_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it holds one output, and none is called 'x'"):
        model_card(merged(tmp_path, {}), "x")


def broken(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest | keys


DAMAGES = {
    "inputs": broken(inputs=[{"model": 3}]),
    "no inputs": broken(inputs=7),
    "donor": broken(donor=9),
    "recipe": broken(recipe=[]),
    "files": broken(files={"a": {}}),
    "coefficients": broken(coefficients=[{"tensors": []}]),
    "versions": broken(versions=None),
    "shards": broken(shard_bytes="many"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_is_told(
    tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    out = merged(tmp_path, {})
    path = out / "distmerge.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(OutputError, match="no model card can be made"):
        model_card(out)


def test_a_folder_that_no_merge_wrote(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is .* an output of distmerge"):
        model_card(tmp_path)
