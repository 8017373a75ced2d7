"""Embedding parts on disk: Parquet files with done markers, published so that a death at any moment loses no truth.

<out>/embedding.json          the model: {"format_version", "model_id", "model_sha256", "preprocess_version", "dim"}
<out>/part-00000.parquet      identity, both embeddings, quality, input statistics, error, catalogue columns
<out>/part-00000.done.json    {"inputs": [{label, size, mtime_ns, rows}], "rows", "failed", "parquet_sha256", ...}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from astroclip.errors import ProvenanceError
from astroclip.io.refusal import refusal
from astroclip.io.sources import Entry, Unit
from astroclip.preprocess.statistics import STATISTICS
from astroclip.types import MODALITIES, Modality, Quality

__all__ = [
    "FORMAT_VERSION",
    "PartRow",
    "Provenance",
    "claim_folder",
    "fingerprint",
    "only_job",
    "part_schema",
    "publish_part",
    "valid_marker",
]

FORMAT_VERSION = 1
_ARROW = {
    "float32": pa.float32(),
    "float64": pa.float64(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}


class Provenance(Protocol):
    """The model that made the vectors, as an `astroclip.embed.Embedder` names it."""

    model_id: str
    model_sha256: str
    preprocess_version: str
    dim: int


@dataclass
class PartRow:
    """A row on its way: what was prepared, then vectors, quality, and errors."""

    entry: Entry
    prepared: dict[Modality, Any] = field(default_factory=dict)
    vectors: dict[Modality, npt.NDArray[np.float32]] = field(default_factory=dict)
    quality: dict[Modality, Quality] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def part_schema(columns: dict[str, str], dim: int) -> pa.Schema:
    """One schema for all parts of a job."""
    own = [("object_id", pa.string()), ("ra", pa.float64()), ("dec", pa.float64()), ("source", pa.string())]
    own += [(f"{m}_embedding", pa.list_(pa.float32(), dim)) for m in MODALITIES]
    own += [(f"{m}_snr", pa.float32()) for m in MODALITIES]
    own += [(f"{m}_masked_fraction", pa.float32()) for m in MODALITIES]
    own += [("quality_flags", pa.list_(pa.string())), ("error", pa.string())]
    measured = [_statistics_field(m) for m in MODALITIES]
    return pa.schema([*own, *measured, *((name, _ARROW[kind]) for name, kind in columns.items())])


def _statistics_field(modality: Modality) -> pa.Field:
    """`<modality>_statistics`, its numbers named in the field's metadata: an index compares those of one name only."""
    names = STATISTICS[modality]
    kind = pa.list_(pa.float32(), len(names))
    return pa.field(f"{modality}_statistics", kind, metadata={"names": ",".join(names)})


def fingerprint(unit: Unit) -> dict[str, Any]:
    """Which rows of which file, in which state."""
    state = unit.path.stat()
    rows = None if unit.stop is None else [unit.start, unit.stop]
    return {"label": unit.label, "size": state.st_size, "mtime_ns": state.st_mtime_ns, "rows": rows}


@contextmanager
def only_job(folder: Path) -> Iterator[None]:
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


def claim_folder(folder: Path, model: Provenance, parts: int) -> None:
    """Write embedding.json, or check that the one there is of the same model; refuse parts beyond this job's."""
    record = {
        "format_version": FORMAT_VERSION,
        "model_id": model.model_id,
        "model_sha256": model.model_sha256,
        "preprocess_version": model.preprocess_version,
        "dim": model.dim,
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
                f"Found parts of model {named} in {folder}; wanted those of {model.model_id} "
                f"({model.model_sha256[:12]}, preprocessing {model.preprocess_version}), since vectors of two "
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


def valid_marker(path: Path, inputs: list[dict[str, Any]], model: Provenance) -> dict[str, Any] | None:
    """The marker of a part that is done, of these inputs and this model, and whole on disk; else None."""
    try:
        marker: dict[str, Any] = json.loads(path.with_suffix(".done.json").read_text())
        same = (
            marker["inputs"] == inputs
            and marker["model_sha256"] == model.model_sha256
            and marker["preprocess_version"] == model.preprocess_version
            and marker["format_version"] == FORMAT_VERSION
            and marker["parquet_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if same else None


def publish_part(
    path: Path, rows: Sequence[PartRow], schema: pa.Schema, inputs: list[dict[str, Any]], model: Provenance
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
        "model_sha256": model.model_sha256,
        "preprocess_version": model.preprocess_version,
        "parquet_sha256": hashlib.sha256(content).hexdigest(),
    }
    _write(marker_path, json.dumps(marker, indent=1).encode())
    return marker


def _table(rows: Sequence[PartRow], schema: pa.Schema) -> pa.Table:
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
        cells[f"{modality}_statistics"] = [
            q.statistics or None if (q := r.quality.get(modality)) else None for r in rows
        ]
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
