"""How much one caller may ask: below, at and above each bound, by a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.testclient import TestClient
from survey import npy

from service.access import Access
from service.app import make_app
from service.keys import KeyRing, changing, new_key
from service.metrics import Metrics
from service.rates import WINDOW_S, Rates, Windows, _item, caller_of
from service.settings import Settings
from service.telemetry import Telemetry
from service.trace import TraceMiddleware

READ = "/v1/objects/sim-00000020"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Service:
    """An application that waits when told to, behind the middleware as `make_app` has it."""

    def __init__(
        self, keys: KeyRing | None = None, per_s: float = 1.0, in_flight: int = 0, metrics_per_s: float = 0.0
    ) -> None:
        self.clock = Clock()
        self.release: asyncio.Event | None = None
        self.rates = Rates(self._answer, per_s, in_flight, metrics_per_s, clock=self.clock)
        self.app = TraceMiddleware(Access(self.rates, keys), Metrics(), Telemetry())

    async def _answer(self, scope, receive, send) -> None:
        if scope["path"] == "/fails":
            raise RuntimeError
        if self.release:
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["trace"].caller.encode()})

    def client(self, address: str = "10.0.0.1") -> TestClient:
        return TestClient(self.app, client=(address, 5), raise_server_exceptions=False)

    def passed(self, times: int, address: str = "10.0.0.1", path: str = "/v1/info", key: str = "") -> int:
        """How many of so many requests pass."""
        headers = {"x-api-key": key} if key else {}
        client = self.client(address)
        return sum(client.get(path, headers=headers).status_code == 200 for _ in range(times))


@pytest.fixture
def keyed(tmp_path):
    def keyed(**options):
        with changing(tmp_path / "keys.json") as held:
            text, key = new_key(["read"], **options)
            held.append(key)
        return text

    keyed.ring = lambda: KeyRing(tmp_path / "keys.json")
    return keyed


# --- requests a second -----------------------------------------------------------------------------------------------


def test_as_many_as_the_rate_and_not_one_more():
    service = Service(per_s=1.5)
    assert service.passed(20) == 15
    answer = service.client().get("/v1/info")
    error = answer.json()["error"]
    assert answer.status_code == 429 and error["code"] == "too_many_requests" and error["limit"] == 1.5
    assert error["request_id"] == answer.headers["x-request-id"]
    assert 1 <= int(answer.headers["retry-after"]) <= 2 * WINDOW_S


def test_what_was_refused_does_not_count():
    patient, pushing = Service(), Service()
    assert patient.passed(10) == pushing.passed(60) == 10
    for service in (patient, pushing):
        service.clock.now += WINDOW_S + 5  # half of the last window still weighs
        assert service.passed(20) == 5


def test_steady_asking_passes_just_below_the_rate_and_is_thinned_out_above():
    below, double = Service(per_s=2), Service(per_s=2)
    passed = 0
    for _ in range(80):
        assert below.passed(1) == 1
        passed += double.passed(2)
        below.clock.now += 0.53
        double.clock.now += 0.5
    assert passed == pytest.approx(80, rel=0.2)


def test_no_burst_at_the_border_of_windows():
    service = Service()
    service.clock.now = 1009.9
    assert service.passed(10) == 10
    service.clock.now = 1010.1
    assert service.passed(10) <= 1


@pytest.mark.parametrize("phase", [0.0, 3.7, 9.9])
@pytest.mark.parametrize("earlier", [0, 4, 10])
@pytest.mark.parametrize("per_s", [0.1, 1.0, 5.0])
def test_after_the_time_named_one_passes_and_not_long_before(phase, earlier, per_s):
    service = Service(per_s=per_s)
    service.passed(min(earlier, round(10 * per_s)))
    service.clock.now += WINDOW_S + phase
    service.passed(round(10 * per_s))
    answer = service.client().get("/v1/info")
    assert answer.status_code == 429
    wait = int(answer.headers["retry-after"])
    if wait > 1:
        service.clock.now += wait - 1.01
        assert service.client().get("/v1/info").status_code == 429
        service.clock.now += 1.01
    else:
        service.clock.now += 1
    assert service.client().get("/v1/info").status_code == 200


def test_zero_is_no_bound_and_a_low_rate_still_lets_one_pass():
    assert Service(per_s=0).passed(50) == 50
    assert Service(per_s=0.001).passed(3) == 1


def test_callers_do_not_share_and_probes_are_not_counted(keyed):
    service = Service()
    assert service.passed(11, "10.0.0.1") == 10 and service.passed(11, "10.0.0.2") == 10
    for path in ("/livez", "/readyz"):
        assert service.passed(20, path=path) == 20
    one, two = keyed(), keyed()
    service = Service(keyed.ring())
    assert service.passed(11, key=one) == 10 and service.passed(11, key=two) == 10
    assert service.passed(1, "10.9.9.9", key=one) == 0  # a key is one caller from wherever it asks
    assert service.client().get("/v1/info", headers={"x-api-key": "junk"}).status_code == 401  # and is not counted


def test_metrics_are_counted_apart(keyed):
    service = Service(metrics_per_s=0.5)
    assert service.passed(11) == 10 and service.passed(11, path="/metrics") == 5
    assert service.passed(1, "10.0.0.2", path="/metrics") == 1
    assert Service(metrics_per_s=0).passed(30, path="/metrics") == 30


def test_a_key_may_have_its_own_rates(keyed):
    slow, free, usual = keyed(max_rate_per_s=0.5), keyed(max_rate_per_s=0), keyed()
    service = Service(keyed.ring())
    assert [service.passed(30, key=key) for key in (slow, free, usual)] == [5, 30, 10]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("not:an:address", "not:another", False),
    ],
)
def test_addresses_of_one_household_are_one_caller(one, other, same):
    found = [caller_of({"client": (address, 1), "state": {}}) for address in (one, other)]
    assert (found[0] == found[1]) == same
    assert caller_of({"client": None, "state": {}}) == "nobody"


def test_memory_is_bounded_and_the_silent_are_forgotten_first():
    windows = Windows(max_callers=3)
    limiter, item = SlidingWindowCounterRateLimiter(windows), _item(0.1)
    assert all(limiter.hit(item, caller) for caller in "abc")
    assert not limiter.hit(item, "a")
    assert limiter.hit(item, "d") and len(windows) == 3
    assert limiter.hit(item, "a")  # forgotten, so it may again
    assert not limiter.hit(item, "d")


# --- requests at once ------------------------------------------------------------------------------------------------


def test_one_at_once_too_many_is_refused_and_others_are_not():
    async def run():
        service = Service(per_s=0, in_flight=3)
        service.release = asyncio.Event()
        transports = [httpx2.ASGITransport(service.app, client=(address, 1)) for address in ("10.0.0.1", "10.0.0.2")]
        one, other = (httpx2.AsyncClient(transport=transport, base_url="http://x") for transport in transports)
        held = [asyncio.create_task(one.get("/v1/info")) for _ in range(3)]
        held.append(asyncio.create_task(other.get("/v1/info")))
        await asyncio.sleep(0.05)
        refused = await one.get("/v1/info")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) == 1
        assert refused.json()["error"]["code"] == "too_many_at_once" and refused.json()["error"]["limit"] == 3
        dropped = held.pop(0)
        dropped.cancel()  # a client that goes away gives its place back
        await asyncio.gather(dropped, return_exceptions=True)
        held.append(asyncio.create_task(one.get("/v1/info")))
        await asyncio.sleep(0.05)
        service.release.set()
        assert {(await task).status_code for task in held} == {200}
        assert service.rates.at_work == {}

    asyncio.run(run())


def test_a_request_that_breaks_gives_its_place_back():
    service = Service(in_flight=1)
    for _ in range(3):
        assert service.client().get("/fails").status_code == 500
    assert service.rates.at_work == {} and service.passed(1) == 1


def test_a_key_may_have_its_own_number_at_once(keyed):
    none_more, usual = keyed(max_in_flight=1), keyed()

    async def run():
        service = Service(keyed.ring(), in_flight=2)
        service.release = asyncio.Event()
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app), base_url="http://x")
        tasks = [
            asyncio.create_task(client.get("/v1/info", headers={"x-api-key": key}))
            for key in (none_more, none_more, usual, usual, usual)
        ]
        await asyncio.sleep(0.05)
        service.release.set()
        return [(await task).status_code for task in tasks]

    assert asyncio.run(run()) == [200, 429, 200, 200, 429]


# --- in the application ----------------------------------------------------------------------------------------------


def test_settings_reach_the_application(settings, engine, galaxy):
    app = make_app(settings.model_copy(update={"max_rate_per_s": 0.3}), engine)
    client = TestClient(app)
    assert [client.get(READ).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert client.post("/v1/embed/image", content=npy(galaxy.pixels)).json()["error"]["code"] == "too_many_requests"
    assert client.get("/readyz").status_code == 200


def test_the_client_waits_as_it_is_told(settings, engine):
    from astroclip.client import Client, InProcessTransport, Retry
    from astroclip.errors import OverloadError

    app = make_app(settings.model_copy(update={"max_rate_per_s": 0.1}), engine)
    with Client("http://test", transport=InProcessTransport(app), retry=Retry(times=0)) as api:
        api.info()
        with pytest.raises(OverloadError) as caught:
            api.info()
    assert caught.value.code == "too_many_requests" and 1 <= caught.value.retry_after_s <= 20


def test_defaults_let_the_page_in_and_stop_a_loop():
    defaults = Settings()
    assert defaults.max_rate_per_s * WINDOW_S > 1000  # a page asks for some sixty things at once
    assert defaults.max_in_flight_per_caller * 2 <= defaults.max_in_flight  # no caller takes all places
