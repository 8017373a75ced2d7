"""Flat Lambda-CDM background: times, distances and volumes as plain numpy functions.

H0 = 70 km/s/Mpc, Omega_m = 0.3, the rounded values that most of the relations cited in `training.simulate.priors`
assume too. Ages follow the closed form of flat LCDM (Carroll, Press & Turner 1992, eq. 17); distances come from one
table integrated at import (Hogg 1999, eqs. 14-28; interpolation error < 1e-6 for 0 <= z <= 3).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "H0",
    "OMEGA_M",
    "age_of_universe",
    "comoving_distance",
    "differential_volume",
    "distance_modulus",
    "kpc_per_arcsec",
    "luminosity_distance",
]

H0 = 70.0  # km/s/Mpc
OMEGA_M = 0.3
SPEED_OF_LIGHT = 299792.458  # km/s
_HUBBLE_TIME_GYR = 977.7922 / H0
_HUBBLE_DISTANCE_MPC = SPEED_OF_LIGHT / H0

FloatArray = npt.NDArray[np.float64]


def _expansion_rate(z: npt.ArrayLike) -> FloatArray:
    """H(z) / H0."""
    return np.sqrt(OMEGA_M * (1.0 + np.asarray(z, float)) ** 3 + 1.0 - OMEGA_M)


_TABLE_Z = np.linspace(0.0, 3.0, 6001)
_inverse_rate = 1.0 / _expansion_rate(_TABLE_Z)
_TABLE_DISTANCE = _HUBBLE_DISTANCE_MPC * np.concatenate(
    ([0.0], np.cumsum(0.5 * (_inverse_rate[1:] + _inverse_rate[:-1]) * np.diff(_TABLE_Z)))
)


def age_of_universe(z: npt.ArrayLike) -> FloatArray:
    """Age of the Universe at redshift z, Gyr."""
    ratio = (1.0 - OMEGA_M) / OMEGA_M / (1.0 + np.asarray(z, float)) ** 3
    return np.asarray(2.0 / 3.0 / np.sqrt(1.0 - OMEGA_M) * np.arcsinh(np.sqrt(ratio)) * _HUBBLE_TIME_GYR)


def comoving_distance(z: npt.ArrayLike) -> FloatArray:
    """Line-of-sight comoving distance, Mpc."""
    return np.interp(np.asarray(z, float), _TABLE_Z, _TABLE_DISTANCE)


def luminosity_distance(z: npt.ArrayLike) -> FloatArray:
    """Luminosity distance, Mpc."""
    return np.asarray((1.0 + np.asarray(z, float)) * comoving_distance(z))


def distance_modulus(z: npt.ArrayLike) -> FloatArray:
    """Distance modulus, magnitudes."""
    return np.asarray(5.0 * np.log10(luminosity_distance(z)) + 25.0)


def differential_volume(z: npt.ArrayLike) -> FloatArray:
    """Comoving volume per unit redshift and steradian, Mpc^3."""
    return np.asarray(_HUBBLE_DISTANCE_MPC * comoving_distance(z) ** 2 / _expansion_rate(z))


def kpc_per_arcsec(z: npt.ArrayLike) -> FloatArray:
    """Proper transverse scale, kpc/arcsec."""
    return np.asarray(comoving_distance(z) / (1.0 + np.asarray(z, float)) * 1e3 * np.pi / 180.0 / 3600.0)
