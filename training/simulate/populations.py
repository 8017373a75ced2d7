"""Galaxy populations: physical parameters of simulated galaxies that a survey's target selection let through."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from training.simulate import priors
from training.simulate.cosmology import age_of_universe, differential_volume, kpc_per_arcsec
from training.simulate.history import solve_decline
from training.simulate.selection import TARGET_CLASSES, Proposal, fiber_fraction, select
from training.simulate.synthesis import ComponentSpectra, SpectralSynthesizer

__all__ = ["ComponentSpectra", "GalaxyPopulation", "SpectralSynthesizer", "draw_candidates", "draw_population"]

FloatArray = npt.NDArray[np.float64]
_BATCH = 512
_LIVING = 0.6  # typical surviving mass fraction (Kroupa IMF): the drawn sSFR is per surviving mass


@dataclass(frozen=True)
class GalaxyPopulation:
    """N galaxies, every field an array (N,); `population[i:j]` and `population[index]` give populations.

    Catalogue: redshift; log_stellar_mass (surviving, Msun); log_metallicity (mass-weighted log10 Z/Zsun); age_gyr
    (mass-weighted); log_ssfr (last 100 Myr, 1/yr); dust_av (diffuse A_V, mag); flux_g, flux_r, flux_z (true total
    nanomaggies, DECam); target_class.
    Structure: bulge_fraction (of observed r-band light), half_light_radius_kpc / _arcsec (semi-major, whole galaxy),
    bulge_size_ratio (bulge over disk half-light radius), sersic_bulge, axis_ratio (disk), position_angle_deg,
    n_knots, knot_fraction (of disk stars younger than 100 Myr that sit in knots).
    Kinematics: velocity_dispersion_kms (stars), gas_dispersion_kms.
    Synthesis: sfh_*, recent_*, metallicity_scale, metallicity_slope, alpha_fe, bulge_mass_fraction, gas_metallicity,
    log_u, nebular_scale, birth_cloud_av, dust_slope, dust_bump.
    """

    redshift: FloatArray
    log_stellar_mass: FloatArray
    log_metallicity: FloatArray
    age_gyr: FloatArray
    log_ssfr: FloatArray
    dust_av: FloatArray
    bulge_fraction: FloatArray
    half_light_radius_kpc: FloatArray
    half_light_radius_arcsec: FloatArray
    bulge_size_ratio: FloatArray
    sersic_bulge: FloatArray
    axis_ratio: FloatArray
    position_angle_deg: FloatArray
    velocity_dispersion_kms: FloatArray
    gas_dispersion_kms: FloatArray
    n_knots: npt.NDArray[np.int64]
    knot_fraction: FloatArray
    flux_g: FloatArray
    flux_r: FloatArray
    flux_z: FloatArray
    target_class: npt.NDArray[np.str_]
    sfh_tau_gyr: FloatArray
    sfh_alpha: FloatArray
    sfh_beta: FloatArray
    recent_factor: FloatArray
    recent_time_gyr: FloatArray
    metallicity_scale: FloatArray
    metallicity_slope: FloatArray
    alpha_fe: FloatArray
    bulge_mass_fraction: FloatArray
    gas_metallicity: FloatArray
    log_u: FloatArray
    nebular_scale: FloatArray
    birth_cloud_av: FloatArray
    dust_slope: FloatArray
    dust_bump: FloatArray

    def __len__(self) -> int:
        return int(self.redshift.size)

    def __getitem__(self, index: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> GalaxyPopulation:
        return GalaxyPopulation(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def concatenate(parts: list[GalaxyPopulation]) -> GalaxyPopulation:
        """All parts, in order."""
        return GalaxyPopulation(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(GalaxyPopulation)}
        )


def draw_population(
    n: int, rng: np.random.Generator, target_class: str, synthesizer: SpectralSynthesizer
) -> GalaxyPopulation:
    """Exactly n galaxies of a class (BGS, LRG, ELG; SDSS for the realism check), in random order.

    Candidates are drawn from the priors and kept when their noisy synthetic photometry passes the cuts.
    Deterministic in the generator's state. Raises KeyError for an unknown class.
    """
    proposal = TARGET_CLASSES[target_class]
    parts: list[GalaxyPopulation] = []
    kept = 0
    while kept < n:
        candidates = draw_candidates(_BATCH, rng, target_class, proposal)
        chosen = _observe(candidates, rng, synthesizer)
        parts.append(chosen)
        kept += len(chosen)
    return GalaxyPopulation.concatenate(parts)[:n]


def _observe(
    candidates: GalaxyPopulation, rng: np.random.Generator, synthesizer: SpectralSynthesizer
) -> GalaxyPopulation:
    sdss = str(candidates.target_class[0]) == "SDSS"
    systems = ("south", "sdss", "twomass") if sdss else ("south", "wise")
    flux = synthesizer.photometries(candidates, systems)
    names: tuple[str, ...]
    south = flux["south"].sum(axis=1)
    if sdss:
        names, columns = (*"ugriz", "Ks"), (flux["sdss"].sum(axis=1), flux["twomass"].sum(axis=1))
    else:
        names, columns = ("g", "r", "z", "W1"), (south, flux["wise"].sum(axis=1))
    bands = dict(zip(names, np.column_stack(columns).T, strict=True))
    fraction = fiber_fraction(candidates.half_light_radius_arcsec, candidates.axis_ratio)
    keep = select(str(candidates.target_class[0]), bands, fraction, rng)
    mix = synthesizer.mix(candidates)
    measured = replace(
        candidates,
        log_metallicity=mix.log_metallicity,
        age_gyr=mix.age_gyr,
        log_ssfr=mix.log_ssfr,
        bulge_fraction=flux["south"][:, 0, 1] / south[:, 1],
        flux_g=south[:, 0],
        flux_r=south[:, 1],
        flux_z=south[:, 2],
    )
    return measured[keep]


def draw_candidates(n: int, rng: np.random.Generator, target_class: str, proposal: Proposal) -> GalaxyPopulation:
    """n galaxies from the priors before any selection; photometry and what follows from synthesis is 0."""
    z, mass = _redshift_and_mass(n, rng, proposal)
    quiescent = rng.random(n) < priors.quiescent_fraction(mass, z)
    if proposal.star_forming_only:
        quiescent[:] = False
    history = _histories(mass, z, quiescent, rng)
    log_ssfr = history.pop("log_ssfr")
    bulge = priors.bulge_mass_fraction(mass, log_ssfr, rng)
    axis = priors.axis_ratio(bulge, rng)
    av, clouds, slope, bump = priors.dust_attenuation(mass, quiescent, log_ssfr, axis, rng)
    gas = priors.gas_metallicity(mass, log_ssfr + mass, z, rng)
    sigma = priors.velocity_dispersion(mass, rng)
    radius = priors.half_light_radius_kpc(mass, quiescent, z, rng)
    zeros = np.zeros(n)
    return GalaxyPopulation(
        redshift=z, log_stellar_mass=mass, log_metallicity=zeros, age_gyr=zeros, log_ssfr=log_ssfr, dust_av=av,
        bulge_fraction=zeros, half_light_radius_kpc=radius, half_light_radius_arcsec=radius / kpc_per_arcsec(z),
        bulge_size_ratio=np.clip(10 ** rng.normal(-0.55, 0.15, n), 0.1, 0.8),
        sersic_bulge=np.clip(rng.normal(2.0 + 2.0 * bulge, 0.7, n), 0.8, 6.0),
        axis_ratio=axis, position_angle_deg=rng.uniform(0.0, 180.0, n), velocity_dispersion_kms=sigma,
        gas_dispersion_kms=priors.gas_dispersion(mass, axis, quiescent, sigma, rng),
        n_knots=rng.poisson(np.clip(12.0 * radius, 8.0, 80.0)), knot_fraction=rng.uniform(0.2, 0.8, n),
        flux_g=zeros, flux_r=zeros, flux_z=zeros, target_class=np.full(n, target_class, dtype="U8"),
        metallicity_scale=priors.stellar_metallicity(mass, quiescent, z, rng),
        metallicity_slope=np.clip(rng.normal(0.3, 0.15, n), 0.0, 0.8),
        alpha_fe=priors.alpha_enhancement(sigma, quiescent, rng),
        bulge_mass_fraction=bulge, gas_metallicity=gas, log_u=priors.ionisation_parameter(gas, log_ssfr, rng),
        nebular_scale=np.clip(10 ** rng.normal(-0.2, 0.1, n), 0.2, 1.2),
        birth_cloud_av=clouds, dust_slope=slope, dust_bump=bump, **history,
    )  # fmt: skip


def _histories(
    mass: FloatArray, z: FloatArray, quiescent: npt.NDArray[np.bool_], rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Double-power-law histories that reach a drawn sSFR.

    Star-forming: main sequence with 0.25 dex scatter plus recent variations of 0.2 dex: 0.32 dex together, the width
    as commonly observed (Speagle et al. 2014, ApJS 214, 15, find 0.2 dex once errors are taken out). Quiescent: log
    sSFR about -12.4, an eighth in the green valley (about -11.1), both chosen here. Peaks follow downsizing (massive
    galaxies formed earlier), after Thomas et al. (2010); the times are chosen here. 3 % had a burst of up to 6 times
    the rate within the last Gyr.
    """
    n = z.size
    present = age_of_universe(z)
    sequence = priors.log_main_sequence_rate(mass, z) - mass + 0.25 * rng.standard_normal(n)
    valley = np.where(rng.random(n) < 0.12, -11.1, -12.4)
    log_ssfr = np.where(quiescent, valley + 0.35 * rng.standard_normal(n), sequence)
    passive_peak = np.clip(3.2 - 1.3 * (mass - 10.8), 0.8, 6.0) * 10 ** (0.15 * rng.standard_normal(n))
    passive_peak = np.minimum(passive_peak, (0.60 - 0.2 * rng.random(n)) * present)
    active_peak = present * np.clip(rng.normal(0.5 - 0.1 * (mass - 10.0), 0.2, n), 0.08, 0.85)
    tau = np.where(quiescent, passive_peak, active_peak)
    beta = 10 ** rng.normal(0.35, 0.25, n)
    alpha = solve_decline(log_ssfr + np.log10(_LIVING), z, tau, beta)
    factor = 10 ** (0.2 * rng.standard_normal(n))
    burst = rng.random(n) < 0.03
    factor = np.where(burst, factor * 10 ** rng.uniform(0.2, 0.8, n), factor)
    time = 10 ** rng.uniform(-1.5, 0.0, n)
    return {
        "log_ssfr": log_ssfr, "sfh_tau_gyr": tau, "sfh_alpha": alpha, "sfh_beta": beta,
        "recent_factor": factor, "recent_time_gyr": time,
    }  # fmt: skip


def _redshift_and_mass(n: int, rng: np.random.Generator, proposal: Proposal) -> tuple[FloatArray, FloatArray]:
    """Draw from volume times the mass function, above the mass that could be bright enough at each redshift."""
    z_grid = np.linspace(proposal.z_min, proposal.z_max, 160)
    mass_grid = np.arange(proposal.log_mass_min, proposal.log_mass_max, 0.02)
    density = priors.mass_function(mass_grid[None, :], z_grid[:, None]) * differential_volume(z_grid)[:, None]
    density *= mass_grid[None, :] > proposal.least_log_mass(z_grid)[:, None]
    cumulative = np.cumsum(density.ravel())
    flat = np.searchsorted(cumulative, rng.random(n) * cumulative[-1])
    row, column = np.unravel_index(np.minimum(flat, density.size - 1), density.shape)
    z = z_grid[row] + (z_grid[1] - z_grid[0]) * (rng.random(n) - 0.5)
    return np.clip(z, proposal.z_min, proposal.z_max), mass_grid[column] + 0.02 * (rng.random(n) - 0.5)
