"""The known input of the readiness check: a spectrum made of arithmetic, so that it needs no file and never changes."""

from __future__ import annotations

from functools import cache

import numpy as np

from astroclip.types import Spectrum

__all__ = ["canary_spectrum"]


@cache
def canary_spectrum() -> Spectrum:
    """A galaxy-like spectrum at z = 0.1: 3600-9824 A in steps of 0.8 A, 1e-17 erg/s/cm2/A, S/N about 10, no noise."""
    wave = np.linspace(3600.0, 9824.0, 7781)
    rest = wave / 1.1
    flux = 5.0 * np.where(rest < 4000.0, 0.6, 1.0) * (rest / 5000.0) ** -0.3
    for line, height in ((3728.5, 8.0), (4862.7, 5.0), (5008.2, 9.0), (6564.6, 15.0)):
        flux = flux + height * np.exp(-0.5 * ((rest - line) / 2.0) ** 2)
    ivar = np.full(wave.size, 4.0, np.float32)
    return Spectrum(wave, flux.astype(np.float32), ivar, np.zeros(wave.size, bool))
