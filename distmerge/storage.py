"""What the operating system offers: file system kinds, the page cache, direct I/O, free memory.

Direct I/O moves bytes between disk and our buffers without the page cache. For files that are
read or written once it is the faster way (measured: docs/performance.md), and it leaves the
host's memory to others. It wants offsets, lengths and addresses in whole pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from distmerge.spec import PAGE

_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "f2fs", "zfs", "tmpfs", "ramfs", "overlay"})
_PROBES = 16
_CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def is_local(path: Path) -> bool:
    """Whether `path` lies on a file system of this host. Unknown ones count as network."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0] in _LOCAL
    return False


def is_cached(descriptor: int, size: int) -> bool:
    """Whether the page cache holds the file, as far as a few probes that read nothing can tell."""
    byte = bytearray(1)
    try:
        for i in range(_PROBES):
            os.preadv(descriptor, [byte], size * i // _PROBES, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system in memory knows no RWF_NOWAIT
        return True
    return True


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor for direct I/O; None where the file system refuses."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return None


def aligned_buffer(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """A uint8 tensor of `num_bytes` that starts at a page; pinned for copies to a GPU."""
    raw = torch.empty(num_bytes + PAGE, dtype=torch.uint8, pin_memory=pinned)
    skip = -raw.data_ptr() % PAGE
    return raw[skip : skip + num_bytes]


def memory_view(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the CPU, without a copy."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


def free_memory() -> int:
    """Bytes that this process may still take: the host's, or less where a cgroup says so."""
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    for group in _cgroups():
        for limit, usage in _LIMITS:
            try:
                room = int((group / limit).read_text()) - int((group / usage).read_text())
            except (OSError, ValueError):  # no such file, or no limit ("max")
                continue
            available = min(available, max(room, 0))
    return available


def _cgroups() -> Iterator[Path]:
    """The memory cgroups that this process is in, from the innermost to the root (v1 and v2)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = _CGROUPS / ("memory" if controllers else "")
            here = root / inside.strip("/")
            yield from (here, *(p for p in here.parents if p == root or root in p.parents))


def peak_memory() -> int:
    """Bytes of the largest resident set that this process has had, mapped files included.

    Not getrusage's: that one starts at what the parent had when it forked.
    """
    return _field(Path("/proc/self/status"), "VmHWM")


def _field(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {key}")
