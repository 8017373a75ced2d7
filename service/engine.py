"""The engine: one model and one index that belong together, over the workers of the process.

    uploads -> prepare -> embed -> search -> answers

An engine never changes. A request takes the current one once and keeps it to its end, so that replacing the index is
one assignment and no answer is of two indexes; the old one is freed with the last request that holds it. Nothing here
knows HTTP; failures are the exceptions of `astroclip.errors`.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import (
    AstroClipError,
    IndexFileError,
    InputError,
    LimitError,
    NotReadyError,
    OverloadError,
    ProvenanceError,
)
from astroclip.io import read_images, read_spectra
from astroclip.types import Image, Modality, Spectrum
from index.filters import FilterLimits, parse_filter
from service.canary import canary
from service.metrics import Metrics
from service.model_process import ModelDied, NoModel, RemoteEmbedder
from service.searching import within
from service.settings import Settings
from service.trace import Trace
from service.uploads import ReadOptions, Upload
from service.waiting import Lane
from service.workers import Workers, first_error

if TYPE_CHECKING:
    from astroclip.embed import Embedder
    from astroclip.preprocess import GridImage, GridSpectrum
    from index import SurveyIndex
    from index.lists import Lists

__all__ = ["Embedded", "Engine", "Prepared", "open_index"]

log = logging.getLogger("astroclip.service")

_MASKS = 8  # a byte an object each
_FEW_ROWS = 200  # of an answer; as a VOTable, 10,000 of them take 0.3 s

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """One object of an upload: what was read of it but its arrays (`item`), and the object on the model's grid, or
    why that failed.

    name: of the file it came from, where there is one. suspect: the model's process may have ended at the object before
    (`service.quarantine`). upload: the file. The arrays are let go of, since 64 pictures of
    100 kB can hold gigabytes of them.
    """

    modality: Modality
    name: str | None = None
    item: Image | Spectrum | None = None
    grid: GridImage | GridSpectrum | None = None
    error: AstroClipError | None = None
    suspect: bool = False
    upload: Upload | None = None


@dataclass(frozen=True)
class Embedded:
    """A prepared object and its unit `vector` (D,), None where it has an error."""

    prepared: Prepared
    vector: Vector | None = None
    error: AstroClipError | None = None


class Engine:
    """See the module. `embedder` and `index` must belong together, which `__init__` checks (ProvenanceError).

    workers: those of the process; without them the engine makes its own, and `close` ends them.
    """

    def __init__(
        self,
        embedder: Embedder | RemoteEmbedder,
        index: SurveyIndex,
        settings: Settings,
        workers: Workers | None = None,
    ) -> None:
        _check_provenance(embedder, index)
        self.embedder, self.index, self.settings = embedder, index, settings
        self.workers = workers or Workers(settings)
        self.started = time.time()
        self.lists, self.lists_problem = _lists(index)
        self._known: dict[Modality, Vector] = {}  # the canary's vectors
        self._canary_at = 0.0
        self._canaries: dict[Modality, GridImage | GridSpectrum] = {}
        self._checking: asyncio.Task[str | None] | None = None
        # The latest filters' masks: requests with the same one are searched together, and MOCs take long to draw.
        self.mask: Callable[[str], npt.NDArray[np.bool_]] = lru_cache(_MASKS)(partial(_mask, index, settings.filter))

    @classmethod
    def load(cls, settings: Settings, metrics: Metrics | None = None, *, apart: bool = False) -> Engine:
        """Model and index from disk; apart: the model in a process of its own (`service.model_process`), which is for
        servers. Raises InputError, IndexFileError, ProvenanceError."""
        from astroclip.embed import Embedder

        metrics = metrics or Metrics()
        if not apart:
            index = open_index(settings)
            embedder = Embedder.from_pretrained(
                settings.model_dir, device=settings.device, dtype=settings.dtype, batch_size=settings.encode_batch
            )
            _check_provenance(embedder, index)  # before threads are started for them
            return cls(embedder, index, settings, Workers(settings, metrics))
        remote = RemoteEmbedder(settings, partial(metrics.failure, "inference", "restart"))
        try:
            index = open_index(settings)  # while the other process loads the model
            _check_provenance(remote.wait(), index)
            return cls(remote, index, settings, Workers(settings, metrics, apart=True))
        except BaseException:
            remote.close()
            raise

    def with_index(self, index: SurveyIndex) -> Engine:
        """The same model and workers over another index. Raises ProvenanceError."""
        engine = Engine(self.embedder, index, self.settings, self.workers)
        engine.started, engine._known, engine._canaries = self.started, self._known, self._canaries
        return engine

    def close(self) -> None:
        self.workers.close()
        if isinstance(self.embedder, RemoteEmbedder):
            self.embedder.close()

    # -- what every answer carries ---------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        return {
            "model": {
                "id": self.embedder.model_id,
                "sha256": self.embedder.model_sha256,
                "preprocess_version": str(self.embedder.preprocess_version),
            },
            "index": {"id": self.index.index_id, "manifest_sha256": self.index.manifest_sha256},
        }

    # -- embedding -------------------------------------------------------------------------------------------------

    async def prepare(
        self, uploads: Sequence[Upload], modality: Modality, options: ReadOptions, trace: Trace, *, judged: bool = True
    ) -> list[Prepared]:
        """Every object of every upload, in order; one that cannot be used carries its error.

        judged: the answer says how far to trust it, for which the inputs are measured.
        Raises LimitError when the files hold more objects than one request may.
        """
        if len(uploads) > self.settings.max_interactive_items:
            trace.be_patient()
        room = _Room(self.settings.max_items)
        works = [partial(self._prepare, upload, modality, options, room, judged) for upload in uploads]
        size = max((len(upload.data) for upload in uploads), default=0)
        outcomes = await self.workers.reading.read(trace, works, size)
        errors = [found for found in outcomes if isinstance(found, BaseException)]
        if errors:
            raise errors[0]
        prepared = [item for found in outcomes if not isinstance(found, BaseException) for item in found]
        if len(prepared) > self.settings.max_interactive_items:
            trace.be_patient()
        return prepared

    def _prepare(
        self, upload: Upload, modality: Modality, options: ReadOptions, room: _Room, judged: bool
    ) -> list[Prepared]:
        room.take(0)  # nothing more is read once there are too many
        try:
            if modality == "image":
                items: Sequence[Image | Spectrum] = read_images(
                    upload.data,
                    media_type=upload.media_type,
                    name=upload.name,
                    limits=self.settings.reader,
                    options=options.image,
                )
            else:
                items = read_spectra(
                    upload.data,
                    media_type=upload.media_type,
                    name=upload.name,
                    limits=self.settings.reader,
                    options=options.spectrum,
                )
        except AstroClipError as error:
            room.take(1)
            return [Prepared(modality, upload.name, error=error.without_frames())]
        room.take(len(items))
        return [self._prepare_item(item, modality, upload, judged) for item in items]

    def _prepare_item(self, item: Image | Spectrum, modality: Modality, upload: Upload, judged: bool) -> Prepared:
        try:
            grid = self.embedder.prepare(item, statistics=judged)
        except AstroClipError as error:
            return Prepared(modality, upload.name, item.without_data(), error=error.without_frames(), upload=upload)
        if self.workers.quarantine.holds(grid):
            return Prepared(modality, upload.name, item.without_data(), error=_no_vector(modality), upload=upload)
        suspect = self.workers.suspects.holds(grid)
        return Prepared(modality, upload.name, item.without_data(), grid, suspect=suspect, upload=upload)

    async def embed(self, prepared: Sequence[Prepared], trace: Trace) -> list[Embedded]:
        """Vectors of what could be prepared (one modality a call), in order; errors are passed on in their place.

        Raises OverloadError where the model has too much to do or the request's deadline passed, NotReadyError where
        it is the model that fails, whatever it is given.
        """
        good = [p for p in prepared if p.grid is not None]
        modality = prepared[0].modality if prepared else "image"
        alone = [place for place, p in enumerate(good) if p.suspect]
        vectors = await self._encode([p.grid for p in good], modality, trace, alone=alone)
        for place in alone:
            if not isinstance(vectors[place], BaseException):
                self.workers.suspects.forget(good[place].grid)
        wild = [p for p, vector in zip(good, vectors, strict=True) if _not_finite(vector)]
        await self._report(wild, modality)
        failed = [p for p, vector in zip(good, vectors, strict=True) if self._unanswered(p.grid, vector)] + wild
        strange = [p.grid for p in failed if p.grid is not None and not self.workers.quarantine.holds(p.grid)]
        if strange:
            # They may have failed for what they are, or for what the model is, which then does not know its own.
            async with trace.in_time():
                await self.check(now=True)
            for grid in strange:
                self.workers.quarantine.add(grid)
        bad, given = set(map(id, failed)), dict(zip(map(id, good), vectors, strict=True))

        def outcome(p: Prepared) -> Embedded:
            if p.error is not None:
                return Embedded(p, error=p.error)
            return Embedded(p, error=_no_vector(p.modality)) if id(p) in bad else Embedded(p, given[id(p)])

        return [outcome(p) for p in prepared]

    async def _report(self, wild: Sequence[Prepared], modality: Modality) -> None:
        """Of objects whose vectors are not finite: count them, and log which files they are of."""
        counts = Counter(id(p.upload) for p in wild)
        for upload in {id(p.upload): p.upload for p in wild}.values():
            digest = await asyncio.to_thread(upload.sha256) if upload else "unknown"
            log.error(
                "the model's output for %d x %s is not finite; sha256 of the input %s",
                counts[id(upload)],
                modality,
                digest,
            )
        for _ in wild:
            self.workers.metrics.nonfinite(modality)

    def _unanswered(self, grid: Any, vector: Any) -> bool:
        """Whether in the vector's place is what the model raised, maybe for this input. Raises what is not its fault:
        OverloadError, NotReadyError."""
        if isinstance(vector, OverloadError | NotReadyError):
            raise vector
        if isinstance(vector, NoModel):
            raise NotReadyError(
                "The model's process ended, and another cannot be started yet. Try again in a few seconds.",
                code="model_restarted",
            ) from vector
        workers = self.workers  # they note at whose the process ended
        if isinstance(vector, ModelDied) and not (workers.quarantine.holds(grid) or workers.suspects.times(grid) > 1):
            raise NotReadyError(
                "The model's process ended while it was at this request; another is being started. Try again in a "
                "few seconds.",
                code="model_restarted",
            ) from vector
        return isinstance(vector, BaseException)

    async def encode(self, trace: Trace, grids: Sequence[Any], modality: Modality) -> Vector:
        """(N, D) vectors of grids that are nobody's upload, behind all that wait for an answer of their own.

        Raises OverloadError, NotReadyError, and InputError where the model has no vector for one of them."""
        quarantine = self.workers.quarantine
        if len(quarantine) and await self.workers.decode(trace, lambda: any(map(quarantine.holds, grids))):
            raise _no_vector(modality)
        vectors = await self._encode(grids, modality, trace, Lane.patient)
        for grid, vector in zip(grids, vectors, strict=True):
            if self._unanswered(grid, vector):
                async with trace.in_time():
                    await self.check(now=True)  # else it is the model's fault
                quarantine.add(grid)
                raise _no_vector(modality) from vector
        return np.stack(vectors)

    async def _encode(
        self,
        grids: Sequence[Any],
        modality: Modality,
        trace: Trace,
        lane: Lane | None = None,
        alone: Collection[int] = (),
    ) -> list[Any]:
        """The vector of each, or what was raised. alone: places of those at which the model's process may have ended,
        which take nobody along, and are known for it if it ends again."""
        group = (self.embedder.encode, modality)
        trace.on_read(len(grids))
        submit = partial(self.workers.inference.submit, trace=trace, stage="inference", lane=lane)
        if not alone:
            return await submit(grids, group)
        rest = [place for place in range(len(grids)) if place not in alone]
        shared = submit([grids[place] for place in rest], group)
        lone = (submit([grids[place]], (*group, object())) for place in alone)  # a batch is of one group
        vectors: list[Any] = []
        for answer in await asyncio.gather(shared, *lone, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer
            vectors += answer
        found = dict(zip([*rest, *alone], vectors, strict=True))
        return [found[place] for place in range(len(grids))]

    # -- searching -------------------------------------------------------------------------------------------------

    async def search(
        self,
        trace: Trace,
        work: Callable[..., Any],
        *arguments: Any,
        lane: Lane | None = None,
        weight: int = 1,
        **keywords: Any,
    ) -> Any:
        """The result of index work, done by the search workers and timed; see `service.searching` for work that
        searches. weight: how many usual searches it is worth."""
        # With the request's context, so that what the worker's thread logs says whose work it was.
        job = within(contextvars.copy_context(), partial(work, *arguments, **keywords))
        return first_error(await self.workers.search.submit([job], self.index, trace, "search", lane, weight))

    async def write(self, trace: Trace, rows: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of making an answer of so many rows: of few it is done where searches are, of many by the worker
        for long answers."""
        if rows <= _FEW_ROWS:
            return await self.search(trace, work, *arguments)
        return await self.workers.write(trace, -(-rows // _FEW_ROWS), work, *arguments)

    # -- readiness -------------------------------------------------------------------------------------------------

    async def check(self, now: bool = False) -> None:
        """Ask the model and the index a question with a known answer, unless they answered just now (and not `now`).

        The first answer is remembered; a later one that differs, or is no unit vector, means a sick device or damaged
        memory, one that does not come within `ready_timeout_s` a worker that hangs. Raises NotReadyError.
        """
        problem = self.workers.problem()
        recent = time.monotonic() - self._canary_at < self.settings.canary_interval_s
        if recent and not now and problem is None and self._known:
            return
        if now and self._checking is not None and not self._checking.done():
            await asyncio.shield(self._checking)  # it may have had its answer before what we ask for happened
        # A worker in trouble is asked at once: if it answers, its inputs were at fault, and it is well again.
        if self._checking is None or self._checking.done():  # who asks meanwhile waits for the same answer
            self._checking = asyncio.create_task(self._check(problem))
        trouble = await asyncio.shield(self._checking)
        if trouble is not None:
            raise NotReadyError(trouble)

    async def _check(self, problem: str | None) -> str | None:
        """What is wrong, None when nothing is."""
        try:
            async with asyncio.timeout(self.settings.ready_timeout_s):
                await self._ask_canary()
        except Exception as error:
            log.exception("the canary failed")
            trouble = f"; {problem}" if problem else ""
            return f"The model did not answer its known input ({type(error).__name__}{trouble})."
        stuck = self.workers.stuck()
        if stuck is None:
            self._canary_at = time.monotonic()
        return stuck

    async def _ask_canary(self) -> None:
        modalities = self.embedder.modalities
        vectors = await asyncio.gather(*(self._canary_vector(modality) for modality in modalities))
        for modality, vector in zip(modalities, vectors, strict=True):
            known = self._known.get(modality, vector)
            if not (abs(float(np.linalg.norm(vector)) - 1.0) <= 1e-3 and np.abs(vector - known).max() <= 1e-3):
                raise ValueError(f"the canary's vector changed ({modality})")
            self._known[modality] = known
        ask = partial(self.index.search, vectors[-1][None], target="either", k=1, query_modality=modalities[-1])
        hits, _ = await self.search(Trace(), ask, lane=Lane.health)
        if not len(hits[0]):
            raise ValueError("the index returned no hit for the canary")

    async def _canary_vector(self, modality: Modality) -> Vector:
        if modality not in self._canaries:
            self._canaries[modality] = await asyncio.to_thread(self.embedder.prepare, canary(modality))
        vector: Vector = first_error(await self._encode([self._canaries[modality]], modality, Trace(), Lane.health))
        return vector


def open_index(settings: Settings) -> SurveyIndex:
    """The index of the settings, verified, its lookup tables built. Raises IndexFileError."""
    from index import SurveyIndex

    index = SurveyIndex.open(settings.index_dir, exact=settings.exact_search, device=settings.device)
    index.catalog.warm()
    return index


class _Room:
    """How many objects the files of one request may still hold; counted by the threads that read them."""

    def __init__(self, most: int) -> None:
        self._most, self._left = most, most
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Raises LimitError once there were more."""
        with self._lock:
            self._left -= count
            if self._left >= 0:
                return
        raise LimitError(
            f"The files hold more than {self._most} objects, which is what one request may bring. Send them in "
            "several, or run `astroclip embed` on the files.",
            code="too_many_items",
            field="file",
            limit=self._most,
        )


def _mask(index: SurveyIndex, limits: FilterLimits, expression: str) -> npt.NDArray[np.bool_]:
    mask = parse_filter(json.loads(expression), limits).mask(index.catalog)
    mask.flags.writeable = False  # it is shared
    return mask


def _check_provenance(embedder: Embedder | RemoteEmbedder, index: SurveyIndex) -> None:
    """Vectors of two models lie in unrelated spaces; searching one with the other gives plausible nonsense."""
    pairs = (
        ("model sha256", embedder.model_sha256, index.model_sha256),
        ("preprocess version", str(embedder.preprocess_version), str(index.preprocess_version)),
        ("dimension", embedder.dim, index.dim),
    )
    for what, has, wants in pairs:
        if has != wants:
            raise ProvenanceError(
                f"The model has {what} {has}; the index {index.index_id!r} was built with {wants}. Serve the index "
                "with its own model (--model), or build it again with this one."
            )


def _lists(index: SurveyIndex) -> tuple[Lists, str | None]:
    """The survey-wide lists beside the index, and what is wrong with those there: they are left out then, with a line
    in the log, since an index without its lists answers all else."""
    from index.lists import Lists

    try:
        return Lists.read(index.folder, index.manifest_sha256), None
    except (IndexFileError, ProvenanceError) as error:
        log.warning("survey-wide lists are not served: %s", error.message)
        return Lists({}, {}), error.message


def _not_finite(vector: Any) -> bool:
    """Whether the model answered, with a vector that is none."""
    return not isinstance(vector, BaseException) and not np.all(np.isfinite(vector))


def _no_vector(kind: Modality) -> InputError:
    return InputError(
        f"The model found no finite embedding for this {kind}. Its values may be far outside any survey's: flux "
        "units are nanomaggies (images) and 1e-17 erg/s/cm2/A (spectra).",
        code="no_embedding",
        field=kind,
    )
