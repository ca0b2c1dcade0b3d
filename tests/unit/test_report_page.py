"""The report from the outside: which files come out, that they are whole, safe and the same."""

from __future__ import annotations

import copy
import json
import logging
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from distmerge import page
from distmerge.plots import (
    Plot,
    canvas,
    coefficients,
    cosines,
    draw,
    labels,
    modules,
    scores,
    trajectory,
)
from tests.unit.report_numbers import STRANGE, averaged, extrapolated, llama, strange

Numbers = dict[str, Any]

ALL = {f"{n}.png" for n in ("scores", "trajectory", "explained", "coefficients", "cosines")}
ALL |= {"modules.png"}
UNSCORED = ALL - {"scores.png"}
SWEEP = {"scores.png", "coefficients.png"}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the pixels, for speed; the layout stays nearly the same."""
    monkeypatch.setattr(canvas, "DPI", 50)


def plain() -> Numbers:
    return extrapolated()


def changed(change: Callable[[Numbers], object], base: Callable[[], Numbers] = plain) -> Numbers:
    numbers = base()
    change(numbers)
    return numbers


def bare() -> Numbers:
    """What an average of checkpoints into one output has to say."""
    numbers = averaged({"last": [4]})
    return {**numbers, "scores": None}


def only(kept: int) -> Numbers:
    """Scores of which only `kept` are numbers: a command may fail to give one."""
    numbers = extrapolated()
    for candidate in numbers["scores"]["candidates"][kept:]:
        candidate.update(score=None, difference=float("nan"), error=None)
    return numbers


def standing_still() -> Numbers:
    """All checkpoints are the same: no difference has a direction, no module moves."""
    numbers = extrapolated(5)
    trend = numbers["trends"][0]
    plane = trend["plane"]
    plane["raw"], plane["merged"] = [[0.0, 0.0]] * 5, [[0.0, 0.0]] * 3
    for point in plane["outputs"]:
        point["at"] = [0.0, 0.0]
    trend["cosines"] = {"raw": [[None] * 4] * 4, "merged": [[float("nan")] * 2] * 2}
    trend["modules"] = [{**module, "norm": 0.0} for module in trend["modules"]]
    return numbers


CASES: dict[str, tuple[Callable[[], Numbers], set[str]]] = {
    "three checkpoints": (lambda: extrapolated(3, windows=[2]), ALL),
    "two windows": (lambda: extrapolated(windows=[2, 4], steps=[0, 1]), ALL),
    "strange names": (strange, ALL),
    "standing still": (standing_still, ALL),
    "one output": (lambda: extrapolated(2, windows=[1], steps=[0.5]), UNSCORED - {"cosines.png"}),
    "one average": (bare, {"coefficients.png"}),
    "a swept number": (lambda: averaged({"schedule.ema": [0.001, 0.01, 0.1, 1.0]}), SWEEP),
    "two swept keys": (lambda: averaged({"last": [4, 8], "schedule": ["wma", "uniform"]}), SWEEP),
    "many lines": (lambda: averaged({"last": range(2, 5), "ema": range(1, 9)}), SWEEP),
    "three swept keys": (
        lambda: averaged({"a": [1, 2], "b": [1, 2], "c": ["x", True]}, goal="max"),
        SWEEP,
    ),
    "words": (lambda: averaged({"schedule": ["wma", "uniform", "linear decay"]}), SWEEP),
}
"""What is drawn in full, and the files that must come out: no more, no fewer."""


@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES.keys())
def test_every_plot_with_numbers_comes_out_whole(
    make: Callable[[], Numbers], expected: set[str], tmp_path: Path, caplog: Any
) -> None:
    numbers = make()
    before = copy.deepcopy(numbers)
    with caplog.at_level(logging.WARNING):
        plots = draw(numbers, tmp_path)
    assert {plot.name for plot in plots} == expected
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(size(tmp_path / plot.name)[0] == 9 * canvas.DPI for plot in plots)
    assert all(plot.title and plot.caption for plot in plots)
    assert not caplog.records
    assert repr(numbers) == repr(before)  # NaN is not equal to itself
    check_page(page.html(numbers, plots, tmp_path), plots)


PARTS: dict[str, tuple[Any, Callable[[], Numbers], bool]] = {
    "no scores": (scores, lambda: changed(lambda n: n.update(scores=None)), False),
    "one score": (scores, lambda: only(1), False),
    "two scores": (scores, lambda: only(2), True),
    "far off": (
        scores,
        lambda: changed(lambda n: n["scores"]["candidates"][2].update(difference=1.0)),
        True,
    ),
    "thirty outputs": (trajectory, lambda: extrapolated(31, windows=[8], steps=range(30)), True),
    "thirty weights": (coefficients, lambda: extrapolated(31, windows=[8], steps=range(30)), True),
    "six windows": (trajectory, lambda: extrapolated(16, windows=range(2, 8), steps=[1]), True),
    "sixty checkpoints": (cosines, lambda: extrapolated(60, windows=[16]), True),
    "no modules": (modules, lambda: changed(lambda n: n["trends"][0].update(modules=[])), False),
    "126 layers": (modules, lambda: extrapolated(modules=llama(126)), True),
    "only layers": (modules, lambda: extrapolated(modules=llama(4)[1:-2]), True),
    "whole layers": (modules, lambda: extrapolated(modules=llama(4, kinds=[""])), True),
    "no layers": (modules, lambda: extrapolated(modules=["model.layers", "lm_head"]), True),
}
"""What matters to one kind of plot, and whether there is anything to draw."""


@pytest.mark.parametrize(("kind", "make", "drawn"), PARTS.values(), ids=PARTS.keys())
def test_one_kind_of_plot(
    kind: Any, make: Callable[[], Numbers], drawn: bool, tmp_path: Path, caplog: Any
) -> None:
    with canvas.style():
        plot = kind.draw(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ([plot.name] if drawn else [])
    assert (plot is not None) == drawn
    assert not caplog.records


def size(png: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


class Reader(HTMLParser):
    """All tags with their attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def check_page(text: str, plots: list[Plot]) -> None:
    """Well formed, and nothing in it that a browser would fetch or run."""
    reader = read(text)
    assert reader.open == []
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "a", "b", "object"}
    images = [of["src"] or "" for tag, of in reader.tags if tag == "img"]
    assert len(images) == len(plots)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    for _, attributes in reader.tags:
        assert not {name for name in attributes if name.startswith("on")} | {
            name for name in attributes if name in ("href", "srcset", "action")
        }
    assert not re.search(r"url\(|@import", text)
    text.encode("utf-8")


def test_equal_numbers_give_equal_bytes(tmp_path: Path) -> None:
    """Fresh or read from report.json; a second drawing replaces the first."""
    plots = draw(extrapolated(), tmp_path)
    text = page.html(extrapolated(), plots, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == ALL
    assert not any(b"Software" in data for data in before.values())
    numbers = json.loads(json.dumps(extrapolated()))
    assert draw(numbers, tmp_path) == plots
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert page.html(numbers, plots, tmp_path) == text


def test_the_user_s_settings_neither_count_nor_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    draw(bare(), tmp_path / "a")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "text.parse_math": True}):
        before = dict(mpl.rcParams)
        draw(bare(), tmp_path / "b")
        assert dict(mpl.rcParams) == before
    name = "coefficients.png"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_drawing_needs_no_pyplot_and_the_page_no_matplotlib() -> None:
    program = (
        "import sys, distmerge.page; assert 'matplotlib' not in sys.modules;"
        "import distmerge.plots; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_plot_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(bare(), tmp_path)
    old = (tmp_path / "coefficients.png").read_bytes()

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(OSError, match="No space"):
        draw(averaged({"last": [4, 8]}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coefficients.png"]
    assert (tmp_path / "coefficients.png").read_bytes() == old


def test_the_page_says_what_the_selection_says(tmp_path: Path) -> None:
    numbers = extrapolated()
    numbers["scores"]["verdict"] = "Nothing is established & that is that."
    text = page.html(numbers, [], tmp_path)
    assert text.index("Nothing is established &amp; that is that.") < text.index("<table>")
    assert "held-out.txt" in text
    words = " ".join(read(text).texts)
    assert "11 checkpoints read, from step 700 to step 1700." in words
    assert "random walk" in words
    assert re.search(r"\+0\.00000.*?0\.00000.*?baseline", text)
    best = next(line for line in text.splitlines() if '<tr class="best">' in line)
    assert f"<td>{numbers['scores']['best']}</td>" in best
    assert ">best</span>" in best
    assert text.count("<details>") == 2


def test_the_page_has_every_coefficient_and_module(tmp_path: Path) -> None:
    numbers = extrapolated()
    text = page.html(numbers, [], tmp_path)
    for output in numbers["outputs"]:
        assert all(f">{weight:+.6f}<" in text for weight in output["coefficients"])
    for module in numbers["trends"][0]["modules"]:
        assert f"<td>{module['name']}</td>" in text


def test_strange_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    text = page.html(strange(), [], tmp_path)
    shown = "".join(read(text).texts)
    for name in STRANGE:
        assert name.encode("utf-8", "replace").decode() in shown
    assert "<script" not in text


def test_scores_alone_are_not_lost(tmp_path: Path) -> None:
    """A candidate that was not written as an output still has its line."""
    numbers = extrapolated()
    del numbers["outputs"][1]
    assert "<td>step=0.5</td>" in page.html(numbers, [], tmp_path)


@pytest.mark.parametrize(
    ("score", "shown"),
    [(1.23456789, "1.23457"), (0.5, "0.50000"), (83.1234567, "83.1235"), (123456.789, "123456.79")],
)
def test_scores_are_shown_with_six_digits(score: float, shown: str, tmp_path: Path) -> None:
    numbers = extrapolated()
    for candidate in numbers["scores"]["candidates"]:
        candidate["score"] = score
    assert f'<td class="number">{shown}</td>' in page.html(numbers, [], tmp_path)


@pytest.mark.parametrize(
    ("name", "stack", "kind", "layer"),
    [
        ("model.layers.3.self_attn", "", "self_attn", 3),
        ("model.layers.12", "", "whole layer", 12),
        ("h.0.mlp.c_fc", "", "mlp.c_fc", 0),
        ("7", "", "whole layer", 7),
        ("a.2.experts.17.w1", "", "experts.*.w1", 2),
        ("a.1.new\nline", "", "new\nline", 1),
    ],
)
def test_the_first_number_of_a_module_is_its_layer(
    name: str, stack: str, kind: str, layer: int
) -> None:
    found = modules.split([{"name": name, "elements": 4, "norm": 6.0}])
    assert found.layered == {kind: {layer: 3.0}}
    assert found.others == {}


def test_experts_are_pooled_and_stacks_are_kept_apart() -> None:
    experts = [{"name": f"l.0.e.{i}", "elements": 2, "norm": 2.0} for i in range(3)]
    found = modules.split([*experts, {"name": "norm", "elements": 4, "norm": 1.0}])
    assert found.layered == {"e.*": {0: pytest.approx(2**0.5)}}
    assert found.others == {"norm": 0.5}
    pair = [{"name": f"{stack}.0.mlp", "elements": 1, "norm": 1.0} for stack in ("enc", "dec")]
    assert set(modules.split(pair).layered) == {"enc.*.mlp", "dec.*.mlp"}


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("plain", 40, "plain"),
        ("a\n b\t c", 40, "a b c"),
        ("0123456789", 7, "0123\N{HORIZONTAL ELLIPSIS}89"),
        ("\N{CJK UNIFIED IDEOGRAPH-540D}", 40, "\N{REPLACEMENT CHARACTER}"),
        ("\udc80", 40, "\N{REPLACEMENT CHARACTER}"),
        ("$x", 40, "$x"),
    ],
)
def test_text_on_a_plot_is_one_short_line_that_the_font_has(
    text: str, limit: int, expected: str
) -> None:
    assert canvas.clean(text, limit) == expected


def test_labels_never_cover_each_other() -> None:
    with canvas.style():
        figure = canvas.new_figure(4.0, "crowded")
        axes = figure.subplots()
        points = np.array([[0.1 * (i % 7), 0.01 * i] for i in range(40)])
        axes.plot(*points.T)
        wanted = [labels.Label(point, f"label {i}", "black") for i, point in enumerate(points)]
        canvas.settle(figure)
        labels.place(axes, wanted, [points], size=8)
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader line
    assert len(boxes) > 10
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i])
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1


def test_ticks_keep_apart() -> None:
    assert canvas.apart([0, 1, 2, 3, 4], 2) == [0, 2, 4]
    assert canvas.apart([0, 0.1, 5, 5.1, 5.2], 1) == [0, 2]
    assert canvas.every([str(i) for i in range(3)], 5) == [0, 1, 2]
    assert len(canvas.every([str(i) for i in range(1000)], 5)) <= 15
