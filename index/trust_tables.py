"""Trust tables: what `index.trust` compares a query with, made when an index is built and read when it is opened.

    calibration/typical-<modality>.safetensors   `index.typical`: the measures of one modality and their scores
    calibration/pairs.npy                        cosines of image and spectrum of one object
    statistics-<modality>.npy                    `index.measured`: input statistics of the objects

An older index has none of them, one of embeddings without input statistics lacks the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.types import MODALITIES, Modality
from index.calibrate import KTH, sample_slots
from index.measured import Measured, write_measured
from index.typical import Typicality, fit_typicality, read_typicality, write_typicality
from index.vectors import VectorTable, load_npy

__all__ = ["TrustTables", "calibrate_trust", "pair_scores", "read_trust_tables"]

_PAIRS_SAMPLE = 8192  # resolves p-values to 1.2e-4
_MIN_PAIRS = 20  # with fewer, no pair could be unusual at 5 %


@dataclass(frozen=True)
class TrustTables:
    """typical: by modality, where there is one. measured: by modality, without names where nothing was kept. pairs:
    sorted cosines, empty where the index has too few objects with both."""

    typical: Mapping[Modality, Typicality]
    measured: Mapping[Modality, Measured]
    pairs: npt.NDArray[np.float32]


def pair_scores(image: VectorTable, spectrum: VectorTable, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Sorted cosines of image and spectrum of (a sample of) the objects that have both; empty if there are too few."""
    rows, first, second = np.intersect1d(image.rows, spectrum.rows, assume_unique=True, return_indices=True)
    if len(rows) < _MIN_PAIRS:
        return np.empty(0, np.float32)
    some = sample_slots(len(rows), _PAIRS_SAMPLE, rng)
    return np.sort(np.einsum("nd,nd->n", image.take(first[some]), spectrum.take(second[some])))


def calibrate_trust(
    folder: Path, tables: Mapping[str, VectorTable], measured: Mapping[str, Measured], seed: int
) -> dict[str, Any]:
    """Write the files of `index.trust` into an index being built; returns their entries of the calibration.

    measured: by slot. Seeded apart from the other tables, so that those do not change with it.
    """
    rng = np.random.default_rng([seed, 1])
    typical, statistics = {}, {}
    for modality, table in tables.items():
        found = measured[modality]
        if entry := write_measured(folder, modality, found):
            statistics[modality] = entry
        values = found.values if entry else None
        fitted = fit_typicality(table, values, found.names if entry else (), KTH, rng)
        if fitted is not None:
            typical[modality] = f"calibration/typical-{modality}.safetensors"
            write_typicality(folder / typical[modality], fitted)
    out: dict[str, Any] = {"typical": typical, "statistics": statistics}
    pairs = pair_scores(tables["image"], tables["spectrum"], rng)
    if len(pairs):
        out["pairs"] = "calibration/pairs.npy"
        np.save(folder / out["pairs"], pairs)
    return out


def read_trust_tables(
    folder: Path, calibration: Mapping[str, Any], tables: Mapping[Modality, VectorTable]
) -> TrustTables:
    """The tables of an opened index. Raises IndexFileError, by name, for a file that is none of ours."""
    typical: dict[Modality, Typicality] = {
        modality: read_typicality(folder / name, name, tables[modality])
        for modality in MODALITIES
        if (name := calibration.get("typical", {}).get(modality))
    }
    kept = calibration.get("statistics", {})
    measured: dict[Modality, Measured] = {m: _read_measured(folder, kept.get(m), len(tables[m])) for m in MODALITIES}
    pairs = np.empty(0, np.float32)
    if name := calibration.get("pairs"):
        pairs = load_npy(folder / name, name, shape=(None,), dtype="float32", mmap=False)
    return TrustTables(typical, measured, pairs)


def _read_measured(folder: Path, entry: Mapping[str, Any] | None, count: int) -> Measured:
    if entry is None:
        return Measured((), np.empty((count, 0), np.float16))
    names = tuple(entry["names"])
    return Measured(names, load_npy(folder / entry["file"], entry["file"], shape=(count, len(names)), dtype="float16"))
