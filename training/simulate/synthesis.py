"""Spectral synthesis: galaxies of a population to observed spectra and photometry of bulge, disk and knots.

One galaxy = stars weighted in metallicity and age (`history`), nebular lines and continuum from the stars younger
than 28 Myr, birth clouds around stars and gas younger than 11 Myr, a diffuse law over everything (`dust`). The stars
are broadened by the velocity dispersion (beyond the 60 km/s of the MILES library); lines are Gaussians integrated
over pixels. The same code runs on two axes: fine (30 km/s) for spectra, coarse (600 km/s) for photometry; they agree
to 1 %.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import fft, special

from training.simulate import dust
from training.simulate.cosmology import SPEED_OF_LIGHT, luminosity_distance
from training.simulate.grid import TemplateGrid, load_grid
from training.simulate.history import HistoryParameters, age_weights, bulge_split, metal_weights
from training.simulate.photometry import SYSTEMS, band_weights

if TYPE_CHECKING:
    from training.simulate.populations import GalaxyPopulation

__all__ = ["COMPONENTS", "ComponentSpectra", "SpectralSynthesizer", "StellarMix"]

COMPONENTS = ("bulge", "disk", "knots")
# Angstrom: all of the SDSS, DECam, BASS and MzLS curves and the spectrograph; the coarse axis reaches WISE W1.
OBSERVED_RANGE = (2950.0, 11200.0)
COARSE_OBSERVED_RANGE = (2900.0, 41900.0)
BIRTH_CLOUD_AGE_GYR = 0.0112  # bin edge nearest the 10 Myr of Charlot & Fall (2000)
# Stars rich in alpha elements are bluer than the solar-scaled ones of the grid at equal total metallicity: an excess
# below about 4900 A, after Coelho et al. (2007) and Vazdekis et al. (2015), applied as a smooth step. Its strength,
# 0.14 mag at [alpha/Fe] = 0.4, is tuned (see `realism`); place and width of the step are chosen here.
ALPHA_EXCESS_MAG_PER_DEX = 0.35
ALPHA_EDGE, ALPHA_WIDTH = 4900.0, 250.0  # Angstrom
KNOT_AGE_GYR = 0.1  # stars younger than this may sit in knots
LIBRARY_SIGMA_KMS = 60.0  # MILES, FWHM 2.5 A (Beifiori et al. 2011), at 5300 A
_LSUN_PER_MPC2 = 3.826e33 / (4.0 * np.pi * 3.0857e24**2) * 1e17  # Lsun/A at 1 Mpc -> 1e-17 erg/s/cm2/A

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ComponentSpectra:
    """wave (L,) Angstrom, vacuum, observed frame, log-spaced (30 km/s); flux (N, 3, L) 1e-17 erg/s/cm2/A:
    COMPONENTS."""

    wave: FloatArray
    flux: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StellarMix:
    """Mass weights of a batch: ages (N, A) and metals (N, Z, A) fractions of mass formed, component shares (N, 3, A),
    living (N,) surviving fraction, log_metallicity (N,) mass-weighted, age_gyr (N,), log_ssfr (N,) (last 100 Myr)."""

    metals: FloatArray
    shares: FloatArray
    living: FloatArray
    log_metallicity: FloatArray
    age_gyr: FloatArray
    log_ssfr: FloatArray


class _Axis:
    """One resolution: rest templates, observed axis and the dust curves tabulated in the rest frame."""

    def __init__(self, rest_log: FloatArray, stellar: npt.NDArray[np.float32], observed: tuple[float, float]) -> None:
        self.step = float(rest_log[1] - rest_log[0])
        self.rest_log = rest_log
        self.stellar = stellar.reshape(-1, rest_log.size)
        self.observed_log = np.arange(np.log(observed[0]), np.log(observed[1]), self.step)
        self.ratio = (rest_log - np.log(5500.0)).astype(np.float32)
        rest_wave = np.exp(rest_log)
        self.calzetti = dust.calzetti_law(rest_wave).astype(np.float32)
        self.bump = dust.bump_profile(rest_wave).astype(np.float32)
        self.alpha = special.expit((ALPHA_EDGE - rest_wave) / ALPHA_WIDTH).astype(np.float32)
        self.cloud = dust.birth_cloud_law(self.ratio).astype(np.float32)

    def window(self, redshift: float) -> tuple[slice, slice, float]:
        """(rest slice one pixel longer than the target, target slice, fraction) of a shift to redshift z.

        Observed pixel i lies at rest pixel start + i + fraction; pixels beyond the rest axis are left out.
        """
        offset = (self.observed_log[0] - np.log1p(redshift) - self.rest_log[0]) / self.step
        start = int(np.floor(offset))
        first = max(0, -start)
        last = min(self.observed_log.size, self.rest_log.size - 1 - start)
        return slice(start + first, start + last + 1), slice(first, last), offset - start


class SpectralSynthesizer:
    """Turns populations into spectra and photometry; holds the template grid, read-only after construction."""

    def __init__(self, grid: TemplateGrid) -> None:
        self.grid = grid
        self._fine = _Axis(grid.fine_log_wave, grid.fine, OBSERVED_RANGE)
        self._coarse = _Axis(grid.coarse_log_wave, grid.coarse, COARSE_OBSERVED_RANGE)
        self._young = int(np.sum(grid.age_edges[1:] <= BIRTH_CLOUD_AGE_GYR * 1.001))
        self._knot = grid.age < KNOT_AGE_GYR
        self._nebular = grid.nebular.reshape(-1, grid.coarse_log_wave.size)
        self._lines = grid.line.reshape(-1, grid.line_wave.size)
        self._halpha = int(np.argmin(np.abs(grid.line_wave - 6564.61)))
        self._bands = {
            system: band_weights(grid.curves(names), self._coarse.observed_log).astype(np.float32)
            for system, names in SYSTEMS.items()
        }

    @classmethod
    def load(
        cls, cache_dir: str | os.PathLike[str] | None = None, grid_file: str | os.PathLike[str] | None = None
    ) -> SpectralSynthesizer:
        """From `grid_file` (needs numpy and scipy alone), or from the cache, built there by the first call."""
        return cls(load_grid(grid_file, cache_dir))

    @property
    def wave(self) -> FloatArray:
        """Observed wavelengths of `components`, (L,) Angstrom, vacuum."""
        return np.exp(self._fine.observed_log)

    def components(self, population: GalaxyPopulation) -> ComponentSpectra:
        """Spectra of the three components, dust-attenuated, with lines."""
        flux = np.empty((len(population), 3, self._fine.observed_log.size), np.float32)
        for start in range(0, len(population), 64):
            part = population[start : start + 64]
            flux[start : start + 64] = self._synthesize(self._fine, part, broaden=True)
        return ComponentSpectra(self.wave, flux)

    def photometry(self, population: GalaxyPopulation, system: str = "south") -> FloatArray:
        """Nanomaggies (N, 3 components, bands): systems south, north (g, r, z), sdss (u, g, r, i, z), wise (W1)."""
        return self.photometries(population, (system,))[system]

    def photometries(self, population: GalaxyPopulation, systems: tuple[str, ...]) -> dict[str, FloatArray]:
        """`photometry` in several systems from one synthesis."""
        parts: dict[str, list[FloatArray]] = {system: [] for system in systems}
        for start in range(0, len(population), 256):
            flux = self._synthesize(self._coarse, population[start : start + 256], broaden=False)
            for system in systems:
                parts[system].append((flux @ self._bands[system]).astype(float))
        return {system: np.concatenate(found) for system, found in parts.items()}

    def mix(self, population: GalaxyPopulation) -> StellarMix:
        """Mass weights and the properties that follow from them."""
        p, grid = population, self.grid
        history = HistoryParameters(
            p.redshift, p.sfh_tau_gyr, p.sfh_alpha, p.sfh_beta, p.recent_factor, p.recent_time_gyr
        )
        ages = age_weights(history, grid.age_edges)
        metals, log_metallicity = metal_weights(ages, p.metallicity_scale, p.metallicity_slope, grid)
        living = np.einsum("nza,za->n", metals, grid.living)
        bulge = bulge_split(ages, p.bulge_mass_fraction, grid.age)
        knots = (1.0 - bulge) * np.where(self._knot, p.knot_fraction[:, None], 0.0)
        shares = np.stack((bulge, 1.0 - bulge - knots, knots), axis=1)
        alive = np.einsum("nza,za->na", metals, grid.living) / living[:, None]
        recent = np.clip((0.1 - grid.age_edges[:-1]) / np.diff(grid.age_edges), 0.0, 1.0)
        rate = np.maximum(ages @ recent, 1e-8) / 1e8 / living
        return StellarMix(metals, shares, living, log_metallicity, alive @ grid.age, np.log10(rate))

    def _synthesize(self, axis: _Axis, p: GalaxyPopulation, broaden: bool) -> npt.NDArray[np.float32]:
        n, mix = len(p), self.mix(p)
        formed = 10**p.log_stellar_mass / mix.living
        scale = formed * _LSUN_PER_MPC2 / luminosity_distance(p.redshift) ** 2 / (1.0 + p.redshift)
        weights = (mix.metals[:, None] * mix.shares[:, :, None]).astype(np.float32)  # (N, 3, Z, A)
        young, old = weights.copy(), weights.copy()
        young[..., self._young :], old[..., : self._young] = 0.0, 0.0
        old_spectra = old.reshape(3 * n, -1) @ axis.stellar
        columns = np.tile(np.arange(self.grid.age.size) < self._young, self.grid.log_metallicity.size)
        young_spectra = young.reshape(3 * n, -1)[:, columns] @ axis.stellar[columns]
        gas = self._gas_weights(p, mix)
        continuum, lines = gas @ self._nebular, gas @ self._lines
        ionising = self._ionising_shares(gas, mix)
        flux = np.zeros((n, 3, axis.observed_log.size), np.float32)
        for i in range(n):
            flux[i] = self._redden(
                axis, p, i, old_spectra[3 * i : 3 * i + 3], young_spectra[3 * i : 3 * i + 3],
                np.outer(ionising[i], continuum[i]),
            )  # fmt: skip
        if broaden:
            flux = _broaden(
                flux, np.sqrt(np.maximum(p.velocity_dispersion_kms**2 - LIBRARY_SIGMA_KMS**2, 900.0)), axis.step
            )
        profile = self._line_profiles(axis, p, lines)
        flux += ionising[:, :, None].astype(np.float32) * profile[:, None, :]
        flux *= scale[:, None, None].astype(np.float32)
        return flux

    def _redden(
        self, axis: _Axis, p: GalaxyPopulation, i: int, old: npt.NDArray[np.float32],
        young: npt.NDArray[np.float32], nebular: FloatArray,
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        """Dust and redshift of one galaxy: (3, R) rest spectra to the observed axis."""
        source, target, fraction = axis.window(float(p.redshift[i]))
        law = dust.diffuse_law(
            axis.calzetti[source], axis.bump[source], axis.ratio[source], float(p.dust_slope[i]), float(p.dust_bump[i])
        )
        diffuse = np.exp(np.float32(-0.921034 * p.dust_av[i]) * law)
        cloud = np.exp(np.float32(-0.921034 * p.birth_cloud_av[i]) * axis.cloud[source])
        if axis is not self._coarse:
            nebular = self._to_fine(nebular, axis.rest_log[source])
        else:
            nebular = nebular[:, source]
        alpha = np.exp(np.float32(0.921034 * ALPHA_EXCESS_MAG_PER_DEX * p.alpha_fe[i]) * axis.alpha[source])
        rest = (old[:, source] * alpha + (young[:, source] + nebular.astype(np.float32)) * cloud) * diffuse
        out = np.zeros((3, axis.observed_log.size), np.float32)
        out[:, target] = rest[:, :-1] * np.float32(1.0 - fraction) + rest[:, 1:] * np.float32(fraction)
        return out

    def _to_fine(self, coarse: FloatArray, log_wave: FloatArray) -> FloatArray:
        return np.stack([np.interp(log_wave, self._coarse.rest_log, row) for row in coarse])

    def _gas_weights(self, p: GalaxyPopulation, mix: StellarMix) -> npt.NDArray[np.float32]:
        """(N, Z*U*Y): young mass spread bilinearly over gas metallicity and ionisation parameter."""
        grid = self.grid
        mass = mix.metals.sum(axis=1)[:, : grid.n_young] * p.nebular_scale[:, None]
        metal = _hat_weights(np.clip(p.gas_metallicity, grid.log_metallicity[0], 0.2), grid.log_metallicity)
        ion = _hat_weights(np.clip(p.log_u, grid.log_u[0], grid.log_u[-1]), grid.log_u)
        weights = metal[:, :, None, None] * ion[:, None, :, None] * mass[:, None, None, :]
        return np.asarray(weights.reshape(len(p), -1).astype(np.float32))

    def _ionising_shares(self, gas: npt.NDArray[np.float32], mix: StellarMix) -> FloatArray:
        """(N, 3) share of each component in the ionising photons, from the H-alpha its young stars power."""
        n_young = self.grid.n_young
        by_age = (gas * self._lines[:, self._halpha]).reshape(gas.shape[0], -1, n_young).sum(axis=1)
        share = np.einsum("ny,ncy->nc", by_age, mix.shares[:, :, :n_young])
        return np.asarray(share / np.maximum(share.sum(axis=1, keepdims=True), 1e-30))

    def _line_profiles(
        self, axis: _Axis, p: GalaxyPopulation, lines: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """(N, L): attenuated lines as pixel-integrated Gaussians, Lsun/A per Msun formed (rest Angstrom)."""
        ratio = np.log(self.grid.line_wave / 5500.0)
        wave = self.grid.line_wave
        calzetti, bump = dust.calzetti_law(wave), dust.bump_profile(wave)
        law = (calzetti + p.dust_bump[:, None] * bump) * np.exp(p.dust_slope[:, None] * ratio)
        depth = p.dust_av[:, None] * law + p.birth_cloud_av[:, None] * dust.birth_cloud_law(ratio)
        strength = lines * 10 ** (-0.4 * depth)  # Lsun / Msun
        sigma = np.maximum(p.gas_dispersion_kms / SPEED_OF_LIGHT, 0.2 * axis.step) / axis.step  # pixels
        centre = (np.log(wave) + np.log1p(p.redshift)[:, None] - axis.observed_log[0]) / axis.step
        half = int(np.ceil(5.0 * sigma.max())) + 1
        pixel = np.rint(centre).astype(int)[:, :, None] + np.arange(-half, half + 1)
        edge = (np.concatenate((pixel, pixel[:, :, -1:] + 1), axis=2) - 0.5 - centre[:, :, None]) / sigma[:, None, None]
        density = strength[:, :, None] * np.diff(special.ndtr(edge), axis=2) / (wave[:, None] * axis.step)
        size = axis.observed_log.size
        inside = (pixel >= 0) & (pixel < size)
        index = pixel + np.arange(len(p))[:, None, None] * size
        summed = np.bincount(index[inside], weights=density[inside], minlength=len(p) * size)
        return np.asarray(summed.reshape(len(p), size).astype(np.float32))


def _hat_weights(value: FloatArray, nodes: FloatArray) -> FloatArray:
    """Linear interpolation weights (N, nodes)."""
    upper = np.clip(np.searchsorted(nodes, value), 1, nodes.size - 1)
    share = (value - nodes[upper - 1]) / (nodes[upper] - nodes[upper - 1])
    weights = np.zeros((value.size, nodes.size))
    rows = np.arange(value.size)
    weights[rows, upper], weights[rows, upper - 1] = share, 1.0 - share
    return weights


def _broaden(flux: npt.NDArray[np.float32], sigma_kms: FloatArray, step: float) -> npt.NDArray[np.float32]:
    """Convolve (N, 3, L) along the log axis with Gaussians of sigma_kms (N,); edges are held constant."""
    pad = 64
    padded = np.pad(flux, ((0, 0), (0, 0), (pad, pad)), mode="edge")
    size = fft.next_fast_len(padded.shape[2], real=True)
    frequency = 2.0 * np.pi * fft.rfftfreq(size)
    sigma = sigma_kms / SPEED_OF_LIGHT / step
    kernel = np.exp(-0.5 * (sigma[:, None] * frequency) ** 2).astype(np.float32)
    spectrum = fft.rfft(padded, n=size, axis=2) * kernel[:, None, :]
    return np.asarray(fft.irfft(spectrum, n=size, axis=2)[:, :, pad : pad + flux.shape[2]].astype(np.float32))
