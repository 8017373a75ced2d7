"""The threads of the service: decoding, the model's, searching, writing. They live as long as the process does.

    bytes --reading--> prepared inputs --inference--> unit vectors --search--> answers --writing--> long tables

Reading and preprocessing run item by item, before anything is batched, so a bad item fails alone and names itself. The
model makes one pass at a time: two at once would only share the same cores or the same GPU. Answers of many rows are
written by a worker of their own, since the event loop would hear nobody meanwhile, and searches would wait. What is
computed, and with which model and index, comes with the work (`service.engine`), so an index is replaced without
stopping them.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from astroclip.errors import OverloadError
from service.batcher import Batcher
from service.metrics import Metrics
from service.model_process import ModelDied, NoModel, torch_threads
from service.quarantine import Quarantine, Suspects
from service.reading import Reading, give_way, outcomes
from service.searching import answer_together
from service.settings import Settings
from service.trace import Trace
from service.waiting import Lane

__all__ = ["Workers", "first_error", "longest_wait"]

PATIENT_WAITS = 30.0  # times max_wait_s: a minute by default

T = TypeVar("T")


class Workers:
    """See the module.

    inference: groups are `(encode, modality)`, items prepared objects, results unit vectors (D,). search: the group is
    the index, items are calls, results what they return (see `service.searching`). apart: the model is in a process of
    its own, which takes batches in turn.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None, *, apart: bool = False) -> None:
        self.settings, self.metrics = settings, metrics or Metrics()
        common: dict[str, Any] = {
            "max_waiting": settings.max_waiting,
            "max_failures": settings.max_worker_failures,
            "stuck_after_s": settings.stuck_after_s,
        }
        self.quarantine = Quarantine(settings.quarantine_s)
        self.suspects = Suspects(settings.quarantine_s)
        self.inference: Batcher[Any, Any] = Batcher(
            "inference",
            lambda group, grids: group[0](grids),
            self.metrics,
            max_batch=settings.encode_batch,
            window_s=settings.batch_window_s,
            ahead=apart,
            prepare=partial(torch.set_num_threads, torch_threads(settings)),
            culprit=self.quarantine.add,
            suspect=self._suspect,
            costly=(ModelDied,),
            absent=(NoModel,),
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
        self.writing: Batcher[Callable[[], Any], Any] = Batcher(
            "write", outcomes, self.metrics, max_batch=1, prepare=give_way, **common
        )
        self.reading = Reading(settings.decode_threads, self.metrics, **common)
        self.explaining = asyncio.Semaphore(1)  # an explanation is hundreds of passes: one at a time
        self.explanations = 0  # at work or waiting

    def _suspect(self, grid: Any, alone: bool) -> None:
        """The model's process ended at this input, or at a batch with it that nobody waited for any more."""
        if self.suspects.add(grid, alone, self.inference.succeeded):
            self.quarantine.add(grid)

    async def decode(
        self, trace: Trace, work: Callable[..., T], *arguments: Any, size: int = 0, lane: Lane | None = None
    ) -> T:
        """Run the reading of one file of `size` bytes in its threads, timed."""
        found: T = first_error(await self.reading.read(trace, [partial(work, *arguments)], size, lane))
        return found

    async def write(self, trace: Trace, weight: int, work: Callable[..., T], *arguments: Any) -> T:
        """Make a long answer; weight: how long, as a multiple of the shortest. Raises OverloadError, too, where it
        would wait longer than requests do here."""
        lane = Lane.patient if trace.batch else Lane.interactive
        wait, allowed = self.writing.predicted_wait(lane, trace.caller), longest_wait(self.settings, trace)
        if wait > allowed:
            raise OverloadError(
                f"The answer is long, and would wait about {wait:.1f} s to be written; at most {allowed:.1f} s is "
                f"waited here. Try again in {max(1.0, wait - allowed):.0f} s, or ask for fewer rows.",
                retry_after_s=max(1.0, wait - allowed),
            )
        job = partial(contextvars.copy_context().run, partial(work, *arguments))
        found: T = first_error(await self.writing.submit([job], None, trace, "search", weight=weight))
        return found

    def predicted_wait(self, lane: Lane, caller: str, arriving: float, size: int = 0) -> float:
        """Seconds a request of this caller would wait in all queues if it came now; arriving: objects of requests that
        are admitted and not yet read; size: bytes of its file."""
        reading = self.reading.predicted_wait(lane, caller, size)
        # Files are read while the model is at work on others, so the slower of the two is what is waited for.
        return max(reading, self.inference.predicted_wait(lane, caller, arriving)) + self.search.predicted_wait(
            lane, caller
        )

    def problem(self) -> str | None:
        """Why the service is not ready, None when its workers are well. Failures in a row count where what failed can
        be asked a known question; of readers and writers they would tell of the files that came."""
        return self.inference.problem() or self.search.problem() or self.stuck()

    def stuck(self) -> str | None:
        """Which worker is at one batch for too long, None when none is."""
        workers = (self.reading.small, self.reading.large, self.inference, self.search, self.writing)
        return next((trouble for worker in workers if (trouble := worker.stuck()) is not None), None)

    def close(self) -> None:
        self.reading.close()
        for worker in (self.inference, self.search, self.writing):
            worker.close()


def longest_wait(settings: Settings, trace: Trace) -> float:
    """Seconds a request may be predicted to wait."""
    allowed = settings.max_wait_s * (PATIENT_WAITS if trace.batch else 1.0)
    return min(allowed, trace.deadline - time.monotonic())


def first_error(results: Sequence[Any]) -> Any:
    """The one result of a job of one item, raised if it is an exception."""
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result
