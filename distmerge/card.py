"""The model card of an output: README.md for the Hub, made from what lies in OUT and in its inputs.

Names, licences and cards are strangers' text. In the body they stand in code spans and fences, in
the front matter only where they are what they should be; folders of this machine are named by
their last part alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData

from distmerge.errors import OutputError
from distmerge.licences import Statement, card_text, statements, verdict
from distmerge.log import format_bytes, printable
from distmerge.manifest import output_names, read
from distmerge.markdown import code, escaped, fence, folded, table
from distmerge.output import MANIFEST
from distmerge.report import BEST, FOLDER, SCORES
from distmerge.sources.hub import is_commit, looks_like_repo

SHOWN_GROUPS = 8
"""Sets of coefficients that are listed; the manifest has all."""

_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")

Section = list[str]
"""Blocks of Markdown, with an empty line between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """`name` is how the card calls it: a repository, or ./ and the last part of a folder."""

    name: str
    revision: str
    commit: str | None
    step: int | None
    folder: Path
    stated: tuple[Statement, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """One output and all that is said of it. `recipe` names inputs as the card does."""

    inputs: tuple[_Input, ...]
    donor: _Input
    recipe: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        """The merger, and what calibrates its result."""
        calibration = self.recipe.get("calibrate")
        return [self.recipe["merge_method"], *([calibration["method"]] if calibration else [])]

    @property
    def repositories(self) -> list[str]:
        return list(dict.fromkeys(each.name for each in self.inputs if each.commit))


def model_card(out: Path, output: str = "") -> str:
    """README.md of the merge in `out`, or of one `output` of the sweep there (BEST for the chosen).

    Equal files give an equal card. Licences are read in the folders of the inputs, where these are
    still there. The donor's own card is kept at the end, word for word. Links to pictures are
    relative: `pictures` must lie in report/ beside the card.
    Raises OutputError where `out` holds no such output, or its manifest or scores are damaged.
    """
    folder = _folder(out, output)
    manifest = read(folder)
    try:
        made = _made(manifest)
        front = _front_matter(made).to_yaml()
        body = [block for section in _sections(made, out, folder.name) for block in section]
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"{folder}: no model card can be made: {error!r}") from error
    text = "\n\n".join(body)
    return str(ModelCard(f"---\n{front}\n---\n\n{text}\n"))


def pictures(out: Path) -> list[Path]:
    """The report's plots, in order of their names."""
    found = sorted((out / FOLDER).glob("*.png"))
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _folder(out: Path, output: str) -> Path:
    names = output_names(out)
    name = (out / BEST).resolve().name if output == BEST else output
    if name not in names:
        listed = ", ".join(printable(each) for each in names[:20])
        raise OutputError(
            f"{out}: it holds no output {printable(name)!r}; it holds {listed}"
            if names != [""]
            else f"{out}: it holds one output, and none is called {printable(name)!r}"
        )
    return out / name


def _made(manifest: dict[str, Any]) -> _Made:
    called: dict[str, str] = {}
    inputs = tuple(_input(entry, called) for entry in manifest["inputs"])
    return _Made(
        inputs=inputs,
        donor=inputs[manifest["donor"]],
        recipe={key: _without_folders(value, called) for key, value in manifest["recipe"].items()},
        manifest=manifest,
    )


def _input(entry: Mapping[str, Any], called: dict[str, str]) -> _Input:
    """An input of the manifest; adds what a local one is called to `called`, by its folder."""
    label, commit, folder = str(entry["model"]), entry["commit"], str(entry["folder"])
    repository, _, revision = label.partition("@")
    on_hub = isinstance(commit, str) and is_commit(commit) and looks_like_repo(repository)
    if not on_hub and folder not in called:
        called[folder] = _local_name(Path(folder), called.values())
    return _Input(
        name=repository if on_hub else called[folder],
        revision=revision if on_hub else "",
        commit=commit if on_hub else None,
        step=entry["step"],
        folder=Path(folder),
        stated=statements(Path(folder)),
    )


def _local_name(folder: Path, taken: Collection[str]) -> str:
    """The dot says that it is no repository; a number tells folders apart that end alike."""
    name, number = f"./{folder.name}", 2
    while name in taken:
        name, number = f"./{folder.name}-{number}", number + 1
    return name


def _without_folders(value: Any, called: Mapping[str, str]) -> Any:
    """`value` with inputs as they are `called`, and of all other absolute paths the last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner, called) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner, called) for inner in value]
    if isinstance(value, str) and value.startswith("/"):
        return called.get(value, f"./{Path(value).name}")
    return value


def _front_matter(made: _Made) -> ModelCardData:
    agreed = verdict([each.stated for each in made.inputs]).agreed
    other = agreed is not None and agreed.identifier == "other"
    linked = agreed is not None and (
        agreed.link.startswith("http") or agreed.link in made.manifest["files"]
    )
    return ModelCardData(
        base_model=made.repositories or None,
        base_model_relation="merge" if made.repositories else None,
        library_name="transformers" if "config.json" in made.manifest["files"] else None,
        license=agreed.identifier if agreed else None,
        license_name=agreed.name if agreed and other else None,
        license_link=agreed.link if agreed and other and linked else None,
        tags=["merge", "distmerge", *(name for name in made.methods if _TAG.fullmatch(name))],
    )


def _sections(made: _Made, out: Path, output: str) -> Iterator[Section]:
    yield _title(made)
    yield _inputs(made)
    yield _licence(made)
    yield _recipe(made)
    yield _coefficients(made)
    yield _scores(out, output)
    yield _plots(out)
    yield _again(made)
    yield _check(made)
    yield _donor_card(made.donor)


def _title(made: _Made) -> Section:
    count = len(made.inputs)
    version = code(made.manifest["versions"]["distmerge"])
    return [
        f"# {_count(count, 'checkpoint')} merged by {' and '.join(map(code, made.methods))}",
        f"The weights are computed from those of {_count(count, 'checkpoint')} by distmerge "
        f"{version}; no training followed. Config, tokenizer and code are those of "
        f"{code(made.donor.name)}.",
    ]


def _inputs(made: _Made) -> Section:
    header = ["", "model", "revision", "commit", "step", "licence"]
    rows = [
        [
            str(number),
            code(each.name),
            code(each.revision),
            code(each.commit or ""),
            "" if each.step is None else str(int(each.step)),
            _stated(each),
        ]
        for number, each in enumerate(made.inputs)
    ]
    note = "What begins with ./ is a folder on the machine that merged, not a repository."
    local = [note] if len(made.repositories) < len({each.name for each in made.inputs}) else []
    return ["## Inputs", table(header, rows), *local]


def _stated(each: _Input) -> str:
    """'`mit` (`README.md`, `LICENSE`)'"""
    by_licence: dict[str, list[str]] = {}
    for file, licence in each.stated:
        by_licence.setdefault(str(licence or ""), []).append(file)
    parts = [
        f"{code(licence) if licence else 'not told by'} ({', '.join(code(file) for file in files)})"
        for licence, files in by_licence.items()
    ]
    return "; ".join(parts) or "unknown"


def _licence(made: _Made) -> Section:
    found = verdict([each.stated for each in made.inputs])
    if found.agreed:
        text = f"All inputs state {code(str(found.agreed))}."
    elif found.conflict:
        listed = ", ".join(code(name) for name in found.conflict)
        text = (
            f"**The inputs state licences that differ: {listed}.** So none is stated here: find "
            "out which terms hold for the merge before you use it."
        )
    else:
        text = (
            "Not every input states a licence that could be read, so none is stated here: ask "
            "those who made the inputs."
        )
    return ["## Licence", text]


def _recipe(made: _Made) -> Section:
    return ["## Recipe, as carried out", fence(_yaml(made.recipe), "yaml")]


def _yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=False, width=100)


def _coefficients(made: _Made) -> Section:
    groups = made.manifest.get("coefficients")
    if not groups:
        return []
    shown = groups[:SHOWN_GROUPS]
    header = ["input", *(_tensors(group["tensors"]) for group in shown)]
    rows = [
        [f"{n} {code(each.name)}", *(_coefficient(group, n) for group in shown)]
        for n, each in enumerate(made.inputs)
    ]
    blocks = [table(header, rows)]
    if left := len(groups) - len(shown):
        blocks.append(f"{_count(left, 'more set')} of coefficients: see {MANIFEST}.")
    return [folded("The weight of each input in what is a weighted sum", *blocks)]


def _coefficient(group: Mapping[str, Any], number: int) -> str:
    value = group["by_input"].get(str(number))
    return "" if value is None else f"{float(value):+.6g}"


def _tensors(names: str | list[str]) -> str:
    """What a set of coefficients holds for: as the manifest has it, a list of names or words."""
    if isinstance(names, str):
        return escaped(names)
    return code(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _scores(out: Path, output: str) -> Section:
    """What was measured of all candidates: one number says little of the best of many."""
    path = out / FOLDER / SCORES
    if not path.is_file():
        return []
    scores = json.loads(path.read_bytes())
    marked = {"this model": output, "best": scores["best"], "baseline": scores["baseline"]}
    rows = []
    for candidate in scores["candidates"]:
        marks = ", ".join(mark for mark, name in marked.items() if name == candidate["name"])
        numbers = (_number(candidate[key]) for key in ("score", "difference", "error"))
        rows.append([code(candidate["name"]), *numbers, marks])
    header = ["output", "score", "difference to the baseline", "standard error", ""]
    return ["## Evaluation", _measured(scores), table(header, rows), escaped(scores["verdict"])]


def _measured(scores: Mapping[str, Any]) -> str:
    better = "lower" if scores["goal"] == "min" else "higher"
    if scores["metric"] != "loss":
        return f"A number that a command measured of each output ({better} is better)."
    text = code(Path(str(scores["text"])).name)
    return (
        f"Loss on held-out text ({text}: {int(scores['tokens'])} tokens in "
        f"{_count(int(scores['windows']), 'window')}), in nats per token ({better} is better). "
        "The same text chose among the outputs."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{float(value):.6g}"


def _plots(out: Path) -> Section:
    links = [
        f"![{escaped(path.stem)}]({FOLDER}/{quote(os.fsencode(path.name))})"
        for path in pictures(out)
    ]
    return ["## Report", *links] if links else []


def _again(made: _Made) -> Section:
    local = [each.name for each in made.inputs if not each.commit]
    copies = "The recipe above is recipe.yaml"
    if local:
        copies += "; the folders that it names with ./ must lie beside it"
    shards = int(made.manifest["shard_bytes"])
    digest = code(made.manifest["plan"])
    versions = [[escaped(key), code(str(v))] for key, v in made.manifest["versions"].items()]
    return [
        "## Make it again",
        f"{copies}. `plan` prints the digest {digest} if recipe and inputs are the same. The bytes "
        "do not depend on the number of ranks; they may on processor and versions.",
        fence(
            f"distmerge plan recipe.yaml --shard-size {shards}\n"
            f"distmerge merge recipe.yaml OUT --shard-size {shards}",
            "bash",
        ),
        folded("Versions", table(["", "version"], versions)),
    ]


def _check(made: _Made) -> Section:
    files = [
        [code(name), format_bytes(int(entry["bytes"])), code(entry["sha256"])]
        for name, entry in made.manifest["files"].items()
    ]
    return [
        "## Verify it",
        "Holds every file of a downloaded copy against its sha256; with the inputs at hand, "
        "`--recompute 1%` also computes a random share of the tensors again.",
        fence("distmerge verify FOLDER", "bash"),
        folded("sha256 of the files", table(["file", "bytes", "sha256"], files)),
    ]


def _donor_card(donor: _Input) -> Section:
    text = card_text(donor.folder)
    title = f"The model card of {donor.name}, which does not describe this model"
    return [folded(title, fence(text, "text"))] if text else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
