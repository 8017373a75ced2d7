"""The calibration of k-NN estimates on disk: one safetensors file, its metadata JSON; nothing in it is executed.

Tensors of entry i (one property of one pair) are `i.scale` (rungs, 3), `i.edges` (rungs, 2), `i.scores` (rungs, 3,
levels) and `i.pit` (knots,), float64 but for the scores, which are float32. The metadata names pairs and properties.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from astroclip.errors import IndexFileError
from index.density import Axis
from index.knn_conformal import BINS, LADDER, LEVELS, OWN_UP_TO, Rung
from index.knn_density import KNOTS, SMOOTHED, Smoothing

__all__ = ["KnnCalibration", "Pair", "PropertyCalibration", "read_knn", "write_knn"]

FORMAT = 1
Pair = tuple[str, str]  # (what the query is: image, spectrum or both; where neighbours are sought: or either)


@dataclass(frozen=True, eq=False)
class PropertyCalibration:
    """One property of one pair, equal to itself alone. axis: its ends and scale, without waves. k: the index's own
    choice, one of `LADDER`. rungs: in the order of `LADDER`."""

    axis: Axis
    k: int
    rungs: tuple[Rung, ...]
    smoothing: Smoothing


KnnCalibration = Mapping[Pair, Mapping[str, PropertyCalibration]]


def write_knn(path: Path, calibration: KnnCalibration) -> None:
    """Write to a new file; the same calibration gives the same bytes."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    entries: list[dict[str, Any]] = []
    for (query, target), properties in calibration.items():
        for name, entry in properties.items():
            i = len(entries)
            tensors[f"{i}.scale"] = np.stack([rung.scale for rung in entry.rungs])
            tensors[f"{i}.edges"] = np.stack([rung.edges for rung in entry.rungs])
            tensors[f"{i}.scores"] = np.stack([rung.scores for rung in entry.rungs]).astype(np.float32)
            tensors[f"{i}.pit"] = entry.smoothing.pit
            entries.append(
                {
                    "query": query,
                    "target": target,
                    "property": name,
                    "axis": {"lo": entry.axis.lo, "hi": entry.axis.hi, "log1p": entry.axis.log1p},
                    "k": entry.k,
                    "median": [rung.median for rung in entry.rungs],
                    "smoothing": {name: getattr(entry.smoothing, name) for name in ("k", "floor", "share")},
                }
            )
    record = {"format": FORMAT, "ladder": list(LADDER), "entries": entries}
    path.write_bytes(save(tensors, metadata={"knn": json.dumps(record, sort_keys=True)}))


def read_knn(path: Path, name: str) -> dict[Pair, dict[str, PropertyCalibration]]:
    """Read what `write_knn` wrote. Raises IndexFileError, by `name`, for anything else."""
    out: dict[Pair, dict[str, PropertyCalibration]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["knn"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if record["format"] != FORMAT or tuple(record["ladder"]) != LADDER:
            raise ValueError(f"format {record['format']!r} with k of {record['ladder']}, wanted {FORMAT} with {LADDER}")
        for i, entry in enumerate(record["entries"]):
            pair = out.setdefault((str(entry["query"]), str(entry["target"])), {})
            pair[str(entry["property"])] = _entry(i, entry, tensors)
        if tensors:
            raise ValueError(f"a tensor that belongs to nothing: {next(iter(tensors))}")
    except (OSError, SafetensorError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise IndexFileError(
            f"index file {name} is not a calibration as written ({error!r}); wanted one of `astroclip index build`; "
            "rebuild the index",
            field=name,
        ) from error
    return out


def _entry(i: int, entry: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> PropertyCalibration:
    """One entry, its tensors taken out of `tensors`. Raises ValueError, KeyError, TypeError."""
    n = len(LADDER)

    def take(key: str, dtype: type, *shape: int) -> npt.NDArray[np.float64]:
        found = tensors.pop(f"{i}.{key}")
        if found.shape != shape or found.dtype != np.dtype(dtype):
            raise ValueError(f"{i}.{key} is {found.dtype} {found.shape}, wanted {np.dtype(dtype)} {shape}")
        if np.isnan(found).any() or (found < 0).any():
            raise ValueError(f"{i}.{key} holds NaN or negative numbers")
        return found.astype(np.float64)

    scale, edges = take("scale", np.float64, n, 3), take("edges", np.float64, n, BINS - 1)
    scores, pit = take("scores", np.float32, n, BINS, len(LEVELS)), take("pit", np.float64, KNOTS)
    if not (scale[:, 0] > 0).all() or not np.isfinite(scale).all():
        raise ValueError(f"{i}.scale is not positive and finite")
    if any((left > right).any() for left, right in ((scores[..., :-1], scores[..., 1:]), (pit[:-1], pit[1:]))):
        raise ValueError(f"{i}.scores or {i}.pit do not ascend")
    if pit[0] != 0.0 or pit[-1] != 1.0:
        raise ValueError(f"{i}.pit does not go from 0 to 1")
    ends = float(entry["axis"]["lo"]), float(entry["axis"]["hi"])
    if not (all(map(math.isfinite, ends)) and ends[0] < ends[1]):
        raise ValueError(f"the axis of entry {i} goes from {ends[0]} to {ends[1]}")
    axis = Axis(str(entry["property"]), *ends, bool(entry["axis"]["log1p"]), ())
    smooth = entry["smoothing"]
    smoothing = Smoothing(int(smooth["k"]), float(smooth["floor"]), float(smooth["share"]), pit)
    if smoothing.k not in SMOOTHED or not (smoothing.floor > 0 and smoothing.share >= 0):
        raise ValueError(f"the smoothing of entry {i} is {smooth}")
    if entry["k"] not in LADDER or entry["k"] > OWN_UP_TO or len(entry["median"]) != n:
        raise ValueError(f"entry {i} has k {entry['k']} and {len(entry['median'])} rungs")
    rungs = tuple(Rung(bool(m), *parts) for m, *parts in zip(entry["median"], scale, edges, scores, strict=True))
    return PropertyCalibration(axis, int(entry["k"]), rungs, smoothing)
