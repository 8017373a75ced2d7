"""Measured: the input statistics of the index's objects, as the embedding job left them in its parts.

On disk `statistics-<modality>.npy`, (n, P) float16 by slot, NaN where a part has none; the names of the P numbers
stand in the manifest. They calibrate `index.typical`, and let an object of the index be judged like an upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Measured", "join_measured", "measured_column", "write_measured"]


@dataclass(frozen=True)
class Measured:
    """names: of P numbers, () where none were measured; values: (n, P), NaN where unknown."""

    names: tuple[str, ...]
    values: npt.NDArray[Any]


def measured_column(table: pa.Table, modality: str, has: npt.NDArray[np.bool_]) -> Measured:
    """The column `<modality>_statistics` of a part, for the rows that have a vector.

    Its field's metadata names the numbers; without column or names there are none.
    """
    count, name = int(np.count_nonzero(has)), f"{modality}_statistics"
    nothing = Measured((), np.empty((count, 0), np.float32))
    if name not in table.column_names:
        return nothing
    field = table.schema.field(name)
    names = tuple(filter(None, (field.metadata or {}).get(b"names", b"").decode().split(",")))
    if not names or field.type != pa.list_(pa.float32(), len(names)):
        return nothing
    column = table.column(name).combine_chunks()
    values = np.full((table.num_rows, len(names)), np.nan, np.float32)
    known = column.is_valid().to_numpy(zero_copy_only=False)
    values[known] = np.asarray(column.drop_null().flatten().to_numpy(zero_copy_only=False)).reshape(-1, len(names))
    return Measured(names, values[has])


def join_measured(parts: Sequence[Measured]) -> Measured:
    """All parts in order; a part whose names are not those of the last that has any becomes NaN."""
    names = next((part.names for part in reversed(parts) if part.names), ())
    blocks = [
        part.values if part.names == names else np.full((len(part.values), len(names)), np.nan, np.float32)
        for part in parts
    ]
    return Measured(names, np.concatenate(blocks) if blocks else np.empty((0, 0), np.float32))


def write_measured(folder: Path, modality: str, measured: Measured) -> dict[str, Any] | None:
    """Write the file; returns its entry of the manifest, None where nothing was measured."""
    if not measured.names or not np.isfinite(measured.values).any():
        return None
    name = f"statistics-{modality}.npy"
    np.save(folder / name, np.clip(measured.values, -6e4, 6e4).astype(np.float16))
    return {"file": name, "names": list(measured.names)}
