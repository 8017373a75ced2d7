"""Images in FITS: Legacy Surveys cutouts and their like, as one cube or one extension a band."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from astroclip.io.fits import Hdu
from astroclip.io.image import (
    DEFAULT_BANDS,
    LEGACY_SCALE_ARCSEC,
    RawImage,
    assemble_image,
    band_name,
    check_samples,
    check_size,
)
from astroclip.io.options import ImageOptions
from astroclip.io.refusal import refusal
from astroclip.io.units import image_factor
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Image

if TYPE_CHECKING:
    from astropy.wcs import WCS

__all__ = ["has_images", "images_from_fits"]

Array = npt.NDArray[Any]
Header = Mapping[str, Any]
_LEGACY = re.compile(r"^(decals|legacysurvey|mzls|bass|des\b|decaps|ls)", re.IGNORECASE)
_IVAR = re.compile(r"(invvar|ivar|weight|wht)", re.IGNORECASE)
_MASK = re.compile(r"(mask|dq|flag)", re.IGNORECASE)
_OTHER = re.compile(r"(psf|model|resid|blob|chi2|depth|nexp|sigma|error|unc)", re.IGNORECASE)
_WCS_TEXTS = ("CTYPE1", "CTYPE2", "CUNIT1", "CUNIT2")
_WCS_NUMBERS = tuple(
    f"{key}{axis}" for key in ("CRVAL", "CRPIX", "CDELT", "CROTA", "CD1_", "CD2_", "PC1_", "PC2_") for axis in (1, 2)
)
NATIVE_TOLERANCE = 0.005  # fractional; cutouts at 0.262 or 0.2624 are native


@dataclass(frozen=True)
class _Planes:
    """The planes of one HDU: role "image", "ivar" or "mask"."""

    role: str
    cube: Array
    bands: tuple[str, ...] | None
    header: Header


def has_images(hdus: Sequence[Hdu]) -> bool:
    return any(_is_picture(h) for h in hdus)


def images_from_fits(hdus: Sequence[Hdu], options: ImageOptions, limits: ReaderLimits) -> list[Image]:
    """The one image of the file.

    Raises InputError (`not_an_image`, `bad_axes`, `band_mismatch`, `unknown_bands`, `length_mismatch`, and
    all of `assemble_image`), LimitError.
    """
    pictures = [h for h in hdus if _is_picture(h)]
    if not pictures:
        raise refusal(
            "not_an_image",
            found=f"a FITS file of {len(hdus)} HDUs without a 2-D image",
            wanted="an image (band, y, x)",
            mend="Spectra go to the spectrum endpoint.",
        )
    check_samples(sum(prod(h.shape) for h in pictures), limits)
    planes = [_planes(h, limits) for h in pictures]
    images = [p for p in planes if p.role == "image"] or planes[:1]
    flags: list[Flag] = []
    cube, bands = _stack(images, options, flags)
    header: Header = ChainMap(images[0].header, hdus[0].header)  # type: ignore[arg-type]  # it is only read
    wcs = _sky(header)
    scale = _scale(header, wcs, options, flags)
    bad = _bad_pixels(planes, cube, bands)
    factor = _factor(header, scale, flags)
    ra, dec = _centre(header, wcs, cube.shape[1:])
    name = header.get("OBJECT")
    raw = RawImage(
        _times(cube, factor),
        bands,
        scale,
        bad,
        ra=ra,
        dec=dec,
        object_id=name.strip() if isinstance(name, str) and name.strip() else None,
        flags=tuple(flags),
    )
    return [assemble_image(raw, limits)]


def _times(cube: Array, factor: float) -> Array:
    """`cube` in nanomaggies; what overflows becomes infinite and is masked later."""
    with np.errstate(over="ignore", invalid="ignore"):
        return cube * np.float32(factor)


def _is_picture(hdu: Hdu) -> bool:
    """An image HDU with a plane: at least two axes longer than one (or any two axes of one pixel, to refuse
    by size)."""
    return hdu.kind == "image" and len(hdu.shape) >= 2


def _planes(hdu: Hdu, limits: ReaderLimits) -> _Planes:
    shape = hdu.shape
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) > 3:
        raise refusal(
            "bad_axes",
            found=f"an image of shape {hdu.shape}",
            wanted="(y, x) or (band, y, x)",
            mend="Send one image a file.",
        )
    if len(shape) == 2:
        shape = (1, *shape)
    check_size(shape, limits)
    label = f"{hdu.name} {hdu.header.get('IMAGETYP', '')}"
    role = (
        "ivar"
        if _IVAR.search(label)
        else "mask"
        if _MASK.search(label)
        else "other"
        if _OTHER.search(label)
        else "image"
    )
    return _Planes(role, hdu.image().reshape(shape), _stated_bands(hdu, shape[0]), hdu.header)


def _stated_bands(hdu: Hdu, planes: int) -> tuple[str, ...] | None:
    """Bands from BANDS, BAND0.., FILTER or EXTNAME; None where the header is silent.

    Raises InputError `band_mismatch` when BANDS and the number of planes disagree.
    """
    header = hdu.header
    stated = header.get("BANDS")
    if isinstance(stated, str) and stated.strip():
        names = re.split(r"[\s,]+", stated.strip()) if re.search(r"[\s,]", stated.strip()) else list(stated.strip())
        if len(names) != planes:
            raise refusal(
                "band_mismatch",
                found=f"{planes} planes, but BANDS = {stated.strip()!r}",
                wanted="one plane for each band",
                mend="Correct BANDS, or cut the planes that belong to it.",
                field="BANDS",
            )
        return tuple(band_name(n) or n.lower() for n in names)
    numbered = [header.get(f"BAND{i}") for i in range(planes)]
    named = [b.strip() for b in numbered if isinstance(b, str) and b.strip()]
    if len(named) == planes:
        return tuple(band_name(b) or b.lower() for b in named)
    if planes == 1:
        for key in ("BAND", "FILTER", "FILTER1", "EXTNAME"):
            if isinstance(header.get(key), str) and (band := band_name(_strip_role(header[key]))):
                return (band,)
    return None


def _strip_role(text: str) -> str:
    """("invvar_r", "MASK-G") -> ("r", "G")."""
    return re.sub(
        r"^(invvar|ivar|weight|wht|mask|maskbits|dq|allmask|anymask|image|flux)[-_ ]+",
        "",
        text.strip(),
        flags=re.IGNORECASE,
    )


def _stack(images: list[_Planes], options: ImageOptions, flags: list[Flag]) -> tuple[Array, tuple[str, ...]]:
    """One (B, H, W) cube from one HDU with several planes or several HDUs of one plane each."""
    if images[0].cube.shape[0] > 1:
        images = images[:1]
    else:
        images = [p for p in images if p.cube.shape[0] == 1]
        shapes = sorted({p.cube.shape[1:] for p in images})
        if len(shapes) > 1:
            raise refusal(
                "length_mismatch",
                found=f"planes of different sizes {shapes}",
                wanted="bands on one pixel grid",
                mend="Cut every band with the same centre, size and pixel scale.",
            )
    cube = np.concatenate([p.cube for p in images])
    if options.bands is not None:
        bands = options.bands
        if len(bands) != len(cube):
            raise refusal(
                "band_mismatch",
                found=f"{len(cube)} planes and {len(bands)} band names {','.join(bands)}",
                wanted="one name for each plane",
                mend="Correct the parameter `bands`.",
                field="bands",
            )
        return cube, bands
    stated = [p.bands for p in images]
    if all(b is not None for b in stated):
        bands = tuple(name for b in stated if b for name in b)
    elif len(cube) == len(DEFAULT_BANDS):
        bands = DEFAULT_BANDS
        flags.append(Flag("assumed_bands", "The file names no bands; g, r, z were assumed for its three planes."))
    else:
        raise refusal(
            "unknown_bands",
            found=f"{len(cube)} planes without band names",
            wanted="planes whose bands are known",
            mend="Write BANDS = 'grz' into the header, or state the parameter `bands`.",
            field="bands",
        )
    if len(set(bands)) < len(bands):
        raise refusal(
            "band_mismatch",
            found=f"repeated bands {','.join(bands)}",
            wanted="each band once",
            mend="Keep one image of the object.",
            field="bands",
        )
    return cube, bands


def _bad_pixels(planes: list[_Planes], cube: Array, bands: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Zero inverse variance, set mask bits, and exact zeros (coadds write 0.0 where no exposure reached)."""
    bad: npt.NDArray[np.bool_] = (cube == 0) if cube.dtype.kind == "f" else np.zeros(cube.shape, dtype=bool)
    if bad.all(axis=(1, 2)).any():
        bad = np.zeros(cube.shape, dtype=bool)  # a plane of zeros is refused as constant, which says more
    for p in planes:
        if p.role not in ("ivar", "mask") or p.cube.shape[1:] != cube.shape[1:]:
            continue
        marked = ~(p.cube > 0) if p.role == "ivar" else (p.cube != 0)
        if p.cube.shape[0] == cube.shape[0]:
            bad |= marked
        elif p.cube.shape[0] == 1 and p.bands and p.bands[0] in bands:
            bad[bands.index(p.bands[0])] |= marked[0]
        elif p.cube.shape[0] == 1 and p.bands is None:
            bad |= marked
    return bad


def _number(header: Header, key: str) -> float | None:
    value = header.get(key)
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value) else None
    )


def _scale(header: Header, wcs: WCS | None, options: ImageOptions, flags: list[Flag]) -> float:
    """Pixel side in arcsec: the option, CD, CDELT, PIXSCALE, else 0.262 with a flag."""
    if options.pixel_scale_arcsec is not None:
        return options.pixel_scale_arcsec
    if wcs is not None:
        from astropy.wcs.utils import proj_plane_pixel_area, proj_plane_pixel_scales

        sides, area = proj_plane_pixel_scales(wcs) * 3600.0, float(proj_plane_pixel_area(wcs)) * 3600.0**2
        if max(sides) > 1.02 * min(sides):
            flags.append(
                Flag(
                    "non_square_pixels",
                    f"Pixels of {sides[0]:.3f} x {sides[1]:.3f} arcsec were taken as square.",
                )
            )
        return float(np.sqrt(area))
    for key in ("PIXSCALE", "PIXSCAL1", "SECPIX"):
        value = _number(header, key)
        if value:
            return value
    flags.append(
        Flag("assumed_pixel_scale", f"The file gives no pixel scale; {LEGACY_SCALE_ARCSEC} arcsec was assumed.")
    )
    return LEGACY_SCALE_ARCSEC


def _sky(header: Header) -> WCS | None:
    """The celestial WCS of the image plane, or None without one; without CTYPE, TAN is meant.

    Only the plain cards of the plane reach wcslib: no distortions, tables or further axes of strangers' files.
    """
    from astropy.io import fits
    from astropy.wcs import WCS

    cards: dict[str, Any] = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"}
    for key in _WCS_TEXTS:
        if isinstance(value := header.get(key), str) and value.isascii():
            cards[key] = value.strip().upper().removesuffix("-SIP") if key.startswith("CTYPE") else value
    if "CUNIT1" in cards:
        cards.setdefault("CUNIT2", cards["CUNIT1"])
    cards |= {key: value for key in _WCS_NUMBERS if (value := _number(header, key)) is not None}
    if not ({"CDELT1", "CDELT2"} <= cards.keys() or any(key.startswith(("CD1_", "CD2_")) for key in cards)):
        return None
    try:
        wcs = _plain_wcs(cards) or WCS(fits.Header(cards), naxis=2, fix=False)
        with np.errstate(over="ignore", invalid="ignore"):
            area = abs(np.linalg.det(wcs.pixel_scale_matrix)) if wcs.has_celestial else 0.0
    except (ValueError, MemoryError, ArithmeticError):  # every error of wcslib is a ValueError
        return None
    return wcs if area > 0 and np.isfinite(area) else None


def _plain_wcs(cards: dict[str, Any]) -> WCS | None:
    """The WCS of a CD matrix in degrees set number by number, as cutouts have it; None with any other cards.

    The same to twelve digits as through a header, which astropy writes and reads again (0.5 ms).
    """
    from astropy.wcs import WCS

    wanted = {f"{key}{axis}" for key in ("CTYPE", "CRVAL", "CRPIX", "CD1_", "CD2_") for axis in (1, 2)}
    if cards.keys() != wanted:
        return None
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = [cards["CTYPE1"], cards["CTYPE2"]]
    wcs.wcs.crval = [cards["CRVAL1"], cards["CRVAL2"]]
    wcs.wcs.crpix = [cards["CRPIX1"], cards["CRPIX2"]]
    wcs.wcs.cd = [[cards["CD1_1"], cards["CD1_2"]], [cards["CD2_1"], cards["CD2_2"]]]
    wcs.wcs.set()
    return wcs


def _factor(header: Header, scale: float, flags: list[Flag]) -> float:
    """Factor from stored values to nanomaggies per pixel of this image.

    Cutouts of the Legacy Surveys viewer that are resampled keep the values of the native 0.262" pixels,
    i.e. surface brightness, not flux per pixel: a galaxy cut at 0.1" and at 0.262" shows one mean value per
    pixel (0.3475 and 0.3496 within 5" in g, DR3 and DR5). They are brought to flux per pixel by the ratio
    of pixel areas.
    """
    survey = str(header.get("SURVEY", ""))
    zero_point = next((z for key in ("MAGZERO", "MAGZP", "MAGZPT") if (z := _number(header, key)) is not None), None)
    unit = header.get("BUNIT")
    legacy = bool(_LEGACY.match(survey.strip()))
    factor = image_factor(unit if isinstance(unit, str) else None, zero_point)
    if factor is None:
        factor = 1.0
        if not legacy:
            flags.append(Flag("assumed_flux_unit", "The file states no unit; nanomaggies per pixel were assumed."))
    if legacy and abs(scale / LEGACY_SCALE_ARCSEC - 1) > NATIVE_TOLERANCE:
        factor *= (scale / LEGACY_SCALE_ARCSEC) ** 2
        flags.append(
            Flag(
                "resampled_cutout",
                f"A viewer cutout at {scale:.3f} arcsec keeps the values of {LEGACY_SCALE_ARCSEC} arcsec; "
                "it was converted to flux per pixel.",
            )
        )
    return factor


def _centre(header: Header, wcs: WCS | None, shape: tuple[int, ...]) -> tuple[float | None, float | None]:
    """(ra, dec) of the middle of the image, deg; (None, None) without an equatorial WCS."""
    stated = all(_number(header, key) is not None for key in ("CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2"))
    if wcs is None or not stated or not str(header.get("CTYPE1", "")).upper().startswith("RA"):
        return None, None
    ra, dec = wcs.wcs_pix2world((shape[1] - 1) / 2, (shape[0] - 1) / 2, 0)
    return (float(ra % 360), float(dec)) if np.isfinite(ra) and np.isfinite(dec) else (None, None)
