"""Python's garbage collector, held off while a great many objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No garbage collection meanwhile; also a decorator.

    For code that makes millions of small objects that stay: the collector would walk all of them
    again and again and find nothing, which takes a third of the time of a large plan.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
