"""Spectra in FITS: which layout a file has, and the generic ones (tables, IRAF-style 1-D images)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from astroclip.io.columns import implied_unit, medium_of, role_of
from astroclip.io.desi import desi_spectra, is_desi
from astroclip.io.fits import Hdu
from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import refusal
from astroclip.io.sdss import is_sdss, sdss_spectrum
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum, check_length
from astroclip.io.targets import check_samples, finite_or_none, select_rows, text_or_none, without_empty
from astroclip.limits import ReaderLimits
from astroclip.types import Spectrum

__all__ = ["has_spectra", "spectra_from_fits"]


def has_spectra(hdus: Sequence[Hdu]) -> bool:
    """True when some layout known here fits; used to tell spectra from images."""
    return is_desi(hdus) or is_sdss(hdus) or _table_hdu(hdus) is not None or _line_hdu(hdus) is not None


def spectra_from_fits(hdus: Sequence[Hdu], options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """Every spectrum of the file (or the one `options.target` names), in file order.

    Raises InputError (`not_a_spectrum`, and all of `assemble_spectrum`), LimitError (`too_many_targets`).
    """
    if is_desi(hdus):
        return without_empty(desi_spectra(hdus, options, limits), options)
    if is_sdss(hdus):
        return [assemble_spectrum(sdss_spectrum(hdus), options, limits)]
    table = _table_hdu(hdus)
    if table is not None:
        return without_empty(_table(table, hdus[0], options, limits), options)
    line = _line_hdu(hdus)
    if line is not None:
        check_length(max(line.shape), limits)  # before its axis is laid out
        return [assemble_spectrum(_line(line), options, limits)]
    raise refusal(
        "not_a_spectrum",
        found="a FITS file with " + ", ".join(_describe(h) for h in hdus[:6]),
        wanted="a DESI or SDSS spectrum, or a table with columns wave (or loglam) and flux",
        mend="Name the columns wave, flux, ivar; images go to the image endpoint.",
    )


def _describe(hdu: Hdu) -> str:
    what = f"columns {', '.join(list(hdu.columns)[:6])}" if hdu.kind == "table" else f"shape {hdu.shape}"
    return f"{hdu.name or 'HDU ' + str(hdu.index)} ({what})"


def _table_hdu(hdus: Sequence[Hdu]) -> Hdu | None:
    """The first table with a wavelength and a flux column."""
    for hdu in hdus:
        if hdu.kind == "table" and hdu.shape[0] > 0:
            names = hdu.columns
            if role_of(names, "wave") and role_of(names, "flux"):
                return hdu
    return None


def _table(hdu: Hdu, primary: Hdu, options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """One spectrum down the rows, or one in each row's vectors (ESO, SPARCL)."""
    names = hdu.columns
    roles = {role: role_of(names, role) for role in ("wave", "flux", "ivar", "error", "variance", "mask")}
    wave_name, flux_name = roles["wave"], roles["flux"]
    assert wave_name and flux_name  # _table_hdu found them
    check_length(hdu.shape[0], limits, "rows")  # a row is a sample or an object; either way before it is read
    columns = {role: hdu.read(name) for role, name in roles.items() if name}
    if any(c.dtype.kind not in "fiub" for c in columns.values()):
        raise refusal(
            "not_numeric",
            found="a wavelength, flux, noise or mask column of text",
            wanted="numeric columns",
            mend="Write the columns as numbers.",
        )
    vectors = columns["flux"].ndim == 2
    count = columns["flux"].shape[0] if vectors else 1
    ids = _table_ids(hdu, primary, count, vectors)
    rows = select_rows(ids, options, limits)
    check_samples(len(rows) * columns["flux"].shape[-1], limits)
    shared: dict[str, Any] = {
        "wave_unit": _unit(hdu, wave_name) or implied_unit(wave_name),
        "flux_unit": _unit(hdu, flux_name) or text_or_none(primary.header.get("BUNIT")),
        "medium": _table_medium(hdu, primary, wave_name),
        "allow_empty": len(rows) > 1,
    }
    spectra = []
    for row in rows:
        pick = {role: c[row] if c.ndim == 2 else c for role, c in columns.items()}
        variance = pick.pop("variance", None)
        if variance is not None and "ivar" not in pick and "error" not in pick:
            with np.errstate(invalid="ignore"):
                pick["error"] = np.sqrt(variance)
        raw = RawSpectrum(
            wave=pick["wave"],
            flux=pick["flux"],
            ivar=pick.get("ivar"),
            error=pick.get("error"),
            bad=pick.get("mask"),
            object_id=ids[row],
            **_table_position(hdu, primary, row, vectors),
            **shared,
        )
        spectra.append(assemble_spectrum(raw, options, limits))
    return spectra


def _unit(hdu: Hdu, column: str) -> str | None:
    return text_or_none(hdu.header.get(f"TUNIT{hdu.columns[column]}"))


def _table_medium(hdu: Hdu, primary: Hdu, wave_name: str) -> Literal["air", "vacuum"] | None:
    for header in (hdu.header, primary.header):
        if isinstance(header.get("VACUUM"), bool):
            return "vacuum" if header["VACUUM"] else "air"
        stated = medium_of(
            text_or_none(header.get("AIRORVAC")),
            text_or_none(header.get("MEDIUM")),
            text_or_none(header.get("WAVEMED")),
        )
        if stated:
            return stated
    i = hdu.columns[wave_name]
    described = (hdu.header.get(f"TUCD{i}"), hdu.header.get(f"TCOMM{i}"), hdu.header.get(f"TUNIT{i}"))
    return medium_of(wave_name, *(text_or_none(d) for d in described), hdu.header.comments, primary.header.comments)


def _table_ids(hdu: Hdu, primary: Hdu, count: int, vectors: bool) -> list[str | None]:
    name = role_of(hdu.columns, "id")
    if vectors and name:
        values = hdu.read(name)
        if values.ndim == 1:
            return [str(v) for v in values]
    one = hdu.header.get("OBJECT", primary.header.get("OBJECT"))
    return [str(one) if one is not None and count == 1 else None] * count


def _table_position(hdu: Hdu, primary: Hdu, row: int, vectors: bool) -> dict[str, Any]:
    """ra, dec, redshift from columns of the row, else (a single object) from the headers."""
    found: dict[str, Any] = {}
    names = hdu.columns
    single = not vectors or hdu.shape[0] == 1
    for key, keyword in (("ra", "RA"), ("dec", "DEC"), ("redshift", "Z")):
        column = role_of(names, key)
        if vectors and column:
            found[key] = finite_or_none(hdu.read(column, row=row))
        elif single:
            found[key] = finite_or_none(hdu.header.get(keyword, primary.header.get(keyword)))
    return found


def _line_hdu(hdus: Sequence[Hdu]) -> Hdu | None:
    """A 1-D image with a linear or logarithmic wavelength axis."""
    for hdu in hdus:
        if hdu.kind == "image" and hdu.shape and max(hdu.shape) == np.prod(hdu.shape) and "CRVAL1" in hdu.header:
            if hdu.header.get("CDELT1", hdu.header.get("CD1_1")) is not None and max(hdu.shape) > 1:
                return hdu
    return None


def _line(hdu: Hdu) -> RawSpectrum:
    """WCS of one axis: wave = CRVAL1 + (i + 1 - CRPIX1) CDELT1, log10 where DC-FLAG is 1 or CTYPE1 says so;
    CTYPE1 AWAV is air (Greisen et al. 2006, A&A 446, 747)."""
    header = hdu.header
    start, step = (finite_or_none(header.get(k)) for k in ("CRVAL1", "CDELT1" if "CDELT1" in header else "CD1_1"))
    reference = finite_or_none(header.get("CRPIX1", 1.0))
    if start is None or step is None or reference is None:
        raise refusal(
            "bad_wavelength",
            found="a 1-D spectrum whose CRVAL1, CRPIX1 or CDELT1 is not a number",
            wanted="a linear wavelength axis",
            mend="Correct the header, or send a table.",
            field="CRVAL1",
        )
    axis = start + (np.arange(max(hdu.shape)) + 1 - reference) * step
    ctype = str(header.get("CTYPE1", "")).upper()
    logarithmic = header.get("DC-FLAG") == 1 or "LOG" in ctype
    medium: Literal["air", "vacuum"] | None = medium_of(ctype, text_or_none(header.get("CUNIT1")), header.comments)
    if ctype.startswith("WAVE"):
        medium = "vacuum"
    if header.get("VACUUM") is True:
        medium = "vacuum"
    return RawSpectrum(
        wave=axis,
        flux=hdu.image().reshape(-1),
        wave_unit="log10(Angstrom)" if logarithmic else text_or_none(header.get("CUNIT1")),
        flux_unit=text_or_none(header.get("BUNIT")),
        medium=medium,
        object_id=text_or_none(header.get("OBJECT")),
        ra=finite_or_none(header.get("RA")),
        dec=finite_or_none(header.get("DEC")),
    )
