"""Shards on disk: HDF5 in Multimodal Universe layout, one dataset a column, written aside and renamed.

The Multimodal Universe Collaboration 2024 (arXiv 2412.02527). Noise does not compress, so image pixels are rounded to a
power of two near 1/32 of the sky noise first (a loss far below it: 1/32/sqrt(12) = 0.9 %, in the manner of Pence et al.
2010, PASP 122, 1065); spectra are rounded alike. Zeros at the end of each mantissa then shrink under shuffle + gzip.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

__all__ = ["round_to_noise", "sha256_of", "shard_path", "write_shard"]

Array = npt.NDArray[np.float32]
_CHUNK_BYTES = 1 << 20


def shard_path(out: Path, pixel: int) -> Path:
    """`<out>/healpix=<NNNN>/001-of-001.hdf5`."""
    return out / f"healpix={pixel:04d}" / "001-of-001.hdf5"


def round_to_noise(values: Array, sigma: Array) -> Array:
    """`values` to the nearest multiple of a power of two in (sigma/64, sigma/32]; `sigma` broadcasts, 0 or inf: 1."""
    good = np.isfinite(sigma) & (sigma > 0)
    exponent = np.floor(np.log2(np.where(good, sigma, 32.0))).astype(np.int32) - 5
    return np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent).astype(np.float32)


def write_shard(path: Path, columns: Mapping[str, npt.NDArray[Any]], attributes: Mapping[str, Any]) -> str:
    """Write the columns (all of one first dimension) to `path`; returns the file's SHA-256.

    The file appears under its name only when it is complete and on disk. Equal columns give equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    with h5py.File(aside, "w", libver=("v108", "v110")) as file:
        file.attrs.update(attributes)
        for name, column in columns.items():
            if column.ndim == 1:
                file.create_dataset(name, data=column)
                continue
            rows = max(1, min(len(column), _CHUNK_BYTES // max(column[0].nbytes, 1)))
            file.create_dataset(
                name,
                data=column,
                chunks=(rows, *column.shape[1:]),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
    digest = sha256_of(aside)
    with open(aside, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(aside, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return digest


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
