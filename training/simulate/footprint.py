"""Where simulated galaxies lie: HEALPix pixels (nside 16, nested) of a DESI-like footprint, without astropy.

Geometry: Gorski et al. 2005 (ApJ 622, 759): twelve faces, on which pixels are squares of equal area; a point
(x, y) of a face maps to the sphere in closed form.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["NSIDE", "footprint_pixels", "photometric_system", "pixel_positions", "positions_in_pixel"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NSIDE = 16
_FACE_ROW = np.array([2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4])
_FACE_COLUMN = np.array([1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7])


def pixel_positions(pixel: IntArray, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Right ascension and declination (deg) of points at fractions (u, v) in 0..1 of nested pixels; all (N,).

    u, v uniform gives positions uniform on the sphere within the pixel; (0.5, 0.5) is its centre.
    """
    face, inner = np.divmod(np.asarray(pixel), NSIDE * NSIDE)
    ix, iy = np.zeros_like(inner), np.zeros_like(inner)
    for bit in range(4):  # nested numbers interleave the bits of x and y
        ix |= ((inner >> (2 * bit)) & 1) << bit
        iy |= ((inner >> (2 * bit + 1)) & 1) << bit
    x, y = (ix + u) / NSIDE, (iy + v) / NSIDE
    ring = _FACE_ROW[face] - x - y  # 0 at the north pole, 4 at the south pole
    width = np.minimum(np.minimum(ring, 4.0 - ring), 1.0)
    z = np.where(ring < 1.0, 1.0 - width**2 / 3.0, np.where(ring > 3.0, width**2 / 3.0 - 1.0, (2.0 - ring) * 2.0 / 3.0))
    turn = (_FACE_COLUMN[face] * width + x - y) / np.maximum(width, 1e-12)
    return np.mod(45.0 * turn, 360.0), np.degrees(np.arcsin(np.clip(z, -1.0, 1.0)))


def positions_in_pixel(pixel: int, n: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """`n` positions (deg) uniform on the sphere inside one pixel."""
    return pixel_positions(np.full(n, pixel), rng.random(n), rng.random(n))


def _galactic_latitude(ra: FloatArray, dec: FloatArray) -> FloatArray:
    """Degrees; pole at (192.859, +27.128) (Hipparcos catalogue, ESA 1997, vol. 1, 1.5.3)."""
    a, d, pole = np.radians(ra - 192.85948), np.radians(dec), np.radians(27.12825)
    return np.degrees(np.arcsin(np.sin(d) * np.sin(pole) + np.cos(d) * np.cos(pole) * np.cos(a)))


def footprint_pixels() -> IntArray:
    """Pixels whose centres lie at -18 < dec < 78 deg and more than 22 deg from the Galactic plane, ascending."""
    pixels = np.arange(12 * NSIDE * NSIDE)
    half = np.full(len(pixels), 0.5)
    ra, dec = pixel_positions(pixels, half, half)
    return pixels[(np.abs(_galactic_latitude(ra, dec)) > 22.0) & (dec > -18.0) & (dec < 78.0)]


def photometric_system(pixel: int) -> str:
    """N (BASS + MzLS: dec > 32.375 deg, north Galactic cap) or S (DECam), by the pixel's centre (Dey et al. 2019)."""
    ra, dec = pixel_positions(np.array([pixel]), np.array([0.5]), np.array([0.5]))
    return "N" if dec[0] > 32.375 and _galactic_latitude(ra, dec)[0] > 0.0 else "S"
