"""mergekit's own results for the same recipes, in float32.

Where both add up the same products, they are at most one ulp apart. Where weights are normalised
they can't be: we divide the weights, in float64, and mergekit the sum, in float32. Counting what
either may lose over K models (we: the coefficient, the product, K - 1 additions; mergekit: these,
then the same for the sum of the weights, and the division) gives less than 4 (K + 1) ulp. A
parameter that is read in another way shows as thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
import yaml

import distmerge
from distmerge.spec import Rule
from tests.oracle.conftest import LAYERS
from tests.support import mergekit_oracle
from tests.support.reference import half_ulp, load, weighted_sum

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not mergekit_oracle.available(),
        reason="NOTHING WAS COMPARED WITH MERGEKIT: benchmarks/mergekit_env.sh makes what it needs",
    ),
]


class Case(NamedTuple):
    """A recipe for the models A, B and C."""

    weights: dict[str, object]
    more: Mapping[str, object] = MappingProxyType({})

    @property
    def allowed_ulps(self) -> int:
        """How far apart the results may be, see above."""
        plain = self.more.get("parameters") == {"normalize": False}
        models = {*self.weights, self.more.get("base_model", "A")}
        return 1 if plain else 4 * (len(models) + 1)

    def recipe(self, folder: Path) -> dict[str, object]:
        listed = [
            {"model": str(folder / name)}
            | ({} if weight is None else {"parameters": {"weight": weight}})
            for name, weight in self.weights.items()
        ]
        more = {
            key: str(folder / str(value)) if key == "base_model" else value
            for key, value in self.more.items()
        }
        return {"merge_method": "linear", "models": listed, "dtype": "float32", **more}


FILTERS = [
    {"filter": "self_attn", "value": 0.9},
    {"filter": "mlp", "value": [0.1, 0.8, 0.2]},
    {"value": 0.4},
]
CASES = {
    "plain weights": Case({"A": 1.0, "B": 0.3, "C": 0.7}),
    "equal weights": Case({"A": 1, "B": 1, "C": 1}),
    "weights as they are": Case(
        {"A": 0.6, "B": 0.3, "C": -0.25}, {"parameters": {"normalize": False}}
    ),
    "normalised by default, a negative one": Case({"A": 1.5, "B": -0.5, "C": 0.25}),
    "gradient": Case({"A": [0, 0.3, 1.0], "B": [1.0, 0.2], "C": 0.5}),
    "gradient as it is": Case(
        {"A": [0.1, 0.9], "B": [0.9, 0.1]}, {"parameters": {"normalize": False}}
    ),
    "filters": Case({"A": FILTERS, "B": 0.5, "C": 0.25}),
    "first filter decides": Case(
        {
            "A": [
                {"filter": "proj", "value": 0.8},
                {"filter": "q_proj", "value": 0.1},
                {"filter": "*", "value": 0.3},
            ],
            "B": [{"filter": "layers.1", "value": 2}, {"value": 1}],
        }
    ),
    "filters that fall through to a global weight": Case(
        {"A": [{"filter": "mlp", "value": 0.9}], "B": 0.5, "C": None},
        {"parameters": {"weight": 0.2}},
    ),
    "global filters": Case(
        {"A": None, "B": 0.5, "C": None},
        {"parameters": {"weight": [{"filter": "norm", "value": 1}, {"value": [0.2, 0.6]}]}},
    ),
    "normalize by filter": Case(
        {"A": 0.5, "B": 0.9},
        {"parameters": {"normalize": [{"filter": "mlp", "value": False}, {"value": True}]}},
    ),
    "base model among the models": Case({"A": 0.5, "B": 0.3, "C": 0.2}, {"base_model": "C"}),
    "base model beside the models, by a global weight": Case(
        {"A": 0.5, "B": None}, {"base_model": "C", "parameters": {"weight": 0.3}}
    ),
    "output rounded to bfloat16": Case({"A": 0.5, "B": 0.3, "C": 0.4}, {"out_dtype": "bfloat16"}),
    "one model": Case({"A": 2.0}),
    "zero weight": Case({"A": 1.0, "B": 0.0, "C": 0.5}),
}


def ulps_apart(
    ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor], rule: Rule
) -> float:
    """The most by which two sums differ, in ulps at the size of their terms.

    At the size of the terms, not of the sum: where terms cancel, what rounding took from them is
    many ulps of the little that is left, for mergekit as for us.
    """
    size = weighted_sum([x.abs() for x in inputs], [abs(c) for c in rule.coefficients[0]])
    ulp = 2 * half_ulp(size, ours.dtype)
    return float(((ours.double() - theirs.double()).abs() / ulp).max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mergekit_s_recipe_gives_mergekit_s_tensors(
    case: Case,
    models: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(case.recipe(models)))
    mergekit_oracle.merge(case.recipe(models), tmp_path / "theirs")
    distmerge.merge(path, tmp_path / "ours")
    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 + 9 * LAYERS
    plan, apart = distmerge.plan(path), {}
    inputs = [load(checkpoint.folder) for checkpoint in plan.inputs]
    for name, rule in [(tensor.name, tensor.rule) for tensor in plan.tensors]:
        assert ours[name].dtype == theirs[name].dtype
        given = [inputs[i][name] for i in rule.inputs]
        apart[name] = ulps_apart(ours[name], theirs[name], given, rule)
    worst = max(apart, key=apart.__getitem__)
    record_property("max_ulp", apart[worst])
    print(f"at most {apart[worst]:.2f} ulp apart ({worst})")
    assert apart[worst] <= case.allowed_ulps, worst
