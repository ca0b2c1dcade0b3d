"""Mapped files whose pages go away: the kernel would end the process, without a word.

It does so (SIGBUS) where a file has shrunk or a disk fails. A handler puts zeros in the place of
what is gone and remembers the file, so that the run can end with an error that names it.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import weakref
from functools import cache
from pathlib import Path

from distmerge.spec import PAGE

_ADDRESS = 16
"""Where siginfo_t has the address, on 64-bit Linux."""

_MAP_FIXED = 0x10
_SA_SIGINFO = 4


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_before = _Action()
_mapped: dict[int, tuple[int, Path]] = {}
"""By where they start: where mapped files end, and which they are."""

_lost: set[Path] = set()


def watch(mapping: mmap.mmap, path: Path) -> None:
    """From now on and as long as `mapping` lives, a page of it that can't be read is zeros."""
    _install()
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    _mapped[start] = (start + len(mapping), path)
    weakref.finalize(mapping, _mapped.pop, start, None)


def is_lost(path: Path) -> bool:
    """Whether a page of `path` could not be read."""
    return path in _lost


def forget() -> None:
    """Begin anew: what was lost before may be whole again."""
    _lost.clear()


@cache
def _install() -> None:
    action = _Action(ctypes.cast(_HANDLER, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_before))


def _on_bus_error(number: int, info: int, context: int) -> None:  # noqa: ARG001
    """Runs in the thread that read, in the middle of whatever it did: so it does little."""
    address = ctypes.c_size_t.from_address(info + _ADDRESS).value
    for start, (stop, path) in list(_mapped.items()):
        if start <= address < stop:
            _lost.add(path)
            first = address // PAGE * PAGE
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            _libc.mmap(first, stop - first, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
            return
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_before), None)  # not ours: as it was


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
"""Kept here: the C side does not."""
