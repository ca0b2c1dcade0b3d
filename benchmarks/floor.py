"""The physical floor of merging: read every input byte once, write one output, fsync.

No tensor is touched and nothing but the standard library is imported, so what this takes is what
the disk, the kernel and the page cache take. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from pathlib import Path

BUFFER_BYTES = 16 << 20
BLOCK_BYTES = 4096  # O_DIRECT wants lengths in whole blocks


def read_all(files: list[Path], *, direct: bool) -> int:
    """Read the files one after the other through one reused buffer; return the bytes read."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    total = 0
    with mmap.mmap(-1, BUFFER_BYTES) as buffer:  # page-aligned, as O_DIRECT wants it
        for path in files:
            fd = os.open(path, flags)
            while count := os.readv(fd, [buffer]):
                total += count
                if direct and count % BLOCK_BYTES:
                    break  # the end of the file; another read would start unaligned
            os.close(fd)
    return total


def write_one(path: Path, nbytes: int, *, direct: bool) -> None:
    """Write and fsync a file of ``nbytes`` from one reused buffer."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, flags, 0o644)
    with mmap.mmap(-1, BUFFER_BYTES) as buffer, memoryview(buffer) as view:
        # Not zeros: those would let a clever filesystem or disk store nothing at all.
        view[:] = os.urandom(BUFFER_BYTES)
        left = nbytes + (-nbytes % BLOCK_BYTES if direct else 0)
        while left:
            with view[: min(left, BUFFER_BYTES)] as part:
                left -= os.write(fd, part)
    os.ftruncate(fd, nbytes)
    os.fsync(fd)
    os.close(fd)


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise SystemExit(f"{folder}: no *.safetensors file")
    return found


def measure(inputs: list[Path], out: Path, *, direct: bool) -> dict[str, float]:
    """Time the reading and the writing."""
    files = [path for folder in inputs for path in shards(folder)]
    nbytes = sum(path.stat().st_size for path in shards(inputs[0]))
    start = time.perf_counter()
    bytes_read = read_all(files, direct=direct)
    between = time.perf_counter()
    write_one(out, nbytes, direct=direct)
    end = time.perf_counter()
    return {
        "read_s": between - start,
        "write_s": end - between,
        "bytes_read": bytes_read,
        "bytes_written": nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--direct", action="store_true", help="O_DIRECT, past the page cache")
    options = parser.parse_args()
    print(json.dumps(measure(options.inputs, options.out, direct=options.direct)))


if __name__ == "__main__":
    main()
