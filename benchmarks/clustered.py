"""Clustered vectors in any number, as an embedding of galaxies has them: few dimensions, clumps, a little noise.

A vector is a point of a 16-dimensional mixture of Gaussian clumps, turned into 128 dimensions, with noise of a fifth of
its length in all of them, scaled to unit norm. Everything follows from the seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["DIM", "SEED", "clustered", "draw"]

SEED = 20261121
DIM = 128
_INTRINSIC = 16
_CLUMPS = 1000
_SPREAD = 0.6  # of a clump, in units of the spread of their centres
_NOISE = 0.2  # length of the noise, in units of the vector's
_CHUNK = 65_536


def draw(count: int, part: int, *, shift: float = 0.0) -> npt.NDArray[np.float32]:
    """(count, DIM) float32 unit vectors of the mixture; `part` numbers independent draws.

    shift: length of a constant vector added before scaling: the gap between two modalities.
    """
    world = np.random.default_rng(SEED)
    centres = world.normal(size=(_CLUMPS, _INTRINSIC))
    turn = np.linalg.qr(world.normal(size=(DIM, _INTRINSIC)))[0].T
    gap = world.normal(size=DIM)
    rng = np.random.default_rng([SEED, part])
    points = centres[rng.integers(0, _CLUMPS, count)] + _SPREAD * rng.normal(size=(count, _INTRINSIC))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    vectors = points @ turn + _NOISE / np.sqrt(DIM) * rng.normal(size=(count, DIM))
    vectors += shift * gap / np.linalg.norm(gap)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def clustered(path: Path, count: int, *, part: int, shift: float = 0.0) -> None:
    """Write (count, DIM) float16 vectors to a .npy file, a chunk at a time."""
    out = np.lib.format.open_memmap(path, "w+", np.float16, (count, DIM))
    for i, start in enumerate(range(0, count, _CHUNK)):
        stop = min(start + _CHUNK, count)
        out[start:stop] = draw(stop - start, part + 1000 * i, shift=shift)
    out.flush()
