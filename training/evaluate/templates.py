"""Redshifts by template cross-correlation: redrock's galaxy vectors fitted at every redshift, the classical baseline.

At every trial redshift the spectrum is fitted by a linear combination of the five principal components that DESI's
redrock uses for galaxies (Bailey et al.; templates of redrock, BSD-3, read from disk, not shipped):

    chi2(z) = sum_p w_p f_p^2 - b^T A^-1 b,   b_i = sum_p w_p f_p T_i(p, z),   A_ij = sum_p w_p T_i(p, z) T_j(p, z)

with flux f and inverse variance w. On a grid uniform in ln(wavelength) a redshift is a shift, so the sums over pixels
are correlations, one Fourier transform each for all redshifts. Sub-pixel redshifts come from templates averaged over
bins that start at `PHASES` fractions of a pixel (18 km/s at four), and a parabola through the three best. Unlike
redrock, the spectrograph's resolution beyond its pixels is not applied, and no other class (QSO, star) competes. """

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft

from astroclip.preprocess import SpectrumGrid

__all__ = ["FILE", "TemplateRedshift"]

Array = npt.NDArray[Any]
FILE = "redrock_galaxy_templates.fits"
Z_MIN, Z_MAX = -0.005, 1.7  # redrock's range for galaxies
PHASES = 4


@dataclass(frozen=True)
class TemplateRedshift:
    """basis: (T, n) vectors on rest wavelengths `first` + `step` i (Angstrom, vacuum); grid: logarithmic."""

    basis: Array
    first: float
    step: float
    grid: SpectrumGrid

    @classmethod
    def load(cls, path: Path, grid: SpectrumGrid) -> TemplateRedshift:
        """redrock's template file: vectors in the first HDU, CRVAL1 and CDELT1 the rest wavelengths."""
        from astropy.io import fits

        with fits.open(path, memmap=False) as hdus:
            header, basis = hdus[0].header, np.asarray(hdus[0].data, np.float64)
            if basis.ndim != 2 or header.get("RRTYPE", "").strip() != "GALAXY":
                raise ValueError(f"{path.name} holds no galaxy vectors (RRTYPE {header.get('RRTYPE')!r})")
            return cls(basis, float(header["CRVAL1"]), float(header["CDELT1"]), grid)

    def __call__(self, flux: Array, ivar: Array) -> Array:
        """(N, L) flux and ivar on the grid -> (N,) redshifts; NaN without any information."""
        n_pixels = self.grid.n_pixels
        pixel = float(np.log(self.grid.edges[-1] / self.grid.edges[0]) / n_pixels)
        top = float(np.log1p(Z_MAX))
        shifts = int(np.ceil((top - np.log1p(Z_MIN)) / pixel))
        size = fft.next_fast_len(n_pixels + shifts, real=True)
        gain = np.full((len(flux), shifts * PHASES), -np.inf)
        pairs = np.triu_indices(len(self.basis))
        for phase in range(PHASES):
            vectors = self._binned(np.log(self.grid.edges[0]) - top + phase / PHASES * pixel, pixel, n_pixels + shifts)
            products = fft.rfft(vectors[pairs[0]] * vectors[pairs[1]], size)
            singles = fft.rfft(vectors, size)
            for row in range(len(flux)):
                gain[row, phase::PHASES] = _gain(flux[row], ivar[row], singles, products, pairs, shifts, size)
        # place m of the fine grid is ln(1 + z) = top - m pixel / PHASES
        best = np.argmax(gain, axis=1)
        place = best + _parabola(gain, best)
        redshift: Array = np.expm1(top - place * pixel / PHASES)
        redshift[~(np.asarray(ivar) > 0).any(axis=1)] = np.nan
        return redshift

    def _binned(self, start: float, pixel: float, count: int) -> Array:
        """(T, count) means of the vectors over bins of `pixel` in ln(wavelength) from `start`, each of unit scatter."""
        edges = np.exp(start + pixel * np.arange(count + 1))
        wave = self.first + self.step * (np.arange(self.basis.shape[1] + 1) - 0.5)  # edges of the templates' pixels
        if edges[0] < wave[0] or edges[-1] > wave[-1]:
            raise ValueError(f"templates reach {wave[0]:.0f}-{wave[-1]:.0f} A; {edges[0]:.0f}-{edges[-1]:.0f} A wanted")
        out = np.empty((len(self.basis), count))
        for i, vector in enumerate(self.basis):
            total = np.interp(edges, wave, np.concatenate([[0.0], np.cumsum(vector) * self.step]))
            out[i] = np.diff(total) / np.diff(edges)
            out[i] /= out[i].std()
        return out


def _gain(
    flux: Array, ivar: Array, singles: Array, products: Array, pairs: tuple[Array, ...], shifts: int, size: int
) -> Array:
    """(shifts,) b^T A^-1 b: what the fit takes off chi2 at every shift."""
    weight = np.asarray(ivar, np.float64)
    weighted = fft.rfft(weight, size).conj()
    data = fft.rfft(weight * np.asarray(flux, np.float64), size).conj()
    b = fft.irfft(data * singles, size)[:, :shifts].T
    normal = np.empty((shifts, len(singles), len(singles)))
    values = fft.irfft(weighted * products, size)[:, :shifts].T
    normal[:, pairs[0], pairs[1]] = values
    normal[:, pairs[1], pairs[0]] = values
    # a millionth of the diagonal: where few pixels are left the five vectors look alike
    ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2) / len(singles) + 1e-300
    normal += ridge[:, None, None] * np.eye(len(singles))
    solved = np.linalg.solve(normal, b[:, :, None])[:, :, 0]
    return np.einsum("st,st->s", b, solved)


def _parabola(gain: Array, best: Array) -> Array:
    """(N,) offset of the vertex through the best place and its neighbours, within half a place."""
    rows = np.arange(len(best))
    inner = np.clip(best, 1, gain.shape[1] - 2)
    left, middle, right = gain[rows, inner - 1], gain[rows, inner], gain[rows, inner + 1]
    curvature = left - 2 * middle + right
    offset = np.divide(left - right, 2 * curvature, out=np.zeros(len(best)), where=curvature < 0)
    return np.where(inner == best, np.clip(offset, -0.5, 0.5), 0.0)
