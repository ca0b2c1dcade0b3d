"""Threads that Python does not wait for when the program ends.

After a failure a thread may hang in a system call, or wait for bytes that will never come. The
interpreter joins the threads of concurrent.futures.ThreadPoolExecutor at its exit: it would hang
with them, and no launcher would notice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """`count` threads that do what is submitted, in order."""

    def __init__(self, count: int, name: str):
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count = count
        self._closed = False
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """Let the threads end as soon as they can. What has not begun is never done."""
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            task()
            del task  # and the buffers that it holds
