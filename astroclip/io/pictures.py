"""PNG and JPEG display pictures: the Legacy Surveys viewer's stretch undone, approximately.

The viewer draws g, r, z as colours with scales s = (6.0, 3.4, 2.2), m = 0.03, Q = 20 (the formula is in
AstroCLIP's ToRGB and goes back to Lupton et al. 2004, PASP 116, 133):

    v_b = s_b x_b + m,   I = mean_b max(0, v_b),   f = arcsinh(Q I) / sqrt(Q),   colour_b = clip(v_b f / I,
    0, 1)

with z in red, r in green, g in blue and x in nanomaggies per 0.262" pixel. Where nothing is clipped mean_b
colour_b = f, so I = sinh(sqrt(Q) f) / Q and x_b = (colour_b I / f - m) / s_b. Eight bits, JPEG and clipping
make the result an estimate: such images are `calibrated=False`. A resampled picture keeps the surface
brightness of 0.262" pixels, so a given pixel scale multiplies the fluxes by the ratio of pixel areas.
"""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from astroclip.io.image import DEFAULT_BANDS, LEGACY_SCALE_ARCSEC, RawImage, assemble_image, check_size
from astroclip.io.options import ImageOptions
from astroclip.io.pieces import check_pieces
from astroclip.io.refusal import refusal
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Image

__all__ = ["colours_to_nanomaggies", "image_from_colours", "image_from_picture", "nanomaggies_to_colours"]

SCALES = np.array([2.2, 3.4, 6.0])  # of z, r, g: the order of the colour planes
M, Q = 0.03, 20.0
ROWS = 64  # of a picture turned into fluxes at a time: double precision of all at once would be 24 bytes a colour
SATURATED = 254  # of 255: the viewer clips here, and JPEG rounds


# Pillow warns of odd metadata, and of sizes that `check_size` judges. For good, not by `catch_warnings`: readers run in
# threads, and it swaps the state of the whole process.
warnings.filterwarnings("ignore", module=r"PIL\b")


def image_from_picture(data: bytes, options: ImageOptions, limits: ReaderLimits) -> Image:
    """Decode a PNG or JPEG. Raises InputError (`damaged_picture`, `not_rgb`, ...) and LimitError
    (`image_too_large`, `picture_too_complex`)."""
    check_pieces(data, limits)
    try:
        with Pillow.open(BytesIO(data), formats=("PNG", "JPEG")) as picture:
            width, height = picture.size
            check_size((3, height, width), limits, limits.max_picture_pixels)
            mode = picture.mode
            if mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
                raise refusal(
                    "not_rgb",
                    found=f"a picture of mode {mode}",
                    wanted="a colour picture (z red, r green, g blue)",
                    mend="Single bands go as FITS or .npy.",
                )
            colours = np.asarray(picture.convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Pillow.DecompressionBombError,
        OverflowError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        MemoryError,
    ) as error:
        raise refusal(
            "damaged_picture",
            found=f"a PNG or JPEG that does not decode ({str(error)[:100] or type(error).__name__})",
            wanted="a complete picture",
            mend="Download or export it again.",
        ) from error
    return image_from_colours(colours, options, limits)


def image_from_colours(colours: npt.NDArray[np.uint8], options: ImageOptions, limits: ReaderLimits) -> Image:
    """The `Image` of an (H, W, 3) uint8 colour picture; bands come out in the order g, r, z."""
    flags = [Flag("uncalibrated", "A display picture: fluxes were estimated from its colours.")]
    scale = options.pixel_scale_arcsec
    if scale is None:
        scale = LEGACY_SCALE_ARCSEC
        flags.append(Flag("assumed_pixel_scale", f"The picture gives no pixel scale; {scale} arcsec was assumed."))
    if options.bands is not None and set(options.bands) != set(DEFAULT_BANDS):
        raise refusal(
            "band_mismatch",
            found=f"bands {','.join(options.bands)} for a picture",
            wanted="g, r and z",
            mend="Leave `bands` out: the viewer's colours are z (red), r (green), g (blue).",
            field="bands",
        )
    saturated = (colours >= SATURATED).any(axis=-1)
    if saturated.any():
        share = 100.0 * float(saturated.mean())
        flags.append(Flag("saturated", f"{share:.2g} % of the pixels are saturated; their fluxes are lower limits."))
    area = (scale / LEGACY_SCALE_ARCSEC) ** 2
    pixels = np.empty((3, *colours.shape[:2]), np.float32)
    for first in range(0, len(colours), ROWS):
        values = colours_to_nanomaggies(colours[first : first + ROWS] / 255.0) * area
        pixels[:, first : first + ROWS] = np.moveaxis(values, -1, 0)[::-1]
    raw = RawImage(pixels, DEFAULT_BANDS, scale, calibrated=False, flags=tuple(flags))
    return assemble_image(raw, limits)


def colours_to_nanomaggies(colours: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(..., 3) colours in 0..1 as (..., 3) nanomaggies per 0.262" pixel of z, r, g."""
    f = np.mean(colours, axis=-1, keepdims=True)
    intensity = np.sinh(np.sqrt(Q) * f) / Q
    # For f -> 0, I / f -> 1 / sqrt(Q).
    ratio = np.where(f > 1e-6, intensity / np.maximum(f, 1e-6), 1.0 / np.sqrt(Q))
    return np.asarray((colours * ratio - M) / SCALES, dtype=np.float64)


def nanomaggies_to_colours(pixels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The viewer's stretch: (..., 3) nanomaggies of z, r, g as colours in 0..1; for previews and tests."""
    v = SCALES * pixels + M
    intensity = np.mean(np.maximum(v, 0.0), axis=-1, keepdims=True)
    stretched = np.arcsinh(Q * intensity) / np.sqrt(Q)
    return np.asarray(np.clip(v * stretched / np.maximum(intensity, 1e-6), 0.0, 1.0), dtype=np.float64)
