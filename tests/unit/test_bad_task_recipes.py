"""What can be mended in a merge of task vectors, through the command line.

One clear message, exit code 2, and nothing at OUT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from distmerge.document import Plain
from tests.support.checkpoints import read_output
from tests.support.commands import merge_command
from tests.support.ranks import Outcome, observe_ranks
from tests.support.tasks import WHOLE, Recipe, Tensors, family, recipe, write_family
from tests.unit.refusals import tree

UP, DOWN, NORM = "layers.0.up.weight", "layers.0.down.weight", "layers.0.norm.weight"
SHAPES = {"embed.weight": (9, 8), UP: (12, 8), DOWN: (8, 12), NORM: (8,)}
ELEMENTWISE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "expo")
Make = Callable[[Path], Recipe]


def command(folder: Path, made: Recipe, *options: str) -> Outcome[None]:
    """Merge into folder/work/out."""
    (folder / "work").mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(made))
    arguments = [str(folder / "r.yaml"), str(folder / "work/out"), "--quiet", *options]
    (outcome,) = observe_ranks(merge_command, 1, arguments)
    return outcome


def refusal(folder: Path, made: Recipe, *options: str) -> str:
    """What the command says, in one line or in one for each difference."""
    outcome = command(folder, made, *options)
    assert outcome.exit_code == 2, outcome.describe()
    assert not [path for path in tree(folder / "work") if not path.startswith(".distmerge")]
    head, *listed = outcome.stderr.splitlines()
    assert head.startswith("error: "), outcome.describe()
    assert all(line.startswith("  ") for line in listed), outcome.describe()
    return outcome.stderr.strip()


def merged(folder: Path, made: Recipe, *options: str) -> Tensors:
    outcome = command(folder, made, *options)
    assert outcome.exit_code == 0, outcome.describe()
    return read_output(folder / "work/out")


def of(method: str, *, models: int | None = None, **own: Plain) -> Make:
    """`method` on two tasks (expo: on one), with parameters of every model."""
    count = models or (1 if method == "expo" else 2)
    shared: Recipe = {"alpha": 0.5} if method == "expo" else {}
    return lambda folder: recipe(folder, method, count, own=own, shared=shared)


def shared(method: str, **parameters: Plain) -> Make:
    return lambda folder: {**of(method)(folder), "parameters": parameters}


def svc(method: str = "task_arithmetic", **keys: Plain) -> Make:
    """SVC on top of `method`, with keys of `calibrate`."""
    return lambda folder: {**of(method)(folder), "calibrate": {"method": "svc", **keys}}


def changed(make: Make, **keys: Plain) -> Make:
    """With other keys of the recipe; None takes one away."""
    return lambda folder: {k: v for k, v in {**make(folder), **keys}.items() if v is not None}


def base_alone(folder: Path) -> Recipe:
    models: Plain = [{"model": str(folder / "base"), "parameters": {"weight": 1}}]
    return {**of("task_arithmetic")(folder), "models": models}


def own_parameters_of_one(method: str, parameters: Recipe) -> Make:
    """Of the first model only."""

    def make(folder: Path) -> Recipe:
        models: list[Plain] = [
            {"model": str(folder / "task-1"), "parameters": parameters},
            {"model": str(folder / "task-2"), "parameters": {"weight": 1}},
        ]
        return {**of(method)(folder), "models": models[: 1 if method in WHOLE else 2]}

    return make


PLAIN = of("task_arithmetic")
ALPHA = (
    r"line \d+, calibrate.alpha: expected auto \(1/K for K models\) or a number over 0; "
    r"for several alphas write sweep: {calibrate.alpha: \[\.\.\.\]}$"
)
PARAMETERS = r"r.yaml line \d+, parameters"
OWN = r"r.yaml line \d+, models\[0\].parameters"

RECIPES: dict[str, tuple[str, Make]] = {
    "no base": ("needs base_model:, from which its models were tuned$",
                changed(PLAIN, base_model=None)),
    "only the base": ("needs at least one model beside base_model under models:$", base_alone),
    "no models": ("merge_method: task_arithmetic needs models:$", changed(PLAIN, models=None)),
    "two models of expo": ("merge_method: expo needs one model beside base_model",
                           of("expo", models=2)),
    "expo without a step": (f"{PARAMETERS}: alpha is missing$", shared("expo")),
    "trajectory": ("trajectory: it belongs to merge_method: average; ties takes models:$",
                   changed(of("ties"), trajectory={"checkpoints": "x"})),
    "no weight": (r"no weight for /.*/task-1, tensor \S+; give the model "
                  r"parameters: {weight: \.\.\.}$", own_parameters_of_one("ties", {"density": 1})),
    "weight": (f"{OWN}.weight: expected a finite number; got 'x'$", of("ties", weight="x")),
    "no density": (f"{OWN}.density: expected a number over 0; got 0$", of("ties", density=0)),
    "negative density": (f"{OWN}.density: expected a number over 0; got -0.5$",
                         of("dare_ties", density=-0.5)),
    "no density at the end": (f"{OWN}.density: expected a number over 0; got 0$",
                              of("ties", density=[0.5, 0])),
    "no density of a filter": (
        f"{OWN}.density: expected a number over 0; got 0$",
        of("ties", density=[{"filter": "norm", "value": 0}, {"value": 1}])),
    "density of all": (f"{PARAMETERS}.density: expected a number over 0; got 0$",
                       shared("ties", density=0)),
    "word for a density": (f"{OWN}.density: expected a finite number; got 'some'$",
                           of("ties", density="some")),
    "lambda": (f"{PARAMETERS}.lambda: expected a finite number; got 'x'$",
               shared("ties", **{"lambda": "x"})),
    "unknown parameter": (f"{PARAMETERS}.lamda: unknown key; did you mean 'lambda'",
                          shared("ties", lamda=1)),
    "unknown parameter of a model": (f"{OWN}.densty: unknown key; did you mean 'density'",
                                     of("ties", densty=1)),
    "parameters of a model of tsv_m": (
        f"{OWN}: this merge_method takes no parameters here$",
        own_parameters_of_one("tsv_m", {"weight": 1})),
    "weight for tsv_m": (f"{PARAMETERS}.weight: unknown key; known here: lambda$",
                         shared("tsv_m", weight=1)),
    "no eta": (f"{PARAMETERS}.eta: expected a number over 0 and at most 1; got 0$",
               shared("star", eta=0)),
    "eta": ("eta: expected a number over 0 and at most 1; got 1.5$", shared("star", eta=1.5)),
    "no common share": ("common_share: expected a number over 0 and at most 1; got 0$",
                        shared("iso_cts", common_share=0)),
    "common share": ("common_share: expected a number over 0 and at most 1; got 80$",
                     shared("iso_cts", common_share=80)),
    "half a seed": (f"{PARAMETERS}.seed: expected a whole number of at least 0; got 0.5$",
                    shared("dare_ties", seed=0.5)),
    "negative seed": ("seed: expected a whole number of at least 0; got -1$",
                      shared("dare_linear", seed=-1)),
    "gradient of seeds": ("seed: a seed has no gradient$", shared("dare_ties", seed=[0, 1])),
    "seed of ties": ("seed: unknown key", shared("ties", seed=1)),
    "missing": ("missing: expected one of error, donor; got 'present'$",
                changed(PLAIN, missing="present")),
    "calibrate": (r"calibrate: expected a mapping with method, alpha, .*; got True$",
                  changed(PLAIN, calibrate=True)),
    "no method": ("calibrate: method is missing; svc is the one there is$",
                  changed(PLAIN, calibrate={"alpha": 1})),
    "method": (r"calibrate.method: expected one of svc; got 'svd' \(did you mean 'svc'\?\)$",
               changed(PLAIN, calibrate={"method": "svd"})),
    "unknown key": (r"line \d+, calibrate.aplha: unknown key; did you mean 'alpha'",
                    svc(aplha=1)),
    "side": (r"line \d+, calibrate.side: only the output side is calibrated: on the other the gain "
             "is lost$", svc(side="input")),
    "alpha of 0": (ALPHA, svc(alpha=0)),
    "negative alpha": (ALPHA, svc(alpha=-0.5)),
    "word for alpha": (ALPHA, svc(alpha="atuo")),
    "alpha that is true": (ALPHA, svc(alpha=True)),
    "list of alphas": (ALPHA, svc(alpha=[0.1, 1])),
    "include is no list": (r"calibrate.include: expected a list; got '\*'$", svc(include="*")),
    "include of nothing": (r"calibrate.include: 'q_\*' matches no tensor; the first is 'embed.w",
                           svc(include=["q_*"])),
    "exclude of nothing": (r"calibrate.exclude: 'lm_head\*' matches no tensor; the first is",
                           svc(exclude=["lm_head*"])),
    "nothing is left": ("calibrate: it leaves no matrix to calibrate; see include:$",
                        svc(exclude=["*"])),
    "no matrix is included": ("calibrate: it leaves no matrix", svc(include=["*norm*"])),
    "split of nothing": (r"calibrate.split: '\*qkv\*' matches no matrix that is calibrated; the "
                         "first is 'layers.0.down.weight'$", svc(split={"*qkv*": 3})),
    "split of no matrix": (r"calibrate.split: '\*norm\*' matches no matrix that is calibrated",
                           svc(split={"*norm*": 2})),
    "split of what is excluded": (r"calibrate.split: '\*up\*' matches no matrix",
                                  svc(split={"*up*": 2}, exclude=["*up*"])),
    "rows that are too few": (r"calibrate.split: \*up\*: layers.0.up.weight has 12 outputs, not 10 "
                              "in all$", svc(split={"*up*": [8, 2]})),
    "parts that are not equal": ("up.weight has 12 outputs, not 5 equal parts$",
                                 svc(split={"*up*": 5})),
    "one part": (r"calibrate.split.\*up\*: expected a whole number of at least 2; got 1$",
                 svc(split={"*up*": 1})),
    "list of one part": ("expected the rows of at least two parts, or a number of equal parts$",
                         svc(split={"*up*": [12]})),
    "part of nothing": (r"split.\*up\*\[1\]: expected a whole number of at least 1; got 0$",
                        svc(split={"*up*": [12, 0]})),
    "split is no mapping": ("calibrate.split: expected a mapping from patterns to numbers of rows",
                            svc(split=[2])),
    "calibrate of linear": (
        "calibrate: linear has no task vectors; one of task_arithmetic, ties, .*, star has$",
        changed(svc(), merge_method="linear", base_model=None)),
    "calibrate of average": (
        "calibrate: average has no task vectors",
        lambda folder: {"merge_method": "average", "calibrate": {"method": "svc"},
                        "trajectory": {"checkpoints": str(folder / "task-*")}}),
    "sweep of a value twice": ("sweep.parameters.lambda: a value is listed twice$",
                               changed(PLAIN, sweep={"parameters.lambda": [1, 1.0]})),
    "sweep of a key that is not used": (
        "sweep: density=0.2 gives the same bytes as density=0.1; leave it out$",
        changed(PLAIN, sweep={"parameters.density": [0.1, 0.2]})),
    "sweep of a key that changes nothing": (
        "sweep: int8_mask=1 gives the same bytes as int8_mask=0",
        changed(of("ties", density=0.5), sweep={"parameters.int8_mask": [0, 1]})),
    "sweep of auto and its value": (
        "sweep: alpha=0.5 gives the same bytes as alpha=auto; leave it out$",
        changed(svc(), sweep={"calibrate.alpha": ["auto", 0.5]})),
    "sweep of alpha without a method": (
        "calibrate: method is missing", changed(PLAIN, sweep={"calibrate.alpha": [0.5, 1]})),
    "sweep of bad values": ("parameters.eta: expected a number over 0 and at most 1; got 2$",
                            changed(of("star"), sweep={"parameters.eta": [0.4, 2]})),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two tasks in which nothing is wrong."""
    return write_family(tmp_path_factory.mktemp("sound"), family(SHAPES, 2))


@pytest.mark.parametrize(("message", "make"), RECIPES.values(), ids=RECIPES)
def test_a_mistake_in_the_recipe_is_told(
    sound: Path, tmp_path: Path, message: str, make: Make
) -> None:
    told = refusal(tmp_path, make(sound))
    assert re.search(message, told), told
    assert len(told.splitlines()) == 1


def poisoned(which: int, name: str = UP, value: float = torch.nan) -> list[Tensors]:
    """A family in which one element of model `which` is not finite."""
    models = family(SHAPES, 2)
    models[which][name].view(-1)[3] = value
    return models


def without(which: int) -> list[Tensors]:
    models = family(SHAPES, 2)
    del models[which][NORM]
    return models


def other_shape() -> list[Tensors]:
    models = family(SHAPES, 2)
    models[2][UP] = models[2][UP].T
    return models


class Case(NamedTuple):
    """`models` are the base and its tasks."""

    message: str
    models: list[Tensors]
    make: Make


IN_UP = r"safetensors: tensor layers.0.up.weight holds 1 NaN or Inf in "
ELEMENTS = f"{IN_UP}elements 0 to 95; pass --allow-nonfinite to go on all the same$"
ROWS = f"{IN_UP}rows 0 to 11, columns 0 to 7: it has no singular values; mend the input"
SPARING = f"{ROWS}, or name the tensor under calibrate.exclude$"
WIDE = "set a wider out_dtype, or pass --allow-nonfinite$"

CASES: dict[str, Case] = {
    **{f"NaN in a task, {method}": Case(f"/task-1/model.{ELEMENTS}", poisoned(1), of(method))
       for method in ELEMENTWISE},
    **{f"Inf in the base, {method}": Case(f"/base/model.{ELEMENTS}", poisoned(0, value=torch.inf),
                                          of(method)) for method in ELEMENTWISE},
    **{f"NaN in a task, {method}": Case(f"/task-1/model.{ROWS}$", poisoned(1), of(method))
       for method in WHOLE},
    **{f"Inf in the base, {method}": Case(f"/base/model.{ROWS}$", poisoned(0, value=-torch.inf),
                                          of(method)) for method in WHOLE},
    **{f"NaN that is calibrated, {method}": Case(f"/task-1/model.{SPARING}", poisoned(1),
                                                 svc(method))
       for method in ("task_arithmetic", "dare_ties", "tsv_m")},
    "NaN that is not calibrated": Case(
        "task-1/.*: tensor layers.0.norm.weight holds 1 NaN .* pass --allow-nonfinite",
        poisoned(1, NORM), svc()),
    "NaN in a vector, tsv_m": Case(
        "task-1/.*: tensor layers.0.norm.weight holds 1 NaN .* pass --allow-nonfinite",
        poisoned(1, NORM), of("tsv_m")),
    "other shape": Case(r"1 of 4 tensors differ\n  layers.0.up.weight: \[12, 8\] in .*/task-1, "
                        r"\[8, 12\] in .*/task-2$", other_shape(), of("ties")),
    "missing in a task": Case(
        r"1 of 4 tensors differ\n  layers.0.norm.weight: not in \S*/task-2 \(the recipe's "
        r"missing: donor would allow it\)$", without(2), changed(of("ties"), missing="error")),
    "missing in the base": Case(r"layers.0.norm.weight: not in \S*/base$", without(0), svc()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_models_that_do_not_fit_are_told(tmp_path: Path, case: Case) -> None:
    write_family(tmp_path, case.models)
    told = refusal(tmp_path, case.make(tmp_path))
    assert re.search(case.message, told), told


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_what_is_not_finite_may_be_allowed_element_by_element(tmp_path: Path, method: str) -> None:
    write_family(tmp_path, poisoned(1, value=torch.inf))
    found = merged(tmp_path, of(method)(tmp_path), "--allow-nonfinite")
    assert not found[UP].view(-1)[3].isfinite()
    assert all(bool(found[name].isfinite().all()) for name in found if name != UP)
    assert int(found[UP].isfinite().sum()) == 95


def test_it_can_t_be_allowed_where_singular_values_are_asked_for(tmp_path: Path) -> None:
    write_family(tmp_path, poisoned(1))
    assert re.search(SPARING, refusal(tmp_path, svc()(tmp_path), "--allow-nonfinite"))
    found = merged(tmp_path, svc(exclude=[UP])(tmp_path), "--allow-nonfinite")
    assert int(found[UP].isfinite().sum()) == 95


@pytest.mark.parametrize("method", [*ELEMENTWISE, *WHOLE])
@pytest.mark.parametrize("make", [of, svc])
def test_values_that_overflow_the_output_are_told(
    tmp_path: Path, method: str, make: Callable[[str], Make]
) -> None:
    write_family(tmp_path, [{UP: 1e5 * model[UP]} for model in family(SHAPES, 2)])
    made = {**make(method)(tmp_path), "out_dtype": "float16"}
    told = refusal(tmp_path, made)
    assert re.search(rf"error: layers.0.up.weight: \d+ values overflow float16; {WIDE}", told), told


def test_the_output_of_a_sweep_that_overflows_is_named(tmp_path: Path, sound: Path) -> None:
    made = changed(svc(), out_dtype="float16", sweep={"parameters.lambda": [1, 1e7]})(sound)
    told = refusal(tmp_path, made)
    assert re.search(r"error: lambda=10000000, \S+: \d+ values overflow float16; ", told), told


def test_what_a_task_lacks_may_be_the_base_s(tmp_path: Path) -> None:
    """As in mergekit, it is by default."""
    models = without(2)
    write_family(tmp_path, models)
    found = merged(tmp_path, {**svc()(tmp_path), "missing": "donor"})
    assert torch.equal(found[NORM], models[0][NORM])
    assert not torch.equal(found[UP], models[0][UP])
    assert torch.equal(merged(tmp_path, svc()(tmp_path), "--overwrite")[NORM], models[0][NORM])


@pytest.mark.parametrize("make", [svc(), of("ties", density=0.5), of("tsv_m")])
def test_the_least_memory_is_told_and_is_enough(sound: Path, tmp_path: Path, make: Make) -> None:
    told = refusal(tmp_path, make(sound), "--memory", "100kB")
    found = re.fullmatch(
        r"error: --memory 100 kB is too little for this recipe; it needs at least (\d+)MB", told
    )
    assert found, told
    least = int(found[1])
    assert "is too little" in refusal(tmp_path, make(sound), "--memory", f"{least - 1}MB")
    merged(tmp_path, make(sound), "--memory", f"{least}MB")
