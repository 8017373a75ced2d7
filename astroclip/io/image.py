"""From planes as found in some file to an `Image`: bands, scale, bad pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.io.refusal import over_limit, refusal
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits
from astroclip.types import Flag, Image, Quality

__all__ = ["DEFAULT_BANDS", "LEGACY_SCALE_ARCSEC", "RawImage", "assemble_image", "band_name"]

DEFAULT_BANDS = ("g", "r", "z")
LEGACY_SCALE_ARCSEC = 0.262  # native pixel of the DESI Legacy Imaging Surveys coadds (Dey et al. 2019, AJ 157, 168)
MAX_SCALE_ARCSEC = 60.0

_BAND = re.compile(
    r"^(?:(?:des|decam|ls|bass|mzls|hsc|sdss|ps1|legacysurvey|image|flux|band|filter|sci)[-_. ]*)*"
    r"([ugrizy])(?:[^a-z0-9].*|)$"
)


def band_name(text: str) -> str | None:
    """("DES-G") -> "g"; ("g DECam SDSS c0001 4720.0 1520.0") -> "g"; None where no single band is named."""
    match = _BAND.match(text.strip().lower())
    return match[1] if match else None


@dataclass(frozen=True)
class RawImage:
    """Planes of one object as the file gives them.

    pixels: (B, H, W), any numeric dtype, in nanomaggies per pixel; bad: same shape or None, True = bad.
    """

    pixels: npt.NDArray[Any]
    bands: tuple[str, ...]
    pixel_scale_arcsec: float
    bad: npt.NDArray[np.bool_] | None = None
    calibrated: bool = True
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    flags: tuple[Flag, ...] = ()


def check_size(shape: tuple[int, ...], limits: ReaderLimits, most: int | None = None) -> None:
    """(B, H, W) against the limits, before pixels are touched; LimitError or InputError `image_too_small`.

    most: pixels of a plane, where not `max_image_pixels`.
    """
    planes, height, width = shape
    most = most or limits.max_image_pixels
    if height * width > most:
        raise over_limit(
            "image_too_large",
            what=f"an image of {width} x {height}, a size",
            found=height * width,
            limit=most,
            unit="pixels",
            mend="Cut out the galaxy (the models look at 25 arcsec).",
        )
    if planes > limits.max_image_planes:
        raise over_limit(
            "too_many_planes",
            what="an image",
            found=planes,
            limit=limits.max_image_planes,
            unit="planes",
            mend="Keep the planes of the bands g, r and z.",
        )
    if min(height, width) < limits.min_image_side:
        raise refusal(
            "image_too_small",
            found=f"an image of {width} x {height} pixels",
            wanted=f"at least {limits.min_image_side} pixels a side (96 at 0.262 arcsec fill the field)",
            mend="Send a larger cutout.",
        )


def check_samples(samples: int, limits: ReaderLimits) -> None:
    """Refuse a file whose images hold more samples in all than one should. Raises LimitError."""
    if samples > limits.max_image_samples:
        raise over_limit(
            "too_many_samples",
            what="a file",
            found=samples,
            limit=limits.max_image_samples,
            unit="samples in all its images",
            mend="Cut out the galaxy (the models look at 25 arcsec).",
        )


def assemble_image(raw: RawImage, limits: ReaderLimits = DEFAULT_LIMITS) -> Image:
    """The `Image` of `raw`: float32, non-finite pixels masked and zero.

    Raises InputError (`no_finite_pixels`, `constant_image`, `bad_pixel_scale`, `image_too_small`) and
    LimitError.
    """
    check_size(raw.pixels.shape, limits)
    scale = raw.pixel_scale_arcsec
    if not (np.isfinite(scale) and 0 < scale <= MAX_SCALE_ARCSEC):
        raise refusal(
            "bad_pixel_scale",
            found=f"a pixel scale of {scale:g} arcsec",
            wanted=f"0 to {MAX_SCALE_ARCSEC:g} arcsec",
            mend="Correct CD or CDELT (degrees), or state `pixel_scale_arcsec`.",
            field="pixel_scale_arcsec",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        pixels = np.array(raw.pixels, dtype=np.float32)
    bad = ~np.isfinite(pixels)
    if raw.bad is not None:
        bad |= raw.bad
    pixels[bad] = 0.0
    for plane, band in enumerate(raw.bands):
        _check_plane(pixels[plane], bad[plane], band, raw.bad)
    quality = Quality(masked_fraction=float(bad.mean()))
    return Image(
        pixels=pixels,
        mask=bad,
        bands=raw.bands,
        pixel_scale_arcsec=float(scale),
        calibrated=raw.calibrated,
        object_id=raw.object_id,
        ra=raw.ra,
        dec=raw.dec,
        quality=quality.with_flags(*raw.flags),
    )


def _check_plane(pixels: npt.NDArray[Any], bad: npt.NDArray[np.bool_], band: str, masked: Any) -> None:
    """Refuse a plane that holds nothing or one value."""
    if bad.all():
        reason = "NaN or infinite" if masked is None else "NaN, infinite or masked"
        raise refusal(
            "no_finite_pixels",
            found=f"band {band} with every pixel {reason}",
            wanted="an image with finite pixels",
            mend="The position may lie outside the survey in this band.",
            field=band,
        )
    good = pixels[~bad]
    if good.min() == good.max():
        raise refusal(
            "constant_image",
            found=f"band {band} with the one value {good[0]:g} throughout",
            wanted="an image of the sky",
            mend="The position may lie outside the survey, or the export wrote no data.",
            field=band,
        )
