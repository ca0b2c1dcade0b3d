"""The peer's side of bench_svc.py, in the peer's environment: prints one line of JSON, last.

run: its algorithm, task arithmetic and SVC, from checkpoints to a checkpoint.
alone: its accelerated SVC function for single matrices that lie in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def run(models: list[Path], out: Path, scale: float, alpha: float) -> dict[str, float]:
    """All models are loaded as they are stored, as the peer's own pool of models does."""
    from fusion_bench.method.singular_value_calibration import (  # type: ignore[import-not-found] # noqa: PLC0415
        SingularValueCalibrationArithmeticTask,
    )
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    names = ["_pretrained_", *(f"task-{number}" for number in range(1, len(models)))]
    start = time.perf_counter()
    pool = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for name, folder in zip(names, models, strict=True)
    }
    loaded = time.perf_counter()
    method = SingularValueCalibrationArithmeticTask(
        scaling_factor=scale, alpha=alpha, accelerator=torch.device("cpu")
    )
    merged = method.run(pool)
    computed = time.perf_counter()
    merged.save_pretrained(out)
    end = time.perf_counter()
    return {"load_s": loaded - start, "compute_s": computed - loaded, "pass_s": end - start}


def alone(
    models: list[Path], out: Path, scale: float, alpha: float, names: list[str]
) -> dict[str, float]:
    """Seconds by matrix. The merged matrix is given in float64, so no rounding of ours is in it."""
    from fusion_bench.method.singular_value_calibration.utils import (  # type: ignore[import-not-found] # noqa: PLC0415
        subspace_consistency_spectral_calibration_accelerated,
    )

    seconds, results = {}, {}
    for name in names:
        base, *tasks = (_read(folder, name) for folder in models)
        exact = base.double()
        merged = exact + scale * sum(task.double() - exact for task in tasks)
        start = time.perf_counter()
        calibrated = subspace_consistency_spectral_calibration_accelerated(
            base, tasks, merged, alpha=alpha, accelerator=torch.device("cpu")
        )
        seconds[name] = time.perf_counter() - start
        results[name] = (calibrated - exact).float()
    save_file(results, out)
    return seconds


def _read(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="the base, then the tasks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--alone", nargs="*", help="names of matrices")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    given = (options.models, options.out, options.scale, options.alpha)
    print(json.dumps(alone(*given, options.alone) if options.alone else run(*given)))


if __name__ == "__main__":
    main()
