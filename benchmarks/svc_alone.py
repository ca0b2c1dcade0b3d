"""This tool's calibration of single matrices that lie in memory, for bench_svc.py: seconds of each.

Takes what benchmarks/fusion_bench_svc.py takes, and starts where that starts: stored weights of the
base and the tasks. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distmerge.methods.calibrate import Setting, calibrate
from distmerge.methods.stages import Panel, drive


def calibrated(base: Tensor, tasks: list[Tensor], setting: Setting) -> Tensor:
    """The calibrated delta, float32, of panels like those that a merge makes."""
    rows, columns = base.shape
    across = 1 if rows <= columns else 0
    width = max(min(rows, columns) // 2, 512)

    def panels() -> Iterator[Panel]:
        for start in range(0, base.shape[across], width):
            length = min(width, base.shape[across] - start)
            first = base.narrow(across, start, length).float()
            deltas = [task.narrow(across, start, length).float().sub_(first) for task in tasks]
            merged = deltas[0].clone()
            for delta in deltas[1:]:
                merged += delta
            yield Panel(deltas, merged)

    found = drive(calibrate(rows, columns, [setting]), panels)
    return torch.cat([found.apply(panel, 0) for panel in panels()], dim=across)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="the base, then the tasks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--alone", nargs="+", help="names of matrices")
    options = parser.parse_args()
    setting = Setting(alpha=options.alpha, scale=options.scale)
    seconds, results = {}, {}
    for name in options.alone:
        base, *tasks = (_read(folder, name) for folder in options.models)
        start = time.perf_counter()
        results[name] = calibrated(base, tasks, setting)
        seconds[name] = time.perf_counter() - start
    save_file(results, options.out)
    print(json.dumps(seconds))


def _read(folder: Path, name: str) -> Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


if __name__ == "__main__":
    main()
