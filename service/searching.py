"""Searching together: requests that ask the same of the index share one call of it.

The work of a request is a function; where it needs the index searched it *yields* a `Search` and is sent what was
found, so that the searches of a whole batch can be collected first:

    answers to their first question -> equal questions in one `SurveyIndex.search` -> answers to their end

One matrix product over the table serves them all (a million vectors of 128: 41 ms for one query, 4.5 ms each in a
batch of 64). What a query finds does not depend on who else asks: only searches that are planned alike are joined, and
scores are computed pair by pair (`VectorTable.scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from index import Hits, How, SearchReport, SurveyIndex

__all__ = ["Search", "Searching", "answer_together", "within"]

Answer = TypeVar("Answer")

# The work of a request that searches: it yields a Search, is sent (hits, report), and returns its answer.
Searching: TypeAlias = "Generator[Search, tuple[Hits, SearchReport], Answer]"

_JOINED = 16  # more excluded rows than a query's own object and its near surroundings: searched alone


@dataclass(frozen=True, eq=False)
class Search:
    """One query: its vector (D,), the rows never to return to it, and how to search."""

    vector: npt.NDArray[np.float32]
    exclude_rows: npt.NDArray[np.int64]
    how: How

    @property
    def like(self) -> Hashable:
        """Equal for searches that one call answers. The number of excluded rows is part of it, since more of them make
        the search look further, and an answer must not depend on who else asks."""
        plain = {**self.how, "mask": id(self.how.get("mask")), "excluded": len(self.exclude_rows)}
        return tuple(plain.values()) if len(self.exclude_rows) <= _JOINED else id(self)


_Asking: TypeAlias = "tuple[int, Searching[Any], Search]"


def answer_together(index: SurveyIndex, works: Sequence[Callable[[], Any]]) -> list[Any]:
    """The result of each function, or the exception it raised."""
    results: list[Any] = [None] * len(works)
    asking: list[_Asking] = []

    def go_on(place: int, step: Callable[[], Any], searching: Searching[Any] | None) -> None:
        """Run one work to its next search or its end."""
        try:
            outcome = step()
            if searching is None and isinstance(outcome, Generator):
                searching = outcome
                outcome = next(searching)
            if searching is None:
                results[place] = outcome
            else:
                asking.append((place, searching, outcome))
        except StopIteration as end:
            results[place] = end.value
        except Exception as error:
            results[place] = error

    for place, work in enumerate(works):
        go_on(place, work, None)
    while asking:
        alike: dict[Hashable, list[_Asking]] = {}
        for entry in asking:
            alike.setdefault(entry[2].like, []).append(entry)
        asking = []
        for group in alike.values():
            for (place, searching, _), found in zip(group, _found(index, [s for _, _, s in group]), strict=True):
                step = (
                    (lambda searching=searching, found=found: searching.throw(found))
                    if isinstance(found, BaseException)
                    else (lambda searching=searching, found=found: searching.send(found))
                )
                go_on(place, step, searching)
    return results


def within(context: Context, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` with every step of it run in `context`, also where it searches: a worker's thread is in no request's."""

    def begin() -> Any:
        outcome = context.run(work)
        return steps(outcome) if isinstance(outcome, Generator) else outcome

    def steps(searching: Searching[Any]) -> Searching[Any]:
        step: Callable[[], Any] = partial(next, searching)
        while True:
            try:
                question = context.run(step)
            except StopIteration as end:
                return end.value
            try:
                found = yield question
            except BaseException as error:
                step = partial(searching.throw, error)
            else:
                step = partial(searching.send, found)

    return begin


def _found(index: SurveyIndex, searches: Sequence[Search]) -> list[Any]:
    """(hits, report) of each of equal searches, or the exception of the one that raises alone."""
    how: How = {**searches[0].how}
    if len(searches) == 1:
        how["exclude_rows"] = searches[0].exclude_rows
    else:
        how["exclude_each"] = [search.exclude_rows for search in searches]
    try:
        hits, report = index.search(np.stack([search.vector for search in searches]), **how)
    except Exception as error:
        if len(searches) == 1:
            return [error]
        return [found for search in searches for found in _found(index, [search])]
    return [(found, report) for found in hits]
