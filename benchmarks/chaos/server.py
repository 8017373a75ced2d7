"""A real server in a process of its own, on a free loopback port, and what it takes of the machine.

    with Server(index=folder, settings={"max_in_flight": 256}) as server:
        server.url, server.port, server.pid
        server.rss_bytes(), server.open_files(), server.cpu_s()
    server.exit_code      # after SIGTERM: 0 when it went in good order

Linux only: memory, files and processor time are read from /proc.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ROOT", "Server", "ServerError", "free_port"]

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
START_S = 120.0  # torch alone takes some seconds to import, far more on a busy machine


class ServerError(RuntimeError):
    """The server did not start or did not end; the message holds the end of its log."""


class Server:
    """See the module. Nothing runs before `start` (or `with`).

    index, model: folders; None serves the demo's.
    settings:     fields of `service.settings.Settings`, given as ASTROCLIP_<NAME>.
    environment:  further variables; a value of None removes one.
    module:       its `main` is run with the arguments `serve ...`; a campaign that needs a fault inside has its own.
    arguments:    added at the end of the command line.
    """

    def __init__(
        self,
        *,
        index: str | Path | None = None,
        model: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str | None] | None = None,
        module: str = "astroclip.cli",
        arguments: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        values = {"host": HOST, "port": self.port, "log_level": "warning", **(settings or {})}
        if index is not None:
            values["index_dir"] = index
        if model is not None:
            values["model_dir"] = model
        variables: dict[str, str | None] = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ASTROCLIP_")},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **{f"ASTROCLIP_{name.upper()}": str(value) for name, value in values.items()},
            **(environment or {}),
        }
        self.environment = {name: value for name, value in variables.items() if value is not None}
        run = f"from {module} import main; main()"
        self.command = [sys.executable, "-c", run, "serve", "--port", str(self.port), *arguments]
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="astroclip-server-", suffix=".log")

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True, timeout_s: float = START_S) -> Server:
        """Start it and, unless told otherwise, wait until /readyz answers 200. Raises ServerError."""
        self.exit_code = None
        self._process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        if wait:
            self.wait_ready(timeout_s)
        return self

    def wait_ready(self, timeout_s: float = START_S) -> float:
        """Seconds until /readyz answered 200. Raises ServerError when the process ends first or time runs out."""
        started = time.monotonic()
        while True:
            if self.process.poll() is not None:
                code = self.exit_code = self.process.returncode
                raise ServerError(f"the server ended with code {code} before it was ready:\n{self.tail()}")
            if self.status("/readyz") == 200:
                return time.monotonic() - started
            if time.monotonic() - started > timeout_s:
                self.kill()
                raise ServerError(f"the server was not ready after {timeout_s:g} s:\n{self.tail()}")
            time.sleep(0.05)

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM; the exit code. One that has not ended after `timeout_s` is killed, and ServerError raised."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"the server had not ended {timeout_s:g} s after SIGTERM:\n{self.tail()}") from None
        return self.exit_code

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.process.poll() is None:
            self.process.kill()
        self.exit_code = self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self.exit_code is None:
            self.kill() if error is not None else self.stop()
        self._log.close()

    # -- what it is and takes --------------------------------------------------------------------------------------

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server was not started; call start() first")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[int]:
        """The server's process and those it started (the model's), which come and go."""
        found, new = [self.pid], [self.pid]
        while new:
            children: list[int] = []
            for pid in new:
                with contextlib.suppress(OSError):
                    for task in Path(f"/proc/{pid}/task").iterdir():
                        children += map(int, (task / "children").read_text().split())
            found += children
            new = children
        return found

    def rss_bytes(self) -> int:
        """Resident memory of the server and what it started; pages they share count in each."""
        return 1024 * sum(self._status_kib("VmRSS", pid) for pid in self.family())

    def memory_kib(self) -> dict[int, dict[str, int]]:
        """Resident memory by process, the server's first: its own (RssAnon) and what it has mapped of files."""
        return {pid: {k: self._status_kib(k, pid) for k in ("RssAnon", "RssFile")} for pid in self.family()}

    def peak_rss_bytes(self) -> int:
        """The most it ever was (since start or `forget_peak`)."""
        return 1024 * sum(self._status_kib("VmHWM", pid) for pid in self.family())

    def forget_peak(self) -> None:
        for pid in self.family():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.family())

    def threads(self) -> int:
        return self._status_kib("Threads")

    def cpu_s(self) -> float:
        """Processor time of the server and what it started, user and system."""
        return sum(_cpu_s(pid) for pid in self.family())

    @property
    def log(self) -> str:
        """All it wrote to stdout and stderr."""
        return Path(self._log.name).read_text(errors="replace")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    # -- asking it, one request a time -----------------------------------------------------------------------------

    def status(self, path: str, timeout_s: float = 10.0) -> int:
        """The status of a GET; 0 when there was none (refused, cut, timed out)."""
        try:
            return self.ask("GET", path, timeout_s=timeout_s)[0]
        except (OSError, http.client.HTTPException):
            return 0

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of one request over a connection of its own."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    # -- /proc -----------------------------------------------------------------------------------------------------

    @property
    def _proc(self) -> Path:
        return Path("/proc") / str(self.pid)

    def _status_kib(self, name: str, pid: int | None = None) -> int:
        """A number of /proc/PID/status; 0 of a child that has ended meanwhile."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid or self.pid}/status").read_text().splitlines():
                if line.startswith(name + ":"):
                    return int(line.split()[1])
        if pid not in (None, self.pid):
            return 0
        raise ServerError(f"/proc/{self.pid}/status holds no {name}; the server has ended (code {self.process.poll()})")


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
