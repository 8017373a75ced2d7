"""The threads of the service: decoding, the model's, searching. They live as long as the process does.

    bytes --decode pool--> prepared inputs --inference worker--> unit vectors --search workers--> answers

Reading and preprocessing run item by item, before anything is batched, so a bad item fails alone and names itself. The
model runs in one thread: two forward passes at once would only share the same cores or the same GPU. What is computed,
and with which model and index, comes with the work (`service.engine`), so an index is replaced without stopping them.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from service.batcher import Batcher
from service.metrics import Metrics
from service.model_process import torch_threads
from service.quarantine import Quarantine
from service.searching import answer_together
from service.settings import Settings
from service.trace import Trace
from service.waiting import Lane

__all__ = ["Workers"]

T = TypeVar("T")

_NICE = 5  # a third of the share of a core that others get


class Workers:
    """See the module.

    inference: groups are `(encode, modality)`, items prepared objects, results unit vectors (D,). search: the group is
    the index, items are calls, results what they return (see `service.searching`).
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.settings, self.metrics = settings, metrics or Metrics()
        common: dict[str, Any] = {
            "max_waiting": settings.max_waiting,
            "max_failures": settings.max_worker_failures,
            "stuck_after_s": settings.stuck_after_s,
        }
        self.quarantine = Quarantine(settings.quarantine_s)
        self.inference: Batcher[Any, Any] = Batcher(
            "inference",
            lambda group, grids: group[0](grids),
            self.metrics,
            max_batch=settings.encode_batch,
            window_s=settings.batch_window_s,
            prepare=partial(torch.set_num_threads, torch_threads(settings)),
            culprit=self.quarantine.add,
            **common,
        )
        self.search: Batcher[Callable[[], Any], Any] = Batcher(
            "search",
            answer_together,
            self.metrics,
            threads=settings.search_threads,
            max_batch=settings.search_batch,
            **common,
        )
        self._decoding = ThreadPoolExecutor(settings.decode_threads, "decode", initializer=_give_way)
        self._decodings = 0
        self._decode_pace = 0.0
        self._patient = asyncio.Semaphore(max(1, settings.decode_threads - 1))
        self.explaining = asyncio.Semaphore(1)  # an explanation is hundreds of passes: one at a time
        self.explanations = 0  # at work or waiting
        self.metrics.queue("decode", lambda: max(0, self._decodings - settings.decode_threads))

    async def decode(self, trace: Trace, work: Callable[..., T], *arguments: Any) -> T:
        """Run the reading of one file in the pool, timed. Patient requests leave one thread to the others."""
        if trace.batch:
            async with self._patient:
                return await self._decode(trace, work, *arguments)
        return await self._decode(trace, work, *arguments)

    async def _decode(self, trace: Trace, work: Callable[..., T], *arguments: Any) -> T:
        asked = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            start = time.perf_counter()
            result = work(*arguments)
            return result, start - asked, time.perf_counter() - start

        self._decodings += 1
        context = contextvars.copy_context()  # so that what the thread logs says whose work it was
        try:
            result, waited, worked = await asyncio.get_running_loop().run_in_executor(
                self._decoding, context.run, timed
            )
        finally:
            self._decodings -= 1
        self._decode_pace += 0.1 * (worked - self._decode_pace)
        trace.add("queue", waited, ended_ago=worked)
        trace.add("decode", worked)
        return result

    def predicted_wait(self, lane: Lane, caller: str, arriving: float) -> float:
        """Seconds a request of this caller would wait in all queues if it came now; arriving: objects of requests that
        are admitted and not yet read."""
        decoding = max(0, self._decodings - self.settings.decode_threads) * self._decode_pace
        return (
            decoding / self.settings.decode_threads
            + self.inference.predicted_wait(lane, caller, arriving)
            + self.search.predicted_wait(lane, caller)
        )

    def problem(self) -> str | None:
        """Why the service is not ready, None when its workers are well."""
        return self.inference.problem() or self.search.problem()

    def close(self) -> None:
        self._decoding.shutdown(wait=True, cancel_futures=True)
        for worker in (self.inference, self.search):
            worker.close()


def _give_way() -> None:
    """Let the model and the event loop go before this thread where cores are short: its work waits for theirs."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def first_error(results: Sequence[Any]) -> Any:
    """The one result of a job of one item, raised if it is an exception."""
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result
