"""Dust of our own Galaxy: what it takes from spectra and images before they reach the telescope.

Coefficients A(lambda) / E(B-V)_SFD for R_V = 3.1 from Schlafly & Finkbeiner 2011 (ApJ 737, 103, table 6; the law of
Fitzpatrick 1999), and for g, r, z those the Legacy Surveys use (catalogue description; Dey et al. 2019, AJ 157, 168).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BAND_COEFFICIENTS", "draw_ebv", "transmission"]

FloatArray = npt.NDArray[np.float64]

BAND_COEFFICIENTS: FloatArray = np.array([3.214, 2.165, 1.211])  # g, r, z

# SDSS u, g, r, i, z and LSST y: A / E(B-V) of their table 6, at SDSS's usual effective wavelengths (A; theirs differ by
# some tens of A). The first point is extrapolated.
_WAVE = np.array([3000.0, 3551.0, 4686.0, 6166.0, 7480.0, 8932.0, 9712.0])
_COEFFICIENT = np.array([4.9, 4.239, 3.303, 2.285, 1.698, 1.263, 1.088])


def draw_ebv(n: int, rng: np.random.Generator) -> FloatArray:
    """E(B-V) (n,) of a high-latitude footprint: log-normal, median 0.03 mag, scatter 0.6 dex-e, at most 0.25; rough."""
    return np.minimum(rng.lognormal(np.log(0.03), 0.6, n), 0.25)


def transmission(wave: FloatArray, ebv: FloatArray) -> FloatArray:
    """Fraction of light that passes, (N, L); wave (L,) Angstrom, ebv (N,) mag. Linear in 1/lambda between the bands."""
    curve = np.interp(1.0 / wave, 1.0 / _WAVE[::-1], _COEFFICIENT[::-1])
    return 10.0 ** (-0.4 * np.multiply.outer(ebv, curve))
