"""How much one caller may ask: requests a second, and requests at work at once. Both answer 429 with Retry-After.

A caller is an API key or, without one, the client's address (of IPv6 its /64, which one household has). Counted is
every request but those of health: a probe must never be told to wait. /metrics has a rate of its own
(`max_metrics_rate_per_s`). What a request costs is not weighed here, since it is unknown before the body is read;
admission weighs it afterwards, in predicted seconds.

The window is 10 s (`WINDOW_S`), so a page that asks for sixty thumbnails at once is within any sensible rate. Strategy
of the `limits` library: sliding window counter, two integers a caller. A fixed window would let twice the rate through
at its border; a moving window keeps, and shifts, a time stamp for each request. Refused requests do not count. Of the
library's in-memory storage only the interface is used: on an idle service it starts a thread with every request, to
sweep (3 ms on two busy cores; `Windows` takes 2 microseconds), goes through all it knows each time, and counts by a
clock that can be set back.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Address

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from astroclip.errors import OverloadError
from service.access import METRICS, key_of, path_of
from service.errors import from_astroclip
from service.keys import Key

__all__ = ["MAX_CALLERS", "WINDOW_S", "Rates", "Windows", "caller_of"]

WINDOW_S = 10
MAX_CALLERS = 10_000  # remembered, some 3 MB; the one heard of longest ago is forgotten first
UNCOUNTED = frozenset({"/livez", "/readyz"})


class Windows(MemoryStorage):
    """Counts of the current and the last window of each caller, in constant time and bounded memory.

    For the sliding window counter alone, and for one thread. clock: seconds, never going back.
    """

    STORAGE_SCHEME = ["astroclip-windows"]  # type: ignore[assignment]

    def __init__(self, max_callers: int = MAX_CALLERS, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.max_callers = max_callers
        self.clock = clock
        self._counts: OrderedDict[str, tuple[int, int, int]] = OrderedDict()  # window number, count before it, count

    def __len__(self) -> int:
        return len(self._counts)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        number, before, count = self._now(key, expiry)
        left = 1.0 - (self.clock() / expiry) % 1.0
        if math.floor(before * left + count) + amount > limit:
            return False
        self._counts[key] = (number, before, count + amount)
        self._counts.move_to_end(key)
        if len(self._counts) > self.max_callers:
            self._counts.popitem(last=False)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        _, before, count = self._now(key, expiry)
        left = (1.0 - (self.clock() / expiry) % 1.0) * expiry
        return before, left, count, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._counts.pop(key, None)

    def _now(self, key: str, expiry: int) -> tuple[int, int, int]:
        number = int(self.clock() // expiry)
        last, before, count = self._counts.get(key, (number, 0, 0))
        if last == number:
            return number, before, count
        return number, count if last == number - 1 else 0, 0


class Rates:
    """See the module. per_s, in_flight: of a caller whose key does not say otherwise; metrics_per_s: of each, of
    /metrics; 0 is no bound."""

    def __init__(
        self,
        app: ASGIApp,
        per_s: float,
        in_flight: int,
        metrics_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.per_s, self.metrics_per_s = per_s, metrics_per_s
        self.in_flight = in_flight
        self.windows = Windows(clock=clock)
        self.limiter = SlidingWindowCounterRateLimiter(self.windows)
        self.at_work: dict[str, int] = {}  # callers with a request at work, no others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        key, caller = key_of(scope), caller_of(scope)
        scope["state"]["trace"].caller = caller  # whose turn it is in the queues
        if path_of(scope) == METRICS:  # counted apart, so that other calls of the same address never keep it out
            caller, per_s, in_flight = f"{caller} {METRICS}", self.metrics_per_s, 0
        else:
            per_s, in_flight = self._bounds(key)
        try:
            self._count(caller, per_s, in_flight)
        except OverloadError as error:
            await from_astroclip(error, scope["state"]["trace"].request_id)(scope, receive, send)
            return
        self.at_work[caller] = self.at_work.get(caller, 0) + 1
        try:
            await self.app(scope, receive, send)
        finally:
            if self.at_work[caller] > 1:
                self.at_work[caller] -= 1
            else:
                del self.at_work[caller]

    def _bounds(self, key: Key | None) -> tuple[float, int]:
        """Requests a second and at once, of the key where it says, else of everybody."""
        per_s = self.per_s if key is None or key.max_rate_per_s is None else key.max_rate_per_s
        in_flight = self.in_flight if key is None or key.max_in_flight is None else key.max_in_flight
        return per_s, in_flight

    def _count(self, caller: str, per_s: float, in_flight: int) -> None:
        """Raises OverloadError."""
        if in_flight and self.at_work.get(caller, 0) >= in_flight:
            raise OverloadError(
                f"{in_flight} requests of this caller are at work, which is all one caller may have at once. Wait for "
                "one to be answered, or send several objects in one request.",
                retry_after_s=1.0,
                code="too_many_at_once",
                limit=in_flight,
            )
        if not per_s:
            return
        item = _item(per_s)
        if not self.limiter.hit(item, caller):
            wait = self._wait_s(item, caller)
            raise OverloadError(
                f"This caller asked more than {per_s:g} times a second over {WINDOW_S} s. Try again in {wait:.0f} s; "
                "several objects go in one request.",
                retry_after_s=wait,
                code="too_many_requests",
                limit=per_s,
            )

    def _wait_s(self, item: RateLimitItemPerSecond, caller: str) -> float:
        """Whole seconds until the next request passes, if none is sent until then.

        In this window the weight of the last one falls; where this one alone is full, its own must fall in the next.
        """
        before, left, count, _ = self.windows.get_sliding_window(item.key_for(caller), WINDOW_S)
        room = item.amount - count  # the weighted count before must fall below it
        if room > 0 and before > 0:
            wait = left - WINDOW_S * room / before
        else:
            wait = left + WINDOW_S * max(0.0, 1 - item.amount / count)
        return max(1.0, math.ceil(wait + 1e-6))


@lru_cache(maxsize=1024)
def _item(per_s: float) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(max(1, math.floor(per_s * WINDOW_S)), WINDOW_S)


def caller_of(scope: Scope) -> str:
    """The key's id, or the address; behind a proxy that is not trusted (see uvicorn) all have the proxy's."""
    key = key_of(scope)
    if key is not None:
        return key.id
    client = scope.get("client")
    return _network(client[0]) if client else "nobody"


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    if ":" not in host:
        return host
    try:
        address = IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
