"""The threads of the service: decoding, the model's, searching. They live as long as the process does.

    bytes --reading threads--> prepared inputs --inference worker--> unit vectors --search workers--> answers

Reading and preprocessing run item by item, before anything is batched, so a bad item fails alone and names itself. The
model makes one pass at a time: two at once would only share the same cores or the same GPU. What is computed,
and with which model and index, comes with the work (`service.engine`), so an index is replaced without stopping them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from service.batcher import Batcher
from service.metrics import Metrics
from service.model_process import torch_threads
from service.quarantine import Quarantine
from service.reading import Reading
from service.searching import answer_together
from service.settings import Settings
from service.trace import Trace
from service.waiting import Lane

__all__ = ["Workers"]

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
        self.inference: Batcher[Any, Any] = Batcher(
            "inference",
            lambda group, grids: group[0](grids),
            self.metrics,
            max_batch=settings.encode_batch,
            window_s=settings.batch_window_s,
            ahead=apart,
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
        self.reading = Reading(settings.decode_threads)
        self.explaining = asyncio.Semaphore(1)  # an explanation is hundreds of passes: one at a time
        self.explanations = 0  # at work or waiting
        self.metrics.queue("decode", self.reading.__len__)

    async def decode(self, trace: Trace, work: Callable[..., T], *arguments: Any, size: int = 0) -> T:
        """Run the reading of one file of `size` bytes in its threads, timed."""
        return await self.reading.read(trace, partial(work, *arguments), size)

    def predicted_wait(self, lane: Lane, caller: str, arriving: float) -> float:
        """Seconds a request of this caller would wait in all queues if it came now; arriving: objects of requests that
        are admitted and not yet read."""
        reading = self.reading.predicted_wait() if lane < Lane.patient else 0.0
        # Files are read while the model is at work on others, so the slower of the two is what is waited for.
        return max(reading, self.inference.predicted_wait(lane, caller, arriving)) + self.search.predicted_wait(
            lane, caller
        )

    def problem(self) -> str | None:
        """Why the service is not ready, None when its workers are well."""
        return self.inference.problem() or self.search.problem()

    def close(self) -> None:
        self.reading.close()
        for worker in (self.inference, self.search):
            worker.close()


def first_error(results: Sequence[Any]) -> Any:
    """The one result of a job of one item, raised if it is an exception."""
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result
