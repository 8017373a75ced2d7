"""Threads that read: what takes long or can wait has its own, and all give way."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from service.reading import LARGE, Reading
from service.trace import Trace


@pytest.fixture
def made():
    opened = []

    def make(threads):
        opened.append(Reading(threads))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def name():
    return threading.current_thread().name


def where(reading, trace=None, size=0):
    return asyncio.run(reading.read(trace or Trace(), name, size))


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
        large = asyncio.create_task(reading.read(Trace(), lambda: gate.wait(10), LARGE + 1))
        waits = asyncio.create_task(reading.read(Trace(), name, LARGE + 1))
        assert await asyncio.wait_for(reading.read(Trace(), lambda: "read"), 5) == "read"
        assert not large.done() and not waits.done() and len(reading) == 1
        gate.set()
        await asyncio.gather(large, waits)
        assert len(reading) == 0

    asyncio.run(run())


def test_small_files_that_wait_are_predicted_and_timed(made):
    reading, trace = made(2), Trace()

    async def run():
        await reading.read(trace, lambda: time.sleep(0.02))
        assert reading.predicted_wait() == 0.0
        tasks = [asyncio.create_task(reading.read(trace, lambda: time.sleep(0.02))) for _ in range(5)]
        await asyncio.sleep(0)
        wait, pace = reading.predicted_wait(), reading._small.pace
        await asyncio.gather(*tasks)
        return wait, pace

    wait, pace = asyncio.run(run())
    assert wait == pytest.approx(4 * pace) and pace > 0
    assert trace.ms["decode"] >= 6 * 20 and trace.ms["queue"] >= (1 + 2 + 3 + 4) * 20


def test_what_reading_raises_is_raised(made):
    reading = made(2)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(reading.read(Trace(), lambda: 1 / 0))
    assert reading._small.count == 0


@pytest.mark.parametrize("size", [0, LARGE + 1])
def test_threads_that_read_give_way_to_the_model(made, size):
    def now():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)

    mine = now()
    nice, policy = asyncio.run(made(2).read(Trace(), now, size))
    assert nice > mine[0] and policy == os.SCHED_BATCH != mine[1]
    assert now() == mine
