"""Batches: formed of what waits, taken apart when they fail, bounded, supervised."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from astroclip.errors import InputError, NotReadyError, OverloadError
from service.batcher import Batcher
from service.metrics import Metrics
from service.trace import Trace
from service.waiting import Lane


class Doubling:
    """Work that doubles numbers: raises on "poison", waits at the gate while it is closed, and keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, group, items):
        self.batches.append(list(items))
        self.gate.wait(10)
        if "poison" in items:
            raise RuntimeError("device-side assert")
        if "exit" in items:
            raise SystemExit
        return [2 * item for item in items]


@pytest.fixture
def work():
    return Doubling()


@pytest.fixture
def make(work):
    made = []

    def batcher(**options):
        made.append(Batcher("test", work, Metrics(), **options))
        return made[-1]

    yield batcher
    work.gate.set()
    for one in made:
        one.close()


def ask(batcher, items, group="g", lane=None, trace=None):
    return batcher.submit(items, group, trace or Trace(), "inference", lane)


async def until(condition, timeout=5.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.001)


async def held(batcher, work, *asks):
    """The tasks of `asks`, all waiting behind one batch that is at work; the gate is left closed."""
    work.gate.clear()
    first = asyncio.create_task(ask(batcher, [0], "first"))
    await until(lambda: work.batches)
    tasks = [asyncio.create_task(one) for one in asks]
    await until(lambda: len(batcher) >= len(tasks))
    return first, tasks


def test_results_in_order_and_nothing_for_nothing(make):
    batcher = make()
    assert asyncio.run(ask(batcher, [1, 2, 3])) == [2, 4, 6]
    assert asyncio.run(ask(batcher, [])) == []


def test_what_waits_becomes_one_batch_of_its_group(make, work):
    async def run():
        batcher = make(max_batch=4)
        first, tasks = await held(batcher, work, *[ask(batcher, [i], i % 2) for i in range(10)])
        work.gate.set()
        return await asyncio.gather(first, *tasks)

    assert asyncio.run(run()) == [[0], *[[2 * i] for i in range(10)]]
    assert sorted(map(len, work.batches)) == [1, 1, 1, 4, 4]
    assert all(len({i % 2 for i in batch}) == 1 for batch in work.batches[1:])


def test_idle_requests_are_not_held_back(make):
    batcher = make(window_s=5.0)
    start = time.perf_counter()
    for i in range(3):
        assert asyncio.run(ask(batcher, [i])) == [2 * i]
    assert time.perf_counter() - start < 1.0


def test_under_load_a_batch_waits_for_as_many_as_came_last(make, work):
    async def run():
        batcher = make(window_s=5.0)
        await ask(batcher, [1, 2, 3])
        tasks = []
        for i in range(3):
            tasks.append(asyncio.create_task(ask(batcher, [i])))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert work.batches == [[1, 2, 3], [0, 1, 2]]


def test_the_window_ends(make, work):
    async def run():
        batcher = make(window_s=0.05)
        await ask(batcher, [1, 2, 3])
        await ask(batcher, [4])

    asyncio.run(run())
    assert work.batches == [[1, 2, 3], [4]]


def test_only_the_culprit_of_a_batch_fails(make, work):
    async def run():
        batcher = make()
        first, tasks = await held(batcher, work, *[ask(batcher, [i]) for i in range(31)], ask(batcher, ["poison"]))
        work.gate.set()
        results = [(await task)[0] for task in tasks]
        await first
        return results

    *good, bad = asyncio.run(run())
    assert good == [2 * i for i in range(31)]
    assert isinstance(bad, RuntimeError)
    assert len(work.batches) <= 2 + 2 * 5  # halved, not tried one by one


class Costly(RuntimeError):
    """What works has to be started anew."""


@pytest.mark.parametrize(("bad", "calls", "answered"), [((3,), 1 + 8, 7), ((1, 3), 1 + 4, 2), ((0, 1), 1 + 2, 0)])
def test_where_failing_is_costly_items_are_worked_alone_and_not_after_the_second(work, bad, calls, answered):
    failures, blamed = [], []

    def fails(group, items):
        work(group, [])
        if set(bad) & set(items):
            failures.append(len(items))
            raise Costly("the process ended")
        return [2 * item for item in items]

    async def run():
        batcher = Batcher("test", fails, Metrics(), costly=(Costly,), culprit=blamed.append, max_failures=1)
        try:
            return await ask(batcher, range(8)), batcher.problem()
        finally:
            await asyncio.to_thread(batcher.close)

    results, problem = asyncio.run(run())
    assert len(work.batches) == calls and failures == [8, *[1] * len(bad)]
    assert sum(isinstance(result, int) for result in results) == answered
    assert all(isinstance(results[i], Costly) for i in bad)
    assert all(isinstance(r, int | Costly | NotReadyError) for r in results)  # left out: not ready, and not blamed
    assert sorted(blamed) == (list(bad) if answered else [])
    assert (problem is None) == bool(answered)


class Absent(RuntimeError):
    """There is nobody to work."""


@pytest.mark.parametrize("count", [1, 8])
def test_where_nobody_works_the_batch_fails_as_it_is_and_nobody_is_blamed(count):
    calls, blamed = [], []

    def fails(group, items):
        calls.append(len(items))
        raise Absent("no process")

    async def run():
        told = {"culprit": blamed.append, "suspect": lambda item, alone: blamed.append(item)}
        batcher = Batcher("test", fails, Metrics(), absent=(Absent,), costly=(Costly,), max_failures=1, **told)
        try:
            return await ask(batcher, range(count)), batcher.problem()
        finally:
            await asyncio.to_thread(batcher.close)

    results, problem = asyncio.run(run())
    assert calls == [count] and all(isinstance(result, Absent) for result in results) and len(results) == count
    assert problem is not None and not blamed


def test_suspects_are_told_of_whether_or_not_anybody_waits():
    """Alone without any that worked, or left out because nobody waits for them any more."""
    told, gone, noted = [], threading.Event(), lambda *what: told.append(what)

    def fails(group, items):
        gone.wait(10)
        if 0 in items:
            raise Costly("the process ended")
        return items

    async def run():
        batcher = Batcher("test", fails, Metrics(), costly=(Costly,), suspect=noted)
        try:
            task = asyncio.create_task(ask(batcher, [0, 1]))
            await until(lambda: batcher._busy)
            task.cancel()
            await asyncio.wait([task])
            gone.set()
            await until(lambda: len(told) == 2)
            await ask(batcher, [0])
            await ask(batcher, [1])
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())
    assert told == [(0, False), (1, False), (0, True)]


def test_a_thread_that_is_back_is_no_problem_any_more_though_nobody_asks(make):
    allowed = threading.Event()

    def prepare():
        if not allowed.is_set():
            raise RuntimeError("not yet")

    async def run():
        batcher = make(max_failures=3, prepare=prepare)
        await until(lambda: batcher.stuck() is not None)
        allowed.set()
        await until(lambda: batcher.stuck() is None)

    asyncio.run(run())


def test_a_thread_that_every_batch_throws_out_is_a_problem_though_it_idles_in_between(make):
    async def run():
        batcher = make(max_failures=3)
        for count in range(1, 4):
            assert isinstance((await ask(batcher, ["exit"]))[0], RuntimeError)
            await until(lambda count=count: batcher._thrown[0] == count)
        trouble = batcher.stuck()
        await ask(batcher, [1])
        await until(lambda: batcher.stuck() is None)
        return trouble

    assert "thrown out of its loop 3 times" in asyncio.run(run())


def test_a_thread_that_cannot_begin_is_a_problem_and_no_busy_loop(make):
    starts = []

    def prepare():
        starts.append(time.monotonic())
        if len(starts) < 5:
            raise OSError("forbidden")

    async def run():
        batcher = make(max_failures=3, prepare=prepare)
        await until(lambda: batcher.stuck() is not None)
        assert "thrown out of its loop" in batcher.problem()
        assert await ask(batcher, [1]) == [2]
        return batcher.stuck()

    assert asyncio.run(run()) is None
    assert starts[4] - starts[0] >= 0.02 + 0.04 + 0.08 + 0.16


def test_a_result_that_is_an_exception_fails_its_item_alone(make, monkeypatch):
    batcher = make()
    monkeypatch.setattr(batcher, "_work", lambda group, items: [InputError("no") if i == 1 else i for i in items])
    results = asyncio.run(ask(batcher, [0, 1, 2]))
    assert results[0] == 0 and results[2] == 2 and isinstance(results[1], InputError)
    assert batcher.problem() is None


def test_more_than_may_wait_are_refused_and_the_rest_served(make, work):
    async def run():
        batcher = make(max_waiting=4)
        first, tasks = await held(batcher, work, *[ask(batcher, [i]) for i in range(4)])
        with pytest.raises(OverloadError) as caught:
            await ask(batcher, [9])
        assert caught.value.retry_after_s >= 1
        work.gate.set()
        return await asyncio.gather(first, *tasks)

    assert len(asyncio.run(run())) == 5


def test_one_request_larger_than_the_queue_is_served_when_it_is_empty(make):
    assert len(asyncio.run(ask(make(max_waiting=2), range(10)))) == 10


def test_dropped_requests_are_not_worked_on(make, work):
    async def run():
        batcher = make()
        first, (gone, stays) = await held(batcher, work, ask(batcher, ["gone"]), ask(batcher, [1]))
        gone.cancel()
        await asyncio.sleep(0.01)
        work.gate.set()
        await first
        return await stays

    assert asyncio.run(run()) == [2]
    assert not any("gone" in batch for batch in work.batches)


def test_what_nobody_waits_for_any_more_leaves_the_queue(make, work):
    """With all it holds: a file that waits behind a worker that hangs is not kept, nor is its place."""

    class File:
        pass

    async def run():
        batcher = make(max_waiting=3)
        late, client = File(), File()
        kept = [weakref.ref(late), weakref.ref(client)]
        first, tasks = await held(
            batcher,
            work,
            ask(batcher, [late], trace=Trace(deadline=time.monotonic() + 0.02)),
            ask(batcher, [client]),
            ask(batcher, [1]),
        )
        with pytest.raises(OverloadError):
            await ask(batcher, [2])
        del late, client
        with pytest.raises(OverloadError):
            await tasks[0]
        tasks[1].cancel()
        await asyncio.wait(tasks[1:2])
        stays = tasks.pop()
        tasks.clear()
        gc.collect()
        assert [ref() for ref in kept] == [None, None] and len(batcher) == 1
        room = asyncio.create_task(ask(batcher, [3, 4]))
        await until(lambda: len(batcher) == 3)
        work.gate.set()
        return await asyncio.gather(first, stays, room)

    assert asyncio.run(run())[1:] == [[2], [6, 8]]


def test_past_its_deadline_a_request_is_refused_unworked(make, work):
    async def run():
        batcher = make()
        late = Trace(deadline=time.monotonic() + 0.02)
        first, (task,) = await held(batcher, work, ask(batcher, ["late"], trace=late))
        with pytest.raises(OverloadError) as refused:
            await task  # while the worker is at another batch, and would be for long
        work.gate.set()
        await first
        return refused.value

    assert asyncio.run(run()).code == "deadline_passed"
    assert not any("late" in batch for batch in work.batches)


def test_who_waits_for_a_batch_at_work_is_answered_at_the_deadline(make, work):
    async def run():
        batcher = make()
        work.gate.clear()
        trace = Trace(deadline=time.monotonic() + 0.05)
        with pytest.raises(OverloadError) as refused:
            await ask(batcher, [1], trace=trace)
        assert trace.ms["queue"] < 45  # it was at work, not waiting
        with pytest.raises(OverloadError):
            await ask(batcher, [3], trace=(waited := Trace(deadline=time.monotonic() + 0.05)))
        assert waited.ms["queue"] >= 45  # what it waited is told, answered or not
        work.gate.set()
        assert await ask(batcher, [2]) == [4]
        return refused.value

    assert asyncio.run(run()).code == "deadline_passed"


def test_one_lane_that_is_full_keeps_no_other_out_and_never_the_service_itself(make, work):
    async def run():
        batcher = make(max_waiting=2)
        first, waiting = await held(batcher, work, ask(batcher, [1, 2], lane=Lane.patient))
        with pytest.raises(OverloadError):
            await ask(batcher, [3], lane=Lane.patient)
        others = [asyncio.create_task(ask(batcher, [n, n], lane=Lane.interactive)) for n in (4,)]
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadError):
            await ask(batcher, [5], lane=Lane.interactive)
        checks = [asyncio.create_task(ask(batcher, [6], lane=Lane.health)) for _ in range(4)]
        await asyncio.sleep(0.01)
        work.gate.set()
        return await asyncio.gather(first, *waiting, *others, *checks)

    assert asyncio.run(run())[1:] == [[2, 4], [8, 8], *4 * [[12]]]


def test_a_patient_request_waits_behind_the_others(make, work):
    async def run():
        batcher = make(max_batch=2)
        patient = ask(batcher, ["p"] * 4, trace=Trace(batch=True))
        first, tasks = await held(batcher, work, patient, ask(batcher, [1, 1]), ask(batcher, [0], lane=Lane.health))
        work.gate.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(run())
    assert work.batches[1:] == [[0, 1], [1, "p"], ["p", "p"], ["p"]]


def test_times_are_told(make):
    trace = Trace()
    asyncio.run(ask(make(), [1], trace=trace))
    assert trace.ms["inference"] > 0 and trace.ms["queue"] >= 0


def test_predicted_wait_is_items_ahead_times_pace(make, work):
    async def run():
        batcher = make(max_batch=8)
        for size in (8, 8, 8):
            await ask(batcher, list(range(size)))
        batcher._pace = {1: 0.5, 8: 0.1}
        work.batches.clear()  # so that `held` waits for its own
        assert batcher.predicted_wait(Lane.interactive, "me") == 0.0
        first, tasks = await held(batcher, work, *[ask(batcher, [i]) for i in range(20)])
        at_work = dict(batcher._busy)
        batcher._busy.clear()
        waits = [
            batcher.predicted_wait(lane, who) for lane in (Lane.interactive, Lane.health) for who in ("anonymous",)
        ]
        arriving = batcher.predicted_wait(Lane.interactive, "anonymous", arriving=10)
        other = batcher.predicted_wait(Lane.interactive, "somebody else")
        batcher._busy.update(at_work)
        work.gate.set()
        await asyncio.gather(first, *tasks)
        return waits, arriving, other

    (own, health), arriving, other = asyncio.run(run())
    assert own == pytest.approx(20 * 0.1) and health == 0.0
    assert arriving == pytest.approx(30 * 0.1)
    assert other == pytest.approx(0.5)  # its turn comes after one of the other's items


@pytest.mark.parametrize(
    ("pace", "items", "seconds"),
    [
        ({1: 0.012, 32: 0.004, 64: 0.015}, 200, 200 * 0.004),  # that of 64 from the warm-up
        ({1: 0.012, 32: 0.004, 64: 0.015}, 8, 8 * 0.012),
        ({1: 0.19, 32: 0.006}, 16, 32 * 0.006),  # that of 1 from the first pass of all
        ({1: 0.19, 32: 0.006}, 0, 0.0),
        ({}, 5, 0.0),
    ],
)
def test_an_old_pace_keeps_nobody_out(make, pace, items, seconds):
    batcher = make(max_batch=64)
    batcher._pace = pace
    assert batcher._seconds(items) == pytest.approx(seconds)


def test_failures_in_a_row_end_health_and_a_success_restores_it(make):
    batcher = make(max_failures=3)
    for _ in range(2):
        asyncio.run(ask(batcher, ["poison"]))
    assert batcher.problem() is None
    asyncio.run(ask(batcher, ["poison"]))
    assert "3 batches" in batcher.problem()
    asyncio.run(ask(batcher, [1]))
    assert batcher.problem() is None


def test_a_worker_thrown_out_of_its_loop_starts_again_and_answers_what_it_held(make, caplog):
    batcher = make()
    (lost,) = asyncio.run(ask(batcher, ["exit"]))
    assert isinstance(lost, RuntimeError)
    assert asyncio.run(ask(batcher, [4])) == [8]
    assert "starts again" in caplog.text


def test_a_batch_that_does_not_end_is_a_problem(make, work):
    async def run():
        batcher = make(stuck_after_s=0.02)
        work.gate.clear()
        task = asyncio.create_task(ask(batcher, [1]))
        await until(lambda: batcher.problem() is not None)
        work.gate.set()
        await task
        return batcher.problem()

    assert asyncio.run(run()) is None


def test_closing_finishes_the_batch_at_work_and_refuses_the_rest(make, work):
    async def run():
        batcher = make()
        first, (waiting,) = await held(batcher, work, ask(batcher, [1]))
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        (error,) = await waiting
        work.gate.set()
        await closing
        assert await first == [0]
        with pytest.raises(NotReadyError):
            await ask(batcher, [2])
        return error

    assert isinstance(asyncio.run(run()), NotReadyError)


def test_metrics_tell_size_and_failures(make, work):
    batcher = make()
    asyncio.run(ask(batcher, [1, 2, "poison"]))
    text = batcher._metrics.text().decode()
    assert 'astroclip_batch_size_sum{worker="test"} 3.0' in text
    assert 'astroclip_worker_failures_total{what="item",worker="test"} 1.0' in text
    assert 'astroclip_queue_items{worker="test"} 0.0' in text


class Turning(Doubling):
    """As what batches are handed to ahead: takes them in turn, and each takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.turn, self.seconds = threading.Lock(), seconds

    def __call__(self, group, items):
        with self.turn:
            time.sleep(self.seconds)
            return super().__call__(group, items)


@pytest.fixture
def ahead(make, work, monkeypatch):
    """A batcher that hands batches over ahead, and those it has handed over."""
    handed = []

    def noted(group, items):
        handed.append(list(items))
        return Doubling.__call__(work, group, items)

    def batcher(pace=0.0, **options):
        one = make(ahead=True, **options)
        one._work, one._pace = noted, {1: pace}
        return one

    return batcher, handed


def test_ahead_one_batch_is_handed_over_while_another_is_at_work_and_no_third(ahead, work):
    make, handed = ahead

    async def run():
        batcher = make(max_batch=4)
        work.gate.clear()
        first = asyncio.create_task(ask(batcher, [0]))
        await until(lambda: handed)
        rest = [asyncio.create_task(ask(batcher, [i])) for i in range(1, 13)]
        await until(lambda: len(handed) == 2)
        await asyncio.sleep(0.05)
        assert len(handed) == 2 and len(batcher) + len(handed[1]) == 12
        work.gate.set()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(run()) == [[2 * i] for i in range(13)]


def test_ahead_few_are_left_until_the_batch_at_work_ends(ahead, work):
    make, handed = ahead

    async def run():
        batcher = make()
        work.gate.clear()
        first = asyncio.create_task(ask(batcher, list(range(8))))
        await until(lambda: handed)
        few = [asyncio.create_task(ask(batcher, [i])) for i in range(3)]
        await asyncio.sleep(0.05)
        assert len(handed) == 1
        few.append(asyncio.create_task(ask(batcher, [3])))
        await until(lambda: len(handed) == 2)
        work.gate.set()
        await asyncio.gather(first, *few)

    asyncio.run(run())
    assert handed[1] == [0, 1, 2, 3]


def test_ahead_is_shortly_before_the_batch_at_work_should_end(ahead, work):
    make, handed = ahead

    async def run():
        batcher = make(pace=0.25)
        work.gate.clear()
        start = time.perf_counter()
        first = asyncio.create_task(ask(batcher, [0]))
        await until(lambda: handed)
        tasks = [asyncio.create_task(ask(batcher, [i])) for i in range(5)]
        await asyncio.sleep(0.1)
        assert len(handed) == 1
        await until(lambda: len(handed) == 2)
        waited = time.perf_counter() - start
        work.gate.set()
        await asyncio.gather(first, *tasks)
        return waited

    assert asyncio.run(run()) >= 0.2 and handed[1] == list(range(5))


def test_ahead_pace_and_times_do_not_count_the_wait_behind_another_batch(make, monkeypatch):
    monkeypatch.setattr("service.batcher._OVER", 0.0)

    async def run():
        batcher = make(ahead=True, max_batch=1)
        batcher._work = Turning(0.05)
        await ask(batcher, [0])
        traces = [Trace() for _ in range(8)]
        await asyncio.gather(*(ask(batcher, [i], trace=trace) for i, trace in enumerate(traces)))
        return batcher._pace[1], max(trace.ms["inference"] for trace in traces), traces[-1].ms["queue"]

    pace, slowest, queued = asyncio.run(run())
    assert pace < 0.08 and slowest < 90 and queued > 250


def test_ahead_what_waits_for_two_batches_is_predicted(ahead, work):
    make, handed = ahead

    async def run():
        batcher = make(max_batch=1)
        work.gate.clear()
        tasks = [asyncio.create_task(ask(batcher, [i])) for i in range(3)]
        await until(lambda: len(handed) == 2)
        batcher._pace = {1: 10.0}
        wait = batcher.predicted_wait(Lane.interactive, "anonymous")
        work.gate.set()
        await asyncio.gather(*tasks)
        return wait

    assert 29.0 < asyncio.run(run()) <= 30.0


def test_ahead_every_item_is_answered_once_under_load(make):
    async def run():
        batcher = make(ahead=True, max_batch=7, window_s=0.002)
        batcher._work = Turning(0.002)

        async def client(number):
            return [(await ask(batcher, [number * 100 + i], group=number % 2))[0] for i in range(30)]

        return await asyncio.wait_for(asyncio.gather(*map(client, range(16))), 30)

    for number, answers in enumerate(asyncio.run(run())):
        assert answers == [2 * (number * 100 + i) for i in range(30)]


def test_a_full_batch_does_not_hold_the_event_loop(make):
    """Requests that were answered together go on a few in each turn."""
    from service.batcher import _AT_ONCE, _resolve, _Ticket

    async def run():
        tickets = [_Ticket(asyncio.get_running_loop(), 0.0, "") for _ in range(3 * _AT_ONCE)]
        _resolve(tickets)
        done = []
        while not done or done[-1] < len(tickets):
            done.append(sum(ticket.answered.done() for ticket in tickets))
            await asyncio.sleep(0)
        return done

    assert asyncio.run(run()) == [8, 16, 24]


def test_who_has_little_waiting_is_let_into_a_lane_that_another_fills(make, work):
    """Up to half of an equal share; who fills it is not."""

    async def run():
        batcher = make(max_waiting=16)
        greedy, modest = Trace(caller="greedy"), Trace(caller="modest")
        first, tasks = await held(batcher, work, *[ask(batcher, [i] * 4, trace=greedy) for i in range(4)])
        await until(lambda: len(batcher) == 16)
        for trace, items in ((greedy, 1), (modest, 5)):
            with pytest.raises(OverloadError):
                await ask(batcher, list(range(items)), trace=trace)
        tasks.append(asyncio.create_task(ask(batcher, [7] * 4, trace=modest)))
        await until(lambda: len(batcher) == 20)
        with pytest.raises(OverloadError):  # it has its half now
            await ask(batcher, [8], trace=modest)
        others = [Trace(caller=f"other {i}") for i in range(6)]  # of eight callers each has a share of two
        tasks += [asyncio.create_task(ask(batcher, [9], trace=trace)) for trace in others]
        await until(lambda: len(batcher) == 26)
        work.gate.set()
        return await asyncio.gather(first, *tasks)

    assert asyncio.run(run())[5] == [14] * 4


def test_where_a_thread_is_idle_nobody_waits_for_the_one_that_is_not(make, work):
    async def run():
        batcher = make(threads=2)
        first, _ = await held(batcher, work)
        batcher._pace = {1: 50.0}
        one = batcher.predicted_wait(Lane.interactive, "me")
        second = asyncio.create_task(ask(batcher, [1], "second"))
        await until(lambda: len(batcher._busy) == 2)
        both = batcher.predicted_wait(Lane.interactive, "me")
        work.gate.set()
        await asyncio.gather(first, second)
        return one, both

    one, both = asyncio.run(run())
    assert one == 0.0 and 40 < both <= 50
