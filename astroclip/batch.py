"""Embed a catalogue overnight: inputs in, Parquet parts with done markers out, resumable after any death.

    <out>/embedding.json          the model: {"format_version", "model_id", "model_sha256", "preprocess_version", "dim"}
    <out>/part-00000.parquet      about 2,000 rows: identity, both embeddings, quality, error, catalogue columns
    <out>/part-00000.done.json    {"inputs": [{label, size, mtime_ns, rows}], "rows", "failed", "parquet_sha256", ...}

How it keeps its promises:

* A part is written aside, synced, renamed; its marker follows the same way. What has no valid marker, or whose inputs
  have changed in size or time since, is made again. Files that a catalogue only names are not watched: after
  replacing or adding such files, run with `retry_failed`, or into a new folder.
* Parts are cut by the list of inputs alone and batches never cross parts, so a job that was killed and resumed writes
  the bytes an undisturbed one writes.
* A row is never lost: an object that cannot be read or embedded keeps its row, without a vector and with its error.
* Threads read and prepare ahead while the model runs; what they hold is bounded by `PREFETCH_UNITS`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from astroclip.errors import AstroClipError, ProvenanceError
from astroclip.io.refusal import refusal
from astroclip.io.sources import Entry, Inputs, Unit, list_inputs, read_unit
from astroclip.types import MODALITIES, Image, Modality, Quality, Spectrum

__all__ = ["FORMAT_VERSION", "BatchReport", "embed_catalog"]

FORMAT_VERSION = 1
PART_ROWS = 2_000  # about 2 MB of two 128-d vectors a row; minutes of work lost at most when a job dies
PREFETCH_UNITS = 8  # a unit of a survey shard is 64 rows, some 30 MB while it is read and 10 MB once on the grid
VectorArray = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What the job needs of an `astroclip.embed.Embedder`."""

    model_id: str
    model_sha256: str
    preprocess_version: str
    dim: int
    batch_size: int

    def prepare(self, item: Image | Spectrum) -> Any: ...

    def encode(self, prepared: Sequence[Any]) -> VectorArray: ...


@dataclass(frozen=True)
class BatchReport:
    """rows and failed count the whole job, resumed parts included; `parts_skipped` were already done."""

    rows: int
    failed: int
    parts: int
    parts_skipped: int
    skipped_files: tuple[str, ...]


@dataclass
class _Row:
    """A row on its way: what was prepared, then vectors, quality, and errors."""

    entry: Entry
    prepared: dict[Modality, Any] = field(default_factory=dict)
    vectors: dict[Modality, VectorArray] = field(default_factory=dict)
    quality: dict[Modality, Quality] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def embed_catalog(
    inputs: Sequence[str | Path],
    out: str | Path,
    embedder: Encoder,
    *,
    limit: int | None = None,
    part_rows: int = PART_ROWS,
    workers: int = 2,
    retry_failed: bool = False,
    advance: Callable[[int, int, int], None] | None = None,
) -> BatchReport:
    """Embed every object of `inputs` into `out`; run it again after a death and it goes on.

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
    with _only_job(folder):
        _claim(folder, embedder, len(parts))
        schema = _schema(listed, embedder.dim)
        total = sum(u.rows for u in listed.units)
        progress = _Progress(total, advance)
        done, markers = 0, []
        for number, units in enumerate(parts):
            path = folder / f"part-{number:05d}.parquet"
            wanted = [_fingerprint(u) for u in units]
            marker = _valid_marker(path, wanted, embedder)
            if marker is None or (retry_failed and marker["failed"]):
                rows = _embed_part(units, embedder, workers, progress)
                marker = _publish(path, rows, schema, wanted, embedder)
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


def _fingerprint(unit: Unit) -> dict[str, Any]:
    """Which rows of which file, in which state."""
    state = unit.path.stat()
    rows = None if unit.stop is None else [unit.start, unit.stop]
    return {"label": unit.label, "size": state.st_size, "mtime_ns": state.st_mtime_ns, "rows": rows}


@contextmanager
def _only_job(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the process dies."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise refusal(
                "job_running",
                found=f"another embedding job at work in {folder}",
                wanted="one job for each --out folder",
                mend="Wait for it, or choose another folder.",
            ) from error
        yield


def _claim(folder: Path, embedder: Encoder, parts: int) -> None:
    """Write embedding.json, or check that the one there is of the same model; refuse parts beyond this job's."""
    record = {
        "format_version": FORMAT_VERSION,
        "model_id": embedder.model_id,
        "model_sha256": embedder.model_sha256,
        "preprocess_version": embedder.preprocess_version,
        "dim": embedder.dim,
    }
    path = folder / "embedding.json"
    if path.exists():
        try:
            held = json.loads(path.read_text())
        except ValueError:
            held = None
        if held != record:
            named = held.get("model_id", "unknown") if isinstance(held, dict) else "unreadable"
            raise ProvenanceError(
                f"Found parts of model {named} in {folder}; wanted those of {embedder.model_id} "
                f"({embedder.model_sha256[:12]}, preprocessing {embedder.preprocess_version}), since vectors of two "
                "models do not compare. Choose another --out folder, or delete this one."
            )
    else:
        _write(path, json.dumps(record, indent=1).encode())
    beyond = [p.name for p in sorted(folder.glob("part-*.parquet")) if int(p.stem.split("-")[1]) >= parts]
    if beyond:
        raise refusal(
            "other_inputs",
            found=f"{beyond[0]} in {folder}, beyond the {parts} parts of these inputs",
            wanted="parts of one list of inputs",
            mend="Choose another --out folder, or delete the parts of the earlier job.",
        )


def _valid_marker(path: Path, inputs: list[dict[str, Any]], embedder: Encoder) -> dict[str, Any] | None:
    """The marker of a part that is done, of these inputs and this model, and whole on disk; else None."""
    try:
        marker: dict[str, Any] = json.loads(path.with_suffix(".done.json").read_text())
        same = (
            marker["inputs"] == inputs
            and marker["model_sha256"] == embedder.model_sha256
            and marker["preprocess_version"] == embedder.preprocess_version
            and marker["format_version"] == FORMAT_VERSION
            and marker["parquet_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if same else None


# --- reading ahead and embedding --------------------------------------------------------------------------------------


def _embed_part(units: Sequence[Unit], embedder: Encoder, workers: int, progress: _Progress) -> list[_Row]:
    """Every row of a part, embedded; units are read and prepared by threads, in order, a few ahead of the model."""
    rows: list[_Row] = []
    waiting: dict[Modality, list[_Row]] = {modality: [] for modality in MODALITIES}
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="read") as pool:
        ahead: deque[tuple[Unit, Future[list[_Row]]]] = deque()
        todo = iter(units)
        try:
            while True:
                while len(ahead) < PREFETCH_UNITS and (unit := next(todo, None)) is not None:
                    ahead.append((unit, pool.submit(_read_and_prepare, unit, embedder)))
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


def _read_and_prepare(unit: Unit, embedder: Encoder) -> list[_Row]:
    """Runs in a thread: the unit's rows with their objects on the model's grid."""
    rows = []
    for entry in read_unit(unit):
        row = _Row(entry, errors=[_message(e) for e in entry.errors])
        for modality in MODALITIES:
            item: Image | Spectrum | None = getattr(entry, modality)
            if item is None:
                continue
            row.quality[modality] = item.quality
            try:
                row.prepared[modality] = embedder.prepare(item)
                row.quality[modality] = row.prepared[modality].quality
            except AstroClipError as error:
                row.errors.append(_message(error))
        if not row.prepared and not row.errors:
            row.errors.append("no_object: the row names neither an image nor a spectrum")
        row.entry = Entry(entry.source, entry.object_id, entry.ra, entry.dec, columns=entry.columns)  # pixels go
        rows.append(row)
    return rows


def _message(error: AstroClipError) -> str:
    return f"{error.code}: {error.message}"


def _encode(rows: list[_Row], modality: Modality, embedder: Encoder) -> None:
    """Give each waiting row its vector and empty the list; a batch that fails is tried again one by one."""
    if not rows:
        return
    try:
        vectors = embedder.encode([row.prepared[modality] for row in rows])
    except Exception:  # whatever the model raises, only the culprit may suffer
        for row in rows:
            _encode_alone(row, modality, embedder)
    else:
        for row, vector in zip(rows, vectors, strict=True):
            _keep(row, modality, vector)
    for row in rows:
        del row.prepared[modality]
    rows.clear()


def _encode_alone(row: _Row, modality: Modality, embedder: Encoder) -> None:
    try:
        _keep(row, modality, embedder.encode([row.prepared[modality]])[0])
    except Exception as error:
        row.errors.append(f"model_failed: {modality}: {type(error).__name__}: {str(error)[:200]}")


def _keep(row: _Row, modality: Modality, vector: VectorArray) -> None:
    if np.isfinite(vector).all():
        row.vectors[modality] = vector
    else:
        row.errors.append(f"model_failed: {modality}: the model gave a vector that is not finite")


# --- publishing -------------------------------------------------------------------------------------------------------

_ARROW = {
    "float32": pa.float32(),
    "float64": pa.float64(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}


def _schema(inputs: Inputs, dim: int) -> pa.Schema:
    """One schema for all parts of a job."""
    own = [("object_id", pa.string()), ("ra", pa.float64()), ("dec", pa.float64()), ("source", pa.string())]
    own += [(f"{m}_embedding", pa.list_(pa.float32(), dim)) for m in MODALITIES]
    own += [(f"{m}_snr", pa.float32()) for m in MODALITIES]
    own += [(f"{m}_masked_fraction", pa.float32()) for m in MODALITIES]
    own += [("quality_flags", pa.list_(pa.string())), ("error", pa.string())]
    return pa.schema([*own, *((name, _ARROW[kind]) for name, kind in inputs.columns.items())])


def _table(rows: Sequence[_Row], schema: pa.Schema) -> pa.Table:
    cells: dict[str, list[Any]] = {
        "object_id": [r.entry.object_id for r in rows],
        "ra": [r.entry.ra for r in rows],
        "dec": [r.entry.dec for r in rows],
        "source": [r.entry.source for r in rows],
        "quality_flags": [
            [f"{m}:{f.code}" for m in MODALITIES if m in r.quality for f in r.quality[m].flags] for r in rows
        ],
        "error": ["; ".join(r.errors) or None for r in rows],
    }
    for modality in MODALITIES:
        cells[f"{modality}_embedding"] = [r.vectors.get(modality) for r in rows]
        cells[f"{modality}_snr"] = [q.snr if (q := r.quality.get(modality)) else None for r in rows]
        cells[f"{modality}_masked_fraction"] = [
            q.masked_fraction if (q := r.quality.get(modality)) else None for r in rows
        ]
    for column in schema:
        if column.name not in cells:
            cells[column.name] = [_cell((r.entry.columns or {}).get(column.name), column.type) for r in rows]
    return pa.table({f.name: pa.array(cells[f.name], type=f.type) for f in schema}, schema=schema)


def _cell(value: Any, kind: pa.DataType) -> Any:
    """A catalogue value as the column's type; what does not fit it becomes null (a column of one input, say)."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if pa.types.is_string(kind):
        return str(value)
    if pa.types.is_boolean(kind):
        return bool(value)
    if isinstance(value, (int, float)):
        return float(value) if pa.types.is_floating(kind) else int(value)
    return None


def _publish(
    path: Path, rows: Sequence[_Row], schema: pa.Schema, inputs: list[dict[str, Any]], embedder: Encoder
) -> dict[str, Any]:
    """Write a part, then its marker, each aside and renamed; returns the marker."""
    marker_path = path.with_suffix(".done.json")
    marker_path.unlink(missing_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows, schema), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    _write(path, content)
    marker = {
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
        "rows": len(rows),
        "failed": sum(bool(r.errors) for r in rows),
        "model_sha256": embedder.model_sha256,
        "preprocess_version": embedder.preprocess_version,
        "parquet_sha256": hashlib.sha256(content).hexdigest(),
    }
    _write(marker_path, json.dumps(marker, indent=1).encode())
    return marker


def _write(path: Path, content: bytes) -> None:
    """Atomic and durable: aside, fsync, rename, fsync of the folder."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
