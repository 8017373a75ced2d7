"""Redshifts by template cross-correlation with redrock's galaxy templates, the classical baseline.

At every trial redshift the spectrum is fitted by redrock's templates for galaxies (Bailey et al., DESI; BSD-3, read
from disk, not shipped). With the five principal components T_i, flux f and inverse variance w,

    A_ij = sum_p w_p T_i(p, z) T_j(p, z),   b_i = sum_p w_p f_p T_i(p, z),

a free linear combination takes b^T A^-1 b off chi2, and the combination c of one archetype (an actual galaxy), scaled
by a positive amplitude, (c b)^2 / (c A c). Both stand beside a free polynomial of degree `DEGREE` in wavelength,
profiled out of A and b, for what calibration and dust do to a continuum. Free combinations fit bright continua best
with ultraviolet shapes that no galaxy has; so the archetypes choose among the redshifts, pixel by pixel, and the free
combination refines the choice within `REACH` pixels. On a grid uniform in ln(wavelength) a redshift is a shift and
the sums are correlations, one Fourier transform each for all redshifts; between pixels the templates are averaged
over bins that start at `PHASES` fractions of one (18 km/s at four), and a parabola goes through the three best.
Unlike redrock, the spectrograph's resolution beyond its pixels is not applied, and no other class (QSO, star)
competes.
"""

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
REACH = 3
DEGREE = 2  # of the polynomial beside every template, as in redrock with archetypes


@dataclass(frozen=True)
class TemplateRedshift:
    """basis: (T, n) vectors on rest wavelengths `first` + `step` i (Angstrom, vacuum); archetypes: (K, T)
    combinations of them, K = 0 for free combinations alone; grid: logarithmic."""

    basis: Array
    archetypes: Array
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
            archetypes = np.asarray(hdus[1].data, np.float64) if len(hdus) > 1 else np.empty((0, len(basis)))
            return cls(basis, archetypes, float(header["CRVAL1"]), float(header["CDELT1"]), grid)

    def __call__(self, flux: Array, ivar: Array) -> Array:
        """(N, L) flux and ivar on the grid -> (N,) redshifts; NaN without any information."""
        n_pixels = self.grid.n_pixels
        pixel = float(np.log(self.grid.edges[-1] / self.grid.edges[0]) / n_pixels)
        top = float(np.log1p(Z_MAX))
        shifts = int(np.ceil((top - np.log1p(Z_MIN)) / pixel))
        size = fft.next_fast_len(n_pixels + shifts, real=True)
        gain = np.full((len(flux), shifts * PHASES), -np.inf)
        physical = np.zeros((len(flux), shifts))
        pairs = np.triu_indices(len(self.basis))
        for phase in range(PHASES):
            vectors = self._binned(np.log(self.grid.edges[0]) - top + phase / PHASES * pixel, pixel, n_pixels + shifts)
            products = fft.rfft(vectors[pairs[0]] * vectors[pairs[1]], size)
            singles = fft.rfft(vectors, size)
            for row in range(len(flux)):
                b, normal = _equations(flux[row], ivar[row], singles, products, pairs, shifts, size)
                gain[row, phase::PHASES] = np.einsum("st,st->s", b, np.linalg.solve(normal, b[:, :, None])[:, :, 0])
                if phase == 0 and len(self.archetypes):
                    physical[row] = self._archetype_gain(b, normal)
        if len(self.archetypes):
            chosen = np.argmax(physical, axis=1)[:, None] * PHASES
            gain[np.abs(np.arange(shifts * PHASES) - chosen) > REACH * PHASES] = -np.inf
        # place m of the fine grid is ln(1 + z) = top - m pixel / PHASES
        best = np.argmax(gain, axis=1)
        place = best + _parabola(gain, best)
        redshift: Array = np.expm1(top - place * pixel / PHASES)
        redshift[~(np.asarray(ivar) > 0).any(axis=1)] = np.nan
        return redshift

    def _archetype_gain(self, b: Array, normal: Array) -> Array:
        """(shifts,) the most that one archetype takes off chi2."""
        n = len(self.basis)
        along = b @ self.archetypes.T
        squares = np.einsum("ki,kj->kij", self.archetypes, self.archetypes).reshape(-1, n * n)
        size = normal.reshape(-1, n * n) @ squares.T
        best: Array = (np.where(along > 0, along, 0.0) ** 2 / np.maximum(size, 1e-300)).max(axis=1)
        return best

    def _binned(self, start: float, pixel: float, count: int) -> Array:
        """(T, count) means of the vectors over bins of `pixel` in ln(wavelength) from `start`."""
        edges = np.exp(start + pixel * np.arange(count + 1))
        wave = self.first + self.step * (np.arange(self.basis.shape[1] + 1) - 0.5)  # edges of the templates' pixels
        if edges[0] < wave[0] or edges[-1] > wave[-1]:
            raise ValueError(f"templates reach {wave[0]:.0f}-{wave[-1]:.0f} A; {edges[0]:.0f}-{edges[-1]:.0f} A wanted")
        out = np.empty((len(self.basis), count))
        for i, vector in enumerate(self.basis):
            total = np.interp(edges, wave, np.concatenate([[0.0], np.cumsum(vector) * self.step]))
            out[i] = np.diff(total) / np.diff(edges)
        return out


def _equations(
    flux: Array, ivar: Array, singles: Array, products: Array, pairs: tuple[Array, ...], shifts: int, size: int
) -> tuple[Array, Array]:
    """b (shifts, T) and A (shifts, T, T) of the module's docstring, for every shift."""
    weight = np.asarray(ivar, np.float64)
    weighted = fft.rfft(weight, size).conj()
    data = fft.rfft(weight * np.asarray(flux, np.float64), size).conj()
    b = fft.irfft(data * singles, size)[:, :shifts].T  # (shifts, T)
    normal = np.empty((shifts, len(singles), len(singles)))
    values = fft.irfft(weighted * products, size)[:, :shifts].T
    normal[:, pairs[0], pairs[1]] = values
    normal[:, pairs[1], pairs[0]] = values
    # profile out the polynomial: A - C P^-1 C^T and b - C P^-1 q
    curves = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(weight)), DEGREE).T
    crossed = fft.rfft(weight * curves, size).conj()
    mixed = np.stack([fft.irfft(row * singles, size)[:, :shifts] for row in crossed])  # (degree + 1, T, shifts)
    own = (weight * curves) @ curves.T
    solved = np.linalg.lstsq(own, mixed.reshape(len(curves), -1), rcond=None)[0].reshape(mixed.shape)
    normal -= np.einsum("pis,pjs->sij", mixed, solved)
    b -= np.einsum("pis,p->si", solved, (weight * curves) @ np.asarray(flux, np.float64))
    # a millionth of the diagonal: where few pixels are left the five vectors look alike
    ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2) / len(singles) + 1e-300
    return b, normal + ridge[:, None, None] * np.eye(len(singles))


def _parabola(gain: Array, best: Array) -> Array:
    """(N,) offset of the vertex through the best place and its neighbours, within half a place."""
    rows = np.arange(len(best))
    inner = np.clip(best, 1, gain.shape[1] - 2)
    left, middle, right = gain[rows, inner - 1], gain[rows, inner], gain[rows, inner + 1]
    with np.errstate(invalid="ignore"):
        curvature = np.where(np.isfinite(left + right), left - 2 * middle + right, 0.0)
    difference = np.where(curvature < 0, left - right, 0.0)
    offset = np.divide(difference, 2 * curvature, out=np.zeros(len(best)), where=curvature < 0)
    return np.where(inner == best, np.clip(offset, -0.5, 0.5), 0.0)
