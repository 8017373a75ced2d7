"""Images onto the model's pixel grid: band order, pixel scale, centre crop, validity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from astroclip.errors import InputError
from astroclip.medians import level_and_noise
from astroclip.preprocess.doubts import image_doubts
from astroclip.preprocess.statistics import image_statistics
from astroclip.types import Flag, Image, Quality

__all__ = ["GridImage", "ImageGrid", "image_to_grid"]

Pixels = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]

# A pixel scale within 5 % of the grid's is taken as it is: resampling would smooth the noise for less than the
# spread of galaxy sizes at one luminosity.
SCALE_TOLERANCE = 0.05
# Outside these a header is wrong (a plate scale in degrees, say) or the galaxy is a handful of pixels.
MIN_SCALE_ARCSEC, MAX_SCALE_ARCSEC = 0.02, 2.0
# A cutout may be smaller than the grid (the rest is masked), but not smaller than a typical galaxy at z = 0.2.
MIN_FIELD_PIXELS = 32
MAX_MASKED_FRACTION = 0.5
# Aperture for the source's signal-to-noise: 3 arcsec radius holds most of a galaxy at z > 0.1.
APERTURE_ARCSEC = 3.0


@dataclass(frozen=True)
class ImageGrid:
    """The model's image grid: `size` x `size` pixels of `pixel_scale_arcsec`, planes in `bands` order."""

    bands: tuple[str, ...] = ("g", "r", "z")
    size: int = 96
    pixel_scale_arcsec: float = 0.262


@dataclass(frozen=True)
class GridImage:
    """An image on the grid.

    pixels: (B, S, S) float32, nanomaggies per grid pixel, contiguous; 0 where not valid.
    valid:  (B, S, S) bool.
    """

    pixels: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    quality: Quality


def image_to_grid(image: Image, grid: ImageGrid | None = None, *, statistics: bool = True) -> GridImage:
    """Put `image` on the model's grid.

    Band planes are picked by name; another pixel scale is resampled conserving flux; the centre is cropped, and
    what lies outside a smaller cutout is masked. Raises InputError where the image cannot carry an embedding:
    a band is missing, the field is too small, too much is masked, or a band is constant.
    statistics: False leaves those of the quality out, where nobody will ask whether the image is like others.
    """
    grid = grid or ImageGrid()
    pixels, valid = _pick_bands(image, grid)
    flags: list[Flag] = []
    scale = image.pixel_scale_arcsec
    if not np.isfinite(scale) or not MIN_SCALE_ARCSEC <= scale <= MAX_SCALE_ARCSEC:
        raise InputError(
            f"The pixel scale is {scale:g} arcsec; wanted {MIN_SCALE_ARCSEC} to {MAX_SCALE_ARCSEC}. "
            "Give pixel_scale_arcsec, or correct CD/CDELT in the header.",
            code="bad_pixel_scale",
            field="pixel_scale_arcsec",
        )
    _refuse_unusable(pixels, valid, image, grid)
    if abs(scale / grid.pixel_scale_arcsec - 1) > SCALE_TOLERANCE:
        pixels, valid = _resample(pixels, valid, scale, grid)
        flags.append(Flag("resampled", f'Resampled from {scale:.3f}" to {grid.pixel_scale_arcsec}" per pixel.'))
    pixels, valid = _crop_or_pad(pixels, valid, grid.size)
    coverage = np.count_nonzero(valid) / valid.size
    if coverage < 1 - MAX_MASKED_FRACTION:
        flags.append(Flag("small_field", f"Good pixels cover {coverage:.0%} of the model's field; the rest is masked."))
    if not image.calibrated:
        flags.append(Flag("uncalibrated", "A display picture: fluxes are estimated from its colours."))
    snr = _source_snr(pixels, valid, grid)
    flags += image_doubts(image, pixels, valid, snr)
    measured = image_statistics(pixels, valid) if statistics else ()
    found = replace(image.quality, coverage=coverage, snr=snr, statistics=measured)
    quality = found.with_flags(*flags)
    return GridImage(pixels, valid, quality)


def _pick_bands(image: Image, grid: ImageGrid) -> tuple[Pixels, Valid]:
    missing = [band for band in grid.bands if band not in image.bands]
    if missing:
        raise InputError(
            f"The image has bands {', '.join(image.bands)}; the model needs {', '.join(grid.bands)} "
            f"(missing: {', '.join(missing)}). Upload a cutout with all of them, or name the planes with `bands`.",
            code="missing_band",
            field="bands",
        )
    if image.bands == grid.bands:
        return image.pixels, ~image.mask
    order = [image.bands.index(band) for band in grid.bands]
    return image.pixels[order], ~image.mask[order]


def _refuse_unusable(pixels: Pixels, valid: Valid, image: Image, grid: ImageGrid) -> None:
    height, width = pixels.shape[1:]
    needed = MIN_FIELD_PIXELS * grid.pixel_scale_arcsec / image.pixel_scale_arcsec
    if min(height, width) < np.floor(needed):
        raise InputError(
            f"The image is {width} x {height} pixels of {image.pixel_scale_arcsec:.3f} arcsec; the model needs at "
            f"least {needed:.0f} x {needed:.0f} ({MIN_FIELD_PIXELS * grid.pixel_scale_arcsec:.1f} arcsec). "
            "Cut out a larger field.",
            code="field_too_small",
            field="pixels",
        )
    for plane, good, band in zip(pixels, valid, grid.bands, strict=True):
        fraction = 1 - np.count_nonzero(good) / good.size
        if fraction > MAX_MASKED_FRACTION:
            raise InputError(
                f"{fraction:.0%} of the {band} band is masked or not finite; at most {MAX_MASKED_FRACTION:.0%} may "
                "be. Use another exposure or a smaller cutout.",
                code="mostly_masked",
                field="mask",
            )
        values = plane[good] if fraction else plane
        if values.size == 0 or float(values.max()) == float(values.min()):
            raise InputError(
                f"The {band} band is constant (every pixel is {float(values.flat[0]) if values.size else 0:g}); wanted "
                "a calibrated cutout with sky noise. Check that the plane was filled.",
                code="constant_image",
                field="pixels",
            )


def _resample(pixels: Pixels, valid: Valid, scale: float, grid: ImageGrid) -> tuple[Pixels, Valid]:
    """Linear resampling about the centre, normalised by validity; coarser grids are smoothed to one pixel first.

    What lies outside the grid's field is left out. Both steps treat rows and columns apart, so each is a product with
    one matrix a side: out = R P C^T.
    """
    ratio = grid.pixel_scale_arcsec / scale
    first_row, rows = _resampling(pixels.shape[1], ratio, grid.size)
    first_col, cols = _resampling(pixels.shape[2], ratio, grid.size)
    window = (..., slice(first_row, first_row + rows.shape[1]), slice(first_col, first_col + cols.shape[1]))
    pixels, valid = pixels[window], valid[window]
    if not valid.all():
        total, weight = rows @ np.where(valid, pixels, 0) @ cols.T, rows @ valid.astype(np.float32) @ cols.T
    else:  # the same sums for one and the same weight everywhere
        total, weight = rows @ pixels @ cols.T, np.outer(rows.sum(axis=1), cols.sum(axis=1))[None]
    good = np.broadcast_to(weight > 0.5, total.shape)
    return np.where(good, total / np.maximum(weight, 0.5), 0) * np.float32(ratio**2), good


@lru_cache(maxsize=16)  # a few surveys' cutouts; at most 0.5 MB each
def _resampling(length: int, ratio: float, size: int) -> tuple[int, Pixels]:
    """Along one axis: the first input pixel that matters, and from there the weights (output pixels, input pixels).

    length: input pixels; ratio: how many of them an output pixel is wide; size: output pixels at most.
    """
    n_out = min(int(round(length / ratio)), 2 * size)
    places = (np.arange(n_out) - (n_out - 1) / 2) * ratio + (length - 1) / 2
    start = max(n_out - size, 0) // 2
    places = np.minimum(np.maximum(places[start : start + size], 0), length - 1)
    low = np.minimum(places.astype(int), length - 2)
    output = np.arange(len(places))
    weights = np.zeros((len(places), length))
    weights[output, low] = low + 1 - places
    weights[output, low + 1] = places - low
    # A box of one output pixel has variance ratio^2/12; the input pixel already has 1/12 of it.
    sigma = float(np.sqrt(max(ratio**2 - 1, 0) / 12))
    if sigma > 0:  # the smoothing is symmetric: what smooths an image smooths the weights of its pixels
        weights[:] = ndimage.gaussian_filter1d(weights, sigma, axis=1, mode="constant")
    used = np.flatnonzero(weights.any(axis=0))
    return int(used[0]), np.ascontiguousarray(weights[:, used[0] : used[-1] + 1], dtype=np.float32)


def _crop_or_pad(pixels: Pixels, valid: Valid, size: int) -> tuple[Pixels, Valid]:
    """Copies of the central `size` x `size`, 0 where not valid; where the image is smaller, invalid around it."""
    source, target = zip(*(_overlap(length, size) for length in pixels.shape[1:]), strict=True)
    shape = (len(pixels), size, size)
    out, known = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    out[:, *target], known[:, *target] = pixels[:, *source], valid[:, *source]
    if not known.all():
        out[~known] = 0
    return out, known


def _overlap(length: int, size: int) -> tuple[slice, slice]:
    """Of `length` pixels those of the central `size`, and where among `size` they lie."""
    if length >= size:
        start = (length - size) // 2
        return slice(start, start + size), slice(None)
    before = (size - length) // 2
    return slice(None), slice(before, before + length)


@lru_cache(maxsize=4)
def _aperture(size: int, radius: float) -> Valid:
    """(S, S): within `radius` pixels of the centre."""
    centre = (size - 1) / 2
    y, x = np.ogrid[:size, :size]
    return np.asarray((x - centre) ** 2 + (y - centre) ** 2 <= radius**2)


def _source_snr(pixels: Pixels, valid: Valid, grid: ImageGrid) -> float | None:
    """Aperture flux over background noise in the middle band; the noise is 1.4826 MAD outside the aperture."""
    plane, good = pixels[len(pixels) // 2], valid[len(valid) // 2]
    inside = _aperture(grid.size, APERTURE_ARCSEC / grid.pixel_scale_arcsec)
    sky = plane[good & ~inside]
    if sky.size < 100 or not (good & inside).any():
        return None
    level, noise = map(float, level_and_noise(sky))
    if noise <= 0:
        return None
    source = plane[good & inside] - level
    return float(source.sum() / (noise * np.sqrt(source.size)))
