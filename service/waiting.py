"""The waiting room of a worker: who is served next. A data structure without threads; `service.batcher` locks it.

Three lanes, most urgent first; in a lane the callers take turns, so one who sends much waits for his own requests and
not in front of others (fair queueing, Nagle 1985, RFC 970). A batch is of one group, since only equal work can be done
in one call: that of the caller whose turn it is, filled up with the same group's items of everybody.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

__all__ = ["Job", "Lane", "Waiting"]

PATIENCE = 8  # every eighth batch starts with the patient lane, so that it is slow under load and never starves


class Lane(IntEnum):
    """How urgent: the service's own check, a person who waits, a job that does not."""

    health = 0
    interactive = 1
    patient = 2


class Job(Protocol):
    """What waits."""

    @property
    def lane(self) -> Lane: ...
    @property
    def caller(self) -> str: ...
    @property
    def group(self) -> Hashable: ...
    @property
    def weight(self) -> int: ...


J = TypeVar("J", bound=Job)
_Groups = OrderedDict[Hashable, deque[J]]


class Waiting(Generic[J]):
    """See the module. `put` and `take` cost the callers of a lane, never the items that wait; `remove` costs those
    of its caller and group.

    An item may weigh as much as several: lengths are sums of weights, batches are counted in items.
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane, OrderedDict[str, _Groups[J]]] = {lane: OrderedDict() for lane in Lane}
        self._own: dict[tuple[Lane, str], int] = {}
        self._count = dict.fromkeys(Lane, 0)
        self._batches = 0

    def __len__(self) -> int:
        return sum(self._count.values())

    def count(self, lane: Lane) -> int:
        """How many items wait in a lane."""
        return self._count[lane]

    def own(self, lane: Lane, caller: str) -> int:
        """How many items of a caller wait in a lane."""
        return self._own.get((lane, caller), 0)

    def callers(self, lane: Lane, caller: str) -> int:
        """How many callers have items in a lane, `caller` counted whether he has or not."""
        return len(self._lanes[lane]) + (caller not in self._lanes[lane])

    def put(self, job: J) -> None:
        groups = self._lanes[job.lane].setdefault(job.caller, OrderedDict())
        groups.setdefault(job.group, deque()).append(job)
        key = (job.lane, job.caller)
        self._own[key] = self._own.get(key, 0) + job.weight
        self._count[job.lane] += job.weight

    def ahead(self, lane: Lane, caller: str) -> int:
        """How many items come before one that this caller would add now: all more urgent ones, and of its own lane as
        many as the turns let pass."""
        urgent = sum([count for other, count in self._count.items() if other < lane])
        if not self._count[lane]:
            return urgent
        own, others = self.own(lane, caller), self.callers(lane, caller) - 1
        return urgent + min(self._count[lane], own + others * (own + 1))

    def take(self, most: int) -> list[J]:
        """The next batch, at most `most` items of one group; empty when nobody waits."""
        lanes = [lane for lane in Lane if self._count[lane]]
        if not lanes:
            return []
        self._batches += 1
        if self._batches % PATIENCE == 0 and lanes[0] is Lane.interactive:
            lanes.reverse()
        caller, groups = next(iter(self._lanes[lanes[0]].items()))
        group = next(iter(groups))
        groups.move_to_end(group)  # the caller's other groups come before this one's rest
        batch: list[J] = []
        for lane in lanes:
            first = caller if lane is lanes[0] else None
            self._fill(batch, lane, group, most, first)
        return batch

    def remove(self, jobs: Sequence[J]) -> None:
        """Those of `jobs` that still wait leave; they are of one lane, caller and group."""
        lane, caller, group = jobs[0].lane, jobs[0].caller, jobs[0].group
        groups = self._lanes[lane].get(caller)
        if groups is None or group not in groups:
            return
        queue = groups[group]
        leaving = set(map(id, jobs))
        gone = [job for job in queue if id(job) in leaving]
        weight = sum(job.weight for job in gone)
        self._count[lane] -= weight
        self._own[lane, caller] -= weight
        if len(gone) == len(queue):
            self._forget(lane, caller, group)
        elif gone:
            groups[group] = deque(job for job in queue if id(job) not in leaving)

    def _fill(self, batch: list[J], lane: Lane, group: Hashable, most: int, first: str | None) -> None:
        """Items of a group from every caller of a lane in turn, beginning with `first`."""
        callers = self._lanes[lane]
        turns = [name for name, groups in callers.items() if group in groups]
        if first is not None:
            turns.sort(key=lambda name: name != first)
        while turns and len(batch) < most:
            for name in list(turns):
                if len(batch) == most:
                    return
                queue = callers[name][group]
                batch.append(job := queue.popleft())
                self._count[lane] -= job.weight
                self._own[lane, name] -= job.weight
                if not queue:
                    turns.remove(name)
                    self._forget(lane, name, group)
                if name in callers:  # who was served goes to the end
                    callers.move_to_end(name)
        if turns and first is not None and first in callers:
            callers.move_to_end(first)  # whole rounds were served: it is another's turn to choose the group

    def _forget(self, lane: Lane, caller: str, group: Hashable) -> None:
        groups = self._lanes[lane][caller]
        del groups[group]
        if not groups:
            del self._lanes[lane][caller], self._own[lane, caller]
