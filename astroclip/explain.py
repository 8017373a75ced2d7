"""Explanation by occlusion: which wavelengths and which image regions make two embeddings alike.

A window slides over the object on the model's grid; what it covers is hidden, the object is embedded again, and the
drop of the cosine with a reference vector says how much of the match rests there (Zeiler & Fergus 2014,
arXiv:1311.2901). Hidden means what the models know as such: pixels of a spectrum get inverse variance 0, which every
tower treats as not observed; pixels of an image show empty sky, of the image's own level and noise, since zeros would
be a hole with sharp edges that no telescope sees. As a control the same number of pixels is hidden scattered over the
object, several times: what one would see where no single place matters.

Nothing here is random between calls: the sky and the controls are seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from astroclip.preprocess import GridImage, GridSpectrum
from astroclip.types import Modality

__all__ = ["DEFAULT_PASSES", "LEAST_PASSES", "Explanation", "Occlusion", "explain"]

CONTROLS = 8
# Step of the windows, which are two steps wide, where the passes allow it. A spectrum's: 16 pixels, windows of 2,300
# km/s, a broad line or a doublet. An image's: 6 pixels, windows of 3 arcsec, about two seeing disks.
_STEP_SPECTRUM, _STEP_IMAGE = 16, 6
DEFAULT_PASSES = 264  # 255 windows over 4,096 pixels, 8 controls, the object itself; 234 for 96 x 96 pixels
LEAST_PASSES = 32  # fewer leave windows too wide to point at anything
_SEED = 20261121

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """What hiding each window does to the cosine with the reference.

    score: the cosine with nothing hidden. windows: (W, 2) first and last + 1 pixel of a spectrum's grid, or (W, 4)
    x0, y0, x1, y1 of an image's. drop: (W,) score less that with the window hidden; negative where hiding helps.
    control: root mean square of the drops with as many pixels hidden, scattered. importance: (L,) or (S, S) mean drop
    of the windows over each pixel. passes: forward passes it took.
    """

    modality: Modality
    score: float
    windows: npt.NDArray[np.int64]
    drop: Vectors
    control: float
    importance: Vectors
    passes: int

    @property
    def share(self) -> Vectors:
        """(W,) each window's part of all drops that are above zero; they sum to 1."""
        above = np.maximum(self.drop, 0.0)
        return np.asarray(above / max(float(above.sum()), 1e-12), np.float32)


class Occlusion:
    """The views of one object that explain it: itself, each window hidden, the controls.

    passes: bound on the views; windows get wider to keep it.
    """

    def __init__(self, grid: GridImage | GridSpectrum, passes: int = DEFAULT_PASSES) -> None:
        if passes < LEAST_PASSES:
            raise ValueError(f"{passes} passes; wanted at least {LEAST_PASSES}")
        self.grid = grid
        rng = np.random.default_rng(_SEED)
        most = passes - 1 - CONTROLS
        if isinstance(grid, GridImage):
            self.modality: Modality = "image"
            self.windows = _boxes(grid.pixels.shape[-1], most)
            self._sky = _sky(grid, rng)
        else:
            self.modality = "spectrum"
            self.windows = _stretches(grid.ivar > 0, most)
        self.hidden = [self.window(window) for window in self.windows]
        self.hidden += [self._scattered(rng) for _ in range(CONTROLS)]

    def __len__(self) -> int:
        return 1 + len(self.hidden)

    def view(self, i: int) -> GridImage | GridSpectrum:
        """View 0 is the object, then its windows, then the controls."""
        if i == 0:
            return self.grid
        hidden = self.hidden[i - 1]
        if isinstance(self.grid, GridImage):
            return replace(self.grid, pixels=np.where(hidden, self._sky, self.grid.pixels))
        flux, ivar = np.where(hidden, 0, self.grid.flux), np.where(hidden, 0, self.grid.ivar)
        return replace(self.grid, flux=flux.astype(np.float32), ivar=ivar.astype(np.float32))

    def views(self, start: int, stop: int) -> list[GridImage] | list[GridSpectrum]:
        """The views from `start` up to `stop`, or to the last."""
        views = [self.view(i) for i in range(start, min(stop, len(self)))]
        return cast("list[GridImage] | list[GridSpectrum]", views)

    def read(self, vectors: Vectors, reference: Vectors) -> Explanation:
        """The explanation from the unit vectors (len, D) of all views and the unit vector it is asked against."""
        cosines = vectors.astype(np.float64) @ reference.astype(np.float64)
        drop = cosines[0] - cosines[1:]
        windows, controls = drop[: len(self.windows)], drop[len(self.windows) :]
        total, covered = np.zeros(self._shape), np.zeros(self._shape)
        for hidden, value in zip(self.hidden[: len(self.windows)], windows, strict=True):
            total[hidden] += value
            covered[hidden] += 1
        return Explanation(
            modality=self.modality,
            score=float(cosines[0]),
            windows=self.windows,
            drop=windows.astype(np.float32),
            control=float(np.sqrt(np.mean(controls**2))),
            importance=(total / np.maximum(covered, 1)).astype(np.float32),
            passes=len(self),
        )

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.grid.pixels.shape[1:] if isinstance(self.grid, GridImage) else self.grid.flux.shape

    def window(self, window: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        hidden = np.zeros(self._shape, bool)
        if self.modality == "image":
            x0, y0, x1, y1 = window
            hidden[y0:y1, x0:x1] = True
        else:
            hidden[window[0] : window[1]] = True
        return hidden

    def _scattered(self, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """As many of the pixels that are there as a window hides."""
        there = self.grid.valid.any(axis=0) if isinstance(self.grid, GridImage) else self.grid.ivar > 0
        at = np.flatnonzero(there)
        count = int(np.median([np.count_nonzero(h & there) for h in self.hidden[: len(self.windows)]]))
        hidden = np.zeros(there.size, bool)
        hidden[rng.choice(at, min(count, len(at)), replace=False)] = True
        return hidden.reshape(there.shape)


def explain(
    encode: Callable[[Sequence[GridImage | GridSpectrum]], Vectors],
    grid: GridImage | GridSpectrum,
    reference: Vectors,
    passes: int = DEFAULT_PASSES,
) -> Explanation:
    """Why `grid` resembles `reference` (D,): all views through `encode` (`Embedder.encode`) at once."""
    occlusion = Occlusion(grid, passes)
    return occlusion.read(encode(occlusion.views(0, len(occlusion))), reference)


def _stretches(known: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.int64]:
    """(W, 2) windows of two steps, every step, that hold at least one known pixel."""
    length = len(known)
    step = max(_STEP_SPECTRUM, -(-length // (most + 1)))
    start = np.arange(0, max(length - step, 1), step)
    windows = np.stack([start, np.minimum(start + 2 * step, length)], axis=1)
    return windows[[bool(known[a:b].any()) for a, b in windows]]


def _boxes(size: int, most: int) -> npt.NDArray[np.int64]:
    """(W, 4) square windows x0, y0, x1, y1 of two steps, every step both ways."""
    step = next(s for s in range(_STEP_IMAGE, size) if len(range(0, size - s, s)) ** 2 <= most)
    start = np.arange(0, size - step, step)
    y, x = (axis.ravel() for axis in np.meshgrid(start, start, indexing="ij"))
    return np.stack([x, y, np.minimum(x + 2 * step, size), np.minimum(y + 2 * step, size)], axis=1)


def _sky(grid: GridImage, rng: np.random.Generator) -> Vectors:
    """(B, S, S) an empty field of the image's own sky: median and 1.4826 MAD of the outer quarter on each side."""
    size = grid.pixels.shape[-1]
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    outside = np.maximum(np.abs(x), np.abs(y)) > size / 4
    out = np.zeros_like(grid.pixels)
    for plane, good, field in zip(grid.pixels, grid.valid, out, strict=True):
        sky = plane[good & outside] if (good & outside).any() else plane[good]
        level = np.median(sky)
        field[:] = level + 1.4826 * np.median(np.abs(sky - level)) * rng.standard_normal(field.shape)
    return out
