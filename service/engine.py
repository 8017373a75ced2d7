"""The engine: one model and one index, and the threads they work in.

    bytes --decode pool--> prepared inputs --inference thread--> unit vectors --search pool--> hits

Reading and preprocessing run item by item, before anything is batched, so a bad item fails alone and names itself.
The model runs in one thread: two forward passes at once would only share the same cores or the same GPU. Nothing
here knows HTTP; failures are the exceptions of `astroclip.errors`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError, IndexFileError, InputError, LimitError, NotReadyError, ProvenanceError
from astroclip.io import read_images, read_spectra
from astroclip.types import Image, Modality, Spectrum
from service.canary import canary
from service.metrics import Metrics
from service.settings import Settings
from service.trace import Trace
from service.uploads import ReadOptions, Upload

if TYPE_CHECKING:
    from astroclip.embed import Embedder
    from astroclip.preprocess import GridImage, GridSpectrum
    from index import SurveyIndex
    from index.lists import Lists

__all__ = ["Embedded", "Engine", "Prepared"]

log = logging.getLogger("astroclip.service")

T = TypeVar("T")
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """One object of an upload: as read (`item`) and on the model's grid, or why that failed.

    name: of the file it came from, where there is one.
    """

    modality: Modality
    name: str | None = None
    item: Image | Spectrum | None = None
    grid: GridImage | GridSpectrum | None = None
    error: AstroClipError | None = None


@dataclass(frozen=True)
class Embedded:
    """A prepared object and its unit `vector` (D,), None where it has an error."""

    prepared: Prepared
    vector: Vector | None = None
    error: AstroClipError | None = None


class Engine:
    """See the module. `embedder` and `index` must belong together, which `__init__` checks."""

    def __init__(
        self, embedder: Embedder, index: SurveyIndex, settings: Settings, metrics: Metrics | None = None
    ) -> None:
        _check_provenance(embedder, index)
        self.metrics = metrics or Metrics()
        self.embedder, self.index, self.settings = embedder, index, settings
        self.started = time.time()
        self._decoding = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._inference = ThreadPoolExecutor(1, "inference")
        self._searching = ThreadPoolExecutor(settings.search_threads, "search")
        self.lists, self.lists_problem = _lists(index)
        self.explaining = asyncio.Semaphore(1)  # an explanation is hundreds of passes: one at a time
        self.explanations = 0  # at work or waiting
        self._canary_vector: Vector | None = None
        self._canary_at = 0.0

    @classmethod
    def load(cls, settings: Settings, metrics: Metrics | None = None) -> Engine:
        """Model and index from disk. Raises InputError, IndexFileError, ProvenanceError."""
        from astroclip.embed import Embedder
        from index import SurveyIndex

        index = SurveyIndex.open(settings.index_dir, exact=settings.exact_search, device=settings.device)
        embedder = Embedder.from_pretrained(
            settings.model_dir, device=settings.device, dtype=settings.dtype, batch_size=settings.encode_batch
        )
        index.catalog.warm()
        return cls(embedder, index, settings, metrics)

    def close(self) -> None:
        for pool in (self._decoding, self._inference, self._searching):
            pool.shutdown(wait=True, cancel_futures=True)

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
        self, uploads: Sequence[Upload], modality: Modality, options: ReadOptions, trace: Trace
    ) -> list[Prepared]:
        """Every object of every upload, in order; one that cannot be used carries its error.

        Raises LimitError when the files hold more objects than one request may.
        """
        jobs = [self._run(self._decoding, "decode", trace, self._prepare, u, modality, options) for u in uploads]
        prepared = [item for items in await asyncio.gather(*jobs) for item in items]
        limit = self.settings.max_items
        if len(prepared) > limit:
            raise LimitError(
                f"The files hold {len(prepared)} objects; at most {limit} are embedded by one request. Send them in "
                "several, or run `astroclip embed` on the files.",
                code="too_many_items",
                field="file",
                limit=limit,
            )
        return prepared

    def _prepare(self, upload: Upload, modality: Modality, options: ReadOptions) -> list[Prepared]:
        try:
            if modality == "image":
                items: Sequence[Image | Spectrum] = read_images(
                    upload.data, media_type=upload.media_type, name=upload.name, options=options.image
                )
            else:
                items = read_spectra(
                    upload.data, media_type=upload.media_type, name=upload.name, options=options.spectrum
                )
        except AstroClipError as error:
            return [Prepared(modality, upload.name, error=error)]
        return [self._prepare_item(item, modality, upload.name) for item in items]

    def _prepare_item(self, item: Image | Spectrum, modality: Modality, name: str | None) -> Prepared:
        try:
            return Prepared(modality, name, item, self.embedder.prepare(item))
        except AstroClipError as error:
            return Prepared(modality, name, item, error=error)

    async def embed(self, prepared: Sequence[Prepared], trace: Trace) -> list[Embedded]:
        """Vectors of what could be prepared (one modality a call), in order; errors are passed on in their place."""
        good = [p.grid for p in prepared if p.grid is not None]
        vectors: Iterator[Vector] = iter(())
        if good:
            vectors = iter(await self._run(self._inference, "inference", trace, self._encode, good))
        out = []
        for p in prepared:
            vector = next(vectors) if p.grid is not None else None
            error = p.error
            if vector is not None and not np.all(np.isfinite(vector)):
                vector, error = None, _no_vector(p)
                self.metrics.nonfinite(p.modality)
            out.append(Embedded(p, vector, error))
        return out

    async def encode(self, trace: Trace, make: Callable[..., Sequence[Any]], *arguments: Any) -> Vector:
        """(N, D) vectors of the grids of one modality that `make(*arguments)` gives, both in the inference thread."""
        return await self._run(self._inference, "inference", trace, lambda: self._encode(make(*arguments)))

    def _encode(self, grids: Sequence[Any]) -> Vector:
        """One batch; if it raises, item by item, so that only the culprit fails (its row is NaN)."""
        try:
            return self.embedder.encode(grids)
        except RuntimeError:
            log.exception("a batch of %d failed; encoding its items one by one", len(grids))
        rows = []
        for grid in grids:
            try:
                rows.append(self.embedder.encode([grid])[0])
            except RuntimeError:
                log.exception("one item failed in the model")
                rows.append(np.full(self.embedder.dim, np.nan, np.float32))
        return np.stack(rows)

    # -- searching -------------------------------------------------------------------------------------------------

    async def search(self, trace: Trace, work: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Run index work in the search pool, timed."""
        return await self._run(self._searching, "search", trace, work, *arguments, **keywords)

    async def _run(
        self, pool: ThreadPoolExecutor, stage: str, trace: Trace, work: Callable[..., T], *args: Any, **keywords: Any
    ) -> T:
        asked = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            start = time.perf_counter()
            result = work(*args, **keywords)
            return result, start - asked, time.perf_counter() - start

        # With the request's context, so that what the thread logs says whose work it was.
        context = contextvars.copy_context()
        result, waited, worked = await asyncio.get_running_loop().run_in_executor(pool, context.run, timed)
        trace.add("queue", waited, ended_ago=worked)
        trace.add(stage, worked)
        return result

    # -- readiness -------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Ask the model and the index a question with a known answer, unless they answered just now.

        The first answer is remembered; a later one that differs, or is no unit vector, means a sick device or damaged
        memory. Raises NotReadyError.
        """
        if time.monotonic() - self._canary_at < self.settings.canary_interval_s and self._canary_vector is not None:
            return
        try:
            await self._ask_canary()
        except Exception as error:
            log.exception("the canary failed")
            raise NotReadyError(f"The model did not answer its known input ({type(error).__name__}).") from error
        self._canary_at = time.monotonic()

    async def _ask_canary(self) -> None:
        trace = Trace()
        modality = self.embedder.modalities[-1]  # the spectrum, where the model takes one
        grid = await self._run(self._decoding, "decode", trace, self.embedder.prepare, canary(modality))
        vector = (await self._run(self._inference, "inference", trace, self.embedder.encode, [grid]))[0]
        if self._canary_vector is None:
            self._canary_vector = vector
        if abs(float(np.linalg.norm(vector)) - 1.0) > 1e-3 or np.abs(vector - self._canary_vector).max() > 1e-3:
            raise ValueError("the canary's vector changed")
        hits, _ = await self.search(
            trace, self.index.search, vector[None], target="either", k=1, query_modality=modality
        )
        if not len(hits[0]):
            raise ValueError("the index returned no hit for the canary")


def _check_provenance(embedder: Embedder, index: SurveyIndex) -> None:
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


def _no_vector(prepared: Prepared) -> InputError:
    kind = prepared.modality
    return InputError(
        f"The model found no finite embedding for this {kind}. Its values may be far outside any survey's: flux "
        "units are nanomaggies (images) and 1e-17 erg/s/cm2/A (spectra).",
        code="no_embedding",
        field=kind,
    )
