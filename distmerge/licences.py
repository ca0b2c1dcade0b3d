"""The licences of a merge's inputs: what their files state, and what follows for the output.

Nothing is guessed. A model card states a licence in its front matter. A licence file does if it is,
word for word, one of two texts that are the same everywhere. Who states nothing stays unknown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from distmerge.errors import SourceError
from distmerge.sources.sidecars import read_sidecar

CARD = "README.md"

MAX_CARD = 1_000_000
MAX_LICENCE = 200_000
MAX_FRONT_MATTER = 20_000
"""Characters, here; the others are bytes. Parsing takes seconds for a million."""

_FILES = ("license", "licence", "copying")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", re.DOTALL)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w.+-]{1,96}")
_LINK = re.compile(r"https?://[^\s<>\"]{1,300}|LICENSE[\w.-]{0,40}")
_UNSAID = ("unknown", "other")


class Licence(NamedTuple):
    """As a model card of the Hub states it; `name` and `link` belong to the identifier 'other'."""

    identifier: str
    name: str = ""
    link: str = ""

    def __str__(self) -> str:
        return self.name or self.identifier


class Statement(NamedTuple):
    """A file of an input that should tell its licence, and what it tells: None if we can't say."""

    file: str
    licence: Licence | None


class Verdict(NamedTuple):
    """What holds for all inputs: the licence that they agree on, and what they name where they
    do not. Without either, some input states none."""

    agreed: Licence | None
    conflict: tuple[str, ...]


def statements(folder: Path) -> tuple[Statement, ...]:
    """The model card and the licence files of an input, as far as they are there; () for none.

    A file that can't be read, or leads out of the folder, tells nothing.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return ()
    licences = [name for name in names if name.lower().startswith(_FILES)]
    found = [Statement(CARD, _of_card(_text(folder, CARD, MAX_CARD)))] if CARD in names else []
    found += [Statement(name, _of_text(_text(folder, name, MAX_LICENCE))) for name in licences]
    return tuple(found)


def verdict(inputs: Sequence[Sequence[Statement]]) -> Verdict:
    """From the statements of every input."""
    stated = [[s.licence for s in each if s.licence is not None] for each in inputs]
    licences = [licence for each in stated for licence in each]
    terms = {(licence.identifier, licence.name) for licence in licences}
    if len(terms) > 1:
        return Verdict(None, tuple(sorted(name or identifier for identifier, name in terms)))
    if not licences or not all(stated):
        return Verdict(None, ())
    links = {licence.link for licence in licences}
    return Verdict(licences[0] if len(links) == 1 else licences[0]._replace(link=""), ())


def card_text(folder: Path) -> str:
    """The model card in `folder` without its front matter; '' where there is none to read."""
    text = _text(folder, CARD, MAX_CARD)
    found = _FRONT_MATTER.match(text)
    return (text[found.end() :] if found else text).strip()


def _text(folder: Path, name: str, limit: int) -> str:
    try:
        content = read_sidecar(folder, Path(name), limit=limit)
    except SourceError:
        return ""
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def _of_card(text: str) -> Licence | None:
    """The licence in a card's front matter."""
    block = _FRONT_MATTER.match(text)
    fields = _fields(block[1]) if block and len(block[1]) <= MAX_FRONT_MATTER else {}
    identifier = fields.get("license", "").lower()
    if identifier == "other" and _NAME.fullmatch(fields.get("license_name", "")):
        link = fields.get("license_link", "")
        return Licence("other", fields["license_name"], link if _LINK.fullmatch(link) else "")
    if identifier in _UNSAID or not _IDENTIFIER.fullmatch(identifier):
        return None
    return Licence(identifier)


def _fields(front_matter: str) -> dict[str, str]:
    """The texts at the top of a mapping; {} for what is no sound YAML.

    Nodes are not made into objects: tags do nothing, and aliases can't multiply.
    """
    try:
        root = yaml.compose(front_matter, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(root, yaml.MappingNode):
        return {}
    pairs = [(key.value, _scalar(value)) for key, value in root.value]
    named = [(key, text) for key, text in pairs if isinstance(key, str) and text]
    fields = dict(named)
    return fields if len(fields) == len(named) else {}


def _scalar(node: yaml.Node) -> str:
    """The text of a scalar, or of the only entry of a list: `license: [mit]` is usual too."""
    if isinstance(node, yaml.SequenceNode) and len(node.value) == 1:
        node = node.value[0]
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


class _Known(NamedTuple):
    """A text that is the same everywhere, from its first words to its last, in small letters and
    without punctuation; a title and copyright lines may stand before it, an appendix after."""

    identifier: str
    first: str
    last: str
    sha256: str
    appendix: str = ""


_KNOWN = (
    _Known(
        "apache-2.0",
        "version 2 0 january 2004",
        "end of terms and conditions",
        "2a29cde102146ca7317f2b989ef942a7a03e20379d7e839572371276472a6fba",
        r"( appendix how to apply .{0,1500} limitations under the license)?",
    ),
    _Known(
        "mit",
        "permission is hereby granted free of charge to any person obtaining a copy",
        "dealings in the software",
        "027375b7d5e155ec836f1ebfc61ec3519477cac4ecb2a987208a070b77747ab7",
    ),
)

MAX_HEAD = 40
"""Words before such a text. A clause that takes rights away needs more."""


def _of_text(text: str) -> Licence | None:
    words = " ".join(re.findall(r"\w+", text.lower()))
    return next((Licence(each.identifier) for each in _KNOWN if _is(each, words)), None)


def _is(known: _Known, words: str) -> bool:
    head, first, rest = words.partition(known.first)
    terms, last, tail = (first + rest).partition(known.last)
    # The last words are not in the hash: where they stand tells where the text ends.
    same = hashlib.sha256(terms.encode()).hexdigest() == known.sha256
    ends = bool(last) and re.fullmatch(known.appendix, tail) is not None
    return same and ends and len(head.split()) <= MAX_HEAD
