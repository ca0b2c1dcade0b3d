"""Which launcher started this process, and what it says about ranks. Pure: reads a mapping."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from distmerge.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process among its peers. `address` is where the ranks meet (host, port)."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: tuple[str, int] | None = None
    warning: str | None = None


def detect(env: Mapping[str, str]) -> Launch:
    """Read the launcher's variables: RANK and WORLD_SIZE first, then a Slurm step, else alone.

    Raises ConfigError where they contradict each other.
    """
    if "WORLD_SIZE" in env and "RANK" in env:
        return _from_ranks(env)
    if "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_slurm(env)
    return Launch(launcher="none", warning=_lonely(env))


def _from_ranks(env: Mapping[str, str]) -> Launch:
    """torchrun, accelerate and deepspeed share these variables."""
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} does not fit WORLD_SIZE={size}")
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "RANK and WORLD_SIZE"
    if any(name.startswith("ACCELERATE_") for name in env):
        launcher = "accelerate"
    elif "CROSS_RANK" in env:
        launcher = "deepspeed"
    address = (env.get("MASTER_ADDR", "127.0.0.1"), _number(env, "MASTER_PORT", 29500))
    return Launch(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=_number(env, "LOCAL_RANK", 0),
        address=address if size > 1 else None,
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    """A task of a job step. The script's body, outside a step, is a process of its own."""
    port = 20000 + _number(env, "SLURM_JOB_ID", 0) % 10000
    return Launch(
        launcher="slurm",
        rank=_number(env, "SLURM_PROCID", 0),
        size=_number(env, "SLURM_STEP_NUM_TASKS", 1),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        address=(
            env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            _number(env, "MASTER_PORT", port),
        ),
    )


def _first_host(nodelist: str) -> str:
    """The first of 'n[1-4],m7'; Slurm's own tool knows all its forms, where it is at hand."""
    if scontrol := shutil.which("scontrol"):
        asked = subprocess.run(
            [scontrol, "show", "hostnames", nodelist], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0 and asked.stdout:
            return asked.stdout.split()[0]
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodelist)


def _lonely(env: Mapping[str, str]) -> str | None:
    """accelerate gives MASTER_PORT when several processes were asked for, even if it starts one."""
    if "MASTER_PORT" in env and any(name.startswith("ACCELERATE_") for name in env):
        return (
            "accelerate started a single process although several were asked for; "
            "add --multi_gpu to its options (it works without a GPU too), or use torchrun"
        )
    return None


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment has {name}={text!r}, which is not a number") from None
