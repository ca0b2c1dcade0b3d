"""Six tasks of telling short English texts apart, made of what Debian and npm packages hold."""

from __future__ import annotations

import email
import hashlib
import html
import json
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

INPUTS = Path("runs/experiment-svc/inputs")
WORDNET = Path("/usr/share/wordnet")

TRAIN, CHOOSE, REPORT = 2400, 240, 960
"""Examples of a task; it may have fewer to train on, but never fewer to choose and to report by."""

SECTIONS = ["net", "games", "sound", "graphics", "science", "text", "admin", "web", "mail", "fonts"]
INTERFACES = ["interface::commandline", "interface::x11"]
# Numbers of WordNet's lexicographer files. Nouns: acts, animals, artifacts, bodies, communication,
# food, places, people, plants, substances. Verbs: change, cognition, communication, contact,
# creation, motion, possession, social.
NOUNS = [4, 5, 6, 8, 10, 13, 15, 18, 20, 27]
VERBS = [30, 31, 32, 35, 36, 38, 40, 41]
MAILS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
MAIL_CHARACTERS = 240
# Brown's genres by letter: reportage, editorial, religion, skills, government, learned; fiction of
# any kind is one.
GENRES = {"a": 0, "b": 1, "d": 2, "e": 3, "h": 4, "j": 5, "k": 6, "l": 6, "n": 6, "p": 6}
PASSAGE_WORDS = 35

Example = tuple[str, int]
"""A text and the number of its class."""


class Task(NamedTuple):
    """A task; its held-out parts, which choose and which report, have as many of every class."""

    name: str
    train: list[Example]
    choose: list[Example]
    report: list[Example]

    @property
    def classes(self) -> int:
        return 1 + max(label for _, label in self.train)


@cache
def tasks() -> list[Task]:
    """Make all tasks, the same every time as long as the packages are."""
    packages = list(_packages())
    return [
        _split("debian-section", _sections(packages)),
        _split("debian-interface", _interfaces(packages)),
        _split("wordnet-noun", _glosses("noun", NOUNS)),
        _split("wordnet-verb", _glosses("verb", VERBS)),
        _split("spam", _mails()),
        _brown(),
    ]


def digest() -> str:
    """A hash that tells whether two machines have the same tasks."""
    return hashlib.sha256(json.dumps(tasks()).encode()).hexdigest()[:16]


def _split(name: str, found: Iterable[Example]) -> Task:
    """Deal texts out to the three parts; one that occurs twice is taken once."""
    chance = random.Random(name)
    classes = _classes(found)
    ends = [-(-count // len(classes)) for count in (CHOOSE, CHOOSE + REPORT)]
    for texts in classes:
        chance.shuffle(texts)
    return Task(
        name,
        _mixed([texts[ends[1] :] for texts in classes], TRAIN, chance),
        _mixed([texts[: ends[0]] for texts in classes], CHOOSE, chance),
        _mixed([texts[ends[0] : ends[1]] for texts in classes], REPORT, chance),
    )


def _classes(found: Iterable[Example]) -> list[list[str]]:
    """The texts of each class, sorted."""
    label_of = dict(found)
    classes: list[list[str]] = [[] for _ in range(1 + max(label_of.values()))]
    for text in sorted(label_of):
        classes[label_of[text]].append(text)
    return classes


def _mixed(classes: list[list[str]], count: int, chance: random.Random) -> list[Example]:
    """Take one text of each class in turn, up to `count`, and shuffle them."""
    labelled = [[(text, label) for text in texts] for label, texts in enumerate(classes)]
    turns = chain.from_iterable(zip_longest(*labelled))
    taken = list(islice((example for example in turns if example is not None), count))
    chance.shuffle(taken)
    return taken


def _packages() -> Iterator[dict[str, str]]:
    """The fields of all packages that the archive offers, as apt's own lists tell."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    for package in listing.stdout.split("\n\n"):
        yield dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", package, re.MULTILINE))


def _described(package: dict[str, str]) -> str:
    """The first line of a package's description."""
    return package.get("Description", package.get("Description-en", "")).partition("\n")[0]


def _sections(packages: list[dict[str, str]]) -> Iterator[Example]:
    for package in packages:
        section = package.get("Section", "").rpartition("/")[2]
        if section in SECTIONS and _described(package):
            yield _described(package), SECTIONS.index(section)


def _interfaces(packages: list[dict[str, str]]) -> Iterator[Example]:
    for package in packages:
        labels = [n for n, tag in enumerate(INTERFACES) if tag in package.get("Tag", "")]
        if len(labels) == 1 and _described(package):
            yield _described(package), labels[0]


def _glosses(kind: str, files: list[int]) -> Iterator[Example]:
    """WordNet's definitions, without their examples, by lexicographer file."""
    for line in (WORDNET / f"data.{kind}").read_text("latin-1").splitlines():
        if line.startswith(" "):  # the licence
            continue
        number = int(line.split(maxsplit=2)[1])
        if number in files:
            yield line.partition("|")[2].partition('; "')[0].strip(), files.index(number)


def _mails() -> Iterator[Example]:
    """The beginnings of mails, without headers: those tell who sent it and how it was filtered."""
    for folder, label in MAILS.items():
        for path in sorted((INPUTS / "mails" / "data" / folder).glob("*.txt")):
            mail = email.message_from_string(path.read_text("utf-8", errors="replace"))
            first = next(part for part in mail.walk() if not part.is_multipart())
            plain = re.sub(r"<[^>]+>", " ", html.unescape(str(first.get_payload())))
            text = re.sub(r"\s+", " ", plain)[:MAIL_CHARACTERS]
            if len(text) > 20:
                yield text, label


def _brown() -> Task:
    """Passages by genre. No document gives passages to two parts: its topic would tell."""
    chance = random.Random("brown-genre")
    parts: dict[str, list[Example]] = {"train": [], "choose": [], "report": []}
    for path in sorted((INPUTS / "brown").glob("c[a-r][0-9][0-9]")):
        if path.name[1] in GENRES:
            part = {0: "report", 1: "choose"}.get(int(path.name[2:]) % 5, "train")
            parts[part] += [(text, GENRES[path.name[1]]) for text in _passages(path)]
    counts = {"train": TRAIN, "choose": CHOOSE, "report": REPORT}
    mixed = {}
    for part, found in parts.items():
        classes = _classes(found)
        for texts in classes:
            chance.shuffle(texts)
        mixed[part] = _mixed(classes, counts[part], chance)
    return Task("brown-genre", **mixed)


def _passages(path: Path) -> Iterator[str]:
    words = [word.rpartition("/")[0] for word in path.read_text().split()]
    for start in range(0, len(words) - PASSAGE_WORDS, PASSAGE_WORDS):
        yield " ".join(words[start : start + PASSAGE_WORDS])
