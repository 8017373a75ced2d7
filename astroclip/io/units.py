"""Units of spectra and images: what a header or a comment says, as a factor to the library's own units.

Wavelengths become vacuum Angstrom, flux densities 1e-17 erg/s/cm2/A, image pixels nanomaggies. astropy.units
reads the expressions and converts; here are only the spellings it does not know. It is imported on use.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.io.refusal import refusal

if TYPE_CHECKING:
    from astropy.units import UnitBase

__all__ = ["air_to_vacuum", "flux_to_flam", "guess_wave_unit", "image_factor", "wave_to_angstrom"]

FloatArray = npt.NDArray[np.float64]

MAGGY_JY = 3631.0  # AB zero point (Oke & Gunn 1983, ApJ 266, 713)
MAX_UNIT_TEXT = 100  # characters; the longest unit of a FITS card has 68

# astropy's name and how else it is written, in lower case. "A" is Angstrom here, never ampere or year.
_NAMES = {
    "Angstrom": "a aa ang angstrom angstroms å",
    "nm": "nm nanometer nanometers nanometre nanometres",
    "um": "um µm μm micron microns micrometer micrometers micrometre micrometres",
    "cm": "cm",
    "s": "s sec second seconds",
    "erg": "erg ergs",
    "W": "w watt watts",
    "Hz": "hz hertz",
    "Jy": "jy jansky",
    "mJy": "mjy",
    "uJy": "ujy µjy μjy microjy",
    "nJy": "njy",
    "mgy": "mgy maggy maggies",
    "nmgy": "nmgy nanomaggy nanomaggies nmaggy nmaggies",
}
_SPELLINGS = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings.split()}
_WORD = re.compile(r"(?<=\d)[eE][+-]?\d+|[^\W\d_]+")  # the e of 1e-17 is no word of its own
_LONG_INTEGER = re.compile(r"(?<!^)(?<![\d.])\d{4,}(?![\d.])")  # m99999999: astropy would work the power out
_COUNTS = {"adu", "ct", "cts", "count", "counts", "dn", "e", "electron", "electrons", "photon", "photons"}
_LOG = re.compile(r"^(?:log(?:10)?|dex)\W*(?:lambda|wave|wavelength|angstroms?|ang|a|aa)?\W*$")
_NO_UNIT = {"", "none", "-", "unknown", "n/a"}


@lru_cache(maxsize=256)
def _parse(text: str) -> UnitBase | None:
    """The unit `text` means ("1E-17 erg/cm^2/s/Ang", "10^{-17} erg s-1 cm-2 \\AA-1"), or None."""
    from astropy import units

    if len(text) > MAX_UNIT_TEXT or _LONG_INTEGER.search(text.strip()):
        return None
    text = re.sub(r"[\\{}$]", "", text.strip()).replace("nano-", "nano")
    text = re.sub(r"^\(([^()]*)\)", r"\1 ", text)  # (10**-17) erg
    text = re.sub(r"^10(?:\*\*|\^)?\(([+-]?\d+)\)", r"10**\1 ", text)  # 10(-17) erg, 10**(-17)erg
    text = _WORD.sub(lambda m: m[0] if m[0] == "MJy" else _SPELLINGS.get(m[0].lower(), m[0]), text)
    if text.count("/") > 1 and "(" not in text:  # a/b/c is a/(b c); astropy reads it so too, with a warning
        head, *rest = text.split("/")
        text = f"{head}/({' '.join(rest)})"
    try:
        return units.Unit(text)
    except (ValueError, TypeError, ArithmeticError):
        return None


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def wave_to_angstrom(wave: FloatArray, unit: str) -> FloatArray:
    """Wavelengths given in `unit` as Angstrom (still in their medium); InputError `unknown_unit`."""
    key = unit.strip().lower().replace(" ", "")
    if _LOG.match(key):
        with np.errstate(over="ignore"):
            return np.power(10.0, wave)
    angstrom = _wave_scale(unit)
    if angstrom is None:
        raise refusal(
            "unknown_unit",
            found=f"the wavelength unit {unit!r}",
            wanted="Angstrom, nm, um, m or log10(Angstrom)",
            mend="Convert the column, or state its unit with `wave_unit`.",
            field="wave_unit",
        )
    return wave * angstrom


@lru_cache(maxsize=256)
def _wave_scale(text: str) -> float | None:
    """Angstrom in one unit of length `text`, or None; light of less than 1e-12 m or over 1 m is not meant."""
    from astropy import units

    unit = _parse(text)
    if unit is None or not unit.is_equivalent(units.AA):
        return None
    scale = float(unit.to(units.AA))
    return scale if 0.01 <= scale <= 1e10 * (1 + 1e-9) else None


def is_wave_unit(text: str) -> bool:
    key = text.strip().lower().replace(" ", "")
    return bool(key) and (bool(_LOG.match(key)) or _wave_scale(text) is not None)


def guess_wave_unit(wave: FloatArray) -> str:
    """Unit of optical wavelengths from their size alone; Angstrom where it is not plain.

    The windows (0.2-2.5 um, 200-2,500 nm, log10 of 1,600-30,000 A) do not overlap.
    """
    good = wave[np.isfinite(wave)]
    if good.size == 0:
        return "Angstrom"
    low, high = float(good.min()), float(good.max())
    if 3.2 < low and high < 4.5:
        return "log10(Angstrom)"
    if 0.2 < low and high < 2.5:
        return "um"
    if 200 < low and high < 2500 and high / low < 4:
        return "nm"
    return "Angstrom"


def flux_to_flam(flux: FloatArray, wave: FloatArray, unit: str) -> FloatArray:
    """Factor (same shape as `wave`) that turns `flux` in `unit` into 1e-17 erg/s/cm2/A; wave in Angstrom.

    Raises InputError (`unknown_unit`, `uncalibrated_flux`).
    """
    from astropy import units

    scale = _flam_scale(unit)
    if scale is not None:
        return np.full(wave.shape, scale)
    parsed = _parse(unit)
    scale = 1.0
    if parsed is not None and parsed.is_equivalent(units.mgy):
        scale, parsed = float(parsed.to(units.mgy)) * MAGGY_JY, units.Jy
    if parsed is not None and parsed.is_equivalent(units.Jy):
        flam = units.Unit(1e-17 * units.erg / units.s / units.cm**2 / units.AA)
        return parsed.to(flam, np.full(wave.shape, scale), equivalencies=units.spectral_density(wave * units.AA))
    if _words(unit) & _COUNTS:
        raise refusal(
            "uncalibrated_flux",
            found=f"the flux unit {unit!r}",
            wanted="a flux density such as 1e-17 erg/s/cm2/A",
            mend="Flux-calibrate the spectrum, or state `flux_unit` when the header is wrong.",
            field="flux_unit",
        )
    raise _unknown_flux_unit(unit)


@lru_cache(maxsize=256)
def _flam_scale(text: str) -> float | None:
    """1e-17 erg/s/cm2/A in one unit of flux per wavelength `text`, or None."""
    from astropy import units

    unit, flam = _parse(text), units.Unit(1e-17 * units.erg / units.s / units.cm**2 / units.AA)
    return float(unit.to(flam)) if unit is not None and unit.is_equivalent(flam) else None


def _unknown_flux_unit(unit: str) -> InputError:
    return refusal(
        "unknown_unit",
        found=f"the flux unit {unit!r}",
        wanted="erg/s/cm2/A (with any power of ten), W/m2/um, or Jy",
        mend="Convert the column, or state its unit with `flux_unit`.",
        field="flux_unit",
    )


def is_silent(unit: str | None) -> bool:
    return unit is None or unit.strip().lower() in _NO_UNIT


def air_to_vacuum(wave: FloatArray) -> FloatArray:
    """Vacuum wavelengths of air wavelengths (both Angstrom), unchanged below 2,000 A.

    Ciddor (1996, Appl. Opt. 35, 1566) dispersion in the form of Morton (2000, ApJS 130, 403, eq. 8), which
    gives vacuum to air; the inverse is iterated three times (converges to below 1e-9 relative).
    """
    vacuum = wave.copy()
    for _ in range(3):
        vacuum = wave * refractive_index(vacuum)
    return np.where(wave < 2000.0, wave, vacuum)


def refractive_index(vacuum: FloatArray) -> FloatArray:
    """n of standard air at the vacuum wavelength `vacuum` (Angstrom)."""
    s2 = np.square(1e4 / vacuum)
    return 1.0 + 5.792105e-2 / (238.0185 - s2) + 1.67917e-3 / (57.362 - s2)


def image_factor(unit: str | None, zero_point: float | None) -> float | None:
    """Factor from `unit` (BUNIT) to nanomaggies, or None where the unit says nothing; `zero_point` in AB
    mag of one count.

    Raises InputError (`unknown_unit`).
    """
    from astropy import units

    text = re.sub(r"\s*(/|per)\s*pix(els?)?$", "", (unit or "").strip(), flags=re.IGNORECASE)
    parsed = None if is_silent(text) else _parse(text)
    if parsed is not None and parsed.is_equivalent(units.mgy):
        return float(parsed.to(units.mgy)) * 1e9
    if parsed is not None and parsed.is_equivalent(units.Jy):
        return float(parsed.to(units.Jy)) / MAGGY_JY * 1e9
    if is_silent(text) or _words(text) - {"s"} <= _COUNTS:
        if zero_point is not None:
            return float(10.0 ** ((22.5 - zero_point) / 2.5))
        if is_silent(text):
            return None
    raise refusal(
        "unknown_unit",
        found=f"the pixel unit {unit!r}",
        wanted="nanomaggies (AB 22.5), Jy per pixel, or MAGZERO",
        mend="Convert the pixels to nanomaggies and set BUNIT = 'nanomaggy'.",
        field="BUNIT",
    )
