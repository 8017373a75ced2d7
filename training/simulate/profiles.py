"""Light profiles as GalSim objects (Rowe et al. 2015, Astronomy and Computing 10, 121), shared by images and fibres.

Angles in degrees, north through east, on a sky with x to the right (west) and y up (north); radii in arcsec along the
major axis; every profile has unit flux. Sersic indices are rounded to 0.5 so that GalSim's tables are made once a
process. Sersic profiles end at 8 half-light radii, about where the de Vaucouleurs models of SDSS and the Tractor do
(after Hogg & Lang 2013, PASP 125, 719).
"""

from __future__ import annotations

from functools import lru_cache

import galsim
import numpy as np
import numpy.typing as npt

__all__ = ["PARAMETERS", "fibre_flux", "moffat", "noise_equivalent_area", "points", "sersic"]

FloatArray = npt.NDArray[np.float64]

# Accuracy that noise hides: about 1 % of the light folded, tables to 1e-4.
PARAMETERS = galsim.GSParams(
    folding_threshold=1e-2, maxk_threshold=2e-3, kvalue_accuracy=1e-4, table_spacing=2.0, maximum_fft_size=8192
)
_TRUNCATION = 8.0  # half-light radii
_FIBRE_SAMPLING = 0.2  # arcsec; sets the transform's grid only, the aperture is a profile itself


@lru_cache(maxsize=32)
def _unit_sersic(index: float) -> galsim.GSObject:
    return galsim.Sersic(n=index, half_light_radius=1.0, trunc=_TRUNCATION, gsparams=PARAMETERS)


def _ellipse(round_profile: galsim.GSObject, axis_ratio: float, pa_deg: float) -> galsim.GSObject:
    """Squeezed at constant area, the major axis along the position angle."""
    if axis_ratio >= 1.0:
        return round_profile
    return round_profile.shear(q=axis_ratio, beta=(90.0 + pa_deg) * galsim.degrees)


def sersic(index: float, half_light_radius: float, axis_ratio: float = 1.0, pa_deg: float = 0.0) -> galsim.GSObject:
    """Elliptical Sersic profile; 0.5 <= index <= 6 after rounding to 0.5."""
    rounded = float(np.clip(round(2.0 * index) / 2.0, 0.5, 6.0))
    return _ellipse(_unit_sersic(rounded).dilate(half_light_radius * axis_ratio**0.5), axis_ratio, pa_deg)


def moffat(fwhm: float, beta: float, axis_ratio: float = 1.0, pa_deg: float = 0.0) -> galsim.GSObject:
    """Moffat PSF (Moffat 1969, A&A 3, 455); `fwhm` is the geometric mean of the axes'."""
    return _ellipse(galsim.Moffat(beta=beta, fwhm=fwhm, gsparams=PARAMETERS), axis_ratio, pa_deg)


def points(x: FloatArray, y: FloatArray, flux: FloatArray, blur: float) -> galsim.GSObject:
    """Points at (x, y) arcsec from the centre, each a Gaussian of standard deviation `blur`; fluxes scaled to sum 1."""
    share = flux / flux.sum()
    spots = [
        galsim.DeltaFunction(flux=float(f), gsparams=PARAMETERS).shift(float(px), float(py))
        for px, py, f in zip(x, y, share, strict=True)
    ]
    return galsim.Convolve(galsim.Sum(spots), galsim.Gaussian(sigma=blur, gsparams=PARAMETERS))


def fibre_flux(seen: galsim.GSObject, radius: float) -> float:
    """Share of the light of `seen`, the PSF taken in, inside a centred round aperture of `radius` arcsec.

    That share is the centre's brightness after convolution with the aperture.
    """
    aperture = galsim.TopHat(radius=radius, flux=np.pi * radius**2, gsparams=PARAMETERS)
    centre = galsim.Convolve(seen, aperture).drawImage(nx=1, ny=1, scale=_FIBRE_SAMPLING, method="no_pixel")
    return float(centre.array[0, 0]) / _FIBRE_SAMPLING**2


@lru_cache(maxsize=8)
def _areas(beta: float, pixel_arcsec: float) -> tuple[FloatArray, FloatArray]:
    fwhm = np.linspace(0.6, 3.6, 31)
    drawn = [moffat(float(f), beta).drawImage(nx=96, ny=96, scale=pixel_arcsec, dtype=float).array for f in fwhm]
    return fwhm, np.array([pixel_arcsec**2 / (image**2).sum() for image in drawn])


def noise_equivalent_area(beta: float, fwhm: FloatArray, pixel_arcsec: float) -> FloatArray:
    """1 / sum(psf^2) in arcsec^2 for a matched filter (Naylor 1998, MNRAS 296, 339), like `fwhm` (0.6-3.6 arcsec).

    Interpolated between PSFs drawn every 0.1 arcsec.
    """
    return np.interp(fwhm, *_areas(beta, pixel_arcsec))
