"""Units of spectra and images: what a header or a comment says, as a factor to the library's own units.

Wavelengths become vacuum Angstrom, flux densities 1e-17 erg/s/cm2/A, image pixels nanomaggies.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.io.refusal import refusal

__all__ = ["air_to_vacuum", "flux_to_flam", "guess_wave_unit", "image_factor", "wave_to_angstrom"]

FloatArray = npt.NDArray[np.float64]

LIGHT_ANGSTROM_S = 2.99792458e18
NANOMAGGY_JY = 3.631e-6  # AB zero point 3631 Jy (Oke & Gunn 1983, ApJ 266, 713)

_WAVE = {
    "angstrom": 1.0,
    "angstroms": 1.0,
    "ang": 1.0,
    "a": 1.0,
    "aa": 1.0,
    "å": 1.0,
    "0.1nm": 1.0,
    "nm": 10.0,
    "nanometer": 10.0,
    "nanometers": 10.0,
    "nanometre": 10.0,
    "nanometres": 10.0,
    "um": 1e4,
    "micron": 1e4,
    "microns": 1e4,
    "µm": 1e4,
    "μm": 1e4,
    "micrometer": 1e4,
    "m": 1e10,
    "cm": 1e8,
}
_LOG = re.compile(r"^(?:log(?:10)?|dex)\W*(?:lambda|wave|wavelength|angstroms?|ang|a|aa)?\W*$")
_NO_UNIT = {"", "none", "-", "unknown", "n/a"}


def wave_to_angstrom(wave: FloatArray, unit: str) -> FloatArray:
    """Wavelengths given in `unit` as Angstrom (still in their medium); InputError `unknown_unit`."""
    key = unit.strip().lower().replace(" ", "")
    if _LOG.match(key):
        with np.errstate(over="ignore"):
            return np.power(10.0, wave)
    if key not in _WAVE:
        raise refusal(
            "unknown_unit",
            found=f"the wavelength unit {unit!r}",
            wanted="Angstrom, nm, um, m or log10(Angstrom)",
            mend="Convert the column, or state its unit with `wave_unit`.",
            field="wave_unit",
        )
    return wave * _WAVE[key]


def is_wave_unit(text: str) -> bool:
    key = text.strip().lower().replace(" ", "")
    return key in _WAVE or bool(key and _LOG.match(key))


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
    scale, tokens = _parse_flux_unit(unit)
    per_angstrom = {
        frozenset({"erg", "s", "cm", "a"}): 1.0,
        frozenset({"erg", "s", "cm", "nm"}): 0.1,
        frozenset({"erg", "s", "cm", "um"}): 1e-4,
        frozenset({"w", "m", "a"}): 1e3,
        frozenset({"w", "m", "nm"}): 1e2,
        frozenset({"w", "m", "um"}): 0.1,
    }
    if tokens in per_angstrom:
        return np.full(wave.shape, scale * per_angstrom[tokens] / 1e-17)
    per_hertz = {  # in erg/s/cm2/Hz
        frozenset({"erg", "s", "cm", "hz"}): 1.0,
        frozenset({"w", "m", "hz"}): 1e3,
        frozenset({"jy"}): 1e-23,
        frozenset({"mjy"}): 1e-26,
        frozenset({"ujy"}): 1e-29,
        frozenset({"nmgy"}): NANOMAGGY_JY * 1e-23,
    }
    if tokens in per_hertz:
        return scale * per_hertz[tokens] * LIGHT_ANGSTROM_S / np.square(wave) / 1e-17
    if tokens & {"count", "counts", "adu", "electron", "electrons", "dn", "photon", "photons", "ct"}:
        raise refusal(
            "uncalibrated_flux",
            found=f"the flux unit {unit!r}",
            wanted="a flux density such as 1e-17 erg/s/cm2/A",
            mend="Flux-calibrate the spectrum, or state `flux_unit` when the header is wrong.",
            field="flux_unit",
        )
    raise _unknown_flux_unit(unit)


def _unknown_flux_unit(unit: str) -> InputError:
    return refusal(
        "unknown_unit",
        found=f"the flux unit {unit!r}",
        wanted="erg/s/cm2/A (with any power of ten), W/m2/um, or Jy",
        mend="Convert the column, or state its unit with `flux_unit`.",
        field="flux_unit",
    )


_NUMERAL = re.compile(
    r"^\W*?(\d+(?:\.\d+)?)(?:\s*(?:\*\*|\^)\s*\(?\s*([+-]?\d+)\s*\)?|[e]([+-]?\d+)|([+-]\d+))?(?![\d.])"
)
_ALIASES = {
    "ang": "a",
    "angstrom": "a",
    "angstroms": "a",
    "aa": "a",
    "å": "a",
    "sec": "s",
    "second": "s",
    "seconds": "s",
    "ergs": "erg",
    "cm2": "cm",
    "micron": "um",
    "microns": "um",
    "µm": "um",
    "μm": "um",
    "watt": "w",
    "hertz": "hz",
    "nanomaggy": "nmgy",
    "nanomaggies": "nmgy",
    "µjy": "ujy",
    "microjy": "ujy",
}


def _parse_flux_unit(unit: str) -> tuple[float, frozenset[str]]:
    """("1E-17 erg/cm^2/s/Ang") -> (1e-17, {"erg", "cm", "s", "a"}); exponents of units are taken as read."""
    text = unit.strip().lower()
    scale = 1.0
    match = _NUMERAL.match(text)
    if match:
        base, power, exponent, bare = match.groups()
        if power:
            scale = float(base) ** int(power)
        elif bare:  # "10-17 erg/..." as some catalogues print it
            scale = float(base) ** int(bare)
        else:
            scale = float(f"{base}e{exponent or 0}")
        text = text[match.end() :]
    words = re.findall(r"[a-zåµμ]+", text)
    return scale, frozenset(_ALIASES.get(w, w) for w in words)


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
    key = (unit or "").strip().lower()
    if re.match(r"^nano-?magg(y|ies)|^nmgy", key):
        return 1.0
    if key in ("maggy", "maggies"):
        return 1e9
    scales = {"jy": 1.0, "mjy": 1e-3, "ujy": 1e-6, "µjy": 1e-6, "njy": 1e-9}
    if (unit or "").strip() == "MJy" or "/sr" in key or "/arcsec" in key:
        key = "surface brightness"
    base = re.sub(r"\s*/\s*pix(el)?$", "", key)
    if base in scales:
        return scales[base] / NANOMAGGY_JY
    if base in (
        "",
        "adu",
        "counts",
        "count",
        "electron",
        "electrons",
        "e-",
        "adu/s",
        "counts/s",
        "e-/s",
        "dn",
    ):
        if zero_point is not None:
            return float(10.0 ** ((22.5 - zero_point) / 2.5))
        if is_silent(key):
            return None
    raise refusal(
        "unknown_unit",
        found=f"the pixel unit {unit!r}",
        wanted="nanomaggies (AB 22.5), Jy per pixel, or MAGZERO",
        mend="Convert the pixels to nanomaggies and set BUNIT = 'nanomaggy'.",
        field="BUNIT",
    )
