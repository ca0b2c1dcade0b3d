"""Extra-Merge and sweeps by any number of ranks: the same bytes, all of OUT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import distmerge
from distmerge.assembly import AssembleMode
from distmerge.errors import NonFiniteError, PeerError
from distmerge.pipeline import MergeResult, Options
from distmerge.budget import SLOTS, step_elements
from distmerge.spec import PAGE
from tests.dist import cases, test_gather
from tests.dist.cases import BLOCK, Recipe, Tensors, fingerprints
from tests.support.checkpoints import read_output, write_checkpoint
from tests.support.commands import merge_command
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks

COUNT = 5
SMALL_SHARDS = Options(shard_size="200kB")


def merge(recipe: Recipe, out: Path, options: Options, *overrides: str) -> MergeResult:
    """What a rank does: several blocks and jobs for a tensor, and no plots."""
    cases.cut()
    without_drawing().start()
    return distmerge.merge(recipe, out, options=options, overrides=overrides)


def extra(folder: Path, **parameters: object) -> Recipe:
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(folder / "step-*"), "window": 2},
        "parameters": {"step": 1, **parameters},  # type: ignore[dict-item]
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all kinds of dtypes, whose largest tensor makes nine jobs."""
    folder = tmp_path_factory.mktemp("mixed")
    cases.write_steps(folder, cases.mixed, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def swept(run: Path) -> Recipe:
    recipe = extra(run, step=[0, 0.5], exclude=["half"])
    return {**recipe, "sweep": {"trajectory.window": [2, 3]}}


@pytest.fixture(scope="module")
def one_process(swept: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(merge, 1, swept, out, SMALL_SHARDS)
    return fingerprints(out)


def test_all_of_the_output_is_compared(one_process: dict[str, str]) -> None:
    folders = {str(Path(name).parent) for name in one_process}
    assert folders == {".", "report", *(f"window={w},step={s}" for w in (2, 3) for s in (0, 0.5))}
    assert {"report/report.json", "report/gram.safetensors", "distmerge.json"} < set(one_process)
    shards = [name for name in one_process if "step=0.5/model-" in name]
    assert len(shards) == 2 * 4


@pytest.mark.parametrize(
    ("ranks", "assemble"),
    [(2, "direct"), (3, "direct"), (4, "direct"), (1, "gather"), (3, "gather")],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    swept: Recipe, one_process: dict[str, str], tmp_path: Path, ranks: int, assemble: AssembleMode
) -> None:
    options = Options(shard_size="200kB", assemble=assemble)
    run_ranks(merge, ranks, swept, tmp_path / "out", options)
    assert fingerprints(tmp_path / "out") == one_process


def merge_blindly(recipe: Recipe, out: Path, options: Options, blind: tuple[int, ...]) -> set[str]:
    without_drawing().start()
    return test_gather.merge_blindly(recipe, out, options, blind).shards


@pytest.mark.parametrize(("ranks", "blind"), [(2, (1,)), (4, (1, 3))])
def test_ranks_that_do_not_see_the_folder_send_all_outputs_to_those_that_do(
    swept: Recipe, one_process: dict[str, str], tmp_path: Path, ranks: int, blind: tuple[int, ...]
) -> None:
    opened = run_ranks(merge_blindly, ranks, swept, tmp_path / "out", SMALL_SHARDS, blind)
    assert fingerprints(tmp_path / "out") == one_process
    assert [bool(names) for names in opened] == [rank not in blind for rank in range(ranks)]


def merge_tightly(recipe: Recipe, out: Path, assemble: AssembleMode, blocks: int) -> None:
    """With the smallest budget in which a step of so many blocks fits."""
    cases.cut()
    plan = distmerge.plan(recipe)
    buffers = len(plan.outputs) + COUNT
    budget = SLOTS * (max(plan.widths) * blocks * BLOCK + 2 * PAGE * buffers)
    assert step_elements(plan, budget) == blocks * BLOCK
    assert step_elements(plan, budget - SLOTS) == (blocks - 1) * BLOCK
    merge(recipe, out, Options(memory=str(budget), shard_size="200kB", assemble=assemble))


@pytest.mark.parametrize(
    ("ranks", "assemble", "blocks"), [(1, "direct", 3), (2, "gather", 2), (3, "direct", 2)]
)
def test_any_memory_budget_gives_the_same_bytes(
    swept: Recipe, one_process: dict[str, str], tmp_path: Path, ranks: int,
    assemble: AssembleMode, blocks: int,
) -> None:  # fmt: skip
    run_ranks(merge_tightly, ranks, swept, tmp_path / "out", assemble, blocks)
    assert fingerprints(tmp_path / "out") == one_process


def test_a_known_statistic_gives_the_same_bytes(
    swept: Recipe, one_process: dict[str, str], tmp_path: Path
) -> None:
    first = run_ranks(merge, 3, swept, tmp_path / "first", SMALL_SHARDS)
    again = run_ranks(merge, 2, swept, tmp_path / "again", SMALL_SHARDS)
    assert {result.statistic_seconds for result in again} == {0}
    assert again[0].read_bytes < first[0].read_bytes
    assert fingerprints(tmp_path / "again") == fingerprints(tmp_path / "first") == one_process


def without_report(folder: Path) -> dict[str, str]:
    found = fingerprints(folder)
    return {name: digest for name, digest in found.items() if not name.startswith("report/")}


def merge_each(recipe: Recipe, folder: Path, names: list[str], points: list[list[str]]) -> None:
    """Merge once for every name, with the overrides of each point; no cache is shared."""
    for name, overrides in zip(names, points, strict=True):
        merge(recipe, folder / name / "out", SMALL_SHARDS, *overrides)


def linear(folder: Path) -> Recipe:
    models: list[object] = [
        {"model": str(folder / f"step-{i}"), "parameters": {"weight": 1}} for i in range(3)
    ]
    return {"merge_method": "linear", "models": models}  # type: ignore[dict-item]


SWEEPS: dict[str, tuple[str, dict[str, list[object]]]] = {
    "steps": ("extra", {"parameters.step": [0, 0.5, -3]}),
    "spans and directions": (
        "extra",
        {"parameters.step.span": [0, 0.1], "parameters.direction": ["principal", "secant"]},
    ),
    "windows": ("extra", {"trajectory.window": [1, 2, 4], "trajectory.stride": [1]}),
    "schedules": ("extra", {"trajectory.schedule": ["uniform", "wma"]}),
    "schedules of an average": ("average", {"trajectory.schedule.ema": [0.1, 0.2, 1]}),
    "last": ("average", {"trajectory.last": [2, 3, 5]}),
    "weights": ("linear", {"models.0.parameters.weight": [0, 0.5, -1]}),
}


def recipe_of(kind: str, folder: Path) -> Recipe:
    if kind == "extra":
        recipe = extra(folder, exclude=["half"])
        return {**recipe, "parameters": {"exclude": ["half"]}}
    return linear(folder) if kind == "linear" else cases.average(folder)


def grid(keys: dict[str, list[object]]) -> list[list[str]]:
    points: list[list[str]] = [[]]
    for key, values in keys.items():
        points = [[*point, f"{key}={value}"] for point in points for value in values]
    return points


@pytest.mark.parametrize(("kind", "keys"), SWEEPS.values(), ids=SWEEPS)
def test_an_output_of_a_sweep_is_that_of_a_run_of_its_own(
    run: Path, tmp_path: Path, kind: str, keys: dict[str, list[object]]
) -> None:
    """To the byte, the manifest included."""
    recipe = recipe_of(kind, run)
    if kind == "extra" and not any(key.startswith("parameters.step") for key in keys):
        recipe["parameters"] = {"step": 0.5, "exclude": ["half"]}
    points = grid(keys)
    sweep: Recipe = {**recipe, "sweep": dict(keys)}  # type: ignore[arg-type]
    results = run_ranks(merge, 2, sweep, tmp_path / "out", SMALL_SHARDS)
    names = list(results[0].outputs)
    assert len(names) == len(points)
    run_ranks(merge_each, 1, recipe, tmp_path / "single", names, points)
    found = [without_report(tmp_path / "out" / name) for name in names]
    assert found == [without_report(tmp_path / "single" / name / "out") for name in names]
    assert len({tuple(files.items()) for files in found}) == len(names)


def test_an_output_does_not_see_the_inputs_that_only_others_take(tmp_path: Path) -> None:
    """The first checkpoint would bring float64 arithmetic, and a NaN, to where it has no weight."""
    for step in range(3):
        tensors = cases.small(torch.Generator().manual_seed(step))
        if step == 0:
            tensors = {"first": tensors["first"].double(), "second": tensors["second"] / 0}
        write_checkpoint(tmp_path / f"in/step-{step}", tensors)
    recipe, options = cases.average(tmp_path / "in"), Options(allow_nonfinite=True)
    sweep: Recipe = {**recipe, "sweep": {"trajectory.last": [2, 3]}}
    (result,) = run_ranks(merge, 1, sweep, tmp_path / "out", options)
    assert result.nonfinite == 11 * BLOCK + 1
    run_ranks(merge, 1, recipe, tmp_path / "single", Options(), "trajectory.last=2")
    assert fingerprints(tmp_path / "out/last=2") == fingerprints(tmp_path / "single")
    assert not read_output(tmp_path / "out/last=3")["second"].isfinite().any()


def shards(folder: Path) -> dict[str, str]:
    return {name: d for name, d in fingerprints(folder).items() if "model" in name}


@pytest.mark.parametrize("schedule", ["uniform", "wma"])
def test_without_a_step_it_is_the_average_of_the_last_window(
    run: Path, tmp_path: Path, schedule: str
) -> None:
    given = f"trajectory.schedule={schedule}"
    still = ["trajectory.window=3", "parameters.step=0", given]
    run_ranks(merge, 2, extra(run), tmp_path / "still", SMALL_SHARDS, *still)
    last = ["trajectory.last=3", given]
    run_ranks(merge, 1, cases.average(run), tmp_path / "average", SMALL_SHARDS, *last)
    assert shards(tmp_path / "still") == shards(tmp_path / "average")


def on_a_line(step: int) -> Tensors:
    """p + step q, whole numbers of which the last dtype holds all."""
    random = torch.Generator().manual_seed(0)
    p, q = torch.randint(-8, 8, (2, 3 * BLOCK + 5), generator=random)
    whole = p + step * q
    return {"f64": whole.double(), "f32": whole.float()[:-3], "bf16": whole.bfloat16()[:99]}


def command(arguments: list[str]) -> None:
    cases.cut()
    merge_command(arguments)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_checkpoints_on_a_line_go_on_along_it(tmp_path: Path, ranks: int) -> None:
    """theta(kappa) = m_last + kappa stride q: through the command, on the disk."""
    for step in range(9):
        write_checkpoint(tmp_path / "in" / f"step-{step}", on_a_line(step), shards=2)
    recipe = extra(tmp_path / "in", step=[0.5, 2])
    recipe["trajectory"] = {"checkpoints": f"{tmp_path}/in/step-*", "window": 3, "stride": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--quiet"]
    for outcome in observe_ranks(command, ranks, arguments):
        assert (outcome.exit_code, outcome.stderr) == (0, ""), outcome.describe()
    zero, one = on_a_line(0), on_a_line(1)
    for kappa in (0.5, 2):
        found = read_output(tmp_path / f"out/step={kappa}")
        for name, at in found.items():
            p, q = zero[name].double(), one[name].double() - zero[name].double()
            expected = p + (7 + kappa * 2) * q
            exact = {"f64": 1e-11, "f32": 1e-4, "bf16": 0.5}[name]
            torch.testing.assert_close(at.double(), expected, rtol=0, atol=exact)


@pytest.mark.parametrize("allowed", [False, True])
def test_nan_in_an_input_ends_the_statistic_on_all_ranks(tmp_path: Path, allowed: bool) -> None:
    """Nothing mends that: a direction can't be found with it."""
    cases.write_steps(tmp_path / "in", cases.small)
    poisoned = cases.small(torch.Generator().manual_seed(1))
    poisoned["second"][-1] = torch.nan
    write_checkpoint(tmp_path / "in" / "step-1", poisoned, shards=2)
    (tmp_path / "work").mkdir()
    options = Options(allow_nonfinite=allowed)
    outcomes = observe_ranks(merge, 3, extra(tmp_path / "in"), tmp_path / "work/out", options)
    message = "model-00002-of-00002.safetensors: tensor second holds 1 NaN or Inf in elements"
    for outcome in outcomes:
        expected = NonFiniteError if outcome.rank == 2 else PeerError
        assert isinstance(outcome.error, expected), outcome.describe()
        assert outcome.error.exit_code == 2
        assert outcome.error.reported == (outcome.rank > 0)
        assert f"{tmp_path}/in/step-1/{message}" in str(outcome.error)
        assert "leave the checkpoint out, or the tensor with parameters.exclude" in str(
            outcome.error
        )
    assert "statistic" in str(outcomes[0].error)
    assert not list((tmp_path / "work").iterdir())


def merge_and_draw(recipe: Recipe, out: Path) -> None:
    cases.cut()
    distmerge.merge(recipe, out)


@pytest.mark.slow
def test_plots_and_page_have_the_same_bytes_too(swept: Recipe, tmp_path: Path) -> None:
    for ranks in (1, 3):
        run_ranks(merge_and_draw, ranks, swept, tmp_path / str(ranks) / "out")
    one, three = (fingerprints(tmp_path / str(ranks) / "out") for ranks in (1, 3))
    assert one == three
    assert {"report/report.html", "report/trajectory.png"} < set(one)
