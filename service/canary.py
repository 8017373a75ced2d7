"""The known inputs of the readiness check: made of arithmetic, so that they need no file and never change."""

from __future__ import annotations

from functools import cache

import numpy as np

from astroclip.types import Image, Modality, Spectrum

__all__ = ["canary", "canary_image", "canary_spectrum"]


def canary(modality: Modality) -> Image | Spectrum:
    """The known input of a modality."""
    return canary_spectrum() if modality == "spectrum" else canary_image()


@cache
def canary_image() -> Image:
    """A round galaxy of 2 arcsec: 152 x 152 pixels of 0.262 arcsec in g, r, z, nanomaggies, no noise."""
    y, x = np.mgrid[:152, :152] - 75.5
    profile = np.exp(-np.hypot(x, y) * 0.262 / 2.0)
    pixels = np.stack([total * profile for total in (0.05, 0.1, 0.15)]).astype(np.float32)
    return Image(pixels, np.zeros(pixels.shape, bool), ("g", "r", "z"), 0.262)


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
