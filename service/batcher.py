"""Batching: the work of many requests in few calls, done by supervised threads behind one bounded, fair queue.

    submit(items) --waiting room--> batch of one group --work(group, items)--> results, each to the request it is of

* A batch is what waits when the worker is free, up to `max_batch`: nothing is held back while it is idle. Only under
  load (the last batch had several items) it waits up to `window_s` for as many again, because the answers just sent
  bring the next requests a moment later, and a batch of one costs several times its share of a batch of many.
* Where the work is done elsewhere (`ahead`), the next batch is made up and handed over shortly before the one at work
  ends, so that who works does not wait for this process, which is at its busiest when a batch has just been answered.
* A batch that raises is halved until the culprit stands alone; only that item fails, with the exception it raised.
  Where failing costs far more than working (`costly`: what works has to be started anew) its items are worked one by
  one instead, which meets the culprit once, and no more of them after the second that failed so. Where nothing was
  worked at all (`absent`: there is nobody to work) the batch fails as it is.
* Items whose request was dropped leave the queue, and what they hold is freed; so do those past their deadline. Who
  waits gets 429 at it, whatever the worker is at.
* A worker whose thread is thrown out of its loop is started again. Batches of which nothing succeeded are counted:
  `problem` says when there were too many in a row, `stuck` when one takes too long, or a thread cannot begin.
* Who was at fault is noted here, whether or not anybody still waits for the answer: what ends the worker after a
  minute has long been given up by whoever sent it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from astroclip.errors import AstroClipError, NotReadyError, OverloadError
from service.metrics import Metrics
from service.trace import Trace, too_late
from service.waiting import Lane, Waiting

__all__ = ["Batcher"]

log = logging.getLogger("astroclip.service")

Item = TypeVar("Item")
Result = TypeVar("Result")

_NEW = 0.2  # weight of the newest batch in the measured pace
_COSTLY_MOST = 2  # items of a batch: one may be the culprit, a second points to who works
_LONGEST_PAUSE_S = 1.0  # before a thread starts again
_AT_ONCE = 8  # requests that go on in one turn of the event loop
_OVER = 0.8  # of the time expected for the batch at work: then the next is made up, of what waits by then


class Batcher(Generic[Item, Result]):
    """See the module.

    work(group, items) gives one result an item, in order; a result that is an exception fails its item alone.
    threads: batches worked at once. ahead: one is, and before it ends another thread hands the next to `work`, which
    itself takes them in turn.
    max_batch: items of one call. max_waiting: items that may wait in a lane, so that patient ones keep nobody else out;
    more are refused (OverloadError), but the service's own question is not.
    max_failures: batches in a row without any success after which `problem` speaks; stuck_after_s: likewise for one
    batch that does not end. prepare: run in each thread before its first batch.
    culprit: told of an item that failed alone where others of its batch did not. suspect: of one that may have caused a
    costly failure, and whether it was alone then: with no others to tell; or in a batch, and not worked alone
    afterwards, since nobody waited for it any more. costly, absent: exceptions, see the module.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Any, list[Item]], Sequence[Result | BaseException]],
        metrics: Metrics,
        *,
        threads: int = 1,
        ahead: bool = False,
        max_batch: int = 64,
        max_waiting: int = 2048,
        window_s: float = 0.0,
        max_failures: int = 3,
        stuck_after_s: float = 60.0,
        prepare: Callable[[], None] = lambda: None,
        culprit: Callable[[Item], None] = lambda item: None,
        suspect: Callable[[Item, bool], None] = lambda item, alone: None,
        costly: tuple[type[Exception], ...] = (),
        absent: tuple[type[Exception], ...] = (),
    ) -> None:
        self.name, self._work, self._prepare, self._metrics = name, work, prepare, metrics
        self._culprit, self._suspect, self._costly, self._absent = culprit, suspect, costly, absent
        self.max_batch, self.max_waiting, self.window_s = max_batch, max_waiting, window_s
        self.max_failures, self.stuck_after_s = max_failures, stuck_after_s
        self._waiting: Waiting[_Job] = Waiting()
        self._ready = threading.Condition()
        self._closed = False
        self._last = 1  # items of the last batch: how many to expect again
        # Threads that wait until a time, for a batch to fill or for the next to be due: not to be woken for less.
        self._timed: Counter[str | None] = Counter()
        self._since = 0.0  # when the oldest item began to wait
        self._failures = 0
        self.succeeded = 0  # batches of which something was worked
        # How often in a row each thread could not begin, and was thrown out of its loop since it last worked a batch.
        self._not_begun: Counter[int] = Counter()
        self._thrown: Counter[int] = Counter()
        self._busy: dict[int, tuple[float, int]] = {}  # thread: since when, weight of its batch
        self._at_once, self._ahead = (1 if ahead else threads), ahead
        self._began = 0.0  # when work on the batch at work began, or ended where there is none
        self._due = 0.0  # when to make up the next one ahead
        self._pace: dict[int, float] = {}  # seconds an item, by the batch's size (powers of two)
        metrics.queue(name, self.__len__)
        self._threads = [
            threading.Thread(target=self._live, args=(i,), name=f"{name}-{i}", daemon=True)
            for i in range(2 if ahead else threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    # -- asking ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        items: Iterable[Item],
        group: Hashable,
        trace: Trace,
        stage: str,
        lane: Lane | None = None,
        weight: int = 1,
    ) -> list[Result | BaseException]:
        """The result of each item, in order; an item that failed has its exception in its place.

        weight: of each item, as a multiple of the usual work, for turns and predictions.
        The time waited and worked is added to the trace (`stage`). Raises OverloadError when too many wait or the
        request's deadline passes, NotReadyError when the service stops.
        """
        chosen = lane if lane is not None else Lane.patient if trace.batch else Lane.interactive
        ticket = _Ticket(asyncio.get_running_loop(), trace.deadline, trace.request_id)
        jobs = [_Job(chosen, trace.caller, group, item, ticket, place, weight) for place, item in enumerate(items)]
        ticket.expect(len(jobs))
        if jobs:
            self._enqueue(jobs)
        try:
            async with trace.in_time():
                await ticket.answered
        finally:
            now = time.perf_counter()
            if ticket.done:
                trace.add("queue", ticket.taken - ticket.asked, ended_ago=now - ticket.taken)
                trace.add(stage, ticket.done - ticket.taken, ended_ago=now - ticket.done)
            elif jobs:  # nobody waits any more: the deadline passed, or the client left
                with self._ready:
                    self._waiting.remove(jobs)
                trace.add("queue", min(ticket.begun, now) - ticket.asked)
        return ticket.results

    def _enqueue(self, jobs: list[_Job]) -> None:
        with self._ready:
            if self._closed:
                raise NotReadyError("The service is stopping. Try again in a few seconds.")
            weight = sum(job.weight for job in jobs)
            lane, waiting = jobs[0].lane, self._waiting.count(jobs[0].lane)
            full = waiting and waiting + weight > self.max_waiting and lane is not Lane.health
            if full and not self._within_share(jobs[0], weight):
                wait = max(1.0, self._seconds(waiting))
                raise OverloadError(
                    f"{waiting} objects wait already, and {self.max_waiting} may. Try again in {wait:.0f} s.",
                    retry_after_s=wait,
                )
            if not len(self._waiting):
                self._since = time.perf_counter()
            for job in jobs:
                self._waiting.put(job)
            if self._wanted():
                self._ready.notify()

    def _within_share(self, job: _Job, weight: int) -> bool:
        """Whether a caller who has little waiting may add to a lane that others have filled: up to half of what would
        be his if all had the same."""
        lane, caller = job.lane, job.caller
        share = self.max_waiting / self._waiting.callers(lane, caller)
        return self._waiting.own(lane, caller) + weight <= share / 2

    def _wanted(self) -> bool:
        """Whether a thread that waits should look at what came."""
        if self._ahead and self._busy:
            return self._worth_it() and not self._timed["due"]
        return not self._timed["fill"] or len(self._waiting) >= min(self._last, self.max_batch)

    def _worth_it(self) -> bool:
        """Whether enough waits to be handed over ahead; of few, more may come while the batch at work ends."""
        return 2 * len(self._waiting) >= min(self._last, self.max_batch)

    def predicted_wait(self, lane: Lane, caller: str, arriving: float = 0.0) -> float:
        """Seconds an item of this caller would wait if it came now; arriving: items known to be on their way."""
        if not self._busy and not arriving and not len(self._waiting):
            return 0.0
        now = time.perf_counter()
        with self._ready:
            ahead = self._waiting.ahead(lane, caller) + arriving
            busy = list(self._busy.values())
            if self._ahead:  # one after the other
                under_way = max(0.0, sum(self._seconds(weight) for _, weight in busy) - (now - self._began))
            else:
                left = (max(0.0, self._seconds(weight) - (now - since)) for since, weight in busy)
                under_way = min(left) if len(busy) >= self._at_once else 0.0
        return under_way + self._seconds(ahead) / self._at_once

    def _seconds(self, items: float) -> float:
        """How long so many items take, by the batches there were: no longer than at the pace of any of them, nor than a
        larger one took. Some of these are old, and the first of all is slow; what is refused for such a one never
        becomes the batch that would teach better."""
        return (
            min((max(items, size) * pace for size, pace in list(self._pace.items())), default=0.0) if items > 0 else 0.0
        )

    # -- health ------------------------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Why this worker should not be relied on, None when it is well."""
        if self._failures >= self.max_failures:
            return f"{self._failures} batches of {self.name} failed in a row"
        return self.stuck()

    def stuck(self) -> str | None:
        """That it is at one batch for too long, None when it is not."""
        busy = max((time.perf_counter() - since for since, _ in list(self._busy.values())), default=0.0)
        if busy > self.stuck_after_s:
            return f"{self.name} has been at one batch for {busy:.0f} s"
        thrown = max([*self._thrown.values(), *self._not_begun.values()], default=0)
        if thrown >= self.max_failures:
            return f"a thread of {self.name} was thrown out of its loop {thrown} times in a row"
        return None

    def close(self) -> None:
        """End the threads after the batches at work; who still waits gets NotReadyError."""
        with self._ready:
            self._closed = True
            left = []
            while jobs := self._waiting.take(self.max_batch):
                left += jobs
            self._ready.notify_all()
        error = NotReadyError("The service is stopping. Try again in a few seconds.")
        self._answer([(job, error) for job in left])
        for thread in self._threads:
            thread.join()

    # -- working -----------------------------------------------------------------------------------------------------

    def _live(self, number: int) -> None:
        """The thread: its loop, started again whatever threw it out."""
        while not self._closed:
            thrown = self._not_begun
            try:
                self._prepare()
                thrown.pop(number, None)
                thrown = self._thrown
                while jobs := self._next(number):
                    self._do(number, jobs)
                    thrown.pop(number, None)
                    jobs.clear()  # else an idle thread would keep the last batch's index alive
                return
            except BaseException:
                self._metrics.failure(self.name, "restart")
                log.exception("the worker %s-%d was thrown out of its loop and starts again", self.name, number)
                thrown[number] += 1
                time.sleep(min(_LONGEST_PAUSE_S, 0.01 * 2 ** min(thrown[number], 10)))

    def _next(self, number: int) -> list[_Job]:
        """The next batch, waited for; empty when closed."""
        with self._ready:
            while not self._closed:
                patience = self._patience()
                if patience is None or patience > 0.0:
                    reason = None if patience is None else "due" if self._busy else "fill"
                    self._timed[reason] += 1
                    self._ready.wait(patience)
                    self._timed[reason] -= 1
                    continue
                jobs = self._waiting.take(self.max_batch)
                now = time.perf_counter()
                self._last, self._since = len(jobs), now
                self._busy[number] = now, sum(job.weight for job in jobs)
                if len(self._busy) == 1:
                    self._begin(now)
                if len(self._waiting):
                    self._ready.notify()
                return jobs
        return []

    def _patience(self) -> float | None:
        """Seconds until the next batch should be made up; None: when somebody comes."""
        now = time.perf_counter()
        if self._ahead and self._busy:
            return max(0.0, self._due - now) if len(self._waiting) and self._worth_it() else None
        if not len(self._waiting):
            return None
        if self._last > 1 and len(self._waiting) < min(self._last, self.max_batch):
            return max(0.0, self._since + self.window_s - now)
        return 0.0

    def _begin(self, now: float) -> None:
        """Work on the batch taken first begins."""
        self._began = now
        self._due = now + _OVER * sum(self._seconds(weight) for _, weight in self._busy.values())

    def _end(self, number: int) -> float:
        """The batch of this thread is worked; when that began."""
        with self._ready:
            now = time.perf_counter()
            since, _ = self._busy.pop(number)
            began = max(since, self._began) if self._ahead else since
            self._begin(now)
            return began

    def _do(self, number: int, taken: list[_Job]) -> None:
        """Work a batch and answer every request in it, whatever happens."""
        now = time.monotonic()
        awaited = [job for job in taken if not job.ticket.dropped]
        begun = time.perf_counter()
        for job in awaited:
            job.ticket.begun = min(job.ticket.begun, begun)
        late = [job for job in awaited if job.ticket.deadline <= now]
        jobs = [job for job in awaited if job.ticket.deadline > now]
        results: list[Any] = []
        try:
            self._answer([(job, too_late()) for job in late])
            results = self._results(jobs[0].group, jobs) if jobs else []
        finally:
            began = self._end(number)
            self._note(jobs, time.perf_counter() - began, results)  # before the answers: who has one sees it
            for job in jobs:
                job.ticket.taken = min(job.ticket.taken, began)
            missing = [RuntimeError(f"{self.name} was interrupted")] * (len(jobs) - len(results))
            self._answer(list(zip(jobs, [*results, *missing], strict=True)))

    def _note(self, jobs: Sequence[_Job], seconds: float, results: Sequence[Any]) -> None:
        """What a batch taught: pace, health, culprits."""
        if not jobs:
            return
        self._metrics.batch(self.name, len(jobs), seconds)
        weight = sum(job.weight for job in jobs)
        size, pace = _size(min(weight, self.max_batch)), seconds / weight
        self._pace[size] = pace + (1.0 - _NEW) * (self._pace.get(size, pace) - pace)
        of_each = list(zip(jobs, results, strict=bool(results)))  # none, where it was interrupted
        success = not all(_unexpected(result) for _, result in of_each if not isinstance(result, _NotWorked))
        self._failures = 0 if success else self._failures + 1
        self.succeeded += success
        for job, result in of_each:
            if isinstance(result, _NotWorked):
                if result.suspect:
                    self._suspect(job.item, False)
            elif _unexpected(result) and not isinstance(result, self._absent):
                if success:
                    self._culprit(job.item)
                elif isinstance(result, self._costly):
                    self._suspect(job.item, True)

    def _results(self, group: Hashable, jobs: Sequence[_Job]) -> list[Any]:
        """The batch's results; if it raises, those of its halves, down to the items that raise alone."""
        try:
            results = list(self._work(group, [job.item for job in jobs]))
            if len(results) != len(jobs):
                raise RuntimeError(f"{self.name}: {len(results)} results of {len(jobs)} items")
            return results
        except Exception as error:
            self._metrics.failure(self.name, "batch" if len(jobs) > 1 else "item")
            if isinstance(error, self._costly) and len(jobs) > 1:
                log.warning(
                    "a batch of %d failed in %s (%s); its items are worked alone",
                    len(jobs),
                    self.name,
                    error,
                    extra=_requests(jobs),
                )
                return self._one_by_one(group, jobs)
            if isinstance(error, self._absent):
                log.error("nobody works in %s: %s", self.name, error, extra=_requests(jobs))
                return [error] * len(jobs)
            if len(jobs) == 1:
                if not isinstance(error, AstroClipError):
                    log.exception("one item failed in %s", self.name, extra=_requests(jobs))
                return [error]
            failed = type(error).__name__
            log.warning(
                "a batch of %d failed in %s (%s); halving it", len(jobs), self.name, failed, extra=_requests(jobs)
            )
        middle = len(jobs) // 2
        return self._results(group, jobs[:middle]) + self._results(group, jobs[middle:])

    def _one_by_one(self, group: Hashable, jobs: Sequence[_Job]) -> list[Any]:
        """Each worked alone; what nobody waits for, and what is left after the second costly failure or where nobody
        works any more, is not."""
        results: list[Any] = []
        failed = 0
        for job in jobs:
            if failed < _COSTLY_MOST and not job.ticket.dropped:
                results += self._results(group, [job])
                if isinstance(results[-1], self._costly):
                    failed += 1
                elif isinstance(results[-1], self._absent):
                    failed = _COSTLY_MOST
            else:
                results.append(_NotWorked(self.name, suspect=job.ticket.dropped and failed < _COSTLY_MOST))
        return results

    def _answer(self, outcomes: Sequence[tuple[_Job, Any]]) -> None:
        """Put results into their tickets; one call into a loop for all that are complete now."""
        complete: dict[asyncio.AbstractEventLoop, list[_Ticket]] = {}
        now = time.perf_counter()
        with self._ready:  # two workers may answer parts of one request
            for job, result in outcomes:
                ticket = job.ticket
                ticket.results[job.place] = result
                ticket.missing -= 1
                if not ticket.missing:
                    ticket.done, ticket.taken = now, min(ticket.taken, now)
                    complete.setdefault(ticket.loop, []).append(ticket)
        for loop, tickets in complete.items():
            try:
                loop.call_soon_threadsafe(_resolve, tickets)
            except RuntimeError:  # the loop is closed: nobody waits any more
                continue


class _NotWorked(NotReadyError):
    """The item was left out, and says nothing of the worker. suspect: it may be what its batch failed at."""

    def __init__(self, worker: str, suspect: bool) -> None:
        super().__init__(f"The worker {worker} failed repeatedly. Try again in a few seconds.")
        self.suspect = suspect


@dataclass(eq=False)
class _Ticket:
    """What one request waits for. Resolved in the loop it was made in; all else may be read from any thread."""

    loop: asyncio.AbstractEventLoop
    deadline: float
    request_id: str
    asked: float = field(default_factory=time.perf_counter)
    begun: float = math.inf  # a worker took the first item
    taken: float = math.inf  # likewise, known at the end: a batch handed over ahead is waited for, too
    done: float = 0.0
    results: list[Any] = field(default_factory=list)
    missing: int = 0

    def __post_init__(self) -> None:
        self.answered: asyncio.Future[None] = self.loop.create_future()

    def expect(self, count: int) -> None:
        self.results, self.missing = [None] * count, count
        if not count:
            self.taken = self.done = self.asked
            self.answered.set_result(None)

    @property
    def dropped(self) -> bool:
        return self.answered.cancelled()

    def resolve(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    lane: Lane
    caller: str
    group: Hashable
    item: Any
    ticket: _Ticket
    place: int
    weight: int = 1


def _resolve(tickets: Sequence[_Ticket]) -> None:
    """A few in each turn of the loop: what an answer costs, times a batch, is time in which nobody else is heard."""
    for ticket in tickets[:_AT_ONCE]:
        ticket.resolve()
    if len(tickets) > _AT_ONCE:
        tickets[0].loop.call_soon(_resolve, tickets[_AT_ONCE:])


def _requests(jobs: Sequence[_Job]) -> dict[str, Any]:
    """Whose work it is, for a line in the log: a worker's thread is in no request's context."""
    names = list(dict.fromkeys(job.ticket.request_id for job in jobs))
    return {"request_id": names[0]} if len(names) == 1 else {"request_ids": names}


def _unexpected(result: Any) -> bool:
    return isinstance(result, BaseException) and not isinstance(result, AstroClipError)


def _size(items: float) -> int:
    """The power of two at or below."""
    return 1 << max(0, int(items).bit_length() - 1)
