"""Drawing light in Fourier space: ellipses, points, seeing and pixels, one inverse transform a band.

Offsets and radii in arcsec, x to the right (west), y up (north); position angles in degrees, north through east, so
the major axis points along (-sin PA, cos PA). An image is what a camera records: surface brightness smeared by the
PSF, integrated over square pixels. The canvas is periodic; callers leave a margin and crop.

GalSim draws the same images (tests: within 1 % of the peak), at more than ten times the cost.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft

from training.simulate.profiles import Mixture, moffat, sersic

__all__ = ["Canvas"]

Array = npt.NDArray[np.float32]
ComplexArray = npt.NDArray[np.complex64]

# The table of a transform is uniform in sqrt(k r): fine at small k, where light is, and enough at large k.
_TABLE_STEP = 1.0 / 256.0
_TABLE_LENGTH = 8192  # sqrt(k r) up to 32, k r up to 1024: beyond the band limit for every radius used


@lru_cache(maxsize=64)
def _table(kind: str, parameter: float) -> Array:
    profile: Mixture = sersic(parameter) if kind == "sersic" else moffat(parameter)
    root = _TABLE_STEP * np.arange(_TABLE_LENGTH + 1, dtype=np.float64)
    return profile.transform(root**4).astype(np.float32)


class Canvas:
    """A square of `size` pixels of `scale` arcsec; its centre is the point (0, 0)."""

    def __init__(self, size: int, scale: float) -> None:
        self.size = size
        self.scale = scale
        ky = 2.0 * np.pi * fft.fftfreq(size, scale)
        kx = 2.0 * np.pi * fft.rfftfreq(size, scale)
        self._kx, self._ky = kx, ky
        self._kxx = (kx**2).astype(np.float32)[None, :]
        self._kyy = (ky**2).astype(np.float32)[:, None]
        self._kxy = (ky[:, None] * kx[None, :]).astype(np.float32)
        self._pixel = (np.sinc(ky * scale / (2 * np.pi))[:, None] * np.sinc(kx * scale / (2 * np.pi))).astype(
            np.float32
        )

    def _radial(self, kind: str, parameter: float, radius: float, q: float, pa_deg: float) -> Array:
        """Transform of an elliptical profile of major-axis `radius` and axis ratio `q`, (size, size // 2 + 1)."""
        angle = np.deg2rad(pa_deg)
        ux, uy = -np.sin(angle), np.cos(angle)
        squeeze = (q * q - 1.0) * radius**2
        # k'^2 = a^2 (k_major^2 + q^2 k_minor^2) = a^2 (q^2 |k|^2 + (1 - q^2) k_major^2)
        k2 = (
            self._kxx * np.float32((q * radius) ** 2 - squeeze * ux * ux)
            + self._kyy * np.float32((q * radius) ** 2 - squeeze * uy * uy)
            - self._kxy * np.float32(2.0 * squeeze * ux * uy)
        )
        root = np.sqrt(np.sqrt(np.maximum(k2, 0.0)))
        root *= np.float32(1.0 / _TABLE_STEP)
        np.minimum(root, np.float32(_TABLE_LENGTH - 1), out=root)
        index = root.astype(np.int32)
        root -= index
        table = _table(kind, parameter)
        low = table[index]
        return low + root * (table[index + 1] - low)

    def phase(self, x: float, y: float) -> ComplexArray:
        """What moves light from the transform's origin, the corner pixel, to (x, y) arcsec from the centre."""
        centre = self._centre_offset()
        wave_y = np.exp(-1j * self._ky * (y + centre)).astype(np.complex64)
        wave_x = np.exp(-1j * self._kx * (x + centre)).astype(np.complex64)
        return wave_y[:, None] * wave_x[None, :]

    def _centre_offset(self) -> float:
        """Arcsec from the centre of pixel 0, the transform's origin, to the middle of the canvas."""
        return (self.size - 1) / 2.0 * self.scale

    def sersic(self, index: float, half_light_radius: float, axis_ratio: float, pa_deg: float) -> Array:
        """Sersic profile of unit flux at the origin; the index is rounded to 0.5, the spacing of the tables."""
        return self._radial("sersic", max(round(2 * index) / 2, 0.5), half_light_radius, axis_ratio, pa_deg)

    def psf(self, fwhm: float, beta: float, axis_ratio: float = 1.0, pa_deg: float = 0.0) -> Array:
        """Moffat PSF (its FWHM is the geometric mean of the axes) times the pixel's response."""
        return self._radial("moffat", beta, fwhm / np.sqrt(axis_ratio), axis_ratio, pa_deg) * self._pixel

    def points(self, x: Array, y: Array, flux: Array, blur: float = 0.0) -> ComplexArray:
        """Sum of points (fluxes `flux`, arcsec from the origin), each a Gaussian of standard deviation `blur`."""
        wave_y = np.exp(-1j * np.multiply.outer(self._ky, y) - 0.5 * (blur * self._ky[:, None]) ** 2)
        wave_x = np.exp(-1j * np.multiply.outer(x, self._kx) - 0.5 * (blur * self._kx[None, :]) ** 2)
        return (wave_y * flux).astype(np.complex64) @ wave_x.astype(np.complex64)

    def image(self, transform: ComplexArray) -> Array:
        """Back to pixels: (..., size, size // 2 + 1) -> (..., size, size)."""
        return fft.irfft2(transform, s=(self.size, self.size), axes=(-2, -1))
