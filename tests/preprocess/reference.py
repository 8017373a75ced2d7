"""Preparing written plainly: what `astroclip.preprocess` must give, however fast it has become.

Every number of an index (statistics, calibration, vectors) rests on version "1" of the preprocessing. These are its
steps as they were first written, one `np.median` at a time; `test_reference.py` compares them with the product's.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from astroclip.preprocess import GridImage, GridSpectrum, ImageGrid, SpectrumGrid, overlap_matrix
from astroclip.preprocess.doubts import CENTRE_PIXELS, NOTHING, SOMETHING
from astroclip.preprocess.image import APERTURE_ARCSEC, SCALE_TOLERANCE
from astroclip.preprocess.statistics import BRIGHT, CORE_PIXELS, FLOOR, MIN_BAND, N_BANDS, SCALES, SOURCE_PIXELS
from astroclip.types import Image, Quality, Spectrum

__all__ = ["elsewhere", "image_quality", "reference_image", "reference_spectrum"]


def reference_image(image: Image, grid: ImageGrid) -> GridImage:
    """`image_to_grid` of a usable image, without flags."""
    order = [image.bands.index(band) for band in grid.bands]
    pixels, valid = image.pixels[order], ~image.mask[order]
    if abs(image.pixel_scale_arcsec / grid.pixel_scale_arcsec - 1) > SCALE_TOLERANCE:
        pixels, valid = _resample(pixels, valid, image.pixel_scale_arcsec, grid)
    pixels, valid = _crop_or_pad(pixels, valid, grid.size)
    return GridImage(pixels, valid, image_quality(pixels, valid, grid))


def image_quality(pixels: np.ndarray, valid: np.ndarray, grid: ImageGrid) -> Quality:
    """What the product says of an image on the grid."""
    snr = _source_snr(pixels, valid, grid)
    return Quality(0, snr, float(valid.mean()), (), image_statistics(pixels, valid))


def reference_spectrum(spectrum: Spectrum, grid: SpectrumGrid) -> GridSpectrum:
    """`spectrum_to_grid` of a usable spectrum, without flags."""
    good = ~spectrum.mask & (spectrum.ivar > 0) & np.isfinite(spectrum.flux) & np.isfinite(spectrum.ivar)
    overlap = overlap_matrix(spectrum.wave, grid)
    weight = np.where(good, spectrum.ivar, 0).astype(np.float64)
    total = overlap @ weight
    known = total > 0
    with np.errstate(invalid="ignore"):
        flux = np.where(known, overlap @ (weight * np.where(good, spectrum.flux, 0)) / total, 0).astype(np.float32)
        ivar = np.where(known, total**2 / (overlap.power(2) @ weight), 0).astype(np.float32)
    snr = float(np.median(flux[known] * np.sqrt(ivar[known])))
    return GridSpectrum(flux, ivar, Quality(0, snr, float(known.mean()), (), spectrum_statistics(flux, ivar)))


# --- images -----------------------------------------------------------------------------------------------------------


def _resample(pixels: np.ndarray, valid: np.ndarray, scale: float, grid: ImageGrid) -> tuple[np.ndarray, np.ndarray]:
    """Linear resampling about the centre, normalised by validity; coarser grids are smoothed to one pixel first."""
    ratio = grid.pixel_scale_arcsec / scale
    height, width = pixels.shape[1:]
    out = (int(round(height / ratio)), int(round(width / ratio)))
    out = (min(out[0], 2 * grid.size), min(out[1], 2 * grid.size))
    rows = (np.arange(out[0]) - (out[0] - 1) / 2) * ratio + (height - 1) / 2
    cols = (np.arange(out[1]) - (out[1] - 1) / 2) * ratio + (width - 1) / 2
    coordinates = np.meshgrid(rows, cols, indexing="ij")
    # A box of one output pixel has variance ratio^2/12; the input pixel already has 1/12 of it.
    sigma = float(np.sqrt(max(ratio**2 - 1, 0) / 12))
    planes, goods = [], []
    for plane, good in zip(pixels, valid, strict=True):
        weight = good.astype(np.float32)
        filled = np.where(good, plane, 0).astype(np.float32)
        if sigma > 0:
            weight = ndimage.gaussian_filter(weight, sigma, mode="constant")
            filled = ndimage.gaussian_filter(filled, sigma, mode="constant")
        top = ndimage.map_coordinates(filled, coordinates, order=1, mode="nearest")
        bottom = ndimage.map_coordinates(weight, coordinates, order=1, mode="nearest")
        good_out = bottom > 0.5
        planes.append(np.where(good_out, top / np.maximum(bottom, 0.5), 0) * ratio**2)
        goods.append(good_out)
    return np.stack(planes).astype(np.float32), np.stack(goods)


def _crop_or_pad(pixels: np.ndarray, valid: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The central `size` x `size`; where the image is smaller, zero and invalid around it."""
    for axis in (1, 2):
        length = pixels.shape[axis]
        if length >= size:
            start = (length - size) // 2
            pixels = np.take(pixels, range(start, start + size), axis=axis)
            valid = np.take(valid, range(start, start + size), axis=axis)
        else:
            before = (size - length) // 2
            pad = [(0, 0)] * 3
            pad[axis] = (before, size - length - before)
            pixels, valid = np.pad(pixels, pad), np.pad(valid, pad)
    return np.where(valid, pixels, 0), valid


def _source_snr(pixels: np.ndarray, valid: np.ndarray, grid: ImageGrid) -> float | None:
    """Aperture flux over background noise in the middle band; the noise is 1.4826 MAD outside the aperture."""
    plane, good = pixels[len(pixels) // 2], valid[len(valid) // 2]
    centre = (grid.size - 1) / 2
    y, x = np.ogrid[: grid.size, : grid.size]
    inside = (x - centre) ** 2 + (y - centre) ** 2 <= (APERTURE_ARCSEC / grid.pixel_scale_arcsec) ** 2
    sky = plane[good & ~inside]
    if sky.size < 100 or not (good & inside).any():
        return None
    level = float(np.median(sky))
    noise = 1.4826 * float(np.median(np.abs(sky - level)))
    if noise <= 0:
        return None
    source = plane[good & inside] - level
    return float(source.sum() / (noise * np.sqrt(source.size)))


def elsewhere(pixels: np.ndarray, valid: np.ndarray) -> float | None:
    """Distance from the centre, grid pixels, of the brightest source where the centre itself is empty; else None."""
    axis = np.arange(pixels.shape[-1]) - (pixels.shape[-1] - 1) / 2
    radius = np.hypot(axis, axis[:, None])
    stacked = np.zeros(pixels.shape[1:])
    for plane, good in zip(pixels, valid, strict=True):
        if not good.any():
            return None
        level = float(np.median(plane[good]))
        noise = 1.4826 * float(np.median(np.abs(plane[good] - level)))
        if noise <= 0:
            return None
        stacked += np.where(good, plane - level, 0.0) / noise
    smoothed = ndimage.uniform_filter(stacked, 5) * 5 / np.sqrt(len(pixels))
    brightest = np.unravel_index(np.argmax(smoothed), smoothed.shape)
    if smoothed[radius <= CENTRE_PIXELS].max() >= NOTHING or smoothed[brightest] < SOMETHING:
        return None
    return float(radius[brightest])


def image_statistics(pixels: np.ndarray, valid: np.ndarray) -> tuple[float, ...]:
    """Of an image on the grid, (B, S, S) each: finite numbers, named by `STATISTICS["image"]`."""
    size = pixels.shape[-1]
    axis = np.arange(size) - (size - 1) / 2
    x, y = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))
    core, source = np.hypot(x, y) <= CORE_PIXELS, np.hypot(x, y) <= SOURCE_PIXELS
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


def _sharpness(units: np.ndarray) -> float:
    """A point seen through the atmosphere spreads over its neighbours; a cosmic ray, a dead column, text do not."""
    inner = units[:, 1:-1, 1:-1]
    around = (units[:, 2:, 1:-1] + units[:, :-2, 1:-1] + units[:, 1:-1, 2:] + units[:, 1:-1, :-2]) / 4
    bright = inner > 4 * BRIGHT
    return float(((inner - around)[bright] / inner[bright]).max()) if bright.any() else 0.0


def _block_noise(stacked: np.ndarray) -> np.ndarray:
    """(16,) median absolute deviations of the sixteenths of the field."""
    side = stacked.shape[0] // 4
    parts = stacked[: 4 * side, : 4 * side].reshape(4, side, 4, side).swapaxes(1, 2).reshape(16, -1)
    return np.asarray(np.median(np.abs(parts - np.median(parts, axis=1, keepdims=True)), axis=1))


def _agreement(units: np.ndarray) -> float:
    """Mean correlation of neighbouring bands, (B, n) values."""
    centred = units - units.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    pairs = (centred[1:] * centred[:-1]).sum(axis=1) / np.maximum(norm[1:] * norm[:-1], 1e-12)
    return float(pairs.mean()) if len(pairs) else 0.0


# --- spectra ----------------------------------------------------------------------------------------------------------


def spectrum_statistics(flux: np.ndarray, ivar: np.ndarray) -> tuple[float, ...]:
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


def _structure(flux: np.ndarray, weight: np.ndarray, scale: int) -> float:
    """Allan variance of means of `scale` pixels over what the noise alone gives: 0 for noise, log."""
    length = len(flux) // scale * scale
    if length < 2 * scale:
        return 0.0
    total = weight[:length].reshape(-1, scale).sum(axis=1)
    mean = (flux * weight)[:length].reshape(-1, scale).sum(axis=1) / total
    squares = np.diff(mean) ** 2 / (1 / total[1:] + 1 / total[:-1])
    return float(np.log(np.mean(np.minimum(squares, np.quantile(squares, 0.99))) + FLOOR))


def _finite(found: list[float]) -> tuple[float, ...]:
    return tuple(np.nan_to_num(np.asarray(found, np.float32), nan=0.0, posinf=50.0, neginf=-50.0).tolist())
