"""Children of a warm parent: what they import is paid once, and what kills them kills nothing else.

The parent must have imported what its children use, and used none of it: threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Child", "Outcome", "forked"]


@dataclass(frozen=True)
class Outcome:
    """How a child ended. signal: that killed it, or 0. code: exit code. value: what its work returned, if it did."""

    signal: int
    code: int
    value: Any = None


class Child:
    """A fork doing `work`; its value, plain JSON, comes back through a pipe."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        code = 1
        try:
            os.close(self._read)
            content = json.dumps(work()).encode()
            with os.fdopen(write, "wb") as stream:
                stream.write(content)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float = 120.0, kill_after_s: float | None = None) -> Outcome:
        """Wait for the end; kill_after_s: SIGKILL then, if it is still at work. Raises TimeoutError."""
        content = b""
        with os.fdopen(self._read, "rb", buffering=0) as stream:
            ready, _, _ = select.select([stream], [], [], timeout_s if kill_after_s is None else kill_after_s)
            if not ready:
                self.kill()
            while chunk := stream.read(65536):
                content += chunk
        _, status = os.waitpid(self.pid, 0)
        if not ready and kill_after_s is None:
            raise TimeoutError(f"a child took longer than {timeout_s} s")
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -killed
        return Outcome(killed, code, json.loads(content) if content and not (code or killed) else None)


def forked(work: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The value of `work`, done in a child. Raises RuntimeError where it failed."""
    outcome = Child(work).wait(timeout_s)
    if outcome.code or outcome.signal:
        raise RuntimeError(f"a child ended with code {outcome.code}, signal {outcome.signal}")
    return outcome.value
