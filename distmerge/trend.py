"""From the Gram matrix to the coefficients of every output, and what is odd about them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from distmerge.config import Config, Direction
from distmerge.errors import MismatchError
from distmerge.log import LOGGER
from distmerge.methods.extrapolate import Trend, null_shares, solve
from distmerge.schedules import windows
from distmerge.trajectory import Schedule, Trajectory


class Setting(NamedTuple):
    """What a trend depends on, beside the checkpoints."""

    window: int
    stride: int
    schedule: Schedule
    direction: Direction

    def __str__(self) -> str:
        secant = ", secant" if self.direction == "secant" else ""
        return f"window {self.window}, stride {self.stride}{secant}"


def setting(config: Config) -> Setting:
    """The setting of a recipe that extrapolates."""
    trajectory, extrapolation = config.trajectory, config.extrapolation
    assert trajectory is not None, "only trajectories are extrapolated"
    assert extrapolation is not None, "only extra_merge has a setting"
    assert trajectory.window is not None, "the recipe is checked"
    return Setting(
        trajectory.window, trajectory.stride, trajectory.schedule, extrapolation.direction
    )


def find_trends(
    configs: Sequence[Config], gram: torch.Tensor, labels: Sequence[str]
) -> dict[Setting, Trend]:
    """The trend of every setting among `configs`, in order.

    `gram` is T x T, float64, `labels` name the T checkpoints. Raises MismatchError where the merged
    checkpoints are equal or end where they began.
    """
    found: dict[Setting, Trend] = {}
    for config in configs:
        key = setting(config)
        if key not in found:
            found[key] = _solved(key, gram, labels)
    return found


def _solved(key: Setting, gram: torch.Tensor, labels: Sequence[str]) -> Trend:
    trend = solve(gram, merging(key, len(labels)), key.direction)
    if not trend.length:
        still = not bool(trend.merged.any())
        what = "they are all equal" if still else "the last is where the first was"
        raise MismatchError(
            f"extra_merge: {len(trend.merging)} merged checkpoints ({key}) have no direction: "
            f"{what} ({_listed(labels)})"
        )
    return trend


def merging(key: Setting, count: int) -> torch.Tensor:
    """The coefficients of the merged checkpoints as J x T, float64."""
    trajectory = Trajectory(
        checkpoints=(), window=key.window, stride=key.stride, schedule=key.schedule
    )
    return torch.tensor(windows(trajectory, count), dtype=torch.float64)


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels if len(labels) <= 6 else [*labels[:3], "...", *labels[-2:]])


def warn_of_noise(trends: dict[Setting, Trend]) -> None:
    """Say where the leading component explains no more than a random walk's would."""
    for key, trend in trends.items():
        share, null = float(trend.merged[0]), float(null_shares(trend.merging)[1][0])
        if key.direction == "principal" and share <= null and len(trend.merging) > 2:
            LOGGER.warning(
                "extra_merge (%s): the direction explains %.1f %% of the merged checkpoints' "
                "variance, a random walk's %.1f %%: it may be noise; compare with step 0 on "
                "held-out data",
                key, 100 * share, 100 * null,
            )  # fmt: skip


def coefficients(configs: Sequence[Config], trends: dict[Setting, Trend]) -> list[Sequence[float]]:
    """The coefficients of the raw checkpoints, for each output a row."""
    rows: list[Sequence[float]] = []
    for config in configs:
        trend, extrapolation = trends[setting(config)], config.extrapolation
        assert extrapolation is not None, "only extra_merge has trends"
        rows.append(trend.coefficients(extrapolation.intervals(len(trend.merging))))
    return rows
