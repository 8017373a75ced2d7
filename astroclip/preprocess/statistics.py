"""Statistics of an input that its embedding throws away: is there a galaxy at all, and does the noise behave?

A contrastive embedding keeps what an image and a spectrum share. Permute the pixels of a picture and its embedding
hardly moves, since the total light and the colours are still there; these few numbers see it at once. They are
computed on the model's grid beside every embedding, kept in the embedding parts, and compared with those of the
survey's objects by `index.typical`. None depends on the model, on the depth of the survey or on its noise's level
alone: ratios, signal-to-noise and shapes, through logarithms or asinh, so that one glitch cannot outweigh the rest.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from astroclip.types import Modality

__all__ = ["STATISTICS", "image_statistics", "spectrum_statistics"]

Array = npt.NDArray[np.floating]
Disc = npt.NDArray[np.bool_]

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
def _discs(size: int) -> tuple[Disc, Disc, Array, Array]:
    """(S, S): within the core, within the source's aperture, and pixels from the centre in x and y."""
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))
    radius = np.hypot(x, y)
    return radius <= CORE_PIXELS, radius <= SOURCE_PIXELS, x, y


def image_statistics(pixels: Array, valid: npt.NDArray[np.bool_]) -> tuple[float, ...]:
    """Of an image on the grid, (B, S, S) each: finite numbers, named by `STATISTICS["image"]`."""
    core, source, x, y = _discs(pixels.shape[-1])
    outside = valid & ~source
    planes = []
    for plane, good, far in zip(pixels, valid, outside, strict=True):
        sky = plane[far] if far.any() else plane[good]
        if not sky.size:
            planes.append(np.zeros(plane.shape))
            continue
        level = float(np.median(sky))
        noise = 1.4826 * float(np.median(np.abs(sky - level)))
        # where most of the sky is one value, as in a drawing, the MAD is 0
        noise = max(noise, 1e-3 * float(np.abs(sky - level).max()), 1e-12)
        planes.append(np.where(good, (plane - level) / noise, 0.0))
    units = np.stack(planes)  # of sigma above the sky
    total = units[:, source].sum(axis=1)
    inner = units[:, core].sum(axis=1)
    weight = np.clip(units.mean(axis=0), 0, None) * source
    light = max(float(weight.sum()), 1e-9)
    offset = np.hypot(float((weight * x).sum()), float((weight * y).sum())) / light
    stacked = units.sum(axis=0) / np.sqrt(len(units))
    smoothed = ndimage.uniform_filter(stacked, 5)
    rival = max(float(smoothed.max()), FLOOR) / max(float(smoothed[source].max()), FLOOR)
    area = max(int(np.count_nonzero(valid)), 1)
    bright, dark = int(np.count_nonzero(units > BRIGHT)) / area, int(np.count_nonzero(units < -BRIGHT)) / area
    steps = np.abs(np.diff(units, axis=2))[outside[:, :, 1:] & outside[:, :, :-1]]
    blocks = _block_noise(stacked)
    found = [
        float(np.mean(np.arcsinh(total / np.sqrt(source.sum())))),
        float(np.mean(inner / np.maximum(np.abs(total), np.sqrt(source.sum())))),
        float(np.log(offset + 0.1)),
        float(np.log(rival)),
        float(np.log(bright + FLOOR)),
        float(np.log(dark + FLOOR / 10)),
        _sharpness(units),
        _agreement(units[:, source]),
        float(np.log(np.median(steps) + FLOOR)) if steps.size else 0.0,
        float(np.log((blocks.max() + FLOOR) / (blocks.min() + FLOOR))),
    ]
    return _finite(found)


def _sharpness(units: Array) -> float:
    """A point seen through the atmosphere spreads over its neighbours; a cosmic ray, a dead column, text do not."""
    inner = units[:, 1:-1, 1:-1]
    around = (units[:, 2:, 1:-1] + units[:, :-2, 1:-1] + units[:, 1:-1, 2:] + units[:, 1:-1, :-2]) / 4
    bright = inner > 4 * BRIGHT
    return float(((inner - around)[bright] / inner[bright]).max()) if bright.any() else 0.0


def _block_noise(stacked: Array) -> Array:
    """(16,) median absolute deviations of the sixteenths of the field."""
    side = stacked.shape[0] // 4
    parts = stacked[: 4 * side, : 4 * side].reshape(4, side, 4, side).swapaxes(1, 2).reshape(16, -1)
    return np.asarray(np.median(np.abs(parts - np.median(parts, axis=1, keepdims=True)), axis=1))


def _agreement(units: Array) -> float:
    """Mean correlation of neighbouring bands, (B, n) values."""
    centred = units - units.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    pairs = (centred[1:] * centred[:-1]).sum(axis=1) / np.maximum(norm[1:] * norm[:-1], 1e-12)
    return float(pairs.mean()) if len(pairs) else 0.0


# --- spectra ----------------------------------------------------------------------------------------------------------


def spectrum_statistics(flux: Array, ivar: Array) -> tuple[float, ...]:
    """Of a spectrum on the grid, (L,) each, ivar 0 where nothing is known: named by `STATISTICS["spectrum"]`."""
    good = ivar > 0
    known, weight = flux[good].astype(np.float64), ivar[good].astype(np.float64)
    noise = np.sqrt(float((1 / weight).mean()) / (len(known) / N_BANDS))
    scale = max(abs(float(known.mean())), noise)
    bands = np.array_split(np.where(good, flux, np.nan), N_BANDS)
    shape = [
        float(np.arcsinh(np.nanmean(band) / scale)) if np.isfinite(band).mean() > MIN_BAND else np.nan for band in bands
    ]
    filled = np.nan_to_num(shape, nan=float(np.nanmean(shape)) if np.isfinite(shape).any() else 0.0)
    return _finite(
        [
            float(np.arcsinh(np.median(known * np.sqrt(weight)))),
            *(_structure(known, weight, scale) for scale in SCALES),
            *filled.tolist(),
        ]
    )


def _structure(flux: Array, weight: Array, scale: int) -> float:
    """Allan variance of means of `scale` pixels over what the noise alone gives: 0 for noise, log."""
    length = len(flux) // scale * scale
    if length < 2 * scale:
        return 0.0
    total = weight[:length].reshape(-1, scale).sum(axis=1)
    mean = (flux * weight)[:length].reshape(-1, scale).sum(axis=1) / total
    squares = np.diff(mean) ** 2 / (1 / total[1:] + 1 / total[:-1])
    return float(np.log(np.mean(np.minimum(squares, np.quantile(squares, 0.99))) + FLOOR))
