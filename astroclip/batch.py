"""Embed a catalogue overnight: inputs in, Parquet parts with done markers out, resumable after any death.

How it keeps its promises:

* A part is written aside, synced, renamed; its marker follows the same way. What has no valid marker, or whose inputs
  have changed in size or time since, is made again. Files that a catalogue only names are not watched: after
  replacing or adding such files, run with `retry_failed`, or into a new folder.
* Parts are cut by the list of inputs alone and batches never cross parts, so a job that was killed and resumed writes
  the bytes an undisturbed one writes.
* A row is never lost: an object that cannot be read or embedded keeps its row, without a vector and with its error.
* Readers work ahead of the model, and what they hold is bounded by `PREFETCH_UNITS`. Threads do for a few files; a
  large job gets processes, since unpacking and resampling hold the interpreter's lock (about 5 ms a row).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError
from astroclip.io.sources import Entry, Unit, list_inputs, read_unit
from astroclip.parts import (
    PartRow,
    Provenance,
    claim_folder,
    fingerprint,
    only_job,
    part_schema,
    publish_part,
    valid_marker,
)
from astroclip.preprocess import ImageGrid, SpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.types import MODALITIES, Image, Modality, Spectrum

__all__ = ["BatchReport", "Encoder", "embed_catalog"]

PART_ROWS = 2_000  # 2 MB of two 128-d vectors each; a death loses minutes of work at most
PREFETCH_UNITS = 8  # a unit of a survey shard is 64 rows, some 30 MB while it is read and 10 MB once on the grid
PROCESS_ROWS = 4_000  # from here on the seconds that processes take to start are earned back
SYSTEMATIC = 8  # so many objects failing one by one are no coincidence


class Encoder(Provenance, Protocol):
    """What the job needs of an `astroclip.embed.Embedder`."""

    batch_size: int
    image_grid: ImageGrid
    spectrum_grid: SpectrumGrid
    modalities: tuple[Modality, ...]

    def encode(self, prepared: Sequence[Any]) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class BatchReport:
    """rows and failed count the whole job, resumed parts included; `parts_skipped` were already done."""

    rows: int
    failed: int
    parts: int
    parts_skipped: int
    skipped_files: tuple[str, ...]


def embed_catalog(
    inputs: Sequence[str | Path],
    out: str | Path,
    embedder: Encoder,
    *,
    limit: int | None = None,
    part_rows: int = PART_ROWS,
    workers: int = 2,
    processes: bool | None = None,
    retry_failed: bool = False,
    advance: Callable[[int, int, int], None] | None = None,
) -> BatchReport:
    """Embed every object of `inputs` into `out`; run it again after a death and it goes on.

    workers, processes: readers, and whether they are processes or threads; None decides by the number of rows.
    retry_failed: make parts that hold rows with errors again.
    advance: called with (rows just finished, rows done, rows in all) as the job goes; rows of finished parts count
             at once.

    Raises InputError (no usable inputs, or parts of another list of inputs in `out`) and ProvenanceError (parts of
    another model in `out`).
    """
    listed = list_inputs(inputs, limit)
    parts = list(_cut_parts(listed.units, part_rows))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with only_job(folder):
        claim_folder(folder, embedder, len(parts))
        schema = part_schema(listed.columns, embedder.dim)
        total = sum(u.rows for u in listed.units)
        progress = _Progress(total, advance)
        processes = total >= PROCESS_ROWS and workers > 1 if processes is None else processes
        done, markers = 0, []
        with _readers(workers, processes) as pool:
            for number, units in enumerate(parts):
                path = folder / f"part-{number:05d}.parquet"
                wanted = [fingerprint(u) for u in units]
                marker = valid_marker(path, wanted, embedder)
                if marker is None or (retry_failed and marker["failed"]):
                    rows = _embed_part(units, embedder, pool, progress)
                    marker = publish_part(path, rows, schema, wanted, embedder)
                else:
                    done += 1
                    progress.add(sum(u.rows for u in units))
                markers.append(marker)
    return BatchReport(
        rows=sum(m["rows"] for m in markers),
        failed=sum(m["failed"] for m in markers),
        parts=len(parts),
        parts_skipped=done,
        skipped_files=listed.skipped,
    )


class _Progress:
    """Counts expected rows, so that a file of several objects does not overrun the bar."""

    def __init__(self, total: int, advance: Callable[[int, int, int], None] | None) -> None:
        self.total, self.done, self._advance = total, 0, advance

    def add(self, rows: int) -> None:
        self.done += rows
        if self._advance is not None:
            self._advance(rows, self.done, self.total)


# --- what belongs together --------------------------------------------------------------------------------------------


def _cut_parts(units: Sequence[Unit], part_rows: int) -> Iterator[list[Unit]]:
    part: list[Unit] = []
    for unit in units:
        if part and sum(u.rows for u in part) + unit.rows > part_rows:
            yield part
            part = []
        part.append(unit)
    if part:
        yield part


# --- reading ahead and embedding --------------------------------------------------------------------------------------


def _embed_part(units: Sequence[Unit], embedder: Encoder, pool: Executor, progress: _Progress) -> list[PartRow]:
    """Every row of a part, embedded; the pool reads and prepares units in order, a few ahead of the model."""
    rows: list[PartRow] = []
    waiting: dict[Modality, list[PartRow]] = {modality: [] for modality in MODALITIES}
    ahead: deque[tuple[Unit, Future[list[PartRow]]]] = deque()
    todo = iter(units)
    grids = _Grids(embedder.image_grid, embedder.spectrum_grid, embedder.modalities)
    try:
        while True:
            while len(ahead) < PREFETCH_UNITS and (unit := next(todo, None)) is not None:
                ahead.append((unit, pool.submit(_read_and_prepare, unit, grids)))
            if not ahead:
                break
            unit, future = ahead.popleft()
            for row in future.result():
                rows.append(row)
                for modality in list(row.prepared):  # encoding takes them away
                    waiting[modality].append(row)
                    if len(waiting[modality]) == embedder.batch_size:
                        _encode(waiting[modality], modality, embedder)
            progress.add(unit.rows)
    finally:
        for _, future in ahead:
            future.cancel()
    for modality in MODALITIES:
        _encode(waiting[modality], modality, embedder)
    return rows


def _readers(workers: int, processes: bool) -> Executor:
    """The pool; processes are spawned, not forked, for a fork of a process that runs CUDA or threads is undefined."""
    if not processes:
        return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="read")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_follow_parent, initargs=(os.getpid(),))


def _follow_parent(parent: int) -> None:
    """In a reading process: leave Ctrl-C to the job, and exit when the job was killed and can no longer say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class _Grids:
    """Where a model wants its inputs, and which it takes."""

    image: ImageGrid
    spectrum: SpectrumGrid
    modalities: tuple[Modality, ...]


def _read_and_prepare(unit: Unit, grids: _Grids) -> list[PartRow]:
    """Runs in the pool: the unit's rows with their objects on the model's grids."""
    rows = []
    for entry in read_unit(unit):
        row = PartRow(entry, errors=[_message(e) for e in entry.errors])
        unwanted = [m for m in MODALITIES if m not in grids.modalities and getattr(entry, m) is not None]
        for modality in grids.modalities:
            item: Image | Spectrum | None = getattr(entry, modality)
            if item is None:
                continue
            row.quality[modality] = item.quality
            try:
                if isinstance(item, Image):
                    row.prepared[modality] = image_to_grid(item, grids.image)
                else:
                    row.prepared[modality] = spectrum_to_grid(item, grids.spectrum)
                row.quality[modality] = row.prepared[modality].quality
            except AstroClipError as error:
                row.errors.append(_message(error))
        if not row.prepared and not row.errors and unwanted:
            row.errors.append(f"no_tower: the row has {unwanted[0]} alone; the model embeds {grids.modalities[0]}")
        elif not row.prepared and not row.errors:
            row.errors.append("no_object: the row names neither an image nor a spectrum")
        row.entry = Entry(entry.source, entry.object_id, entry.ra, entry.dec, columns=entry.columns)  # pixels go
        rows.append(row)
    return rows


def _message(error: AstroClipError) -> str:
    return f"{error.code}: {error.message}"


def _encode(rows: list[PartRow], modality: Modality, embedder: Encoder) -> None:
    """Give each waiting row its vector and empty the list; a batch that fails is tried again one by one."""
    if not rows:
        return
    try:
        vectors = embedder.encode([row.prepared[modality] for row in rows])
    except Exception:  # whatever the model raises, only the culprit may suffer
        for row in rows:
            _encode_alone(row, modality, embedder)
        if len(rows) >= SYSTEMATIC and not any(modality in row.vectors for row in rows):
            raise  # not the objects but the model or the device is broken: die, to be resumed
    else:
        for row, vector in zip(rows, vectors, strict=True):
            _keep(row, modality, vector)
    for row in rows:
        del row.prepared[modality]
    rows.clear()


def _encode_alone(row: PartRow, modality: Modality, embedder: Encoder) -> None:
    try:
        _keep(row, modality, embedder.encode([row.prepared[modality]])[0])
    except Exception as error:
        row.errors.append(f"model_failed: {modality}: {type(error).__name__}: {str(error)[:200]}")


def _keep(row: PartRow, modality: Modality, vector: npt.NDArray[np.float32]) -> None:
    if np.isfinite(vector).all():
        row.vectors[modality] = vector
    else:
        row.errors.append(f"model_failed: {modality}: the model gave a vector that is not finite")
