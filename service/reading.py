"""Who reads and prepares what was sent: one worker for what takes long or can wait, the others for the rest.

Python's lock lets one thread compute at a time, and the event loop, which gives it away several times in a request,
waits each time behind every thread that wants it. Two that read files read no more in a second than one (but for large
images), and hold the loop up for longer. What a second thread is for is that a large file holds nobody up.

Files wait as objects do for the model (`service.batcher`): interactive before patient, callers in turn, and what nobody
waits for any more is not read.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from astroclip.errors import AstroClipError
from service.batcher import Batcher
from service.metrics import Metrics
from service.trace import Trace
from service.waiting import Lane

__all__ = ["LARGE", "Reading", "give_way", "outcomes"]

T = TypeVar("T")

LARGE = 1 << 20  # bytes; a spectrum or image of one object has 50 to 700 kB and takes 1 to 5 ms
_NICE = 5  # a third of the share of a core that others get


class Reading:
    """See the module. threads: of both kinds together; a single one does all. bounds: of each `Batcher`."""

    def __init__(self, threads: int, metrics: Metrics | None = None, **bounds: Any) -> None:
        def worker(name: str, count: int) -> Batcher[Callable[[], Any], Any]:
            return Batcher(name, outcomes, metrics or Metrics(), threads=count, max_batch=1, prepare=give_way, **bounds)

        self.small = worker("decode", max(1, threads - 1))
        self.large = worker("decode-large", 1) if threads > 1 else self.small

    async def read(
        self, trace: Trace, works: Sequence[Callable[[], T]], size: int = 0, lane: Lane | None = None
    ) -> list[T | BaseException]:
        """What each of `works` returns, or the exception it raised, timed as "decode"; size: bytes of the largest.

        Raises as `Batcher.submit` does.
        """
        # With the request's context, so that what the thread logs says whose work it was.
        within = [partial(contextvars.copy_context().run, work) for work in works]
        return await self._worker(trace.batch, size).submit(within, None, trace, "decode", lane)

    def predicted_wait(self, lane: Lane, caller: str, size: int = 0) -> float:
        """Seconds a file of `size` bytes would wait if it came now."""
        return self._worker(lane is Lane.patient, size).predicted_wait(lane, caller)

    def _worker(self, patient: bool, size: int) -> Batcher[Callable[[], Any], Any]:
        return self.large if patient or size > LARGE else self.small

    def close(self) -> None:
        for worker in {self.small, self.large}:
            worker.close()


def outcomes(group: Any, works: Sequence[Callable[[], T]]) -> list[T | BaseException]:
    """What each returns or raises."""
    return [_outcome(work) for work in works]


def _outcome(work: Callable[[], T]) -> T | BaseException:
    # A function of its own: an error holds the frames it went through, and must not meet itself in one.
    try:
        return work()
    except AstroClipError as error:
        return error.without_frames()  # which hold the file, also of a request that is not waited for any more
    except Exception as error:
        return error


def give_way() -> None:
    """To the model and the event loop, where cores are short: who waits for this thread's work waits for both. Its
    share is smaller, and what comes for it does not interrupt a pass (SCHED_BATCH, see sched(7))."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):  # forbidden, as some sandboxes do: then it does not give way
            others = os.getpriority(os.PRIO_PROCESS, os.getpid())  # of the first thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, others + _NICE))
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
