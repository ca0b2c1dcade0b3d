"""The report of merges on task vectors: its numbers against those of the tensors, its page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import distmerge
from distmerge import page
from distmerge.document import Plain
from distmerge.errors import OutputError
from distmerge.plots import canvas, draw
from distmerge.report import make, numbers
from distmerge.report_spectra import kept, summed_up
from tests.support.checkpoints import read_output
from tests.support.drawing import without_drawing
from tests.support.ranks import run_ranks
from tests.support.svc_reference import calibrated
from tests.support.tasks import SHAPES, Recipe, Tensors, family, recipe, write_family
from tests.unit.report_numbers import STRANGE
from tests.unit.test_report_page import check_page, read

Numbers = dict[str, Any]

TASKS = 3
MATRICES = [name for name in SHAPES if "layers" in name and "norm" not in name]
EXPERTS = "model.layers.0.mlp.experts.up_proj"
UP = "model.layers.0.mlp.up_proj.weight"
ALL = ["gamma.png", "directions.png", "singular_values.png", "tasks.png"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the pixels, for speed."""
    monkeypatch.setattr(canvas, "DPI", 50)


@pytest.fixture(scope="module")
def models() -> list[Tensors]:
    return family(SHAPES, TASKS)


@pytest.fixture(scope="module")
def folder(models: list[Tensors], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), models)


def merge(made: Recipe, out: Path) -> Numbers:
    """The content of report.json; nothing is drawn."""
    with without_drawing():
        found = distmerge.merge(made, out)
    assert found.report == out / "report/report.html"
    return content(out)


def content(out: Path) -> Numbers:
    found: Numbers = json.loads((out / "report/report.json").read_bytes())
    return found


def deltas(models: Sequence[Tensors], name: str) -> list[list[torch.Tensor]]:
    """By slice, then by task, float64."""
    base, *tasks = [m[name] if m[name].dim() == 3 else m[name][None] for m in models]
    return [[(task[at] - base[at]).double() for task in tasks] for at in range(len(base))]


def gammas(models: Sequence[Tensors], name: str, alpha: float, scale: float) -> torch.Tensor:
    """Of all directions of all slices, for the sum of the task vectors."""
    parts = [calibrated(torch.stack(d).sum(0), d, alpha, scale) for d in deltas(models, name)]
    return torch.cat([part.gamma for part in parts])


def cosines(models: Sequence[Tensors], names: Sequence[str]) -> torch.Tensor:
    parts = [[torch.cat([x.flatten() for x in d]) for d in zip(*deltas(models, n), strict=True)]
             for n in names]  # fmt: skip
    flat = torch.stack([torch.cat(each) for each in zip(*parts, strict=True)])
    unit = flat / flat.norm(dim=1, keepdim=True)
    products: torch.Tensor = unit @ unit.T
    return products


def test_gamma_is_told_by_module_and_layer(
    folder: Path, models: list[Tensors], tmp_path: Path
) -> None:
    made = recipe(folder, "task_arithmetic", TASKS, shared={"lambda": 0.7}, calibrate={})
    spectra = merge(made, tmp_path / "out")["spectra"]
    (output,) = spectra["outputs"]
    assert (output["name"], output["alpha"], output["lambda"]) == ("", pytest.approx(1 / 3), 0.7)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    everything = []
    for name in MATRICES:
        gamma = gammas(models, name, 1 / 3, 0.7)
        everything.append(gamma)
        kind = name.removeprefix("model.layers.0.").removesuffix(".weight")
        own = output["modules"][kind]
        assert own["quantiles"] == pytest.approx(torch.quantile(gamma, levels).tolist(), rel=1e-4)
        assert own["damped"] == pytest.approx(float((gamma < 1).double().mean()))
        assert own["layers"] == [[0, own["quantiles"][2]]]
    gamma = torch.cat(everything)
    assert output["damped"] == pytest.approx(float((gamma < 1).double().mean()))
    assert output["amplified"] == pytest.approx(float((gamma > 1).double().mean()))
    assert 0 < output["damped"] < 1
    assert [m["directions"] for m in spectra["modules"]].count(3 * 20) == 1
    assert sum(module["directions"] for module in spectra["modules"]) == len(gamma)
    assert spectra["matrices"] == len(MATRICES) + 2
    assert spectra["missing"] == 0


def test_task_vectors_are_compared(folder: Path, models: list[Tensors], tmp_path: Path) -> None:
    """Over all matrices, and by module: also for methods that calibrate nothing."""
    found = merge(recipe(folder, "tsv_m", TASKS), tmp_path / "out")
    spectra = found["spectra"]
    assert spectra["tasks"] == ["task-1", "task-2", "task-3"]
    whole = cosines(models, MATRICES)
    assert torch.tensor(spectra["cosines"]).allclose(whole.float(), atol=1e-5)
    (experts,) = [module for module in spectra["modules"] if "experts" in module["name"]]
    own = cosines(models, [EXPERTS])
    assert experts["cosine"] == pytest.approx(float(own.triu(1).sum() / 3), abs=1e-5)
    assert experts["matrices"] == 3
    assert spectra["outputs"] == spectra["singular_values"] == []
    assert found["title"] == "TSV-M of 3 models"


def test_singular_values_are_those_of_the_update(
    folder: Path, models: list[Tensors], tmp_path: Path
) -> None:
    """Of what is added to the base, lambda and gamma included; of experts, the first's."""
    made = recipe(folder, "ties", TASKS, own={"density": 0.5}, shared={"lambda": 0.6})
    merge({**made, "calibrate": {"method": "svc"}}, tmp_path / "after")
    distmerge.merge(made, tmp_path / "before")
    updates = {
        key: {n: x - models[0][n] for n, x in read_output(tmp_path / key).items()}
        for key in ("before", "after")
    }
    found = content(tmp_path / "after")["spectra"]["singular_values"]
    assert len(found) == 4
    for one in found:
        for key in ("before", "after"):
            update = updates[key][one["tensor"]]
            sigma = torch.linalg.svdvals((update[0] if update.dim() == 3 else update).double())
            assert one["places"] == list(range(1, len(sigma) + 1))
            ours = torch.tensor(sorted(one[key], reverse=True), dtype=torch.float64)
            assert ours.allclose(sigma, rtol=1e-3, atol=1e-6), (one["tensor"], key)


def test_every_output_of_a_sweep_is_told(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "task_arithmetic", TASKS, calibrate={})
    made["sweep"] = {"parameters.lambda": [0.1, 0.3, 1], "calibrate.alpha": ["auto", 1]}
    found = merge(made, tmp_path / "out")
    outputs = found["spectra"]["outputs"]
    assert [output["name"] for output in outputs] == [each["name"] for each in found["outputs"]]
    assert [output["lambda"] for output in outputs] == [0.1, 0.1, 0.3, 0.3, 1, 1]
    assert [round(output["alpha"], 3) for output in outputs] == [0.333, 1] * 3
    assert [bool(output["modules"]) for output in outputs] == [True] * 4 + [False] * 2
    # The smaller the scale, the more is amplified; with alpha 1 nothing ever is.
    assert [output["amplified"] for output in outputs[1::2]] == [0.0, 0.0, 0.0]
    amplified = [output["amplified"] for output in outputs[::2]]
    assert amplified == sorted(amplified, reverse=True)
    assert [output["ceiling"] for output in outputs[:2]] == pytest.approx([0.95, 0.95])
    assert outputs[4]["ceiling"] == 0


def test_of_a_sweep_the_chosen_output_is_told_in_full(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "task_arithmetic", TASKS, calibrate={})
    made["sweep"] = {"parameters.lambda": [0.1, 0.3, 1]}
    script = tmp_path / "score.py"
    script.write_text("import sys; print(0 if sys.argv[1].endswith('=0.3') else 1)")
    made["select"] = {"command": f"{sys.executable} {script} {{model}}", "goal": "min"}
    spectra = merge(made, tmp_path / "out")["spectra"]
    assert [output["name"] for output in spectra["outputs"] if output["modules"]] == ["lambda=0.3"]
    assert {one["output"] for one in spectra["singular_values"]} == {"lambda=0.3"}


def test_singular_values_are_not_mistaken_for_those_of_another_output(
    folder: Path, models: list[Tensors], tmp_path: Path
) -> None:
    """Each density makes other matrices to calibrate; of these the last one's are kept."""
    made = recipe(folder, "ties", TASKS, calibrate={})
    made["sweep"] = {"parameters.density": [0.3, 0.9]}
    for entry in made["models"]:  # type: ignore[union-attr]
        entry["parameters"] = {"weight": 1}  # type: ignore[index, call-overload]
    found = merge(made, tmp_path / "out")["spectra"]["singular_values"]
    assert {one["output"] for one in found} == {"density=0.9"}
    for one in (each for each in found if each["tensor"] != EXPERTS):
        merged = read_output(tmp_path / "out/density=0.9")[one["tensor"]]
        sigma = torch.linalg.svdvals((merged - models[0][one["tensor"]]).double())
        ours = torch.tensor(sorted(one["after"], reverse=True), dtype=torch.float64)
        assert ours.allclose(sigma, rtol=1e-3, atol=1e-6)


def test_fall_backs_are_listed(tmp_path: Path) -> None:
    """Directions 2^-30 of the largest, which alpha brings up, take another Gram matrix."""
    hard, easy = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(2))
    steep = torch.diag(torch.tensor([1, 2.0**-10, 2.0**-30, 2.0**-31]))
    base = {name: torch.zeros(4, 4) for name in (hard, easy)}
    write_family(tmp_path, [base, {hard: steep, easy: torch.eye(4)}])
    made = recipe(tmp_path, "task_arithmetic", 1, calibrate={"alpha": 1e-7})
    found = merge(made, tmp_path / "out")["spectra"]["fallbacks"]
    assert [entry["tensor"] for entry in found] == [hard]
    assert "1e-07" in found[0]["fallback"]
    text = make(tmp_path / "out").read_text()
    assert "1 fall-back" in text
    assert f"<li>{hard}</li>" in text


def test_what_an_earlier_attempt_could_not_keep_is_counted(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "task_arithmetic", TASKS, calibrate={})
    out = tmp_path / "out"
    merge(made, out)
    path = out / "report/spectra.json"
    found = json.loads(path.read_bytes())
    plan = distmerge.plan(made)
    assert kept(plan, found) == found
    path.write_text(json.dumps(kept(plan, [e for e in found if "experts" not in e["tensor"]])))
    spectra = numbers(out)["spectra"]
    assert (spectra["matrices"], spectra["missing"]) == (len(MATRICES) - 1, 3)
    assert "Of 3 more no numbers are left" in make(out).read_text()


def merge_plainly(made: Recipe, out: Path) -> None:
    """What a rank does."""
    with without_drawing():
        distmerge.merge(made, out)


def test_the_same_bytes_at_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "dare_ties", TASKS, own={"density": 0.5}, calibrate={})
    for ranks in (1, 2):
        run_ranks(merge_plainly, ranks, made, tmp_path / str(ranks))
    one, two = [(tmp_path / f"{n}/report/report.json").read_bytes() for n in (1, 2)]
    assert one == two


def test_the_page_and_the_plots_follow_from_what_lies_in_out(folder: Path, tmp_path: Path) -> None:
    """The inputs may be gone by then."""
    gone = shutil.copytree(folder, tmp_path / "gone")
    out = tmp_path / "out"
    distmerge.merge(recipe(gone, "task_arithmetic", TASKS, calibrate={}), out)
    before = {path.name: path.read_bytes() for path in (out / "report").iterdir()}
    assert set(before) == {*ALL, "report.html", "report.json", "spectra.json"}
    shutil.rmtree(gone)
    make(out)
    assert before == {path.name: path.read_bytes() for path in (out / "report").iterdir()}
    text = before["report.html"].decode()
    words = " ".join(" ".join(read(text).texts).split())
    assert "Task arithmetic + SVC of 3 models" in words
    assert "3 models (task-1, task-2, task-3) merged into base." in words
    assert "gamma is below 1 and damps it" in words
    assert "7 matrices were calibrated." in words
    assert "No fall-back was needed" in words
    assert text.count("<img") == len(ALL)


@pytest.mark.parametrize("method", ["ties", "expo", "task_arithmetic"])
def test_without_matrices_there_is_no_report(folder: Path, tmp_path: Path, method: str) -> None:
    count = 1 if method == "expo" else TASKS
    shared: dict[str, Plain] = {"alpha": 0.3} if method == "expo" else {}
    made = recipe(folder, method, count, shared=shared)
    assert distmerge.merge(made, tmp_path / "out").report is None
    assert not (tmp_path / "out/report").exists()


def test_models_of_one_name_are_told_apart(models: list[Tensors], tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_family(tmp_path / run, models[:2])
    made = recipe(tmp_path / "a", "iso_c", 1)
    made["models"] = [{"model": str(tmp_path / run / "task-1")} for run in ("a", "b")]
    spectra = merge(made, tmp_path / "out")["spectra"]
    assert spectra["tasks"] == ["a/task-1", "b/task-1"]
    assert spectra["cosines"] == [[pytest.approx(1)] * 2] * 2


def test_a_choice_among_weighted_sums_has_a_page(folder: Path, tmp_path: Path) -> None:
    """Its outputs have no weights by checkpoint to show."""
    made: Recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(folder / f"task-{n}"), "parameters": {"weight": n}} for n in (1, 2)
        ],
        "sweep": {"models.0.parameters.weight": [1, 2]},
        "select": {"command": f"{sys.executable} -c print(1) {{model}}", "goal": "min"},
    }
    found = distmerge.merge(made, tmp_path / "out").report
    assert found is not None
    assert "Weighted sum of 2 models" in found.read_text()


@cache
def entry() -> Numbers:
    """Of one matrix, as spectra.json has it."""
    gamma = {"quantiles": [0.2, 0.5, 1, 2, 4], "damped": 0.5, "amplified": 0.4, "gamma": [0.3, 2]}
    return {
        "tensor": "x", "start": 0, "matrices": 1, "shape": [2, 3], "products": [1, 0.1, 1],
        "fallback": None, "places": [0, 1], "sigma": [2, 1], "sigma_of": [""],
        "outputs": {"": {"alpha": 0.25, "lambda": 1, **gamma}},
    }  # fmt: skip


def drawable(entries: Sequence[Numbers], tasks: Sequence[str] = ("a", "b")) -> Numbers:
    outputs: list[Numbers] = [{"name": "", "values": {}, "trend": None, "coefficients": []}]
    return {
        "title": "TIES + SVC of 2 models", "method": "ties", "base": tasks[0],
        "checkpoints": [{"label": task, "step": None} for task in tasks], "outputs": outputs,
        "trends": [], "scores": None, "spectra": summed_up(entries, tasks, [""], [""]),
    }  # fmt: skip


def test_a_cell_of_many_matrices_shows_that_in_the_middle() -> None:
    """Weighted by directions: experts are as many as they are."""
    entries = []
    for expert, median in enumerate([0.5, 0.6, 3, 3]):
        own = {**entry()["outputs"][""], "quantiles": [0.2, 0.4, median, 3, 4]}
        name = f"model.layers.7.experts.{expert}.up_proj.weight"
        entries.append(
            {**entry(), "tensor": name, "matrices": 3 - expert // 2, "outputs": {"": own}}
        )
    (module,) = summed_up(entries, ("a", "b"), [""], [""])["outputs"][0]["modules"].items()
    assert module[0] == "experts.*.up_proj"
    assert module[1]["layers"] == [[7, 0.6]]
    assert module[1]["ceiling"] == pytest.approx(0.05)


def test_matrices_are_chosen_from_all_depths_and_of_several_kinds() -> None:
    entries = []
    for layer in range(9):
        for kind, low in (("q", 0.1), ("k", 0.2), ("v", 0.3)):
            own = {**entry()["outputs"][""], "quantiles": [low, 0.5, 1, 2, 4]}
            name = f"layers.{layer}.{kind}.weight"
            entries.append({**entry(), "tensor": name, "outputs": {"": own}})
    found = summed_up(entries, ("a", "b"), [""], [""])["singular_values"]
    assert [one["tensor"] for one in found] == [
        "layers.0.q.weight", "layers.1.q.weight", "layers.4.k.weight", "layers.8.v.weight",
    ]  # fmt: skip


CASES = {
    "strange": [f"{stack}.{n}.{k}" for stack in ("enc", "dec") for n in range(3) for k in STRANGE],
    "200 layers": [
        f"layers.{n}.{kind}.weight" for n in range(200) for kind in ("q", "experts.1.w")
    ],
    "no layers": ["proj.weight", *STRANGE],
    "one matrix": ["layers.3.weight"],
}


@pytest.mark.parametrize("names", CASES.values(), ids=CASES.keys())
def test_any_names_can_be_drawn_and_are_text(
    names: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [{**entry(), "tensor": name, "fallback": STRANGE[0]} for name in names]
    found = drawable(entries, [STRANGE[0], STRANGE[4]])
    plots = draw(found, tmp_path)
    layered = "no layers" if names == CASES["no layers"] else ""
    assert [plot.name for plot in plots] == (ALL[1:] if layered else ALL)
    assert not caplog.records
    text = page.html(found, plots, tmp_path)
    check_page(text, plots)
    assert draw(json.loads(json.dumps(found)), tmp_path) == plots


def test_what_can_not_be_drawn_is_left_out(tmp_path: Path) -> None:
    """One task has nothing to compare with; a zero matrix has no singular values, nor cosines."""
    one = drawable([{**entry(), "products": [1]}], ["a"])
    assert [plot.name for plot in draw(one, tmp_path)] == ALL[1:3]
    zero = {**entry(), "tensor": "layers.0.q", "products": [0, 0, 0], "sigma": [0, 0]}
    found = drawable([zero])
    assert found["spectra"]["cosines"] == [[None, None], [None, None]]
    assert [plot.name for plot in draw(found, tmp_path)] == [
        "gamma.png",
        "directions.png",
        "tasks.png",
    ]
    assert "&ndash;" in page.html(found, [], tmp_path)


def test_singular_values_that_are_rounding_are_left_out(tmp_path: Path) -> None:
    """They would stretch the axis until nothing else could be seen."""
    pictures = []
    for noise in (1e-12, 1e-15):
        found = drawable([{**entry(), "tensor": "layers.0.q", "sigma": [2, noise]}])
        draw(found, tmp_path)
        pictures.append((tmp_path / "singular_values.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "change",
    [
        {"products": [1, 2]}, {"products": ["x"] * 6}, {"products": [float("nan")] * 6},
        {"sigma": []}, {"shape": []}, {"matrices": 0}, {"outputs": []}, {"outputs": {"": 1}},
        {"outputs": {"": {}}}, {"tensor": 3}, {"fallback": ...},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_spectra_are_refused(folder: Path, tmp_path: Path, change: Numbers) -> None:
    out = tmp_path / "out"
    merge(recipe(folder, "task_arithmetic", TASKS, calibrate={}), out)
    path = out / "report/spectra.json"
    found = json.loads(path.read_bytes())
    found[0] = {key: value for key, value in {**found[0], **change}.items() if value is not ...}
    path.write_text(json.dumps(found))
    with pytest.raises(OutputError, match="no report can be made"):
        numbers(out)
