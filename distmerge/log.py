"""Logging with the rank in the prefix, human units, and progress that counts bytes."""

from __future__ import annotations

import logging
import re
import sys
import time
from types import TracebackType

from tqdm import tqdm

from distmerge.errors import ConfigError

LOGGER = logging.getLogger("distmerge")
PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines where the output is not a terminal."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def configure(*, rank: int, verbose: bool, quiet: bool) -> None:
    """Log to standard error: INFO from the first rank alone, DEBUG from all with `verbose`."""
    level = logging.DEBUG if verbose else logging.INFO
    if quiet or (rank and not verbose):
        level = logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[rank {rank}] " if rank or verbose else ""
    handler.setFormatter(_Formatter(f"{prefix}%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line: what a terminal would obey or can't show stands as an escape.

    Beyond `limit` characters it is cut. Names come from strangers' files.
    """
    cut = text if limit is None or len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in cut)


def printable_lines(text: str) -> str:
    """As `printable`, but lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def parse_bytes(text: str) -> int:
    """Bytes of '5GB', '500MB', '64MiB' or mergekit's '5B' (B for billion; it counts bytes).

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)(i?)(B?)\s*", text)
    if match is None:
        raise ConfigError(f"not a size: {text!r}; write for example 5GB, 500MB or 64MiB")
    number, unit, binary, suffix = match.groups()
    if binary and (not unit or not suffix):
        raise ConfigError(f"not a size: {text!r}; write for example 64MiB")
    if not unit:
        scale = 10**9 if suffix else 1
    else:
        scale = (_BINARY if binary else _UNITS)[unit.upper()]
    return int(float(number) * scale)


def format_bytes(count: float) -> str:
    """'5.1 GB': powers of ten, as disks count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing if not `shown`."""

    def __init__(self, label: str, total_bytes: int, *, shown: bool):
        self._label, self._total, self._done = label, total_bytes, 0
        self._start = self._printed = time.monotonic()
        self._plain = shown and not sys.stderr.isatty()
        self._bar = None
        if shown and not self._plain:
            self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, leave=False)

    def show(self, done: int) -> None:
        """Take the number of bytes that all ranks have handled so far."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._plain and now - self._printed >= PLAIN_INTERVAL and done:
            self._printed = now
            self._print(now - self._start)

    def _print(self, elapsed: float) -> None:
        rate = self._done / elapsed
        left = format_seconds((self._total - self._done) / rate)
        LOGGER.info(
            "%s: %s of %s, %s/s, %s left",
            self._label, format_bytes(self._done), format_bytes(self._total),
            format_bytes(rate), left,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
