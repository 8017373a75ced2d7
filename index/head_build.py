"""Heads of an index, fitted when it is built on its own vectors and catalogue.

There is one for each modality, and one for image and spectrum of an object together (`BOTH`), whose input is the two
vectors one after the other. On held-out objects of the demo survey that gave R2 0.95 for stellar mass, where the
spectrum alone gave 0.91 and the image alone 0.80, and it is calibrated like the others; a product of the two densities
is neither (the two are not independent), and for redshifts it had more outliers than the spectrum alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from astroclip.errors import InputError
from astroclip.types import MODALITIES
from index.head_files import write_head
from index.heads import DENSITY, DensityHead, HeadSettings, fit_head
from index.vectors import VectorTable

__all__ = ["BOTH", "HEADS_FROM", "HEAD_ROWS", "WhenHeads", "fit_heads"]

WhenHeads = Literal["auto", "always", "never"]
BOTH = "both"

HEADS_FROM = 1000  # labels of a property from which `auto` fits it: a hundred then calibrate its intervals
HEAD_ROWS = 20_000  # labels a fit uses at most, drawn by the seed: one to two minutes on one core


def fit_heads(
    folder: Path,
    tables: Mapping[str, VectorTable],
    catalog: pa.Table,
    properties: Mapping[str, str],
    *,
    when: WhenHeads,
    seed: int,
    settings: HeadSettings = DENSITY,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write `heads/<name>.safetensors`, name = image, spectrum or both, for each with labels enough; returns the
    manifest's record, {} where none has.

    when: "auto" = properties with `HEADS_FROM` labels or more, "always" = with as few as a density can be fitted on
    (InputError where no property of any modality has so many), "never".
    """
    from index.head_fit import MIN_DENSITY

    out: dict[str, Any] = {}
    least = {"auto": HEADS_FROM, "always": MIN_DENSITY, "never": 0}[when]
    for key, parts in _inputs(tables).items() if when != "never" else ():
        rows = _drawn(functools.reduce(np.intersect1d, [table.rows for table in parts]), seed)
        labels = {name: _values(catalog, name)[rows] for name in properties}
        names = [name for name, values in labels.items() if _enough(values, least)]
        if not names:
            continue
        say(f"{key} head")
        vectors = np.concatenate([table.take(np.searchsorted(table.rows, rows)) for table in parts], axis=1)
        targets = np.stack([labels[name] for name in names], axis=1)
        head = fit_head(vectors, targets, names, settings=settings, seed=seed)
        assert isinstance(head, DensityHead)
        (folder / "heads").mkdir(exist_ok=True)
        write_head(folder / "heads" / f"{key}.safetensors", head)
        out[key] = _record(head, key, len(rows))
    if when == "always" and not out:
        raise InputError(
            f"no property has {least} labels that differ among the objects of one modality; wanted some for a head; "
            "build with --no-heads",
            code="too_few_labels",
        )
    return out


def _record(head: DensityHead, key: str, objects: int) -> dict[str, Any]:
    """What the manifest says of a head: how it was fitted, and what was measured on labels kept aside."""
    return {
        "file": f"heads/{key}.safetensors",
        "objects": objects,
        "seed": head.seed,
        "settings": {**asdict(head.settings), "hidden": list(head.settings.hidden)},
        "properties": {entry.axis.name: {"labels": entry.rows, **entry.report} for entry in head.properties},
    }


def _inputs(tables: Mapping[str, VectorTable]) -> dict[str, tuple[VectorTable, ...]]:
    """What each head reads: a table, or both, in the order of `MODALITIES`."""
    return {m: (tables[m],) for m in MODALITIES} | {BOTH: tuple(tables[m] for m in MODALITIES)}


def _drawn(rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Catalogue rows to fit on: all, or `HEAD_ROWS` of them."""
    if len(rows) <= HEAD_ROWS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, HEAD_ROWS, replace=False))


def _values(catalog: pa.Table, name: str) -> npt.NDArray[np.float64]:
    column = catalog.column(name).combine_chunks().cast(pa.float64(), safe=False)
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def _enough(values: npt.NDArray[np.float64], least: int) -> bool:
    """Known often enough, and not one value for nearly all."""
    known = values[np.isfinite(values)]
    if len(known) < least:
        return False
    lo, hi = np.quantile(known, [0.05, 0.95])
    return bool(hi > lo)
