"""The threads that read and prepare what was sent: one for what takes long or can wait, the others for the rest.

Python's lock lets one thread compute at a time, and the event loop, which gives it away several times in a request,
waits each time behind every thread that wants it. Two that read files read no more in a second than one (but for large
images), and hold the loop up for longer. What a second thread is for is that a large file holds nobody up.

They give way to the model and the event loop where cores are short, since their work waits for both: their share is
smaller, and a file that comes does not interrupt a pass (SCHED_BATCH, see sched(7)).
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from service.trace import Trace

__all__ = ["LARGE", "Reading"]

T = TypeVar("T")

LARGE = 1 << 20  # bytes; a spectrum or image of one object has 50 to 700 kB and takes 1 to 5 ms
_NEW = 0.1  # weight of the newest file in the measured pace
_NICE = 5  # a third of the share of a core that others get


class Reading:
    """See the module. threads: of both kinds together; a single one does all."""

    def __init__(self, threads: int) -> None:
        self._small = _Pool("decode", max(1, threads - 1))
        self._large = _Pool("decode-large", 1) if threads > 1 else self._small

    def __len__(self) -> int:
        """Files that wait for a thread."""
        return sum(max(0, pool.count - pool.threads) for pool in {self._small, self._large})

    async def read(self, trace: Trace, work: Callable[[], T], size: int = 0) -> T:
        """What `work` returns, timed as "decode"; size: bytes to be read."""
        pool = self._large if trace.batch or size > LARGE else self._small
        return await pool.run(trace, work)

    def predicted_wait(self) -> float:
        """Seconds a small file would wait if it came now."""
        pool = self._small
        return max(0, pool.count - pool.threads) * pool.pace / pool.threads

    def close(self) -> None:
        for pool in {self._small, self._large}:
            pool.executor.shutdown(wait=True, cancel_futures=True)


class _Pool:
    """Threads, how many files they have or are to get, and the seconds one takes."""

    def __init__(self, name: str, threads: int) -> None:
        self.threads, self.count, self.pace = threads, 0, 0.0
        self.executor = ThreadPoolExecutor(threads, name, initializer=_give_way)

    async def run(self, trace: Trace, work: Callable[[], T]) -> T:
        asked = time.perf_counter()
        context = contextvars.copy_context()  # so that what the thread logs says whose work it was
        self.count += 1
        try:
            result, waited, worked = await asyncio.get_running_loop().run_in_executor(
                self.executor, partial(context.run, _timed, work, asked)
            )
        finally:
            self.count -= 1
        self.pace += _NEW * (worked - self.pace)
        trace.add("queue", waited, ended_ago=worked)
        trace.add("decode", worked)
        return result


def _timed(work: Callable[[], T], asked: float) -> tuple[T, float, float]:
    """What `work` returns, and the seconds since `asked` that it waited and then took."""
    start = time.perf_counter()
    result = work()
    return result, start - asked, time.perf_counter() - start


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
