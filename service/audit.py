"""The audit line: who asked for which admin action, from where, and what came of it.

One line a call, written by who knows what was done, else by `service.access`, on the logger ``astroclip.audit``, JSON
in the message (and the same mapping as `audit` on the record, for a formatter that writes JSON itself). Strings are
escaped, so nothing a caller sends can begin a line of its own.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.requests import Request

from service.trace import trace_of

__all__ = ["audit"]

log = logging.getLogger("astroclip.audit")
_CALL_CHARS = 200  # of the call; who is refused may have sent anything
log.setLevel(logging.INFO)  # also where the service is told to say less


def audit(request: Request, action: str, outcome: str, **details: Any) -> None:
    """Write the line. action: what was asked for ("swap_index"); outcome: "done", "refused", "failed" ...

    details: anything JSON can say; what it cannot is written by `str`. Never a key: its id is in `key`.
    """
    request.state.audited = True
    trace = trace_of(request)
    line = {
        "action": action,
        "outcome": outcome,
        "key": trace.caller,
        "address": request.client.host if request.client else None,
        "call": f"{request.method} {request.url.path}"[:_CALL_CHARS],
        "request_id": trace.request_id,
        **details,
    }
    log.info("%s", json.dumps(line, default=str), extra={"audit": line})
