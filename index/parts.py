"""Embedding parts: what `astroclip embed` leaves on disk, read back a part at a time.

A parts directory holds `embedding.json` (which model made it) and `part-NNNNN.parquet` files, each with a
`part-NNNNN.done.json` marker written after it. A part without its marker was not finished and is refused rather than
left out. Columns: object_id, source, error (strings), ra, dec (float64), `image_embedding`, `spectrum_embedding`
(fixed_size_list<float32>[D], null where there is none), `image_statistics`, `spectrum_statistics` (of later jobs, see
`index.measured`), and scalar catalogue columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from astroclip.errors import InputError
from astroclip.types import MODALITIES, Modality
from index.manifest import sha256_file
from index.measured import Measured, measured_column

__all__ = ["Part", "PartsInfo", "read_info", "read_parts"]

_FORMAT_VERSION = 1  # of the parts this module reads
_NORM_TOLERANCE = 0.01  # float16 storage moves a norm by 1e-3; more means it is not an embedding of ours
_LISTS = tuple(f"{m}_{what}" for m in MODALITIES for what in ("embedding", "statistics"))
_OWN = ("has_image", "has_spectrum", "preview_image", "preview_spectrum")  # columns the index writes itself


@dataclass(frozen=True)
class PartsInfo:
    """Provenance of a parts directory: model id and SHA-256, preprocessing version, dimension D."""

    model_id: str
    model_sha256: str
    preprocess_version: str
    dim: int


@dataclass(frozen=True)
class Part:
    """One part, rows that could not be embedded left out.

    catalog: Arrow table of n rows. vectors: {modality: (m, D) float32 of unit norm}, for the m rows where
    `has_<modality>` is true, in order. measured: {modality: input statistics of the same rows}. skipped: rows left out.
    """

    name: str
    catalog: pa.Table
    vectors: dict[str, npt.NDArray[np.float32]]
    measured: dict[Modality, Measured]
    skipped: int


def read_info(folder: str | Path) -> PartsInfo:
    """Provenance of a parts directory. Raises InputError."""
    path = Path(folder) / "embedding.json"
    try:
        record = json.loads(path.read_text())
        if record["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']}, not {_FORMAT_VERSION}")
        return PartsInfo(
            model_id=str(record["model_id"]),
            model_sha256=str(record["model_sha256"]),
            preprocess_version=str(record["preprocess_version"]),
            dim=int(record["dim"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not readable as the record of an embedding job ({error!r}); wanted a directory written by "
            "`astroclip embed`; give its --out directory",
            code="bad_parts",
        ) from error


def read_parts(folder: str | Path, info: PartsInfo) -> Iterator[Part]:
    """The parts in order of their names. Raises InputError for an unfinished or unreadable part, or none at all."""
    paths = sorted(Path(folder).glob("part-*.parquet"))
    if not paths:
        raise InputError(f"{folder} holds no part-*.parquet; run `astroclip embed` first", code="bad_parts")
    unfinished = [path.name for path in paths if not path.with_suffix(".done.json").is_file()]
    if unfinished:
        raise InputError(
            f"{', '.join(unfinished[:3])} of {len(paths)} parts lack their .done.json marker; wanted a finished job; "
            "run the same `astroclip embed` again, it resumes",
            code="unfinished_parts",
        )
    for path in paths:
        try:
            marker = json.loads(path.with_suffix(".done.json").read_text())
            if marker["parquet_sha256"] != sha256_file(path):
                raise ValueError("its SHA-256 is not that of its marker")
            table = pq.read_table(path)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise InputError(
                f"{path.name} is not as it was written ({error}); delete it with its marker and embed again",
                code="bad_parts",
            ) from error
        yield _part(path.name, table, info)


def _part(name: str, table: pa.Table, info: PartsInfo) -> Part:
    missing = {"object_id", "ra", "dec"} - set(table.column_names)
    if missing:
        raise InputError(f"{name} lacks the columns {sorted(missing)}; embed again", code="bad_parts")
    present = {
        m: pc.is_valid(table.column(f"{m}_embedding")) for m in MODALITIES if f"{m}_embedding" in table.column_names
    }
    if not present:
        raise InputError(
            f"{name} has no embedding column; wanted image_embedding or spectrum_embedding", code="bad_parts"
        )
    keep = np.zeros(table.num_rows, bool)
    for mask in present.values():
        keep |= mask.to_numpy()
    skipped = int(table.num_rows - np.count_nonzero(keep))
    table = table.filter(pa.array(keep))
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    flags: dict[str, npt.NDArray[np.bool_]] = {}
    for modality in MODALITIES:
        column = table.column(f"{modality}_embedding") if modality in present else None
        vectors[modality], flags[modality] = _vectors(name, modality, column, table.num_rows, info.dim)
    measured = {m: measured_column(table, m, flags[m]) for m in MODALITIES}
    return Part(name, _catalog(table, flags), vectors, measured, skipped)


def _vectors(
    name: str, modality: str, column: pa.ChunkedArray | None, count: int, dim: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Compact unit vectors of one column, and which rows have one."""
    if column is None:
        return np.empty((0, dim), np.float32), np.zeros(count, bool)
    has = column.is_valid().to_numpy()
    values = column.combine_chunks().drop_null()
    flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False), np.float32)
    if flat.size != np.count_nonzero(has) * dim:
        raise InputError(
            f"{name}: {modality}_embedding holds {column.type}; wanted lists of {dim} as embedding.json says",
            code="bad_parts",
        )
    vectors = flat.reshape(-1, dim)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~(np.abs(norm[:, 0] - 1.0) <= _NORM_TOLERANCE)  # NaN is bad too
    if np.any(bad):
        raise InputError(
            f"{name}: {np.count_nonzero(bad)} {modality} embeddings are not unit vectors (first norm "
            f"{norm[bad][0, 0]:.4g}); wanted norm 1; embed again",
            code="bad_parts",
        )
    return vectors / norm, has


def _catalog(table: pa.Table, has: dict[str, npt.NDArray[np.bool_]]) -> pa.Table:
    """The part's scalar columns as the catalogue keeps them: ids filled, NaN to null, our own flags added."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        if name in ("error", *_LISTS, *_OWN):
            continue
        column = table.column(name)
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
        columns[name] = column
    ids = columns["object_id"].cast(pa.string())
    if ids.null_count and "source" in columns:
        ids = pc.coalesce(ids, columns["source"].cast(pa.string()))
    columns["object_id"] = ids
    columns["ra"], columns["dec"] = columns["ra"].cast(pa.float64()), columns["dec"].cast(pa.float64())
    out = pa.table(columns)
    for modality, flags in has.items():
        out = out.append_column(f"has_{modality}", pa.array(flags))
    return out
