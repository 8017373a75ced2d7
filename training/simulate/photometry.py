"""Filter curves and AB photometry: nanomaggies from flux densities.

AB: f_nu = 3631 Jy, i.e. f_lambda = 0.10885 / lambda^2 erg/s/cm2/A; maggies are the photon-weighted ratio of the two
(Fukugita et al. 1996, eq. 7), zero point 22.5 mag = 1 nanomaggy. Curves come from `speclite` when the grid is built
and travel inside the grid file afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FILTERS", "SYSTEMS", "FilterCurve", "ab_magnitude", "band_weights", "load_curves"]

# DECam (south), BASS + MzLS (north), SDSS, WISE W1 for the LRG cuts, 2MASS Ks for the realism check.
SYSTEMS: dict[str, tuple[str, ...]] = {
    "south": ("decam2014-g", "decam2014-r", "decam2014-z"),
    "north": ("BASS-g", "BASS-r", "MzLS-z"),
    "sdss": ("sdss2010-u", "sdss2010-g", "sdss2010-r", "sdss2010-i", "sdss2010-z"),
    "wise": ("wise2010-W1",),
    "twomass": ("twomass-Ks",),
}
FILTERS: tuple[str, ...] = tuple(name for names in SYSTEMS.values() for name in names)

_AB_FLUX = 3.631e-20 * 2.99792458e18  # erg/s/cm2/A at 1 A; divide by lambda^2

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FilterCurve:
    """One response curve: wave (K,) Angstrom, vacuum; response (K,) per photon, any scale."""

    name: str
    wave: FloatArray
    response: FloatArray


def load_curves() -> list[FilterCurve]:
    """The curves of `FILTERS` from speclite."""
    import speclite.filters

    loaded = speclite.filters.load_filters(*FILTERS)
    return [FilterCurve(f.name, np.asarray(f.wavelength, float), np.asarray(f.response, float)) for f in loaded]


def band_weights(curves: list[FilterCurve], log_wave: FloatArray) -> FloatArray:
    """Weights (L, F) that turn flux densities in 1e-17 erg/s/cm2/A on a log-wavelength grid into nanomaggies.

    log_wave: ln(Angstrom), evenly spaced. The curve is averaged over each pixel, so that coarse grids stay exact for
    flat spectra; a curve that reaches beyond the grid is cut there.
    """
    step = log_wave[1] - log_wave[0]
    fine = (log_wave[:, None] + step * (np.arange(16) - 7.5) / 16.0).ravel()
    wave = np.exp(fine)
    weights = np.zeros((log_wave.size, len(curves)))
    for column, curve in enumerate(curves):
        response = np.interp(wave, curve.wave, curve.response, left=0.0, right=0.0)
        photons = (response * wave**2).reshape(-1, 16).mean(axis=1)  # lambda dlambda = lambda^2 dln(lambda)
        reference = _AB_FLUX * np.sum(response.reshape(-1, 16).mean(axis=1))
        weights[:, column] = photons / reference * 1e-17 * 1e9
    return weights


def ab_magnitude(nanomaggies: npt.ArrayLike, floor: float = 1e-4) -> FloatArray:
    """Plain AB (Pogson) magnitude, 22.5 - 2.5 log10 of flux in nanomaggies, with fluxes below `floor` set to it."""
    return np.asarray(22.5 - 2.5 * np.log10(np.maximum(np.asarray(nanomaggies, float), floor)))
