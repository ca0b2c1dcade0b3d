"""How close a merge of task vectors must come to mergekit's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.support.reference import half_ulp

Tensors = Mapping[str, torch.Tensor]


def check_alike(method: str, ours: Tensors, theirs: Tensors, models: Mapping[str, Tensors]) -> None:
    """Assert that two merges of `models` (A is the base) are alike, all in float32.

    Both make the same merged task vector to the bit, if nothing is rescaled; then come a product
    and a sum. Task arithmetic we add up as a weighted sum of the models themselves. So the bound is
    in ulps at the size of the models. Which elements differ from the base, as those that are kept
    do, is the same exactly.
    """
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        given = [tensors[name] for tensors in models.values()]
        assert found.dtype == theirs[name].dtype == torch.float32, name
        ulp = 2 * half_ulp(torch.stack(given).abs().sum(0), torch.float32)
        apart = float(((found.double() - theirs[name].double()).abs() / ulp).max())
        assert apart <= 4, f"{name}: {apart:.2f} ulp apart"
        if method != "task_arithmetic":
            base = models["A"][name]
            assert torch.equal(found != base, theirs[name] != base), name
