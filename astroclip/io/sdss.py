"""SDSS and BOSS spec-PLATE-MJD-FIBER files, full and lite.

Data model: https://data.sdss.org/datamodel/files/BOSS_SPECTRO_REDUX/RUN2D/spectra. HDU 1 is the coadd
            (log10 of the
vacuum wavelength), HDU 2 one row of catalogue, HDU 0 the plate's header; the single exposures of full files
are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from astroclip.io.fits import Hdu
from astroclip.io.spectrum import RawSpectrum
from astroclip.io.targets import finite_or_none

__all__ = ["is_sdss", "sdss_spectrum"]

# Fatal bits of the SDSS pixel mask (spPixmask, https://www.sdss.org/dr17/algorithms/bitmasks/#SPPIXMASK):
# FULLREJECT 18, NOSKY 22, BRIGHTSKY 23, NODATA 24, REDMONSTER 28. The others are advisory; ivar already
# reflects them.
FATAL = sum(1 << bit for bit in (18, 22, 23, 24, 28))


def is_sdss(hdus: Sequence[Hdu]) -> bool:
    if len(hdus) < 2 or hdus[1].kind != "table":
        return False
    return {"flux", "loglam", "ivar", "and_mask"} <= set(hdus[1].columns)


def sdss_spectrum(hdus: Sequence[Hdu]) -> RawSpectrum:
    """The coadd as raw columns; object_id is plate-mjd-fiber."""
    coadd, primary = hdus[1], hdus[0].header
    loglam = coadd.read("loglam").astype(np.float64)
    snapped = np.round(loglam, 4)  # the pipeline's grid has steps of 1e-4; float32 blurs it by 0.002 A
    if np.allclose(loglam, snapped, rtol=0, atol=2e-6):
        loglam = snapped
    catalogue = _catalogue(hdus)
    plate, mjd, fiber = (
        catalogue.get(column, primary.get(key))
        for column, key in (("plate", "PLATEID"), ("mjd", "MJD"), ("fiberid", "FIBERID"))
    )
    known = all(isinstance(v, (int, np.integer)) for v in (plate, mjd, fiber))
    return RawSpectrum(
        wave=loglam,
        flux=coadd.read("flux"),
        ivar=coadd.read("ivar"),
        bad=coadd.read("and_mask") & FATAL,
        wave_unit="log10(Angstrom)",
        flux_unit="1e-17 erg/s/cm2/A",
        medium="air" if primary.get("VACUUM") is False else "vacuum",
        object_id=f"{plate}-{mjd}-{fiber}" if known else None,
        ra=finite_or_none(catalogue.get("plug_ra", primary.get("PLUG_RA"))),
        dec=finite_or_none(catalogue.get("plug_dec", primary.get("PLUG_DEC"))),
        redshift=finite_or_none(catalogue.get("z")),
    )


def _catalogue(hdus: Sequence[Hdu]) -> dict[str, Any]:
    """The wanted cells of the first one-row table after the coadd."""
    for hdu in hdus[2:]:
        if hdu.kind == "table" and hdu.shape[0] == 1:
            columns = hdu.columns
            wanted = [c for c in ("plate", "mjd", "fiberid", "plug_ra", "plug_dec", "z") if c in columns]
            return {c: hdu.read(c, row=0) for c in wanted}
    return {}
