"""The model in a process of its own, looking like `astroclip.embed.Embedder` to the engine.

    inference thread --grids in shared memory--> child: Embedder.encode_arrays --vectors over a pipe--> inference thread

Two reasons. A pass of the model is hundreds of small operations, each of which takes Python's lock: beside threads that
read files and answer requests it spends a third of its time waiting for it (measured: 3.3 s of processor time in 5 s
under load). And what kills a process - a fault in a kernel, memory of the device - kills the child alone: it is started
again, the items of its batch are worked one by one, and what it ends at again is kept away from it (`service.batcher`,
`service.quarantine`).

Grids cross in memory that both map (memfd, so no file, and no /dev/shm to fill): one copy and one message, instead of
one write after another, each of which would wait for the lock again. There is room for two batches: the next is handed
over before the answer to the last has come, and the child goes from one to the other without waiting for this process
(measured: between passes it waited for a tenth of its time, for a fifth beside a thousand refusals a second).

The child reads nothing but that, its pipe and the model directory, ignores the signals that are the service's, and
ends when its pipe does, so it never outlives the service. A pass that takes longer than `stuck_after_s` ends with its
process.
"""

from __future__ import annotations

import atexit
import gc
import logging
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError
from astroclip.models.model import no_tower
from astroclip.preprocess import GridImage, GridSpectrum, ImageGrid, SpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.types import Image, Modality, Spectrum
from service.settings import Settings

__all__ = ["ModelDied", "NoModel", "RemoteEmbedder", "torch_threads"]

log = logging.getLogger("astroclip.service")

START_S = 300.0  # importing torch and reading weights from a cold network disk
_END_S = 5.0
_ROOM = 2  # batches
_STARTS = 2  # of a child, before a batch is given up: the first may die of the memory that the one before still holds
_GONE = (EOFError, OSError, TimeoutError)  # what talking to a child that ended or hung gives


class ModelDied(RuntimeError):
    """The child ended or hung while it was at this batch: whether that or anything else was at fault is not known."""


class NoModel(RuntimeError):
    """There is no child to ask: it cannot be started, or cannot load the model. Nothing was asked, so no input is at
    fault."""


@dataclass(frozen=True)
class _Described:
    """What the child says of its embedder once it is loaded; the attributes of `Embedder`."""

    model_id: str
    model_sha256: str
    preprocess_version: str
    dim: int
    modalities: tuple[Modality, ...]
    device: str
    dtype: str
    dtype_reason: str
    image_grid: ImageGrid
    spectrum_grid: SpectrumGrid
    batch_size: int


class RemoteEmbedder:
    """See the module. `prepare` may run in any thread; `encode` too, and of those that do two have a batch with the
    child, which takes them in turn.

    Starts the child at once and returns; `wait` (or the first use) waits until its model is loaded. on_restart: told
    of every child that had to be replaced.
    """

    def __init__(self, settings: Settings, on_restart: Callable[[], None] = lambda: None) -> None:
        self._settings, self._on_restart = settings, on_restart
        self._turn = threading.Condition()  # of all below
        self._line: deque[int] = deque()  # rooms of the batches that the child has, in its order
        self._free: SimpleQueue[int] = SimpleQueue()
        for room in range(_ROOM):
            self._free.put(room)
        self._described: _Described | None = None
        self._generation = 0  # of children
        _ALL.add(self)
        self._start()

    def _start(self) -> None:
        """Another child. Raises OSError where the system gives none; there is then no child, and no pipe, until the
        next call."""
        self._loaded = False
        self._line.clear()
        self._generation += 1
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        try:
            process = context.Process(target=_serve, args=(theirs, self._settings), name="model", daemon=True)
            process.start()
        except BaseException:
            pipe.close()
            raise
        finally:
            theirs.close()
        self._pipe, self._process = pipe, process

    def wait(self) -> RemoteEmbedder:
        """Until the model is loaded. Raises what loading it raised; OSError, EOFError or TimeoutError where the child
        ended or hung meanwhile."""
        with self._turn:
            if not self._loaded:
                answer = self._receive(START_S)
                if isinstance(answer, BaseException):
                    raise answer
                if self._described is not None and answer.model_sha256 != self._described.model_sha256:
                    raise OSError("the model directory holds another model than the service was started with")
                self._described = answer
                self._share()
                self._loaded = True
        return self

    def _share(self) -> None:
        """Memory for the batches, of either modality, mapped here and there."""
        image, spectrum, batch = self.image_grid, self.spectrum_grid, self.batch_size
        size = _ROOM * batch * 4 * max(len(image.bands) * image.size**2, 2 * spectrum.n_pixels)
        descriptor = os.memfd_create("astroclip-batch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
            send_handle(self._pipe, descriptor, self._process.pid)
        finally:
            os.close(descriptor)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the embedder, as the child described it."""
        if name.startswith("_"):
            raise AttributeError(name)
        # Once known it needs no turn: files are read while a pass is at work.
        return getattr(self._described or self.wait()._described, name)

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return self._process.pid

    def prepare(self, item: Image | Spectrum, *, statistics: bool = True) -> GridImage | GridSpectrum:
        """As `Embedder.prepare`, in this process."""
        modality: Modality = "image" if isinstance(item, Image) else "spectrum"
        if modality not in self.modalities:
            raise no_tower(self.model_id, self.modalities, modality)
        return (
            image_to_grid(item, self.image_grid, statistics=statistics)
            if isinstance(item, Image)
            else spectrum_to_grid(item, self.spectrum_grid, statistics=statistics)
        )

    def encode(self, prepared: Sequence[GridImage] | Sequence[GridSpectrum]) -> npt.NDArray[np.float32]:
        """(N, D) float32 unit vectors, as `Embedder.encode`. Raises RuntimeError where the pass raised in the child,
        ModelDied where the child ended or hung during it (another one is being started then), NoModel where none can
        be started."""
        if not len(prepared):
            return np.empty((0, self.dim), np.float32)
        parts = []
        for start in range(0, len(prepared), self.batch_size):
            room = self._free.get()
            try:
                while (part := self._pass(room, prepared[start : start + self.batch_size])) is None:
                    pass
            finally:
                self._free.put(room)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pass(self, room: int, batch: Sequence[GridImage] | Sequence[GridSpectrum]) -> npt.NDArray[np.float32] | None:
        """The vectors of one batch; None where the child ended while another batch was at work: to be tried again."""
        with self._turn:
            self._have_child()
            generation, memory = self._generation, self._memory
        columns = _columns(batch)
        shapes = [(len(batch), *column[0].shape) for column in columns]
        for view, column in zip(_views(memory, room, shapes), columns, strict=True):
            np.stack(column, out=view)
        with self._turn:
            if self._generation != generation:
                return None
            self._line.append(room)
            with suppress(OSError):  # whose batch is at the head of the line finds out
                self._pipe.send((room, shapes))
            while self._generation == generation and self._line[0] != room:
                self._turn.wait()
            if self._generation != generation:
                return None
        out = np.empty((len(batch), self.dim), np.float32)  # the pipe is this thread's until it leaves the line
        try:
            failed = self._receive(self._settings.stuck_after_s)
            if failed is None:
                self._pipe.recv_bytes_into(out.data.cast("B"))
        except _GONE as error:
            with self._turn:
                raise ModelDied(self._replace(error)) from error
        with self._turn:
            self._line.popleft()
            self._turn.notify_all()
        if failed is not None:
            raise RuntimeError(failed)
        return out

    def _have_child(self) -> None:
        """Wait until there is one that has loaded. One that died while nobody asked it anything, or before it had
        loaded, is replaced: that is no batch's doing. Raises NoModel."""
        for left in reversed(range(1 + _STARTS)):
            try:
                self.wait()
                if self._line or self._process.is_alive():  # of a line, whose batch is at its head finds out
                    return
                raise EOFError("it ended while it had nothing to do")
            except Exception as error:
                if not left:
                    self._end()  # it may be alive, and of no use: who asks next would wait for it to speak
                    raise NoModel(f"no process has the model ({type(error).__name__}: {error})") from error
                self._replace(error)

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"no answer in {seconds:g} s")
        return self._pipe.recv()

    def _replace(self, error: BaseException) -> str:
        """Another child; says what became of this one. Where none can be started, who asks next tries again."""
        self._end()
        words = f"the model's process ended (exit code {self._process.exitcode}; {type(error).__name__}: {error})"
        log.error("%s; starting another", words)
        self._on_restart()
        try:
            self._start()
        except OSError:
            log.exception("another process for the model cannot be started")
        finally:
            self._turn.notify_all()
        return words

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(0.0 if self._process.exitcode is not None else _END_S / 5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_S)

    def close(self) -> None:
        """End the child; a pass at work is cut."""
        self._end()


_ALL: weakref.WeakSet[RemoteEmbedder] = weakref.WeakSet()


def _end_all() -> None:
    """At the end of a process that did not close them, as of a server stopped by force: multiprocessing would send the
    child a SIGTERM, which it does not hear, and wait for it."""
    for embedder in list(_ALL):
        embedder.close()


atexit.register(_end_all)  # after multiprocessing did, so it comes before that


def _columns(batch: Sequence[GridImage] | Sequence[GridSpectrum]) -> list[list[npt.NDArray[np.float32]]]:
    """What the model sees of prepared objects: pixels, or flux and ivar."""
    names = ("pixels",) if isinstance(batch[0], GridImage) else ("flux", "ivar")
    return [[getattr(grid, name) for grid in batch] for name in names]


def _views(memory: mmap.mmap, room: int, shapes: Sequence[tuple[int, ...]]) -> list[npt.NDArray[np.float32]]:
    """Arrays of these shapes, one behind the other in a room of `memory`. Raises ValueError where they do not fit."""
    size = len(memory) // _ROOM
    if 4 * sum(int(np.prod(shape)) for shape in shapes) > size:
        raise ValueError(f"{shapes} do not fit into {size} bytes")
    views, start = [], room * size
    for shape in shapes:
        count = int(np.prod(shape))
        views.append(np.frombuffer(memory, np.float32, count, start).reshape(shape))
        start += 4 * count
    return views


def torch_threads(settings: Settings) -> int:
    """Threads of a pass: as set, else all cores of this process but one."""
    return settings.torch_threads or max(1, len(os.sched_getaffinity(0)) - 1)


# --- in the child ----------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, settings: Settings) -> None:
    """Load, describe, answer until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a whole group may get them; they are the service's
        signal.signal(number, signal.SIG_IGN)
    import torch
    from transformers.utils import logging as transformers_logging

    from astroclip.embed import Embedder

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(torch_threads(settings))
    try:
        embedder = Embedder.from_pretrained(
            settings.model_dir, device=settings.device, dtype=settings.dtype, batch_size=settings.encode_batch
        )
    except (AstroClipError, OSError, ValueError, RuntimeError) as error:
        pipe.send(error if isinstance(error, AstroClipError) else RuntimeError(f"the model cannot be loaded: {error}"))
        return
    pipe.send(_Described(**{name: getattr(embedder, name) for name in _Described.__dataclass_fields__}))
    gc.collect()
    gc.freeze()  # as in service.app: what is loaded stays
    try:
        descriptor = recv_handle(pipe)
        memory = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        while True:
            _answer(pipe, embedder, _views(memory, *pipe.recv()))
    except (EOFError, OSError):  # the service has gone
        gc.unfreeze()


def _answer(pipe: Connection, embedder: Any, batch: Sequence[npt.NDArray[np.float32]]) -> None:
    try:
        vectors = embedder.encode_arrays(*batch)
    except Exception as error:
        _check_device(embedder.device)
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    pipe.send_bytes(np.ascontiguousarray(vectors, np.float32).data)


def _check_device(device: Any) -> None:
    """Raises, so that the process ends, where what went wrong stays with it: after an illegal access or a failed
    assertion every later call of CUDA in the process fails, and only another process cures that."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
