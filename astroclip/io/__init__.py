"""Bytes in, images and spectra out.

    read_images(data, media_type=, name=)   -> [Image, ...]      FITS cutouts, PNG / JPEG, .npy
    read_spectra(data, media_type=, name=)  -> [Spectrum, ...]   DESI, SDSS / BOSS, FITS tables, CSV, .npy
    detect_modality(data, ...)              -> "image" or "spectrum"

Survey shards and catalogues are read from disk: `astroclip.io.mmu`, `astroclip.io.catalogs`, `astroclip.io.sources`.

All refusals are `InputError`, `MediaTypeError` or `LimitError`; nothing else escapes, whatever the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from astroclip.errors import AstroClipError
from astroclip.io.fits import Hdu, parse_fits
from astroclip.io.fits_images import has_images, images_from_fits
from astroclip.io.fits_spectra import has_spectra, spectra_from_fits
from astroclip.io.formats import FORMATS, MEDIA_TYPES, plain_bytes, sniff
from astroclip.io.npy import images_from_npy, is_spectrum_shape, load_npy, spectrum_from_npy
from astroclip.io.options import ImageOptions, SpectrumOptions
from astroclip.io.pictures import image_from_picture
from astroclip.io.refusal import refusal
from astroclip.io.text import spectrum_from_text
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits
from astroclip.types import Flag, Image, Modality, Spectrum

__all__ = [
    "FORMATS",
    "MEDIA_TYPES",
    "ImageOptions",
    "SpectrumOptions",
    "detect_modality",
    "load_npy",
    "read_images",
    "read_spectra",
    "sniff",
]

T = TypeVar("T")
Item = TypeVar("Item", Image, Spectrum)


def read_images(
    data: bytes,
    *,
    media_type: str | None = None,
    name: str | None = None,
    limits: ReaderLimits = DEFAULT_LIMITS,
    options: ImageOptions | None = None,
) -> list[Image]:
    """Every image in `data`: one for FITS and pictures, N for a 4-D array.

    Raises MediaTypeError (unknown or contradicted type), LimitError, InputError (`not_an_image` and the
    readers' codes).
    """
    return _guarded(lambda: _images(data, media_type, name, limits, options or ImageOptions()))


def read_spectra(
    data: bytes,
    *,
    media_type: str | None = None,
    name: str | None = None,
    limits: ReaderLimits = DEFAULT_LIMITS,
    options: SpectrumOptions | None = None,
) -> list[Spectrum]:
    """Every spectrum in `data`, in file order, each with its id where the file has one.

    Raises MediaTypeError (unknown or contradicted type), LimitError, InputError (`not_a_spectrum` and the
    readers' codes).
    """
    return _guarded(lambda: _spectra(data, media_type, name, limits, options or SpectrumOptions()))


def detect_modality(
    data: bytes,
    *,
    media_type: str | None = None,
    name: str | None = None,
    limits: ReaderLimits = DEFAULT_LIMITS,
) -> Modality:
    """Whether `data` holds images or spectra; refuses like the readers when it holds neither."""
    return _guarded(lambda: _modality(data, media_type, name, limits))


def _images(
    data: bytes, media_type: str | None, name: str | None, limits: ReaderLimits, options: ImageOptions
) -> list[Image]:
    fmt, content = plain_bytes(data, media_type, name, limits)
    if fmt == "fits":
        hdus = parse_fits(content, limits)
        return _noted(images_from_fits(hdus, options, limits), hdus)
    if fmt == "npy":
        return images_from_npy(content, options, limits)
    if fmt == "csv":
        raise refusal(
            "not_an_image",
            found="text",
            wanted="an image as FITS, PNG, JPEG or .npy",
            mend="Spectra as text go to the spectrum endpoint.",
        )
    return [image_from_picture(content, options, limits)]


def _spectra(
    data: bytes, media_type: str | None, name: str | None, limits: ReaderLimits, options: SpectrumOptions
) -> list[Spectrum]:
    fmt, content = plain_bytes(data, media_type, name, limits)
    if fmt == "fits":
        hdus = parse_fits(content, limits)
        return _noted(spectra_from_fits(hdus, options, limits), hdus)
    if fmt == "npy":
        return [spectrum_from_npy(content, options, limits)]
    if fmt == "csv":
        return [spectrum_from_text(content, options, limits)]
    raise refusal(
        "not_a_spectrum",
        found=f"a {fmt.upper()} picture",
        wanted="a spectrum as FITS, CSV or .npy",
        mend="Pictures go to the image endpoint.",
    )


def _modality(data: bytes, media_type: str | None, name: str | None, limits: ReaderLimits) -> Modality:
    fmt, content = plain_bytes(data, media_type, name, limits)
    if fmt == "fits":
        hdus = parse_fits(content, limits)
        if has_spectra(hdus):
            return "spectrum"
        if has_images(hdus):
            return "image"
        raise refusal(
            "unusable_input",
            found="a FITS file with neither an image nor a spectrum",
            wanted="one of them",
            mend="Images are (band, y, x); spectra are tables with columns wave and flux.",
        )
    if fmt == "npy":
        return "spectrum" if is_spectrum_shape(load_npy(content).shape) else "image"
    return "spectrum" if fmt == "csv" else "image"


def _noted(items: list[Item], hdus: Sequence[Hdu]) -> list[Item]:
    """`items` flagged with what astropy warned of in their file; it read the file all the same."""
    notes = hdus[0].notes
    if not notes:
        return items
    first = notes[0] if len(notes) == 1 else f"{notes[0]} (and {len(notes) - 1} more)"
    flag = Flag("nonstandard_fits", f"The file departs from the FITS standard: {first}")
    return [replace(item, quality=item.quality.with_flags(flag)) for item in items]


def _guarded(read: Callable[[], T]) -> T:
    """Run a reader; what a malformed file makes numpy or the parsers raise becomes an InputError."""
    try:
        return read()
    except AstroClipError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        ArithmeticError,
        struct.error,
        UnicodeError,
    ) as error:
        raise refusal(
            "damaged_file",
            found=f"content that does not parse ({type(error).__name__}: {str(error)[:120]})",
            wanted="a well-formed file",
            mend="Write it again with a standard tool; if it opens elsewhere, report it.",
        ) from error
