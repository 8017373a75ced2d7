"""DESI coadd and spectra files: three arms a target, merged onto one increasing grid.

Data model: https://desidatamodel.readthedocs.io (coadd, spectra). Extensions <ARM>_WAVELENGTH (vacuum
            Angstrom),
_FLUX and _IVAR (1e-17 erg/s/cm2/A) and _MASK (0 is good), one row a target, for the arms B, R and Z;
FIBERMAP names the targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.io.columns import role_of
from astroclip.io.fits import Hdu
from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum, check_length
from astroclip.io.targets import check_samples, finite_or_none, select_rows
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Spectrum

__all__ = ["desi_spectra", "is_desi"]

Array = npt.NDArray[Any]
ARMS = ("B", "R", "Z", "BRZ")  # BRZ: coadds whose arms were merged by the pipeline


def is_desi(hdus: Sequence[Hdu]) -> bool:
    names = {h.name for h in hdus}
    return any({f"{arm}_WAVELENGTH", f"{arm}_FLUX"} <= names for arm in ARMS)


def desi_spectra(hdus: Sequence[Hdu], options: SpectrumOptions, limits: ReaderLimits) -> list[Spectrum]:
    """Every wanted target: its arms laid end to end; where they overlap, their 0.8 A grids agree."""
    by_name = {h.name: h for h in hdus}
    arms = [arm for arm in ARMS if f"{arm}_FLUX" in by_name and f"{arm}_WAVELENGTH" in by_name]
    check_length(sum(math.prod(by_name[f"{arm}_WAVELENGTH"].shape) for arm in arms), limits)  # before reading them
    wave = np.concatenate([by_name[f"{arm}_WAVELENGTH"].image().astype(np.float64) for arm in arms])
    planes = {arm: _desi_planes(by_name, arm) for arm in arms}
    shapes = {p.shape[0] for arm in arms for p in planes[arm]}
    if len(shapes) != 1:
        raise refusal(
            "length_mismatch",
            found=f"arms with {sorted(shapes)} rows",
            wanted="the same targets in every arm",
            mend="Write the file again with desispec.",
        )
    identities = _desi_identities(by_name.get("FIBERMAP"), shapes.pop())
    rows = select_rows([i["object_id"] for i in identities], options, limits)
    check_samples(len(rows) * wave.size, limits)
    spectra = []
    for row in rows:
        flux, ivar, bad = (np.concatenate([planes[arm][k][row] for arm in arms]) for k in range(3))
        raw = RawSpectrum(
            wave=wave,
            flux=flux,
            ivar=ivar,
            bad=bad,
            wave_unit="Angstrom",
            flux_unit="1e-17 erg/s/cm2/A",
            medium="vacuum",
            sorted_by_format=True,
            allow_empty=len(rows) > 1,
            **identities[row],
        )
        spectra.append(assemble_spectrum(raw, options, limits))
    return spectra


def _desi_planes(by_name: dict[str, Hdu], arm: str) -> tuple[Array, Array, Array]:
    """(flux, ivar, mask), each (targets, wavelengths)."""
    flux = np.atleast_2d(by_name[f"{arm}_FLUX"].image())
    if f"{arm}_IVAR" not in by_name:
        raise refusal(
            "missing_hdu",
            found=f"a DESI file without {arm}_IVAR",
            wanted="WAVELENGTH, FLUX and IVAR for each arm",
            mend="Copy the arm's extensions together.",
        )
    ivar = np.atleast_2d(by_name[f"{arm}_IVAR"].image())
    mask = np.atleast_2d(by_name[f"{arm}_MASK"].image()) if f"{arm}_MASK" in by_name else np.zeros(flux.shape, "i4")
    if (
        not flux.shape == ivar.shape == mask.shape
        or flux.ndim != 2
        or by_name[f"{arm}_WAVELENGTH"].shape != flux.shape[1:]
    ):
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
    names = fibermap.columns
    ids = fibermap.read("targetid") if "targetid" in names else None
    position = {key: fibermap.read(column) if (column := role_of(names, key)) else None for key in ("ra", "dec")}
    kinds = fibermap.read("objtype") if "objtype" in names else None
    identities: list[dict[str, Any]] = []
    for row in range(count):
        identity: dict[str, Any] = {"object_id": None if ids is None else str(int(ids[row]))}
        identity |= {key: finite_or_none(v[row]) if v is not None else None for key, v in position.items()}
        if kinds is not None and str(kinds[row]).upper() == "SKY":
            identity["flags"] = (Flag("sky_fibre", "The fibre was placed on empty sky."),)
        identities.append(identity)
    return identities
