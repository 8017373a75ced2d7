"""Spectra onto the model's wavelength grid: overlap-weighted rebinning that propagates ivar and masks.

On a logarithmic grid a redshift is a shift, whatever the rest wavelength, so one convolution kernel or patch
embedding serves a line at every redshift. Published spectrum encoders want DESI's own grid, linear in wavelength.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import sparse

from astroclip.errors import InputError
from astroclip.medians import medians
from astroclip.preprocess.doubts import spectrum_doubts
from astroclip.preprocess.statistics import spectrum_statistics
from astroclip.types import Flag, Quality, Spectrum

__all__ = ["GridSpectrum", "LinearSpectrumGrid", "SpectrumGrid", "overlap_matrix", "rebin", "spectrum_to_grid"]

# Two strong features (4000 A break and Ha, or [OII] and [OIII]) are about this far apart: less range than this
# leaves the redshift a guess.
MIN_RANGE_ANGSTROM = 2000.0
MIN_GOOD_FRACTION = 0.2  # of the grid
# A pixel wider than this many neighbours' widths is a gap between arms, not a pixel.
GAP_FACTOR = 4.0
# Wavelengths this close to the grid's, in bins, are the grid's: files keep them as float32 (2e-4 A at 9000 A), and
# sharing pixels between bins by that would only blur.
ON_GRID = 0.01
# Overlaps kept: the spectra of a survey share their wavelengths, or have a few sets of them. Longer ones (echelle
# orders) are kept for nobody: eight of them together take 4 MB, of 400,000 pixels they would take 100.
KEPT_OVERLAPS, KEPT_PIXELS = 8, 20_000


@dataclass(frozen=True)
class SpectrumGrid:
    """`n_pixels` bins of equal width in ln(wavelength) from `wave_min` to `wave_max` (Angstrom, vacuum).

    The default spans DESI (3600-9824 A) at 73 km/s a bin, close to DESI's and SDSS's own sampling.
    """

    wave_min: float = 3600.0
    wave_max: float = 9824.0
    n_pixels: int = 4096

    @cached_property
    def edges(self) -> npt.NDArray[np.float64]:
        """(n_pixels + 1,) bin edges, Angstrom."""
        return np.geomspace(self.wave_min, self.wave_max, self.n_pixels + 1)

    @cached_property
    def wave(self) -> npt.NDArray[np.float64]:
        """(n_pixels,) bin centres (geometric), Angstrom."""
        return np.sqrt(self.edges[1:] * self.edges[:-1])


@dataclass(frozen=True)
class LinearSpectrumGrid(SpectrumGrid):
    """`n_pixels` bins of equal width in wavelength, centres from `wave_min` to `wave_max`; the default is DESI's."""

    n_pixels: int = 7781
    spacing: str = "linear"

    @cached_property
    def edges(self) -> npt.NDArray[np.float64]:
        half = (self.wave_max - self.wave_min) / (self.n_pixels - 1) / 2
        return np.linspace(self.wave_min - half, self.wave_max + half, self.n_pixels + 1)

    @cached_property
    def wave(self) -> npt.NDArray[np.float64]:
        return np.linspace(self.wave_min, self.wave_max, self.n_pixels)


@dataclass(frozen=True)
class GridSpectrum:
    """A spectrum on the grid: `flux` (L,) float32 1e-17 erg/s/cm2/A, `ivar` (L,) float32, 0 where nothing is known."""

    flux: npt.NDArray[np.float32]
    ivar: npt.NDArray[np.float32]
    quality: Quality


def overlap_matrix(wave: npt.NDArray[np.float64], grid: SpectrumGrid) -> sparse.csr_array:
    """(n_pixels, L) sparse: the fraction of input pixel j that lies in bin i.

    wave: (L,) strictly increasing centres, Angstrom. Input pixels reach half-way to their neighbours, but never
    further than GAP_FACTOR/2 typical half-widths, so that gaps stay gaps. A spectrum on the grid stays as it is.
    """
    if len(wave) == grid.n_pixels and (np.abs(wave - grid.wave) < ON_GRID * np.diff(grid.edges)).all():
        return sparse.csr_array(sparse.eye_array(grid.n_pixels))
    step = np.diff(wave)
    typical = np.minimum(np.append(step, step[-1]), np.insert(step, 0, step[0]))
    reach = GAP_FACTOR / 2 * typical
    half = np.concatenate([[step[0] / 2], step / 2, [step[-1] / 2]])
    low = wave - np.minimum(half[:-1], reach)
    high = wave + np.minimum(half[1:], reach)
    first = np.clip(np.searchsorted(grid.edges, low, "right") - 1, 0, grid.n_pixels - 1)
    last = np.clip(np.searchsorted(grid.edges, high, "left") - 1, 0, grid.n_pixels - 1)
    counts = np.maximum(last - first + 1, 0)
    columns = np.repeat(np.arange(len(wave)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    bins = first[columns] + offsets
    shared = np.minimum(high[columns], grid.edges[bins + 1]) - np.maximum(low[columns], grid.edges[bins])
    fraction = np.clip(shared, 0, None) / (high - low)[columns]
    keep = fraction > 0
    shape = (grid.n_pixels, len(wave))
    return sparse.csr_array((fraction[keep], (bins[keep], columns[keep])), shape=shape)


class Overlaps:
    """Overlap matrices and their squares by wavelengths and grid, the latest few kept; safe in threads."""

    def __init__(self, kept: int = KEPT_OVERLAPS) -> None:
        self._kept = kept
        self._found: list[tuple[npt.NDArray[np.float64], SpectrumGrid, sparse.csr_array, sparse.csr_array]] = []
        self._lock = threading.Lock()

    def get(self, wave: npt.NDArray[np.float64], grid: SpectrumGrid) -> tuple[sparse.csr_array, sparse.csr_array]:
        """`overlap_matrix(wave, grid)` and the same with every element squared."""
        for theirs, of, overlap, squared in self._found:
            if len(theirs) == len(wave) and theirs[0] == wave[0] and of == grid and np.array_equal(theirs, wave):
                return overlap, squared
        overlap = overlap_matrix(wave, grid)
        squared = overlap.power(2)
        if len(wave) > KEPT_PIXELS:
            return overlap, squared
        with self._lock:
            self._found = [(wave.copy(), grid, overlap, squared), *self._found[: self._kept - 1]]
        return overlap, squared


_OVERLAPS = Overlaps()


def rebin(
    flux: npt.NDArray[np.floating],
    ivar: npt.NDArray[np.floating],
    overlap: sparse.csr_array,
    squared: sparse.csr_array | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Inverse-variance weighted means in each bin.

    flux, ivar: (L,) or (N, L), ivar 0 where bad. Returns the same with L -> n_pixels.
    squared:    `overlap` with every element squared, where the caller has it.
    With overlap fractions o and inverse variances w of independent pixels,
    flux = sum(o w f) / sum(o w) and ivar = sum(o w)^2 / sum(o^2 w).
    """
    weight = ivar.T.astype(np.float64)
    total = overlap @ weight
    variance = (overlap.power(2) if squared is None else squared) @ weight
    weight *= flux.T
    good = total > 0
    mean = np.divide(overlap @ weight, total, out=np.zeros_like(total), where=good)
    out = np.divide(total**2, variance, out=np.zeros_like(total), where=good)
    return mean.T.astype(np.float32), out.T.astype(np.float32)


def spectrum_to_grid(spectrum: Spectrum, grid: SpectrumGrid | None = None, *, statistics: bool = True) -> GridSpectrum:
    """Put `spectrum` on the model's grid; raises InputError where too little of it is usable.

    Missing ranges keep ivar 0 and are masked inside the model, never filled. statistics: as in `image_to_grid`.
    """
    grid = grid or SpectrumGrid()
    good = ~spectrum.mask & (spectrum.ivar > 0) & np.isfinite(spectrum.flux) & np.isfinite(spectrum.ivar)
    if not good.any():
        raise InputError(
            f"All {len(good)} pixels are masked or have zero inverse variance; wanted good pixels over at least "
            f"{MIN_RANGE_ANGSTROM:.0f} A of {grid.wave_min:.0f}-{grid.wave_max:.0f} A. Check the ivar and mask "
            "columns.",
            code="no_valid_pixels",
            field="ivar",
        )
    _refuse_short(spectrum.wave[good], grid)
    overlaps = _OVERLAPS.get(spectrum.wave, grid)
    flux, ivar = rebin(np.where(good, spectrum.flux, 0), np.where(good, spectrum.ivar, 0), *overlaps)
    covered = ivar > 0
    coverage = np.count_nonzero(covered) / covered.size
    if coverage < MIN_GOOD_FRACTION:
        raise InputError(
            f"Good pixels cover {coverage:.0%} of {grid.wave_min:.0f}-{grid.wave_max:.0f} A; the model needs "
            f"{MIN_GOOD_FRACTION:.0%}. Check the mask, or use a spectrum with finer sampling.",
            code="low_coverage",
            field="mask",
        )
    known = flux[covered]
    if float(known.max()) == float(known.min()):
        raise InputError(
            f"The flux is constant ({float(known[0]):g}); wanted a spectrum with signal or noise. "
            "Check the flux column.",
            code="constant_spectrum",
            field="flux",
        )
    snr = float(medians(known * np.sqrt(ivar[covered])))
    measured = spectrum_statistics(flux, ivar) if statistics else ()
    quality = replace(spectrum.quality, coverage=coverage, snr=snr, statistics=measured)
    flags = _coverage_flags(grid.wave[covered], coverage, grid)
    flags += spectrum_doubts(spectrum.quality.masked_fraction, snr)
    return GridSpectrum(flux, ivar, quality.with_flags(*flags))


def _refuse_short(wave: npt.NDArray[np.float64], grid: SpectrumGrid) -> None:
    inside = wave[(wave >= grid.wave_min) & (wave <= grid.wave_max)]
    span = float(np.ptp(inside)) if inside.size else 0.0
    if span < MIN_RANGE_ANGSTROM:
        raise InputError(
            f"The spectrum has {wave.size} good wavelengths in {wave.min():.0f}-{wave.max():.0f} A, {span:.0f} A of "
            f"them inside the model's range; the model needs at least {MIN_RANGE_ANGSTROM:.0f} A of "
            f"{grid.wave_min:.0f}-{grid.wave_max:.0f} A (vacuum, observed frame). Check the wavelength unit.",
            code="wavelength_range",
            field="wave",
        )


def _coverage_flags(wave: npt.NDArray[np.float64], coverage: float, grid: SpectrumGrid) -> list[Flag]:
    if coverage > 0.95:
        return []
    ends = []
    if wave[0] > 1.02 * grid.wave_min:
        ends.append(f"starts at {wave[0]:.0f} A")
    if wave[-1] < 0.98 * grid.wave_max:
        ends.append(f"ends at {wave[-1]:.0f} A")
    where = " and ".join(ends) or "has gaps"
    message = f"The spectrum {where}; {1 - coverage:.0%} of the model's range is missing."
    return [Flag("wavelength_coverage", message)]
