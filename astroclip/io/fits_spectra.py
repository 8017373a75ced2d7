"""Spectra in FITS: DESI coadd / spectra files, SDSS and BOSS spec files, generic tables, IRAF-style 1-D images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.io.columns import implied_unit, medium_of, role_of
from astroclip.io.fits import Hdu
from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import over_limit, refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Spectrum

__all__ = ["has_spectra", "spectra_from_fits"]

Array = npt.NDArray[Any]
DESI_ARMS = ("B", "R", "Z", "BRZ")  # BRZ: coadds whose arms were merged by the pipeline

# Fatal bits of the SDSS pixel mask (spPixmask, https://www.sdss.org/dr17/algorithms/bitmasks/#SPPIXMASK):
# FULLREJECT 18, NOSKY 22, BRIGHTSKY 23, NODATA 24, REDMONSTER 28. The others are advisory; ivar already reflects them.
SDSS_FATAL = sum(1 << bit for bit in (18, 22, 23, 24, 28))


def has_spectra(hdus: Sequence[Hdu]) -> bool:
    """True when some layout known here fits; used to tell spectra from images."""
    return _is_desi(hdus) or _is_sdss(hdus) or _table_hdu(hdus) is not None or _line_hdu(hdus) is not None


def spectra_from_fits(hdus: Sequence[Hdu], options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """Every spectrum of the file (or the one `options.target` names), in file order.

    Raises InputError (`not_a_spectrum`, and all of `assemble_spectrum`), LimitError (`too_many_targets`),
    """
    if _is_desi(hdus):
        return _living(_desi(hdus, options, limits), options)
    if _is_sdss(hdus):
        return [assemble_spectrum(_sdss(hdus), options, limits)]
    table = _table_hdu(hdus)
    if table is not None:
        return _living(_table(table, hdus[0], options, limits), options)
    line = _line_hdu(hdus)
    if line is not None:
        return [assemble_spectrum(_line(line), options, limits)]
    raise refusal(
        "not_a_spectrum",
        found="a FITS file with " + ", ".join(_describe(h) for h in hdus[:6]),
        wanted="a DESI or SDSS spectrum, or a table with columns wave (or loglam) and flux",
        mend="Name the columns wave, flux, ivar; images go to the image endpoint.",
    )


def _living(spectra: list[Spectrum], options: SpectrumOptions) -> list[Spectrum]:
    """Without the targets that hold no good sample (broken fibres), unless `options.keep_empty`."""
    dead = [s for s in spectra if s.mask.all()]
    if not dead or options.keep_empty:
        return spectra
    if len(dead) == len(spectra):
        raise refusal(
            "zero_ivar", found=f"{len(dead)} targets, none with a good sample", wanted="samples with ivar > 0",
            mend="Check the ivar and mask arrays: the fibres may be broken.", field="ivar",
        )  # fmt: skip
    ids = ", ".join(str(s.object_id) for s in dead[:5])
    note = Flag("targets_left_out", f"{len(dead)} of {len(spectra)} targets of the file hold no good sample: {ids}.")
    return [replace(s, quality=s.quality.with_flags(note)) for s in spectra if not s.mask.all()]


def _describe(hdu: Hdu) -> str:
    what = f"columns {', '.join(list(hdu.columns())[:6])}" if hdu.kind == "table" else f"shape {hdu.shape}"
    return f"{hdu.name or 'HDU ' + str(hdu.index)} ({what})"


# --- DESI -----------------------------------------------------------------------------------------------------------------


def _is_desi(hdus: Sequence[Hdu]) -> bool:
    names = {h.name for h in hdus}
    return any({f"{arm}_WAVELENGTH", f"{arm}_FLUX"} <= names for arm in DESI_ARMS)


def _desi(hdus: Sequence[Hdu], options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """Arms end to end, then one increasing grid: where arms overlap their grids agree (0.8 A), so pixels merge by ivar.

    Data model: https://desidatamodel.readthedocs.io (coadd, spectra). Wavelengths are vacuum Angstrom, fluxes in units of
    1e-17 erg/s/cm2/A.
    """
    by_name = {h.name: h for h in hdus}
    arms = [arm for arm in DESI_ARMS if f"{arm}_FLUX" in by_name and f"{arm}_WAVELENGTH" in by_name]
    wave = np.concatenate([by_name[f"{arm}_WAVELENGTH"].image().astype(np.float64) for arm in arms])
    planes = {arm: _desi_planes(by_name, arm) for arm in arms}
    shapes = {p.shape[0] for arm in arms for p in planes[arm]}
    if len(shapes) != 1:
        raise refusal(
            "length_mismatch", found=f"arms with {sorted(shapes)} rows", wanted="the same targets in every arm",
            mend="Write the file again with desispec.",
        )  # fmt: skip
    identities = _desi_identities(by_name.get("FIBERMAP"), shapes.pop())
    rows = select_rows([i["object_id"] for i in identities], options, limits)
    spectra = []
    for row in rows:
        flux, ivar, bad = (np.concatenate([planes[arm][k][row] for arm in arms]) for k in range(3))
        raw = RawSpectrum(
            wave=wave, flux=flux, ivar=ivar, bad=bad, wave_unit="Angstrom", flux_unit="1e-17 erg/s/cm2/A", medium="vacuum",
            sorted_by_format=True, allow_empty=len(rows) > 1, **identities[row],
        )  # fmt: skip
        spectra.append(assemble_spectrum(raw, options, limits))
    return spectra


def _desi_planes(by_name: dict[str, Hdu], arm: str) -> tuple[Array, Array, Array]:
    """(flux, ivar, mask), each (targets, wavelengths)."""
    flux = np.atleast_2d(by_name[f"{arm}_FLUX"].image())
    if f"{arm}_IVAR" not in by_name:
        raise refusal(
            "missing_hdu", found=f"a DESI file without {arm}_IVAR", wanted="WAVELENGTH, FLUX and IVAR for each arm",
            mend="Copy the arm's extensions together.",
        )  # fmt: skip
    ivar = np.atleast_2d(by_name[f"{arm}_IVAR"].image())
    mask = np.atleast_2d(by_name[f"{arm}_MASK"].image()) if f"{arm}_MASK" in by_name else np.zeros(flux.shape, "i4")
    if not flux.shape == ivar.shape == mask.shape or flux.ndim != 2 or by_name[f"{arm}_WAVELENGTH"].shape != flux.shape[1:]:
        raise refusal(
            "length_mismatch",
            found=f"{arm}_FLUX {flux.shape}, {arm}_IVAR {ivar.shape}, {arm}_MASK {mask.shape}, "
            f"{arm}_WAVELENGTH {by_name[f'{arm}_WAVELENGTH'].shape}",
            wanted="arrays of (targets, wavelengths)",
            mend="Write the file again with desispec.",
        )
    return flux, ivar, mask


def _desi_identities(fibermap: Hdu | None, count: int) -> list[dict[str, Any]]:
    """object_id, ra, dec, flags for each row; empty where the FIBERMAP is absent or of another length."""
    if fibermap is None or fibermap.kind != "table" or fibermap.shape[0] != count:
        return [{"object_id": None} for _ in range(count)]
    names = fibermap.columns()
    ids = fibermap.read("targetid") if "targetid" in names else None
    position = {
        key: fibermap.read(column) if (column := role_of(names, key)) else None for key in ("ra", "dec")
    }
    kinds = fibermap.read("objtype") if "objtype" in names else None
    identities: list[dict[str, Any]] = []
    for row in range(count):
        identity: dict[str, Any] = {"object_id": None if ids is None else str(int(ids[row]))}
        identity |= {key: _finite(v[row]) if v is not None else None for key, v in position.items()}
        if kinds is not None and str(kinds[row]).upper() == "SKY":
            identity["flags"] = (Flag("sky_fibre", "The fibre was placed on empty sky."),)
        identities.append(identity)
    return identities


def select_rows(ids: Sequence[str | None], options: SpectrumOptions, limits: ReaderLimits) -> list[int]:
    """Rows to read: all, or the one `options.target` names (an id first, an index from 0 second)."""
    target = options.target
    if target is not None:
        if str(target) in ids:
            return [ids.index(str(target))]
        if str(target).isdecimal() and int(target) < len(ids):
            return [int(target)]
        shown = ", ".join(str(i) for i in ids[:5])
        raise refusal(
            "no_such_target", found=f"no target {target!r} among {len(ids)} (first: {shown})",
            wanted=f"an id of the file or an index from 0 to {len(ids) - 1}", mend="List the ids with any FITS viewer.",
            field="target",
        )  # fmt: skip
    if len(ids) > limits.max_targets:
        raise over_limit(
            "too_many_targets", what="a file", found=len(ids), limit=limits.max_targets, unit="targets",
            mend="Name one with `target`, or run `astroclip embed` on the file.",
        )  # fmt: skip
    return list(range(len(ids)))


# --- SDSS / BOSS ----------------------------------------------------------------------------------------------------------


def _is_sdss(hdus: Sequence[Hdu]) -> bool:
    if len(hdus) < 2 or hdus[1].kind != "table":
        return False
    return {"flux", "loglam", "ivar", "and_mask"} <= set(hdus[1].columns())


def _sdss(hdus: Sequence[Hdu]) -> RawSpectrum:
    """spec-PLATE-MJD-FIBER files, full or lite (https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/spectra):
    HDU 1 the coadd (vacuum log10 wavelength), HDU 2 one row of catalogue, HDU 0 the plate's header."""
    coadd, primary = hdus[1], hdus[0].header
    loglam = coadd.read("loglam").astype(np.float64)
    snapped = np.round(loglam, 4)  # the pipeline's grid has steps of 1e-4; float32 blurs it by 0.002 A
    if np.allclose(loglam, snapped, rtol=0, atol=2e-6):
        loglam = snapped
    catalogue = _sdss_catalogue(hdus)
    plate, mjd, fiber = (
        catalogue.get(column, primary.get(key)) for column, key in (("plate", "PLATEID"), ("mjd", "MJD"), ("fiberid", "FIBERID"))
    )
    known = all(isinstance(v, (int, np.integer)) for v in (plate, mjd, fiber))
    return RawSpectrum(
        wave=loglam, flux=coadd.read("flux"), ivar=coadd.read("ivar"), bad=coadd.read("and_mask") & SDSS_FATAL,
        wave_unit="log10(Angstrom)", flux_unit="1e-17 erg/s/cm2/A",
        medium="air" if primary.get("VACUUM") is False else "vacuum",
        object_id=f"{plate}-{mjd}-{fiber}" if known else None,
        ra=_finite(catalogue.get("plug_ra", primary.get("PLUG_RA"))),
        dec=_finite(catalogue.get("plug_dec", primary.get("PLUG_DEC"))),
        redshift=_finite(catalogue.get("z")),
    )  # fmt: skip


def _sdss_catalogue(hdus: Sequence[Hdu]) -> dict[str, Any]:
    """The wanted cells of the first one-row table after the coadd."""
    for hdu in hdus[2:]:
        if hdu.kind == "table" and hdu.shape[0] == 1:
            columns = hdu.columns()
            wanted = [c for c in ("plate", "mjd", "fiberid", "plug_ra", "plug_dec", "z") if c in columns]
            return {c: hdu.read(c, row=0) for c in wanted if columns[c].repeat == 1}
    return {}


def _finite(value: Any) -> float | None:
    """`value` as a float, or None where it is absent, not a number, or not finite."""
    if value is None or isinstance(value, (str, bool)) or np.ndim(value) > 0 or not np.isfinite(value):
        return None
    return float(value)


# --- tables and 1-D images ------------------------------------------------------------------------------------------------


def _table_hdu(hdus: Sequence[Hdu]) -> Hdu | None:
    """The first table with a wavelength and a flux column."""
    for hdu in hdus:
        if hdu.kind == "table" and hdu.shape[0] > 0:
            names = hdu.columns()
            if role_of(names, "wave") and role_of(names, "flux"):
                return hdu
    return None


def _table(hdu: Hdu, primary: Hdu, options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """One spectrum down the rows, or one in each row's vectors (ESO, SPARCL)."""
    names = hdu.columns()
    roles = {role: role_of(names, role) for role in ("wave", "flux", "ivar", "error", "variance", "mask")}
    wave_name, flux_name = roles["wave"], roles["flux"]
    assert wave_name and flux_name  # _table_hdu found them
    columns = {role: hdu.read(name) for role, name in roles.items() if name}
    if any(c.dtype.kind not in "fiub" for c in columns.values()):
        raise refusal(
            "not_numeric", found="a wavelength, flux, noise or mask column of text", wanted="numeric columns",
            mend="Write the columns as numbers.",
        )  # fmt: skip
    vectors = columns["flux"].ndim == 2
    count = columns["flux"].shape[0] if vectors else 1
    ids = _table_ids(hdu, primary, count, vectors)
    rows = select_rows(ids, options, limits)
    shared: dict[str, Any] = {
        "wave_unit": _unit(hdu, wave_name) or implied_unit(wave_name),
        "flux_unit": _unit(hdu, flux_name) or _text(primary.header.get("BUNIT")),
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
            wave=pick["wave"], flux=pick["flux"], ivar=pick.get("ivar"), error=pick.get("error"), bad=pick.get("mask"),
            object_id=ids[row], **_table_position(hdu, primary, row, vectors), **shared,
        )  # fmt: skip
        spectra.append(assemble_spectrum(raw, options, limits))
    return spectra


def _unit(hdu: Hdu, column: str) -> str | None:
    return _text(hdu.header.get(f"TUNIT{hdu.columns()[column].number}"))


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _table_medium(hdu: Hdu, primary: Hdu, wave_name: str) -> Literal["air", "vacuum"] | None:
    for header in (hdu.header, primary.header):
        if isinstance(header.get("VACUUM"), bool):
            return "vacuum" if header["VACUUM"] else "air"
        stated = medium_of(_text(header.get("AIRORVAC")), _text(header.get("MEDIUM")), _text(header.get("WAVEMED")))
        if stated:
            return stated
    i = hdu.columns()[wave_name].number
    described = (hdu.header.get(f"TUCD{i}"), hdu.header.get(f"TCOMM{i}"), hdu.header.get(f"TUNIT{i}"))
    return medium_of(wave_name, *(_text(d) for d in described), hdu.comments, primary.comments)


def _table_ids(hdu: Hdu, primary: Hdu, count: int, vectors: bool) -> list[str | None]:
    name = role_of(hdu.columns(), "id")
    if vectors and name:
        values = hdu.read(name)
        if values.ndim == 1:
            return [str(v) for v in values]
    one = hdu.header.get("OBJECT", primary.header.get("OBJECT"))
    return [str(one) if one is not None and count == 1 else None] * count


def _table_position(hdu: Hdu, primary: Hdu, row: int, vectors: bool) -> dict[str, float | None]:
    """ra, dec, redshift from columns of the row, else (a single object) from the headers."""
    found: dict[str, float | None] = {}
    names = hdu.columns()
    single = not vectors or hdu.shape[0] == 1
    for key, keyword in (("ra", "RA"), ("dec", "DEC"), ("redshift", "Z")):
        column = role_of(names, key)
        if vectors and column and names[column].repeat == 1 and names[column].code in "EDIJK":
            found[key] = _finite(hdu.read(column, row=row))
        elif single:
            found[key] = _finite(hdu.header.get(keyword, primary.header.get(keyword)))
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
    start, step = (_finite(header.get(k)) for k in ("CRVAL1", "CDELT1" if "CDELT1" in header else "CD1_1"))
    reference = _finite(header.get("CRPIX1", 1.0))
    if start is None or step is None or reference is None:
        raise InputError(
            "Found a 1-D spectrum whose CRVAL1, CRPIX1 or CDELT1 is not a number; wanted a linear wavelength axis. "
            "Correct the header, or send a table.", code="bad_wavelength", field="CRVAL1",
        )  # fmt: skip
    axis = start + (np.arange(max(hdu.shape)) + 1 - reference) * step
    ctype = str(header.get("CTYPE1", "")).upper()
    logarithmic = header.get("DC-FLAG") == 1 or "LOG" in ctype
    medium: Literal["air", "vacuum"] | None = medium_of(ctype, _text(header.get("CUNIT1")), hdu.comments)
    if ctype.startswith("WAVE"):
        medium = "vacuum"
    if header.get("VACUUM") is True:
        medium = "vacuum"
    return RawSpectrum(
        wave=axis, flux=hdu.image().reshape(-1), wave_unit="log10(Angstrom)" if logarithmic else _text(header.get("CUNIT1")),
        flux_unit=_text(header.get("BUNIT")), medium=medium, object_id=_text(header.get("OBJECT")),
        ra=_finite(header.get("RA")), dec=_finite(header.get("DEC")),
    )  # fmt: skip
