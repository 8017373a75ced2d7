"""Names and types that catalogue columns get in the embedding parts, the same for every kind of input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["add_columns", "column_name", "renamed", "type_name"]

# Columns the job writes itself; a catalogue's own of that name gets the prefix `catalog_`.
OWN = {
    "object_id", "ra", "dec", "source", "error", "image_embedding", "spectrum_embedding", "image_snr", "spectrum_snr",
    "image_masked_fraction", "spectrum_masked_fraction", "quality_flags",
}  # fmt: skip
IDENTITY = {"object_id", "ra", "dec"}


def column_name(name: str, present: Iterable[str]) -> str | None:
    """The name a catalogue column gets: lower case, `Z` is `redshift`; None where another column already says it."""
    lower = name.lower()
    if lower == "z":
        return None if any(p.lower() == "redshift" for p in present) else "redshift"
    return f"catalog_{lower}" if lower in OWN - IDENTITY else lower


def renamed(cells: dict[str, Any]) -> dict[str, Any]:
    """A row's cells under the names of the output."""
    return {new: value for old, value in cells.items() if (new := column_name(old, cells)) and new not in IDENTITY}


def type_name(kind: str, itemsize: int) -> str:
    return {"f": "float32" if itemsize <= 4 else "float64", "i": "int64", "u": "int64", "b": "bool"}.get(kind, "string")


def add_columns(columns: dict[str, str], types: dict[str, str]) -> None:
    """Widen the job's columns by those of one input; types that differ become their common one."""
    for name in types:
        new = column_name(name, types)
        if new is None or new in IDENTITY:
            continue
        old = columns.get(new, types[name])
        if old == types[name]:
            columns[new] = old
        elif {old, types[name]} <= {"float32", "float64", "int64"}:
            columns[new] = "float64"
        else:
            columns[new] = "string"
