"""Threads that read: what takes long or can wait has its own, callers take turns, and all give way."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from astroclip.errors import OverloadError
from service.reading import LARGE, Reading
from service.trace import Trace
from service.waiting import Lane


@pytest.fixture
def made():
    opened = []

    def make(threads, **bounds):
        opened.append(Reading(threads, **bounds))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


async def read(reading, work, trace=None, size=0, lane=None):
    (found,) = await reading.read(trace or Trace(), [work], size, lane)
    return found


def name():
    return threading.current_thread().name


def where(reading, trace=None, size=0):
    return asyncio.run(read(reading, name, trace, size))


def test_large_files_and_patient_requests_have_a_thread_of_their_own(made):
    reading = made(2)
    small = where(reading, size=LARGE)
    assert where(reading, size=LARGE + 1) == where(reading, Trace(batch=True)) != small


def test_a_single_thread_does_all(made):
    reading = made(1)
    assert where(reading) == where(reading, size=LARGE + 1) == where(reading, Trace(batch=True))


def test_a_large_file_holds_no_small_one_up(made):
    reading, gate = made(2), threading.Event()

    async def run():
        large = asyncio.create_task(read(reading, lambda: gate.wait(10), size=LARGE + 1))
        waits = asyncio.create_task(read(reading, name, size=LARGE + 1))
        assert await asyncio.wait_for(read(reading, lambda: "read"), 5) == "read"
        assert not large.done() and not waits.done()
        while len(reading.large) != 1:  # one is read, one waits
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(large, waits)
        assert len(reading.large) == 0

    asyncio.run(run())


async def behind(reading, *asks):
    """What finished in which order, of `asks`, (name, trace, lane) each, that all wait behind one file."""
    gate, order = threading.Event(), []
    first = asyncio.create_task(read(reading, lambda: gate.wait(10)))
    await asyncio.sleep(0.02)
    tasks = [
        asyncio.create_task(read(reading, lambda who=who: order.append(who), trace, lane=lane))
        for who, trace, lane in asks
    ]
    await asyncio.sleep(0.02)
    gate.set()
    await asyncio.gather(first, *tasks)
    return order


def test_callers_take_turns(made):
    """Whose eighty files came first waits for his own, and not in front of somebody's one."""
    asks = [("greedy", Trace(caller="greedy"), None)] * 8 + [("modest", Trace(caller="modest"), None)]
    assert asyncio.run(behind(made(2), *asks)).index("modest") <= 1


def test_patient_files_wait_behind_those_of_people_and_all_behind_the_services_own(made):
    asks = [
        ("patient", Trace(batch=True), None),
        ("person", Trace(), None),
        ("check", Trace(), Lane.health),
    ]
    assert asyncio.run(behind(made(1), *asks)) == ["check", "person", "patient"]


def test_what_nobody_waits_for_is_not_read(made):
    reading, gate, order = made(2), threading.Event(), []

    async def run():
        first = asyncio.create_task(read(reading, lambda: gate.wait(10)))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(read(reading, lambda: order.append("gone")))
        late = asyncio.create_task(read(reading, lambda: order.append("late"), Trace(deadline=time.monotonic() + 0.03)))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(OverloadError):
            await late
        gate.set()
        await first
        await read(reading, lambda: order.append("here"))

    asyncio.run(run())
    assert order == ["here"]


def test_so_many_files_may_wait_and_no_more(made):
    reading, gate = made(2, max_waiting=3), threading.Event()

    async def run():
        first = asyncio.create_task(read(reading, lambda: gate.wait(10)))
        await asyncio.sleep(0.02)
        waits = asyncio.create_task(reading.read(Trace(), [name] * 2))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadError):
            await reading.read(Trace(), [name] * 2)
        fits = asyncio.create_task(reading.read(Trace(), [name]))
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(first, waits, fits)

    asyncio.run(run())


def test_small_files_that_wait_are_predicted_and_timed(made):
    reading, trace, gate, pace = made(2), Trace(), threading.Event(), 5.0

    async def run():
        await read(reading, lambda: None, trace)
        assert reading.predicted_wait(Lane.interactive, "me") == 0.0
        first = asyncio.create_task(read(reading, lambda: gate.wait(10), trace))
        rest = asyncio.create_task(reading.read(trace, [lambda: time.sleep(0.02)] * 4))
        while len(reading.small) != 4:
            await asyncio.sleep(0.001)
        reading.small._pace = {1: pace}
        waits = [reading.predicted_wait(Lane.interactive, who) for who in (trace.caller, "somebody else")]
        assert reading.predicted_wait(Lane.patient, "me") == 0.0
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(first, rest)
        return waits

    own, other = asyncio.run(run())
    assert 4 * pace <= own <= 5 * pace and pace <= other <= 2 * pace  # callers take turns
    assert trace.ms["decode"] >= 4 * 20 and trace.ms["queue"] >= 45


def test_what_one_file_raises_is_its_own(made):
    found = asyncio.run(made(2).read(Trace(), [lambda: 1 / 0, lambda: "read"]))
    assert isinstance(found[0], ZeroDivisionError) and found[1] == "read"


def test_a_file_that_is_read_for_ever_is_a_problem(made):
    reading, gate = made(2, stuck_after_s=0.02), threading.Event()

    async def run():
        task = asyncio.create_task(read(reading, lambda: gate.wait(10)))
        await asyncio.sleep(0.1)
        assert "decode has been at one batch" in reading.small.stuck()
        gate.set()
        await task
        assert reading.small.stuck() is None

    asyncio.run(run())


@pytest.mark.parametrize("size", [0, LARGE + 1])
def test_threads_that_read_give_way_to_the_model(made, size):
    def now():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)

    mine = now()
    nice, policy = asyncio.run(read(made(2), now, size=size))
    assert nice == min(19, mine[0] + 5) and policy == os.SCHED_BATCH != mine[1]
    assert now() == mine
