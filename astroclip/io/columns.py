"""Names under which tables carry wavelength, flux, noise and mask, in FITS and in text alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from astroclip.io.units import is_wave_unit

__all__ = ["ROLES", "medium_of", "role_of", "split_unit"]

# Roles in order of preference; the first name present wins.
ROLES: dict[str, tuple[str, ...]] = {
    "wave": (
        "wave",
        "wavelength",
        "lambda",
        "lam",
        "wavelengths",
        "wl",
        "wave_vac",
        "vac_wave",
        "wavelength_vac",
        "vacuum_wavelength",
        "wave_air",
        "air_wave",
        "airwave",
        "wavelength_air",
        "air_wavelength",
        "spectral_axis",
        "angstrom",
        "loglam",
        "log_wave",
        "loglambda",
        "log_lambda",
        "logwave",
        "spectrum_lambda",
    ),
    "flux": (
        "flux",
        "flam",
        "f_lambda",
        "flux_density",
        "fluxes",
        "spec",
        "spectrum",
        "fnu",
        "intensity",
        "spectrum_flux",
    ),
    "ivar": ("ivar", "invvar", "inverse_variance", "flux_ivar", "inv_var", "spectrum_ivar"),
    "error": (
        "error",
        "err",
        "errors",
        "sigma",
        "flux_err",
        "flux_error",
        "e_flux",
        "noise",
        "std",
        "uncertainty",
        "unc",
        "fluxerr",
        "err_flux",
        "dflux",
    ),
    "variance": ("variance", "var", "flux_var"),
    "mask": (
        "mask",
        "and_mask",
        "qual",
        "quality",
        "bad",
        "flag",
        "flags",
        "dq",
        "bpm",
        "badpix",
        "spectrum_mask",
    ),
    "id": ("targetid", "object_id", "objid", "specobjid", "id", "name", "sparcl_id"),
    "ra": ("ra", "target_ra", "plug_ra", "raj2000"),
    "dec": ("dec", "target_dec", "plug_dec", "dej2000"),
    "redshift": ("z", "redshift", "z_spec", "zspec"),
}


def role_of(names: Iterable[str], role: str) -> str | None:
    """The column (lower case) of `names` that plays `role`, or None."""
    present = set(names)
    return next((name for name in ROLES[role] if name in present), None)


_BRACKETS = re.compile(r"^(.*?)\s*[\[(](.+)[\])]\s*$")
_SUFFIX = re.compile(r"^(wave|wavelength|lambda|lam)[_ ](nm|um|micron|angstroms?|aa|a|m)$")


def split_unit(name: str) -> tuple[str, str | None]:
    """("Wavelength [nm]") -> ("wavelength", "nm"); ("wave_um") -> ("wave", "um"); lower-case name, unit as
    written."""
    match = _BRACKETS.match(name.strip())
    if match:
        return match[1].strip().lower().replace(" ", "_"), match[2].strip()
    bare = name.strip().lower()
    match = _SUFFIX.match(bare)
    if match and is_wave_unit(match[2]):
        return match[1], match[2]
    return bare.replace(" ", "_"), None


def implied_unit(name: str) -> str | None:
    """Unit a column's own name settles: loglam is log10(Angstrom)."""
    if name.startswith("log"):
        return "log10(Angstrom)"
    return "Angstrom" if name == "angstrom" else None


_AIR = re.compile(r"\bair\b|obs\.atmos|\bawav\b|wave(length)?s?_air|air_?wave", re.IGNORECASE)
_VACUUM = re.compile(r"\bvac(uum)?\b|wave(length)?s?_vac|vac(uum)?_?wave", re.IGNORECASE)


def medium_of(*texts: str | None) -> Literal["air", "vacuum"] | None:
    """ "air" or "vacuum" when the texts (column name, unit, UCD, comments) mention exactly one of them."""
    joined = " ".join(t for t in texts if t)
    air, vacuum = bool(_AIR.search(joined)), bool(_VACUUM.search(joined))
    if air == vacuum:
        return None
    return "air" if air else "vacuum"
