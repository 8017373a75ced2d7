"""A DESI-like spectrograph: fibres, resolution, noise, sky residuals, calibration errors and bad pixels.

Grid: 3600-9824 A in steps of 0.8 A, vacuum (DESI's coadds; Guy et al. 2023, AJ 165, 144). Fluxes follow DESI's
convention: calibrated as for a point source, so a galaxy shows the part of its light that its fibre collects over the
part a star's would (PSF_TO_FIBER_SPECFLUX, DESI Collaboration 2024, AJ 168, 58). Bulge, disk and knots lose light each
by its own size, so what the fibre sees is redder than the whole where the bulge is.

Not in `ivar`, as in real data: residuals of the sky lines, errors of the flux calibration, unflagged cosmic rays.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import galsim
import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import ndtr

from training.simulate import sky
from training.simulate.extinction import transmission
from training.simulate.profiles import PARAMETERS, fibre_flux, moffat, sersic

__all__ = [
    "WAVE",
    "Exposures",
    "ObservedSpectra",
    "draw_exposures",
    "fibre_fractions",
    "lsf_sigma",
    "observe",
    "resample",
]

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]

WAVE: FloatArray = 3600.0 + 0.8 * np.arange(7781, dtype=np.float64)
STEP = 0.8
_BETA = 3.0  # of the Moffat seeing at the fibres
FIBRE_RADIUS = 0.75  # arcsec; 107 um at 70 um/arcsec (DESI Collaboration 2022, AJ 164, 207)

# Median effective exposure (s), its scatter (dex), and the share of deep (four times) observations: rough. Bright time
# is nominally 180 s, dark time 1000 s (Schlafly et al. 2023, AJ 166, 259); the Early Data Release holds many deeper
# ones.
_BRIGHT, _DARK = (260.0, 0.22, 0.15), (1150.0, 0.18, 0.2)
_EXPOSURE = {"BGS": _BRIGHT, "SDSS": _BRIGHT, "LRG": _DARK, "ELG": _DARK}

# Line-spread sigma (A, the pixel included), from the second moments of DESI's RESOLUTION matrices.
_LSF = np.array(
    [(3600, 0.66), (5000, 0.68), (5720, 0.68), (5820, 0.64), (7000, 0.65), (7540, 0.64), (7640, 0.71), (8000, 0.76)]
    + [(9000, 0.755), (9824, 0.79)]
)

# Photons (electrons) per pixel from 1e-17 erg/s/cm2/A in REFERENCE_EXPOSURE_S: 8.7 m^2, 0.8 A, and the throughput with
# fibre and atmosphere, rough values after Guy et al. 2023 and DESI Collaboration 2022.
_THROUGHPUT = np.array(
    [(3600, 0.05), (4000, 0.13), (4500, 0.19), (5500, 0.24), (5800, 0.20), (6500, 0.28), (7400, 0.32), (7600, 0.28)]
    + [(8500, 0.34), (9300, 0.29), (9824, 0.20)]
)
_ELECTRONS = 8.66e4 * 1000.0 * STEP * 1e-17 / 1.986e-8  # times lambda (A) and throughput


def lsf_sigma(scale: float = 1.0) -> FloatArray:
    """Standard deviation of the line-spread function on `WAVE`, Angstrom; `scale` tells spectrographs apart."""
    return scale * np.interp(WAVE, _LSF[:, 0], _LSF[:, 1])


def resample(wave: FloatArray, scale: float = 1.0) -> sparse.csr_matrix:
    """Matrix (L, 7781) that takes flux densities on `wave`, pixel averages, to `WAVE` at the instrument's resolution.

    Each output pixel is the mean under a Gaussian whose variance is the LSF's less that of the input pixel; rows are
    normalised, so a constant stays constant. `wave` must reach 4 A beyond both ends.
    """
    edges = np.concatenate(
        [[1.5 * wave[0] - 0.5 * wave[1]], 0.5 * (wave[1:] + wave[:-1]), [1.5 * wave[-1] - 0.5 * wave[-2]]]
    )
    input_step = np.interp(WAVE, wave, np.gradient(wave))
    sigma = np.sqrt(np.maximum(lsf_sigma(scale) ** 2 - input_step**2 / 12.0, 0.05))
    first = np.searchsorted(edges, WAVE - 4.5 * sigma) - 1
    width = int((np.searchsorted(edges, WAVE + 4.5 * sigma) - first).max())
    columns = np.clip(first[:, None] + np.arange(width), 0, len(wave) - 1)
    weights = ndtr((edges[columns + 1] - WAVE[:, None]) / sigma[:, None]) - ndtr(
        (edges[columns] - WAVE[:, None]) / sigma[:, None]
    )
    weights /= weights.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(len(WAVE)), width)
    shape = (len(WAVE), len(wave))
    return sparse.csr_matrix((weights.ravel(), (rows, columns.ravel())), shape).astype(np.float32)


@dataclass(frozen=True)
class Exposures:
    """How N spectra were taken: seconds of effective exposure, seeing (arcsec), fibre offset is in `grey`.

    exposure_s, seeing_arcsec, grey, tilt, curvature (N,); arm_steps (N, 2); sky_lines (N,): brightness of the lines.
    """

    exposure_s: FloatArray
    seeing_arcsec: FloatArray
    grey: FloatArray
    tilt: FloatArray
    curvature: FloatArray
    arm_steps: FloatArray
    sky_lines: FloatArray

    def __getitem__(self, rows: slice) -> Exposures:
        return Exposures(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def calibration(self) -> FloatArray:
        """Multiplicative error of the flux scale, (N, L): grey, smooth in wavelength, and steps where arms meet."""
        x = (WAVE - 6700.0) / 3100.0
        smooth = 1.0 + self.tilt[:, None] * x + self.curvature[:, None] * (1.5 * x**2 - 0.5)
        for arm, join in enumerate((5780.0, 7570.0)):
            smooth += self.arm_steps[:, arm, None] * 0.5 * np.tanh((WAVE - join) / 20.0)
        return self.grey[:, None] * smooth


def draw_exposures(target_class: npt.NDArray[np.str_], rng: np.random.Generator) -> Exposures:
    """Conditions for targets of the classes of `survey.DEFAULT_MIX` (N,)."""
    n = len(target_class)
    median, scatter, deep = (np.array([_EXPOSURE[str(c)][i] for c in target_class]) for i in range(3))
    seconds = median * 10.0 ** (scatter * rng.standard_normal(n))
    return Exposures(
        exposure_s=np.where(rng.random(n) < deep, 4.0, 1.0) * seconds,
        seeing_arcsec=np.clip(1.1 * np.exp(0.2 * rng.standard_normal(n)), 0.7, 2.2),
        grey=np.exp(0.12 * rng.standard_normal(n)),
        tilt=0.03 * rng.standard_normal(n),
        curvature=0.015 * rng.standard_normal(n),
        arm_steps=0.012 * rng.standard_normal((n, 2)),
        sky_lines=np.exp(0.3 * rng.standard_normal(n)),
    )


def fibre_fractions(
    radii: FloatArray, axis_ratios: FloatArray, bulge_index: FloatArray, seeing: FloatArray
) -> FloatArray:
    """Light in the fibre over that of a point source, (N, 3), of bulge, disk and knots.

    radii (N, 2): major-axis half-light radii of bulge and disk, arcsec; axis_ratios (N, 2); bulge_index (N,); knots
    follow the disk, 15 % wider.
    """
    fractions = np.empty((len(seeing), 3))
    for row, fwhm in enumerate(seeing):
        psf = moffat(float(fwhm), _BETA)
        (bulge, disk), (bulge_ratio, disk_ratio) = radii[row], axis_ratios[row]
        parts = (
            sersic(bulge_index[row], bulge, bulge_ratio),
            sersic(1.0, disk, disk_ratio),
            sersic(1.0, 1.15 * disk, disk_ratio),
        )
        held = [fibre_flux(galsim.Convolve(psf, part, gsparams=PARAMETERS), FIBRE_RADIUS) for part in parts]
        fractions[row] = np.array(held) / fibre_flux(psf, FIBRE_RADIUS)
    return fractions


def _electrons() -> FloatArray:
    """Electrons per pixel and unit flux in the reference exposure, (L,)."""
    return _ELECTRONS * WAVE * np.interp(WAVE, _THROUGHPUT[:, 0], _THROUGHPUT[:, 1])


def _floor_ivar() -> FloatArray:
    """Inverse variance between the lines, arms added, for the reference exposure, (L,)."""
    return np.asarray(sum(sky.floor_sigma(arm, WAVE) ** -2.0 for arm in sky.ARMS))


@dataclass(frozen=True)
class ObservedSpectra:
    """flux, ivar, flux_true (N, L) float32, 1e-17 erg/s/cm2/A; mask (N, L) bool, True = bad, where ivar is 0."""

    flux: Array
    ivar: Array
    flux_true: Array
    mask: npt.NDArray[np.bool_]


def observe(
    components: Array,
    fractions: FloatArray,
    ebv: FloatArray,
    exposures: Exposures,
    matrix: sparse.csr_matrix,
    rng: np.random.Generator,
) -> ObservedSpectra:
    """Spectra as recorded from what arrives.

    components (N, 3, K) flux densities on `matrix`'s input grid; fractions (N, 3) from `fibre_fractions`; ebv (N,).
    """
    arriving = np.einsum("nck,nc->nk", components, fractions.astype(np.float32))
    true = (matrix @ arriving.T).T * transmission(WAVE, ebv) * exposures.calibration()
    seconds = exposures.exposure_s[:, None]
    lines = exposures.sky_lines[:, None] * sky.line_profile(WAVE, float(np.median(lsf_sigma())))
    variance = (1.0 + lines) / _floor_ivar() * (sky.REFERENCE_EXPOSURE_S / seconds)
    variance += np.maximum(true, 0.0) / _electrons() * (sky.REFERENCE_EXPOSURE_S / seconds)
    sigma = np.sqrt(variance, dtype=np.float32)
    flux = true + sigma * rng.standard_normal(true.shape, dtype=np.float32)
    flux += _sky_residual(lines, sigma, rng)
    mask = _defects(flux, sigma, rng)
    ivar = np.where(mask, 0.0, 1.0 / variance)
    return ObservedSpectra(flux.astype(np.float32), ivar.astype(np.float32), true.astype(np.float32), mask)


def _sky_residual(lines: FloatArray, sigma: Array, rng: np.random.Generator) -> FloatArray:
    """Imperfect subtraction: each band of lines is over- or under-subtracted as a whole, and shifted a little.

    Amplitudes of 0.25 sigma where lines rule, drawn anew every 150 A, with the lines' own shape or its derivative's.
    """
    share = np.sqrt(lines / (1.0 + lines)) * sigma
    knots = np.arange(WAVE[0], WAVE[-1] + 150.0, 150.0)
    which = np.searchsorted(knots, WAVE, side="right") - 1
    amplitude = rng.normal(0.0, 0.25, (len(lines), len(knots)))[:, which]
    shift = rng.normal(0.0, 0.2, (len(lines), 1)) * np.sign(np.gradient(lines, axis=1))
    return (amplitude + shift) * share


def _defects(flux: FloatArray, sigma: Array, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Flag cosmic rays, dead columns and rare gaps; `flux` keeps the spikes, in place, and some pass unflagged."""
    n, length = flux.shape
    mask = np.zeros((n, length), dtype=bool)
    for row, hits in enumerate(np.asarray(rng.poisson(6.0, n))):
        starts, widths = rng.integers(0, length - 6, hits), rng.integers(1, 5, hits)
        heights, flagged = rng.lognormal(2.5, 0.8, hits), rng.random(hits) < 0.96
        for start, width, height, seen in zip(starts, widths, heights, flagged, strict=True):
            flux[row, start : start + width] += height * sigma[row, start : start + width]
            mask[row, start : start + width] |= seen
        luck = rng.random(2)
        if luck[0] < 0.10:  # dead column
            start = rng.integers(0, length - 4)
            mask[row, start : start + rng.integers(1, 4)] = True
        if luck[1] < 0.01:  # amplifier or arm lost for a stretch
            start = rng.integers(0, length - 600)
            stretch = slice(start, start + rng.integers(60, 600))
            mask[row, stretch] = True
            flux[row, stretch] = 0.0
    return mask
