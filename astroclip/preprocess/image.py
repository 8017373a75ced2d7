"""Images onto the model's pixel grid: band order, pixel scale, centre crop, validity."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from astroclip.errors import InputError
from astroclip.preprocess.doubts import image_doubts
from astroclip.preprocess.statistics import image_statistics
from astroclip.types import Flag, Image, Quality

__all__ = ["GridImage", "ImageGrid", "image_to_grid"]

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


def image_to_grid(image: Image, grid: ImageGrid | None = None) -> GridImage:
    """Put `image` on the model's grid.

    Band planes are picked by name; another pixel scale is resampled conserving flux; the centre is cropped, and
    what lies outside a smaller cutout is masked. Raises InputError where the image cannot carry an embedding:
    a band is missing, the field is too small, too much is masked, or a band is constant.
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
    coverage = float(valid.mean())
    if coverage < 1 - MAX_MASKED_FRACTION:
        flags.append(Flag("small_field", f"Good pixels cover {coverage:.0%} of the model's field; the rest is masked."))
    if not image.calibrated:
        flags.append(Flag("uncalibrated", "A display picture: fluxes are estimated from its colours."))
    snr = _source_snr(pixels, valid, grid)
    flags += image_doubts(image, pixels, valid, snr)
    found = replace(image.quality, coverage=coverage, snr=snr, statistics=image_statistics(pixels, valid))
    quality = found.with_flags(*flags)
    return GridImage(np.ascontiguousarray(pixels, dtype=np.float32), np.ascontiguousarray(valid), quality)


def _pick_bands(image: Image, grid: ImageGrid) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    missing = [band for band in grid.bands if band not in image.bands]
    if missing:
        raise InputError(
            f"The image has bands {', '.join(image.bands)}; the model needs {', '.join(grid.bands)} "
            f"(missing: {', '.join(missing)}). Upload a cutout with all of them, or name the planes with `bands`.",
            code="missing_band",
            field="bands",
        )
    order = [image.bands.index(band) for band in grid.bands]
    return image.pixels[order], ~image.mask[order]


def _refuse_unusable(
    pixels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], image: Image, grid: ImageGrid
) -> None:
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
        fraction = 1 - float(good.mean())
        if fraction > MAX_MASKED_FRACTION:
            raise InputError(
                f"{fraction:.0%} of the {band} band is masked or not finite; at most {MAX_MASKED_FRACTION:.0%} may "
                "be. Use another exposure or a smaller cutout.",
                code="mostly_masked",
                field="mask",
            )
        values = plane[good]
        if values.size == 0 or float(values.max()) == float(values.min()):
            raise InputError(
                f"The {band} band is constant (every pixel is {float(values[0]) if values.size else 0:g}); wanted a "
                "calibrated cutout with sky noise. Check that the plane was filled.",
                code="constant_image",
                field="pixels",
            )


def _resample(
    pixels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], scale: float, grid: ImageGrid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
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


def _crop_or_pad(
    pixels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
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


def _source_snr(pixels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], grid: ImageGrid) -> float | None:
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
