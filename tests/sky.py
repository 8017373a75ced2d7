"""A small synthetic sky for tests: one galaxy image, one spectrum, from a seeded generator."""

from __future__ import annotations

import numpy as np

from astroclip.types import Image, Spectrum

SKY_SIGMA = (0.004, 0.011, 0.023)  # nanomaggies per pixel in g, r, z


def make_image(
    rng: np.random.Generator, size: int = 152, flux: float = 30.0, radius: float = 6.0, noise: float = 1.0
) -> Image:
    """A round exponential galaxy; `flux` total r-band nanomaggies, `radius` pixels, `noise` in units of the sky's."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    profile = np.exp(-np.hypot(x, y) / radius)
    profile *= flux / profile.sum()
    planes = [
        profile * colour + noise * rng.normal(0, sigma, (size, size))
        for colour, sigma in zip((0.5, 1.0, 1.6), SKY_SIGMA, strict=True)
    ]
    pixels = np.stack(planes).astype(np.float32)
    return Image(pixels, np.zeros(pixels.shape, bool), ("g", "r", "z"), 0.262)


def make_spectrum(rng: np.random.Generator, redshift: float = 0.2, noise: float = 0.5) -> Spectrum:
    """A sloped continuum with a break and four emission lines on DESI's grid."""
    wave = 3600 + 0.8 * np.arange(7781)
    rest = wave / (1 + redshift)
    flux = 4 * (rest / 5000) ** 0.5 * np.where(rest < 4000, 0.6, 1.0)
    for line, strength in ((3728.5, 8), (4862.7, 4), (5008.2, 10), (6564.6, 15)):
        flux = flux + strength * np.exp(-0.5 * ((rest - line) / 2.5) ** 2)
    flux = (flux + rng.normal(0, noise, wave.size)).astype(np.float32)
    ivar = np.full(wave.size, noise**-2, np.float32)
    return Spectrum(wave, flux, ivar, np.zeros(wave.size, bool), redshift=redshift)
