"""Recipes on task vectors, for models named A (the base), B and C: what mergekit is asked for too.

float32 throughout, and masks that keep all: mergekit draws its own from a global stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Case(NamedTuple):
    """Parameters of B and C (none: not among the models), and those for all."""

    method: str
    b: dict[str, object]
    c: dict[str, object] | None
    shared: Mapping[str, object] = MappingProxyType({})

    def recipe(self, folder: Path) -> dict[str, object]:
        """For the models in `folder`."""
        listed = [
            {"model": str(folder / name), "parameters": parameters}
            for name, parameters in (("B", self.b), ("C", self.c))
            if parameters is not None
        ]
        return {
            "merge_method": self.method,
            "base_model": str(folder / "A"),
            "models": listed,
            "parameters": dict(self.shared),
            "dtype": "float32",
        }


GRADIENT = [0.2, 0.9]
CASES = {
    "task_arithmetic": Case("task_arithmetic", {"weight": 0.7}, {"weight": -0.4}),
    "task_arithmetic scaled": Case(
        "task_arithmetic", {"weight": 1.0}, {"weight": 1.0}, {"lambda": 0.3}
    ),
    "task_arithmetic normalized": Case(
        "task_arithmetic", {"weight": 1.2}, {"weight": 0.3}, {"normalize": True}
    ),
    "ties of one": Case("ties", {"weight": 1.0, "density": 0.3}, None),
    "ties keeps one": Case("ties", {"weight": 1.0, "density": 1e-6}, None),
    "ties": Case("ties", {"weight": 0.6, "density": 0.5}, {"weight": 0.4, "density": 0.2}),
    "ties of all": Case("ties", {"weight": 1.0}, {"weight": 1.0}, {"lambda": 0.7}),
    "ties as it is": Case(
        "ties", {"weight": 0.6, "density": 0.8}, {"weight": 0.4, "density": 0.7},
        {"normalize": False},
    ),
    "ties with a negative weight": Case(
        "ties", {"weight": 1.5, "density": 0.6}, {"weight": -0.5, "density": 0.6}
    ),
    "ties rescaled": Case(
        "ties", {"weight": 0.6, "density": 0.4}, {"weight": 0.5, "density": 0.3},
        {"rescale": True, "lambda": 0.5},
    ),
    "ties with gradients": Case(
        "ties", {"weight": GRADIENT, "density": GRADIENT},
        {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.1}, {"value": 0.6}]},
    ),
    "dare_linear": Case("dare_linear", {"weight": 0.5, "density": 1.0}, {"weight": 0.8}),
    "dare_linear normalized": Case(
        "dare_linear", {"weight": 0.5}, {"weight": 0.8}, {"normalize": True, "rescale": False}
    ),
    "dare_ties": Case("dare_ties", {"weight": 0.5}, {"weight": 0.8}, {"lambda": 1.5}),
    "dare_ties normalized": Case(
        "dare_ties", {"weight": 0.5}, {"weight": 0.8}, {"normalize": True}
    ),
}  # fmt: skip
