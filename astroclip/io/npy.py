"""NumPy .npy files: an image (3, H, W) or (H, W, 3), or a spectrum of columns. Never pickles, never object
arrays.

The header is checked against the limits and the bytes before an array is made; structured, object, complex
and text dtypes are refused.
"""

from __future__ import annotations

import ast
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from astroclip.io.image import DEFAULT_BANDS, LEGACY_SCALE_ARCSEC, RawImage, assemble_image, check_samples
from astroclip.io.options import ImageOptions, SpectrumOptions
from astroclip.io.pictures import image_from_colours
from astroclip.io.refusal import over_limit, refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits
from astroclip.types import Flag, Image, Spectrum

__all__ = ["images_from_npy", "is_spectrum_shape", "load_npy", "spectrum_from_npy"]

_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I"}  # of the header, by version
_KINDS = "fiu"


def load_npy(data: bytes, limits: ReaderLimits = DEFAULT_LIMITS) -> npt.NDArray[Any]:
    """The array, as a view of `data`. Raises InputError (`damaged_npy`, `object_array`, `truncated_npy`)."""
    try:
        shape, fortran, dtype, start = _header(data, limits)
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError, RecursionError, struct.error) as error:
        raise refusal(
            "damaged_npy",
            found=f"a .npy header that does not parse ({str(error)[:100]})",
            wanted="a file of numpy.save",
            mend="Save the array again with numpy.save.",
        ) from error
    if dtype.hasobject or dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise refusal(
            "object_array",
            found=f"an array of dtype {dtype}",
            wanted="float or integer numbers of at most 8 bytes",
            mend="Save array.astype('f4') instead; object arrays are pickles and are never read.",
        )
    count = 1
    for n in shape:
        count *= n  # Python integers: no overflow, whatever the header claims
    if any(n < 0 for n in shape) or count * dtype.itemsize > len(data) - start:
        raise refusal(
            "truncated_npy",
            found=f"shape {shape} of {dtype} but only {len(data) - start:,} bytes",
            wanted="a complete array",
            mend="Send the whole file.",
        )
    flat = np.frombuffer(data, dtype=dtype, count=count, offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(data: bytes, limits: ReaderLimits) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, in Fortran's order, dtype, offset of the data), by the letter of NEP 1.

    Not numpy's own reader: it mends what Python 2 wrote with `tokenize`, which 3 kB of blanks and bytes keep busy for
    seconds.
    """
    form = _LENGTHS[data[6:8]]
    begin = 8 + struct.calcsize(form)
    (length,) = struct.unpack_from(form, data, 8)
    if length > limits.max_npy_header:
        raise ValueError(f"its header has {length:,} bytes; at most {limits.max_npy_header:,} are read")
    if length > len(data) - begin:
        raise ValueError("its header is cut")
    return *_fields(data[begin : begin + length]), begin + length


@lru_cache(maxsize=256)
def _fields(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, in Fortran's order, dtype). Remembered, since arrays come in few shapes, parsing one takes ten times what
    all else here does, and `literal_eval` leaves a cycle of references each time."""
    fields = ast.literal_eval(header.decode("latin-1").strip())
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header does not say descr, fortran_order and shape")
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape) or not isinstance(fortran, bool):
        raise ValueError(f"its header has shape {shape!r:.60} and fortran_order {fortran!r:.20}")
    return shape, fortran, npy_format.descr_to_dtype(fields["descr"])


def is_spectrum_shape(shape: tuple[int, ...]) -> bool:
    """(L, 2..4) or (2..4, L)."""
    return len(shape) == 2 and min(shape) in (2, 3, 4) and max(shape) > 4


def images_from_npy(data: bytes, options: ImageOptions, limits: ReaderLimits) -> list[Image]:
    """(3, H, W), (H, W, 3), or (N, ...) of either; floats in nanomaggies per pixel, uint8 a display
    picture."""
    array = load_npy(data, limits)
    if array.ndim == 4 and len(array) > limits.max_targets:
        raise over_limit(
            "too_many_targets",
            what="an array",
            found=len(array),
            limit=limits.max_targets,
            unit="images",
            mend="Split it.",
        )
    stack = array if array.ndim == 4 else array[np.newaxis]
    count = len(options.bands or DEFAULT_BANDS)
    if stack.ndim != 4 or 0 in stack.shape or count not in (stack.shape[1], stack.shape[3]):
        raise refusal(
            "not_an_image",
            found=f"an array of shape {array.shape}",
            wanted=f"({count}, H, W) or (H, W, {count})",
            mend="Stack the bands g, r, z; name others with the parameter `bands`.",
        )
    check_samples(stack.size, limits)
    last = stack.shape[3] == count and stack.shape[1] != count
    if stack.dtype == np.uint8:
        return [image_from_colours(a if last else np.moveaxis(a, 0, -1), options, limits) for a in stack]
    return [_image(np.moveaxis(a, -1, 0) if last else a, options, limits) for a in stack]


def _image(pixels: npt.NDArray[Any], options: ImageOptions, limits: ReaderLimits) -> Image:
    flags = [Flag("assumed_flux_unit", "An array has no units; nanomaggies per pixel were assumed.")]
    bands, scale = options.bands, options.pixel_scale_arcsec
    if bands is None:
        bands = DEFAULT_BANDS
        flags.append(Flag("assumed_bands", "An array names no bands; g, r, z were assumed."))
    if scale is None:
        scale = LEGACY_SCALE_ARCSEC
        flags.append(Flag("assumed_pixel_scale", f"An array has no pixel scale; {scale} arcsec was assumed."))
    return assemble_image(RawImage(pixels, bands, scale, flags=tuple(flags)), limits)


def spectrum_from_npy(data: bytes, options: SpectrumOptions, limits: ReaderLimits) -> Spectrum:
    """Columns (or rows) wave, flux[, ivar[, mask]]."""
    array = load_npy(data, limits)
    if not is_spectrum_shape(array.shape):
        raise refusal(
            "not_a_spectrum",
            found=f"an array of shape {array.shape}",
            wanted="(L, 2), (L, 3) or (L, 4): wave, flux, ivar, mask",
            mend="Stack the columns with numpy.column_stack.",
        )
    columns = array.T if array.shape[0] > array.shape[1] else array
    raw = RawSpectrum(
        wave=columns[0],
        flux=columns[1],
        ivar=columns[2] if len(columns) > 2 else None,
        bad=columns[3] if len(columns) > 3 else None,
    )
    return assemble_spectrum(raw, options, limits)
