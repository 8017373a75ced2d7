"""One shard of the simulated survey: a population in one HEALPix pixel, imaged and observed with the spectrograph.

Everything drawn depends on the survey's seed and the shard's number alone, so shards can be made in any order, by any
number of processes, on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import gammainc, gammaincinv

from training.simulate import imaging, neighbours, spectrograph
from training.simulate.extinction import draw_ebv
from training.simulate.footprint import photometric_system, positions_in_pixel
from training.simulate.mmu import round_to_noise

if TYPE_CHECKING:
    from training.simulate.populations import GalaxyPopulation

__all__ = ["Shard", "Synthesizer", "disk_radius", "simulate_shard"]

Columns = dict[str, npt.NDArray[Any]]
FloatArray = npt.NDArray[np.float64]

CHUNK = 100  # galaxies whose spectra are held at once: 3 components x 13,000 pixels x 4 bytes each
_PROPERTIES = (
    "redshift log_stellar_mass log_metallicity age_gyr log_ssfr dust_av half_light_radius_arcsec bulge_fraction"
    " axis_ratio velocity_dispersion_kms gas_metallicity flux_g flux_r flux_z"
).split()


class Synthesizer(Protocol):
    """What a shard asks of `training.simulate.synthesis.SpectralSynthesizer`."""

    def components(self, population: GalaxyPopulation) -> Any: ...

    def photometry(self, population: GalaxyPopulation, system: str = ...) -> FloatArray: ...


@dataclass(frozen=True)
class Shard:
    """What makes a shard what it is: its number, the HEALPix pixel, first object number, size, seed, class shares."""

    number: int
    pixel: int
    first_object: int
    size: int
    seed: int
    mix: tuple[tuple[str, float], ...]

    def generators(self) -> list[np.random.Generator]:
        """Independent generators for the population, the images, the spectra and the sky positions."""
        children = np.random.SeedSequence(self.seed, spawn_key=(self.number,)).spawn(4)
        return [np.random.default_rng(child) for child in children]


def simulate_shard(shard: Shard, synthesizer: Any) -> Columns:
    """All columns, Multimodal Universe names. Images: nanomaggies a pixel; spectra: 1e-17 erg/s/cm2/A."""
    for_population, for_images, for_spectra, for_sky = shard.generators()
    population = _population(shard, synthesizer, for_population)
    photsys = photometric_system(shard.pixel)
    ebv = draw_ebv(shard.size, for_sky)
    ra, dec = positions_in_pixel(shard.pixel, shard.size, for_sky)
    columns: Columns = {
        "object_id": np.array([f"sim-{shard.first_object + i:08d}" for i in range(shard.size)], dtype="S12"),
        "ra": ra,
        "dec": dec,
        "healpix": np.full(shard.size, shard.pixel, dtype=np.int64),
        "Z": population.redshift.astype(np.float32),
    }
    columns |= {name: np.asarray(getattr(population, name), dtype=np.float32) for name in _PROPERTIES}
    columns["target_class"] = np.asarray(population.target_class).astype("S4")
    columns["photsys"] = np.full(shard.size, photsys, dtype="S1")
    columns["ebv"] = ebv.astype(np.float32)
    columns |= _images(population, synthesizer, photsys, ebv, for_images)
    columns |= _spectra(population, synthesizer, ebv, for_spectra)
    return columns


def _population(shard: Shard, synthesizer: Any, rng: np.random.Generator) -> GalaxyPopulation:
    from training.simulate.populations import GalaxyPopulation, draw_population

    shares = np.array([share for _, share in shard.mix])
    counts = rng.multinomial(shard.size, shares / shares.sum())
    parts = [
        draw_population(int(count), rng, name, synthesizer)
        for (name, _), count in zip(shard.mix, counts, strict=True)
        if count
    ]
    return GalaxyPopulation.concatenate(parts)[rng.permutation(shard.size)]


def disk_radius(population: GalaxyPopulation) -> FloatArray:
    """Half-light radius of the disk (arcsec, major axis) such that bulge and disk together have the galaxy's, (N,).

    Solves B P_bulge(R) + (1 - B) P_disk(R) = 1/2 at the galaxy's radius R by bisection; P is the growth curve of a
    Sersic profile (Graham & Driver 2005, PASA 22, 118).
    """
    share, ratio = population.bulge_fraction, population.bulge_size_ratio
    index = population.sersic_bulge

    def held(n: npt.ArrayLike, x: FloatArray) -> FloatArray:
        return gammainc(2.0 * np.asarray(n), gammaincinv(2.0 * np.asarray(n), 0.5) * x ** (1.0 / np.asarray(n)))

    low, high = np.full(len(share), 0.3), np.full(len(share), 12.0)  # disk radius / galaxy radius
    for _ in range(40):
        middle = np.sqrt(low * high)
        inside = share * held(index, 1.0 / (ratio * middle)) + (1.0 - share) * held(1.0, 1.0 / middle)
        low, high = np.where(inside > 0.5, middle, low), np.where(inside > 0.5, high, middle)
    return population.half_light_radius_arcsec * np.sqrt(low * high)


def _images(
    population: GalaxyPopulation, synthesizer: Any, photsys: str, ebv: FloatArray, rng: np.random.Generator
) -> Columns:
    n, size = len(population), imaging.STAMP
    system = {"S": "south", "N": "north"}[photsys]
    flux = imaging.extinguish(synthesizer.photometry(population, system), ebv[:, None])
    conditions = imaging.draw_conditions(n, photsys, ebv, rng)
    disk = disk_radius(population)
    total = np.maximum(flux.sum(axis=1), 1e-6)
    colours = -2.5 * np.log10(total[:, :2] / total[:, 1:])
    pool = neighbours.Pool(
        22.5 - 2.5 * np.log10(total[:, 1]), colours, population.axis_ratio, population.bulge_fraction
    )
    scale = imaging.PIXEL_SCALE
    pixels, mask = np.empty((n, 3, size, size), np.float32), np.empty((n, 3, size, size), bool)
    for row in range(n):
        psfs = imaging.band_psfs(conditions, row)
        shape = imaging.draw_shape(population, row, disk[row], rng)
        light = imaging.target_light(shape, flux[row], psfs, rng)
        others = neighbours.draw_neighbours(pool, (size / 2 + 8) * scale, rng)
        neighbours.paint(light, others, psfs, scale)
        pixels[row], mask[row] = imaging.add_noise(light, conditions, row, rng)
    return {
        "image_array": round_to_noise(pixels, conditions.sky_sigma[:, :, None, None].astype(np.float32)),
        "image_mask": mask,
        "image_band": np.tile(np.array([b"DES-G", b"DES-R", b"DES-Z"]), (n, 1)),
        "image_psf_fwhm": conditions.psf_fwhm.astype(np.float32),
        "image_scale": np.full((n, 3), scale, np.float32),
        "image_sky_sigma": conditions.sky_sigma.astype(np.float32),
    }


def _spectra(population: GalaxyPopulation, synthesizer: Any, ebv: FloatArray, rng: np.random.Generator) -> Columns:
    n, length = len(population), len(spectrograph.WAVE)
    exposures = spectrograph.draw_exposures(population.target_class, rng)
    disk = disk_radius(population)
    radii = np.stack([disk * population.bulge_size_ratio, disk], axis=1)
    ratios = np.stack([imaging.bulge_axis_ratio(population.axis_ratio), population.axis_ratio], axis=1)
    fractions = spectrograph.fibre_fractions(radii, ratios, population.sersic_bulge, exposures.seeing_arcsec)
    lsf_scale = float(np.clip(rng.normal(1.0, 0.03), 0.9, 1.1))  # one spectrograph a shard
    spectra = {name: np.empty((n, length), np.float32) for name in ("flux", "ivar", "flux_true")}
    mask = np.empty((n, length), bool)
    matrix = None
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        found = synthesizer.components(population[rows])
        if matrix is None:
            matrix = spectrograph.resample(found.wave, lsf_scale)
        seen = spectrograph.observe(found.flux, fractions[rows], ebv[rows], exposures[rows], matrix, rng)
        sigma = (1.0 / np.sqrt(np.where(seen.mask, 1.0, seen.ivar))).astype(np.float32)
        spectra["flux"][rows] = round_to_noise(seen.flux, sigma)
        spectra["flux_true"][rows] = round_to_noise(seen.flux_true, sigma / np.float32(4))
        spectra["ivar"][rows] = round_to_noise(seen.ivar, seen.ivar)
        mask[rows] = seen.mask
    columns: Columns = {f"spectrum_{name}": values for name, values in spectra.items()}
    columns["spectrum_mask"] = mask
    columns["spectrum_lambda"] = np.broadcast_to(spectrograph.WAVE.astype(np.float32), (n, length))
    columns["spectrum_lsf_sigma"] = np.broadcast_to(spectrograph.lsf_sigma(lsf_scale).astype(np.float32), (n, length))
    columns["exposure_s"] = exposures.exposure_s.astype(np.float32)
    columns["fibre_seeing_arcsec"] = exposures.seeing_arcsec.astype(np.float32)
    return columns
