"""Dust attenuation: a family of smooth laws around Calzetti with a bump, and steeper birth clouds.

The diffuse law is Calzetti et al. (2000, ApJ 533, 682, eq. 4) plus a 2175 A bump, times a power of wavelength (Noll et
al. 2009, A&A 507, 1793, in the form of Kriek & Conroy 2013, ApJ 775, L16, eqs. 1-2), normalised to A(5500 A) = 1; slope
0 and bump 0 give Calzetti. The birth clouds follow (lambda / 5500 A)^-1.3: the two components of Charlot & Fall (2000,
whose own slope is -0.7) with the slope of Wild et al. (2007) and da Cunha et al. (2008). Wavelengths are in Angstrom,
rest frame.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BIRTH_CLOUD_SLOPE", "birth_cloud_law", "bump_profile", "calzetti_law", "diffuse_law"]

BIRTH_CLOUD_SLOPE = -1.3
_PIVOT = 5500.0

FloatArray = npt.NDArray[np.floating]


def calzetti_law(wave: npt.ArrayLike) -> FloatArray:
    """A(lambda) / A_V of Calzetti et al. (2000); its red branch is continued, floored at 0, beyond 2.2 micron."""
    micron = np.asarray(wave, float) * 1e-4
    blue = 2.659 * (-2.156 + 1.509 / micron - 0.198 / micron**2 + 0.011 / micron**3) + 4.05
    red = 2.659 * (-1.857 + 1.040 / micron) + 4.05
    return np.maximum(np.where(micron < 0.63, blue, red), 0.0) / 4.05


def bump_profile(wave: npt.ArrayLike) -> FloatArray:
    """Drude profile of the 2175 A bump, width 350 A, unit amplitude, divided by R_V = 4.05."""
    wave = np.asarray(wave, float)
    return (wave * 350.0) ** 2 / ((wave**2 - 2175.0**2) ** 2 + (wave * 350.0) ** 2) / 4.05


def diffuse_law(
    calzetti: FloatArray, bump: FloatArray, log_wave_ratio: FloatArray, slope: float, amplitude: float
) -> FloatArray:
    """A(lambda) / A(5500 A) from the tabulated pieces on one wavelength grid.

    log_wave_ratio: ln(lambda / 5500 A); slope: the power delta added to Calzetti; amplitude: bump strength.
    """
    return (calzetti + amplitude * bump) * np.exp(slope * log_wave_ratio)


def birth_cloud_law(log_wave_ratio: FloatArray) -> FloatArray:
    """A(lambda) / A(5500 A) of the birth clouds; log_wave_ratio = ln(lambda / 5500 A)."""
    return np.exp(BIRTH_CLOUD_SLOPE * log_wave_ratio)
