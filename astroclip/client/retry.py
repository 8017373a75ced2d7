"""When to ask again: answers 429 and 503, as often as allowed, no sooner than the server says."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2

from astroclip.client.results import retry_after_s

__all__ = ["Retry"]


@dataclass(frozen=True)
class Retry:
    """times: further attempts. backoff_s: wait before the first of them where the server names none; doubles each
    time. longest_s: a longer wait is not waited for; the error is raised, and its `retry_after_s` tells."""

    times: int = 3
    backoff_s: float = 0.5
    longest_s: float = 30.0

    def wait_s(self, response: httpx2.Response, attempt: int) -> float | None:
        """Seconds until the next attempt, None when `response` is to be taken as the answer."""
        if response.status_code not in (429, 503) or attempt >= self.times:
            return None
        asked = retry_after_s(response)
        wait = self.backoff_s * 2.0**attempt if asked is None else asked
        return wait if wait <= self.longest_s else None
