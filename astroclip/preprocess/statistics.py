"""Statistics of an input that its embedding throws away: is there a galaxy at all, and does the noise behave?

A contrastive embedding keeps what an image and a spectrum share. Permute the pixels of a picture and its embedding
hardly moves, since the total light and the colours are still there; these few numbers see it at once. They are
computed on the model's grid beside every embedding, kept in the embedding parts, and compared with those of the
survey's objects by `index.typical`. None depends on the model, on the depth of the survey or on its noise's level
alone: ratios, signal-to-noise and shapes, through logarithms or asinh, so that one glitch cannot outweigh the rest.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from astroclip.medians import chosen_pixels, level_and_noise, medians
from astroclip.types import Modality

__all__ = ["STATISTICS", "image_statistics", "spectrum_statistics"]

Array = npt.NDArray[np.floating]
Disc = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.intp]

CORE_PIXELS, SOURCE_PIXELS = 4.0, 11.5  # 1" and 3" at 0.262": the seeing, and most of a galaxy at z > 0.1
BRIGHT = 5.0  # sigma from which a pixel is no noise: three in a million in a million pixels of sky
SCALES = (16, 64, 256)  # grid pixels averaged: 1,200 to 19,000 km/s; below, the errors of stated noise would show
N_BANDS = 8  # of the coarse shape of a spectrum
MIN_BAND = 0.2  # of a band's pixels; one that is known less takes the mean of the others
FLOOR = 1e-3  # of ratios before their logarithm

_IMAGE = (
    "source_snr",  # asinh of the signal-to-noise within 3", mean of the bands
    "concentration",  # share of that light within 1"
    "offset",  # of the light's centroid from the centre, log pixels
    "rival",  # log of the brightest smoothed pixel of the field over the brightest within 3"
    "bright",  # log share of pixels above 5 sigma
    "dark",  # log share of pixels below -5 sigma
    "sharp",  # largest share of a bright pixel's light that its four neighbours do not have
    "agreement",  # correlation of neighbouring bands within 3"
    "smooth",  # log of the difference of neighbouring pixels outside the source, over sigma
    "uneven",  # log of the noisiest over the quietest sixteenth of the field
)
_SPECTRUM = (
    "snr",  # asinh of the median signal-to-noise
    *(f"structure_{scale}" for scale in SCALES),  # log mean square difference of neighbouring means, over their noise
    *(f"shape_{band}" for band in range(N_BANDS)),  # asinh of a band's mean over the whole's
)


STATISTICS: dict[Modality, tuple[str, ...]] = {"image": _IMAGE, "spectrum": _SPECTRUM}


def _finite(found: list[float]) -> tuple[float, ...]:
    return tuple(np.nan_to_num(np.asarray(found, np.float32), nan=0.0, posinf=50.0, neginf=-50.0).tolist())


# --- images -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _discs(size: int) -> tuple[Disc, Pixels, Disc, Array, Array]:
    """Where the source is: (S, S) its aperture; of its n pixels their places in the flattened image, which of them are
    the core's, and how far from the centre they are in x and y."""
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))
    radius = np.hypot(x, y)
    source = radius <= SOURCE_PIXELS
    return source, np.flatnonzero(source), radius[source] <= CORE_PIXELS, x[source], y[source]


def image_statistics(pixels: Array, valid: npt.NDArray[np.bool_]) -> tuple[float, ...]:
    """Of an image on the grid, (B, S, S) each: finite numbers, named by `STATISTICS["image"]`."""
    source, places, core, x, y = _discs(pixels.shape[-1])
    outside = valid & ~source
    units = _units(pixels, valid, outside)
    inside = units.reshape(len(units), -1).take(places, axis=1)
    total, inner = inside.sum(axis=1), inside.compress(core, axis=1).sum(axis=1)
    one_sigma = np.sqrt(len(places))
    weight = np.maximum(inside.mean(axis=0), 0)
    offset = math.hypot(weight @ x, weight @ y) / max(float(weight.sum()), 1e-9)
    stacked = units.sum(axis=0) / np.sqrt(len(units))
    smoothed = ndimage.uniform_filter(stacked, 5)
    rival = max(float(smoothed.max()), FLOOR) / max(float(smoothed[source].max()), FLOOR)
    area = max(int(np.count_nonzero(valid)), 1)
    bright, dark = np.count_nonzero(units > BRIGHT) / area, np.count_nonzero(units < -BRIGHT) / area
    steps = np.abs((units[:, :, 1:] - units[:, :, :-1])[outside[:, :, 1:] & outside[:, :, :-1]])
    blocks = _block_noise(stacked)
    found = [
        float(np.mean(np.arcsinh(total / one_sigma))),
        float(np.mean(inner / np.maximum(np.abs(total), one_sigma))),
        float(np.log(offset + 0.1)),
        float(np.log(rival)),
        float(np.log(bright + FLOOR)),
        float(np.log(dark + FLOOR / 10)),
        _sharpness(units),
        _agreement(inside),
        float(np.log(medians(steps) + FLOOR)) if steps.size else 0.0,
        float(np.log((blocks.max() + FLOOR) / (blocks.min() + FLOOR))),
    ]
    return _finite(found)


def _units(pixels: Array, valid: npt.NDArray[np.bool_], outside: npt.NDArray[np.bool_]) -> Array:
    """Every band above its sky in units of its noise, 0 where not `valid`; both from the pixels `outside` the source,
    or from all where there are none."""
    some = outside.any(axis=(1, 2), keepdims=True)
    if not np.all(some):
        outside = np.where(some, outside, valid)
    level, noise = (np.concatenate(parts) for parts in zip(*map(_sky, chosen_pixels(pixels, outside)), strict=True))
    units = (pixels - level[:, None, None]) / noise.astype(pixels.dtype)[:, None, None]
    return units if valid.all() else np.where(valid, units, 0)


def _sky(pixels: Array) -> tuple[Array, Array]:
    """Level and noise of bands (B, n)."""
    if not pixels.size:
        return np.zeros(len(pixels), pixels.dtype), np.ones(len(pixels))
    level, noise = level_and_noise(pixels)
    # where most of the sky is one value, as in a drawing, the MAD is 0
    furthest = np.maximum(pixels.max(axis=1) - level, level - pixels.min(axis=1)).astype(np.float64)
    return level, np.maximum(noise, np.maximum(1e-3 * furthest, 1e-12))


def _sharpness(units: Array) -> float:
    """A point seen through the atmosphere spreads over its neighbours; a cosmic ray, a dead column, text do not."""
    inner = units[:, 1:-1, 1:-1] > 4 * BRIGHT
    if not inner.any():
        return 0.0
    band, y, x = np.unravel_index(np.flatnonzero(inner), inner.shape)
    y, x = y + 1, x + 1
    bright = units[band, y, x]
    around = (units[band, y + 1, x] + units[band, y - 1, x] + units[band, y, x + 1] + units[band, y, x - 1]) / 4
    return float(((bright - around) / bright).max())


def _block_noise(stacked: Array) -> Array:
    """(16,) median absolute deviations of the sixteenths of the field."""
    side = stacked.shape[0] // 4
    parts = stacked[: 4 * side, : 4 * side].reshape(4, side, 4, side).swapaxes(1, 2).reshape(16, -1)
    return np.asarray(medians(np.abs(parts - medians(parts)[:, None])))


def _agreement(units: Array) -> float:
    """Mean correlation of neighbouring bands, (B, n) values."""
    centred = units - units.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.square(centred).sum(axis=1))
    pairs = (centred[1:] * centred[:-1]).sum(axis=1) / np.maximum(norm[1:] * norm[:-1], 1e-12)
    return float(pairs.mean()) if len(pairs) else 0.0


# --- spectra ----------------------------------------------------------------------------------------------------------


def spectrum_statistics(flux: Array, ivar: Array) -> tuple[float, ...]:
    """Of a spectrum on the grid, (L,) each, ivar 0 where nothing is known: named by `STATISTICS["spectrum"]`."""
    good = ivar > 0
    known, weight = flux[good].astype(np.float64), ivar[good].astype(np.float64)
    noise = np.sqrt(float((1 / weight).mean()) / (len(known) / N_BANDS))
    scale = max(abs(float(known.mean())), noise)
    weighted = known * weight
    return _finite(
        [
            float(np.arcsinh(medians(known * np.sqrt(weight)))),
            *(_structure(weighted, weight, size) for size in SCALES),
            *_shape(flux, good, scale),
        ]
    )


def _shape(flux: Array, good: npt.NDArray[np.bool_], scale: float) -> list[float]:
    """asinh of the bands' means over `scale`; one of which too little is known takes the mean of the others."""
    starts = _band_starts(len(flux))
    pixels = np.diff(starts, append=len(flux))
    known = np.add.reduceat(good, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(good, flux, 0), starts, dtype=np.float64)
    found = np.arcsinh(sums / np.maximum(known, 1) / scale)
    enough = known / pixels > MIN_BAND
    others = float(found[enough].mean()) if enough.any() else 0.0
    return [float(value) for value in np.where(enough, found, others)]


@lru_cache(maxsize=4)
def _band_starts(length: int) -> npt.NDArray[np.int64]:
    """First pixels of `N_BANDS` bands of `length` pixels, as equal as they can be, the longer ones first."""
    return np.array([band[0] for band in np.array_split(np.arange(length), N_BANDS)])


def _structure(weighted: Array, weight: Array, scale: int) -> float:
    """Allan variance of means of `scale` pixels over what the noise alone gives: 0 for noise, log.

    weighted, weight: flux times its inverse variance, and the latter.
    """
    length = len(weight) // scale * scale
    if length < 2 * scale:
        return 0.0
    total = weight[:length].reshape(-1, scale).sum(axis=1)
    mean = weighted[:length].reshape(-1, scale).sum(axis=1) / total
    squares = np.sort(np.diff(mean) ** 2 / (1 / total[1:] + 1 / total[:-1]))
    limit = np.interp(0.99 * (len(squares) - 1), np.arange(len(squares)), squares)  # the quantile 0.99
    return float(np.log(np.mean(np.minimum(squares, limit)) + FLOOR))
