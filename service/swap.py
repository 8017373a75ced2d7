"""Replacing the index while serving: load and verify, ask what it must know, then one assignment.

    trigger --> manifest --same: unchanged
                   `--other--> open (every checksum) --> belongs to the model? --> canary queries --> app.state.engine

Triggers are SIGHUP, `POST /v1/admin/index/reload`, and the watcher, which looks at the root every `watch_index_s`. All
load the directory the service was started with (`index_dir`), whose CURRENT a publisher moved: a path in a request
would let who holds an admin key read any directory of the host, and leave a restart with another index than was served.

One swap at a time; triggers that come during one share the next. Whatever fails leaves the old index serving, is logged
once for each cause, and stands in `problem` (and in /readyz) until a swap succeeds or the old index is current again.
A request keeps the engine it took, so no answer is of two indexes. The old index is freed with the last request that
holds it, and the memory given back to the system; until then, and while the new one loads, there are two.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI

from astroclip.errors import AstroClipError, IndexFileError, NotReadyError, ProvenanceError
from index import SurveyIndex
from index.lists import RECORD, Lists, lists_folder
from index.manifest import MANIFEST, Manifest
from index.store import resolve
from service.canary import find_themselves
from service.engine import Engine, open_index
from service.settings import Settings

__all__ = ["Swap", "Swapper"]

log = logging.getLogger("astroclip.service")

_SLOWEST_S = 300.0  # between tries of an index that is refused: each reads all of it


@dataclass(frozen=True)
class Swap:
    """What a trigger led to. outcome: swapped, lists (same index, new lists beside it) or unchanged."""

    outcome: Literal["swapped", "lists", "unchanged"]
    index_id: str
    manifest_sha256: str
    before_sha256: str
    seconds: float


class Swapper:
    """See the module. One an application (`app.state.swapper`); `start` and `stop` are called by its lifespan."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self.problem: str | None = None
        self._running: asyncio.Task[Swap] | None = None
        self._next: asyncio.Task[Swap] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._asked: set[asyncio.Task[bool]] = set()
        self._hup = False
        self._before: Any = signal.SIG_DFL  # who heard SIGHUP before

    # -- triggers ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen to SIGHUP (in the main thread) and watch the root (unless `watch_index_s` is 0)."""
        with suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread: tests, embedded
            self._before = signal.getsignal(signal.SIGHUP)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_signal)
            self._hup = True
        if self._settings.watch_index_s:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """No more triggers; a swap at work is abandoned, its thread reads to its end."""
        if self._hup:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, self._before)  # and not the default, which ends the process
        for task in (self._watching, self._next, self._running, *self._asked):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    def _on_signal(self) -> None:
        task = asyncio.create_task(self._quietly())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _quietly(self) -> bool:
        """A swap whose failure is logged and nothing else; whether it succeeded."""
        try:
            await self.reload()
        except AstroClipError as error:
            error.without_frames()  # which hold both indexes
            return False
        return True

    async def _watch(self) -> None:
        """Swap when what lies at the root changes; one that is refused is tried again, ever more seldom. A root that
        cannot be looked at (a file server that is away) is looked at again next time."""
        seen: tuple[Any, ...] = ()  # so the first look swaps to what was published since the index was opened
        patience, again_at, blind = self._settings.watch_index_s, float("inf"), False
        while True:
            await asyncio.sleep(self._settings.watch_index_s)
            try:
                found = await asyncio.to_thread(_signature, self._settings.index_dir)
            except OSError as error:
                if not blind:
                    log.warning("cannot look for another version of the index: %s", error)
                blind = True
                continue
            blind = False
            if found != seen:
                patience = self._settings.watch_index_s
            elif time.monotonic() < again_at:
                continue
            seen, again_at = found, float("inf")
            if not await self._quietly():
                patience = min(2 * patience, _SLOWEST_S)
                again_at = time.monotonic() + patience

    async def reload(self) -> Swap:
        """Serve what the root's CURRENT names now; joins the next swap where one is at work.

        Raises ProvenanceError for an index of another model, IndexFileError for a damaged one or one that does not
        find its own objects, NotReadyError where the model does not answer; the old index goes on serving.
        """
        if self._next is not None:  # not begun
            task = self._next
        elif self._running is None or self._running.done():
            task = self._running = asyncio.create_task(self._swap())
        else:  # it may have read CURRENT before it was moved: there must be one more, for all who ask meanwhile
            task = self._next = asyncio.create_task(self._after(self._running))
        return await asyncio.shield(task)

    async def _after(self, running: asyncio.Task[Swap]) -> Swap:
        await asyncio.wait([running])
        self._running, self._next = self._next, None
        return await self._swap()

    # -- the swap ----------------------------------------------------------------------------------------------------

    async def _swap(self) -> Swap:
        engine: Engine | None = self._app.state.engine
        if engine is None:
            raise NotReadyError("The model and the index are still being loaded. Try again in a few seconds.")
        metrics = engine.workers.metrics
        try:
            swap = await self._replace(engine)
        except Exception as caught:
            known = isinstance(caught, AstroClipError)
            error: AstroClipError = IndexFileError(f"The index cannot be loaded ({caught!r}).")
            if isinstance(caught, AstroClipError):
                error = caught
            metrics.swap("refused")
            if error.message != self.problem:
                log.error("the index was not replaced: %s", error.message, exc_info=None if known else caught)
                self.problem = error.message
            if error is caught:
                raise
            raise error from caught
        self.problem = None
        metrics.swap("unchanged" if swap.outcome == "unchanged" else "swapped")
        if swap.outcome != "unchanged":
            before, now = swap.before_sha256[:12], swap.manifest_sha256[:12]
            log.info("%s: index %s, %s -> %s, %.2f s", swap.outcome, swap.index_id, before, now, swap.seconds)
        return swap

    async def _replace(self, engine: Engine) -> Swap:
        start, before = time.perf_counter(), engine.index.manifest_sha256
        fresh, outcome = await asyncio.to_thread(_load, engine, self._settings)
        if fresh is None:
            return Swap("unchanged", engine.index.index_id, before, before, time.perf_counter() - start)
        await fresh.check(now=True)  # the model's answer is the one it always gave, and the index answers it
        self._app.state.engine = fresh
        index = fresh.index
        engine.workers.metrics.serving(index.index_id, index.manifest_sha256, index.model_sha256, len(index))
        if outcome == "swapped":
            _release_memory_after(engine.index)
        return Swap(outcome, index.index_id, index.manifest_sha256, before, time.perf_counter() - start)


def _load(engine: Engine, settings: Settings) -> tuple[Engine | None, Literal["swapped", "lists"]]:
    """An engine over what lies at the root now, proven; None where that is what is served."""
    folder = resolve(settings.index_dir)
    manifest, sha256 = Manifest.read(folder)
    if sha256 == engine.index.manifest_sha256:
        if folder == engine.index.folder and _lists_differ(engine):
            return engine.with_index(engine.index), "lists"
        return None, "lists"
    if manifest.model["sha256"] != engine.embedder.model_sha256:
        # Said before gigabytes are read in vain; `with_index` compares the rest.
        raise ProvenanceError(
            f"The model has model sha256 {engine.embedder.model_sha256}; the index {manifest.index_id!r} was built "
            f"with {manifest.model['sha256']}. Build it with this model, or start the service anew with the other."
        )
    index = open_index(settings)
    fresh = engine.with_index(index)
    find_themselves(index)
    return fresh, "swapped"


def _lists_differ(engine: Engine) -> bool:
    with suppress(IndexFileError, ProvenanceError):
        return Lists.read(engine.index.folder, engine.index.manifest_sha256).entries != engine.lists.entries
    return False


def _signature(root: Path) -> tuple[Any, ...]:
    """What changes when an index, or lists beside it, are published; looks at names and times alone."""
    try:
        folder = resolve(root)
    except AstroClipError:
        return ("nothing",)
    found: list[Any] = [folder]
    for path in (folder / MANIFEST, lists_folder(folder) / RECORD):
        try:
            stat = path.stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def _release_memory_after(index: SurveyIndex) -> None:
    """Give memory back to the system once `index` is gone: the allocators would keep most of it for later."""
    weakref.finalize(index, _release_memory).atexit = False


def _release_memory() -> None:
    """glibc keeps freed blocks below 32 MB on its heap, Arrow in its pool. Elsewhere than on Linux nothing is done."""
    import threading

    import pyarrow as pa

    def release() -> None:
        pa.default_memory_pool().release_unused()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    # The index is freed by whoever held it last, perhaps in the event loop. After a moment its parts are gone, too.
    threading.Timer(0.2, release).start()
