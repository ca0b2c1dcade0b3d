"""Random masks that can be made for any part of a tensor alone: the same bits however it is cut.

Element p of a tensor takes bits 16 * (p % 4) and up of word p // 4 of a PCG64DXSM stream, which
jumps to any word at once (O'Neill, HMC-CS-2014-0905; numpy keeps the stream for good).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_LEVELS = 1 << 16
_WORD = 4
"""Elements for each 64-bit word of the stream."""


def key(seed: int, model: int, tensor: str) -> int:
    """64 bits that tell the masks of one tensor of one model from all others."""
    name = f"{seed}\0{model}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def fill(out: torch.Tensor, key: int, density: float, *, start: int, stride: int) -> None:
    """out = 1 with probability `density`, else 0, independently for each element.

    `out` is rows x columns, float32, on any device; its element (i, j) is number
    start + i * stride + j of the mask. 0 < density <= 1, taken to a multiple of 2^-16 (to one at
    least).
    """
    stream = np.random.PCG64DXSM(key)
    word = 0  # where the stream stands
    # The numbers are compared as signed: the smallest is -2^15.
    largest = max(1, round(density * _LEVELS)) - 1 - _LEVELS // 2
    rows, columns = out.shape
    if stride == columns:
        out, rows, columns = out.view(1, -1), 1, rows * columns
    for i in range(rows):
        first = start + i * stride
        last = -(-(first + columns) // _WORD)
        stream.advance((first // _WORD - word) % (1 << 128))
        numbers = stream.random_raw(last - first // _WORD).view(np.int16)
        word = last
        drawn = torch.from_numpy(numbers)[first % _WORD :][:columns]
        if out.device.type == "cpu":
            torch.le(drawn, largest, out=out[i])
        else:
            out[i].copy_(drawn <= largest)
