"""The model in a process of its own, looking like `astroclip.embed.Embedder` to the engine.

    inference thread --grids over a socket pair--> child: Embedder.encode --vectors--> inference thread

Two reasons. A pass of the model is hundreds of small operations, each of which takes Python's lock: beside threads that
read files and answer requests it spends a third of its time waiting for it (measured: 3.3 s of processor time in 5 s
under load). And what kills a process - a fault in a kernel, memory of the device - kills the child alone: it is started
again, its batch fails, and everybody else's request goes on.

The child reads nothing but its pipe and the model directory, ignores the signals that are the service's, and ends when
its pipe does, so it never outlives the service. A pass that takes longer than `stuck_after_s` ends with its process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError
from astroclip.models.model import no_tower
from astroclip.preprocess import GridImage, GridSpectrum, ImageGrid, SpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.types import Image, Modality, Spectrum
from service.settings import Settings

__all__ = ["ModelDied", "RemoteEmbedder", "torch_threads"]

log = logging.getLogger("astroclip.service")

START_S = 300.0  # importing torch and reading weights from a cold network disk
_END_S = 5.0


class ModelDied(RuntimeError):
    """The child ended or hung during a pass: whether its input or anything else was at fault is not known."""


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
    """See the module. `prepare` may run in any thread, `encode` takes turns.

    Starts the child at once and returns; `wait` (or the first use) waits until its model is loaded. on_restart: told
    of every child that had to be replaced.
    """

    def __init__(self, settings: Settings, on_restart: Callable[[], None] = lambda: None) -> None:
        self._settings, self._on_restart = settings, on_restart
        self._turn = threading.RLock()
        self._described: _Described | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._settings), name="model", daemon=True)
        self._process.start()
        theirs.close()
        self._loaded = False

    def wait(self) -> RemoteEmbedder:
        """Until the model is loaded. Raises what loading it raised."""
        with self._turn:
            if not self._loaded:
                answer = self._receive(START_S)
                if isinstance(answer, BaseException):
                    raise answer
                if self._described is not None and answer.model_sha256 != self._described.model_sha256:
                    raise RuntimeError("the model directory holds another model than the service was started with")
                self._described, self._loaded = answer, True
        return self

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

    def prepare(self, item: Image | Spectrum) -> GridImage | GridSpectrum:
        """As `Embedder.prepare`, in this process."""
        modality: Modality = "image" if isinstance(item, Image) else "spectrum"
        if modality not in self.modalities:
            raise no_tower(self.model_id, self.modalities, modality)
        return (
            image_to_grid(item, self.image_grid)
            if isinstance(item, Image)
            else spectrum_to_grid(item, self.spectrum_grid)
        )

    def encode(self, prepared: Sequence[GridImage] | Sequence[GridSpectrum]) -> npt.NDArray[np.float32]:
        """(N, D) float32 unit vectors, as `Embedder.encode`. Raises RuntimeError where the pass raised in the child,
        ModelDied where the child ended or hung; another one is being started then."""
        with self._turn:
            self.wait()
            if not len(prepared):
                return np.empty((0, self.dim), np.float32)
            try:
                return self._asked([_arrays(grid) for grid in prepared])
            except (EOFError, OSError, TimeoutError) as error:
                raise ModelDied(self._replace(error)) from error

    def _asked(self, rows: Sequence[tuple[npt.NDArray[np.float32], ...]]) -> npt.NDArray[np.float32]:
        self._pipe.send((len(rows), [array.shape for array in rows[0]]))
        for arrays in rows:
            for array in arrays:
                self._pipe.send_bytes(array.data)
        failed = self._receive(self._settings.stuck_after_s)
        if failed is not None:
            raise RuntimeError(failed)
        out = np.empty((len(rows), self.dim), np.float32)
        self._pipe.recv_bytes_into(out.data.cast("B"))
        return out

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"no answer in {seconds:g} s")
        return self._pipe.recv()

    def _replace(self, error: BaseException) -> str:
        """Another child; says what became of this one."""
        self._end()
        words = f"the model's process ended (exit code {self._process.exitcode}; {type(error).__name__}: {error})"
        log.error("%s; starting another", words)
        self._on_restart()
        self._start()
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


def _arrays(grid: GridImage | GridSpectrum) -> tuple[npt.NDArray[np.float32], ...]:
    """What the model sees of a prepared object."""
    arrays = (grid.pixels,) if isinstance(grid, GridImage) else (grid.flux, grid.ivar)
    return tuple(np.ascontiguousarray(array, np.float32) for array in arrays)


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
    while True:
        try:
            count, shapes = pipe.recv()
            batch = [np.empty((count, *shape), np.float32) for shape in shapes]
            for row in range(count):
                for array in batch:
                    pipe.recv_bytes_into(array[row].data.cast("B"))
            _answer(pipe, embedder, batch)
        except (EOFError, OSError):  # the service has gone
            return


def _answer(pipe: Connection, embedder: Any, batch: Sequence[npt.NDArray[np.float32]]) -> None:
    try:
        vectors = embedder.encode_arrays(*batch)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    pipe.send_bytes(np.ascontiguousarray(vectors, np.float32).data)
