"""Heads on disk: one safetensors file a modality, its metadata JSON; nothing in it is executed.

Tensors of property i are `i.mean`, `i.spread`, `i.bias.j` (layer j) and `i.scores` in float32, and the matrices
`i.weight.j` and `i.skip` in float16, to which a fit has rounded them (`head_fit.TorchNet.network`).
The metadata names the properties, their axes and the settings; every shape follows from it and is checked on reading.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from astroclip.errors import IndexFileError
from index.density import CELLS_PER_CYCLE, MAX_CELLS, Axis
from index.heads import DensityHead, HeadSettings, Network, PropertyDensity

__all__ = ["read_head", "write_head"]

FORMAT = 1
_MAX_FREQUENCIES = 257  # of one property: eight, and at most every other one of the 498 that a fit scans

Tensors = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.float16]]


def write_head(path: Path, head: DensityHead) -> None:
    """Write `head` to a new file; the same head gives the same bytes."""
    tensors: Tensors = {}
    for i, entry in enumerate(head.properties):
        network = entry.network
        named = {"mean": network.mean, "spread": network.spread, "skip": network.skip, "scores": entry.scores}
        named |= {f"weight.{j}": weight for j, weight in enumerate(network.weights)}
        named |= {f"bias.{j}": bias for j, bias in enumerate(network.biases)}
        present = {key: array for key, array in named.items() if array is not None}
        tensors |= {f"{i}.{key}": np.ascontiguousarray(array, _kind(key)) for key, array in present.items()}
    record = {
        "format": FORMAT,
        "dim": head.dim,
        "seed": head.seed,
        "settings": asdict(head.settings),
        "properties": [{"axis": asdict(e.axis), "rows": e.rows, "report": e.report} for e in head.properties],
    }
    # not `save_file`, whose files only their owner may read
    path.write_bytes(save(tensors, metadata={"head": json.dumps(record, sort_keys=True)}))


def read_head(path: Path, name: str, *, dim: int) -> DensityHead:
    """Read a head for vectors (N, dim). Raises IndexFileError, by `name`, for anything that is not one."""
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["head"])
            tensors: Tensors = {key: file.get_tensor(key) for key in file.keys()}
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, wanted {FORMAT}")
        if record["dim"] != dim:
            raise ValueError(f"vectors of {record['dim']} dimensions, wanted {dim}")
        settings = HeadSettings(**{**record["settings"], "hidden": tuple(record["settings"]["hidden"])})
        entries = tuple(_property(i, entry, tensors, settings, dim) for i, entry in enumerate(record["properties"]))
        if tensors:
            raise ValueError(f"a tensor that belongs to nothing: {next(iter(tensors))}")
        names = tuple(entry.axis.name for entry in entries)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"properties {names}, wanted at least one and each once")
        return DensityHead("density", names, settings, int(record["seed"]), dim, entries)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IndexFileError(
            f"index file {name} is not a head as written ({error!r}); wanted one of `astroclip index build`; rebuild "
            "the index, or build it with --no-heads",
            field=name,
        ) from error


def _property(i: int, entry: dict[str, Any], tensors: Tensors, settings: HeadSettings, dim: int) -> PropertyDensity:
    """One property, its tensors taken out of `tensors`. Raises ValueError, KeyError, TypeError."""
    axis = _axis(entry["axis"])
    widths = (dim, *settings.hidden, axis.outputs)

    def take(key: str, *shape: int | None) -> npt.NDArray[np.float64]:
        found = tensors.pop(f"{i}.{key}")
        fits = len(found.shape) == len(shape) and all(w in (None, f) for f, w in zip(found.shape, shape, strict=True))
        if not fits or found.dtype != _kind(key):
            raise ValueError(f"{i}.{key} is {found.dtype} {found.shape}, wanted {_kind(key)} {shape}")
        if not np.isfinite(found).all():
            raise ValueError(f"{i}.{key} holds NaN or infinity")
        return found.astype(np.float64)

    network = Network(
        mean=take("mean", dim),
        spread=take("spread", dim),
        weights=tuple(take(f"weight.{j}", widths[j + 1], widths[j]) for j in range(len(widths) - 1)),
        biases=tuple(take(f"bias.{j}", widths[j + 1]) for j in range(len(widths) - 1)),
        skip=take("skip", axis.outputs, dim),
    )
    if not (network.spread > 0).all():
        raise ValueError(f"{i}.spread holds numbers that are not positive")
    scores = take("scores", None)
    if np.any(np.diff(scores) < 0) or np.any((scores < 0) | (scores > 0.5)):
        raise ValueError(f"{i}.scores do not ascend from 0 to 0.5")
    return PropertyDensity(axis, network, scores, int(entry["rows"]), dict(entry["report"]))


def _axis(record: dict[str, Any]) -> Axis:
    axis = Axis(
        name=str(record["name"]),
        lo=float(record["lo"]),
        hi=float(record["hi"]),
        log1p=bool(record["log1p"]),
        frequencies=tuple(float(f) for f in record["frequencies"]),
    )
    f = axis.frequencies
    ascending = 0 < len(f) <= _MAX_FREQUENCIES and f[0] > 0 and all(a < b for a, b in zip(f[:-1], f[1:], strict=True))
    if not ascending or not f[-1] <= MAX_CELLS / CELLS_PER_CYCLE * (1 + 1e-9):
        raise ValueError(f"frequencies of {axis.name} are not ascending up to {MAX_CELLS / CELLS_PER_CYCLE:g}")
    if not (math.isfinite(axis.lo) and math.isfinite(axis.hi) and axis.lo < axis.hi):
        raise ValueError(f"the axis of {axis.name} goes from {axis.lo} to {axis.hi}")
    return axis


def _kind(name: str) -> npt.DTypeLike:
    return np.dtype(np.float16 if name.startswith(("weight.", "skip")) else np.float32)
