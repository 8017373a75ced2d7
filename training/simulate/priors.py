"""Scaling relations the population is drawn from, each with its scatter and its source.

A paper named with an equation or a table gives the numbers as they stand here; "after" means its trend, with
coefficients chosen here; whatever was changed is said. Scatter is chosen here unless a source is given.

Masses are log10 of surviving stellar mass in Msun (Kroupa / Chabrier), rates Msun/yr, sizes kpc (semi-major
half-light radius). Functions take arrays and return means or, where they take a generator, draws.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from training.simulate.cosmology import age_of_universe

__all__ = [
    "alpha_enhancement",
    "axis_ratio",
    "bulge_mass_fraction",
    "dust_attenuation",
    "gas_dispersion",
    "gas_metallicity",
    "half_light_radius_kpc",
    "ionisation_parameter",
    "log_main_sequence_rate",
    "mass_function",
    "quiescent_fraction",
    "stellar_metallicity",
    "velocity_dispersion",
]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Rng = np.random.Generator


def mass_function(log_mass: FloatArray, z: FloatArray) -> FloatArray:
    """Galaxies per Mpc^3 per dex: evolving double Schechter function of Leja et al. (2020, ApJ 893, 111, appendix B).

    Its parameters are quadratics through the values at z = 0.2, 1.6, 3.0; below z = 0.2, where the fit ends, they are
    held. All galaxies, star-forming and quiescent. Their masses (Prospector) are larger than those behind the other
    relations here, so that massive galaxies are somewhat too many; no correction is made.
    """
    z = np.clip(z, 0.2, 3.0)

    def quadratic(a: float, b: float, c: float) -> FloatArray:
        nodes = np.array([0.2, 1.6, 3.0])
        return np.asarray(np.polyval(np.polyfit(nodes, [a, b, c], 2), z))

    log_phi1, log_phi2 = quadratic(-2.44, -3.08, -4.14), quadratic(-2.89, -3.29, -3.51)
    x = 10 ** (log_mass - quadratic(10.79, 10.88, 10.84))
    density = 10**log_phi1 * x ** (-0.28 + 1.0) + 10**log_phi2 * x ** (-1.48 + 1.0)
    return np.asarray(np.log(10.0) * np.exp(-x) * density)


def quiescent_fraction(log_mass: FloatArray, z: FloatArray) -> FloatArray:
    """Fraction of quiescent galaxies: rough. A logistic in mass about 10.4 + 0.4 z, after the mass where the two mass
    functions of Muzzin et al. (2013, ApJ 777, 18) cross, plus a share quenched at any mass at low z, after the
    environment quenching of Peng et al. (2010, ApJ 721, 193). Shape and shares are chosen here."""
    crossing = 10.4 + 0.4 * z
    by_mass = 1.0 / (1.0 + np.exp(-(log_mass - crossing) / 0.25))
    satellites = 0.12 * np.exp(-z / 0.7)
    return np.asarray(np.minimum(satellites + (1.0 - satellites) * by_mass * 0.95, 0.97))


def log_main_sequence_rate(log_mass: FloatArray, z: FloatArray) -> FloatArray:
    """log10 SFR of the star-forming main sequence, Popesso et al. (2023, MNRAS 519, 1526, eq. 14): bends over at high
    mass. Fitted for log mass 8.5-11.5; below that the slope of the low end goes on."""
    t = age_of_universe(z)
    turnover = 10.85 - 0.0729 * t
    return np.asarray(2.693 - 0.186 * t - np.log10(1.0 + 10 ** (0.99 * (turnover - log_mass))))


# Mass and median: Gallazzi et al. 2005, table 2 (three of their rows left out, which moves the median by 0.02 dex at
# most). The spread is not theirs: 0.6-0.8 of half their 16-84 % range, for they include the errors of measurement.
_GALLAZZI_MASS = np.array([8.91, 9.31, 9.72, 9.91, 10.11, 10.31, 10.51, 10.72, 10.91, 11.11, 11.31, 11.51, 11.91])
_GALLAZZI_MEDIAN = np.array([-0.60, -0.65, -0.52, -0.41, -0.23, -0.11, -0.01, 0.04, 0.07, 0.10, 0.12, 0.13, 0.15])
_GALLAZZI_SPREAD = np.array([0.45, 0.40, 0.36, 0.34, 0.30, 0.24, 0.20, 0.17, 0.15, 0.13, 0.12, 0.11, 0.11])


def stellar_metallicity(log_mass: FloatArray, quiescent: BoolArray, z: FloatArray, rng: Rng) -> FloatArray:
    """log10(Z/Zsun): the median of Gallazzi et al. (2005, MNRAS 362, 41, table 2), light-weighted there and taken as
    mass-weighted here, lowered by 0.08 dex (quiescent) and 0.15 dex (star-forming) and by 0.1 dex per unit z.

    Star-forming galaxies are poorer after Peng et al. (2015, Nature 521, 192), by one step at all masses, where theirs
    shrinks with mass; offsets tuned (see `realism`). Scatter: 0.65 of the column above, together 0.38-0.53 of
    half the published 16-84 % range.
    """
    median = np.interp(log_mass, _GALLAZZI_MASS, _GALLAZZI_MEDIAN)
    spread = 0.65 * np.interp(log_mass, _GALLAZZI_MASS, _GALLAZZI_SPREAD)
    offset = np.where(quiescent, -0.08, -0.15) - 0.1 * z
    return np.clip(median + offset + spread * rng.standard_normal(z.shape), -1.6, 0.35)


def alpha_enhancement(sigma_kms: FloatArray, quiescent: BoolArray, rng: Rng) -> FloatArray:
    """[alpha/Fe] of the stars: -0.55 + 0.33 log sigma for early types (fit to the red sequence by Thomas et al. 2010,
    MNRAS 404, 1775), half of that where stars still form (chosen here); scatter 0.05 dex."""
    early = -0.55 + 0.33 * np.log10(sigma_kms)
    return np.clip(np.where(quiescent, early, 0.5 * early) + 0.05 * rng.standard_normal(early.shape), 0.0, 0.4)


def gas_metallicity(log_mass: FloatArray, log_rate: FloatArray, z: FloatArray, rng: Rng) -> FloatArray:
    """log10 gas-phase O/H relative to solar (8.69): Curti et al. (2020, MNRAS 491, 944, eq. 2 and table 4; Chabrier
    masses), scatter 0.1 dex.

    Lowered by 0.1 dex per dex of SFR above the present-day main sequence: a rough stand-in for their fundamental
    relation, which has no such constant slope.
    """
    relation = 8.793 - 0.28 / 1.2 * np.log10(1.0 + 10 ** (-1.2 * (log_mass - 10.02)))
    excess = log_rate - log_main_sequence_rate(log_mass, np.full_like(z, 0.05))
    return np.clip(relation - 8.69 - 0.1 * np.clip(excess, -1.0, 1.5) + 0.1 * rng.standard_normal(z.shape), -1.5, 0.2)


def ionisation_parameter(gas: FloatArray, log_ssfr: FloatArray, rng: Rng) -> FloatArray:
    """log U: falls with metallicity, after Carton et al. (2017, MNRAS 468, 2140: -0.8 log Z/Zsun - 3.58), and rises
    with sSFR, after Kaasinen et al. (2018, MNRAS 477, 5568); scatter 0.2 dex, kept within -3.6..-2.2.

    Slopes and zero point are chosen here: the slope is shallower and solar metallicity lies 0.6 dex above Carton's.
    """
    mean = -3.0 - 0.6 * gas + 0.25 * np.clip(log_ssfr + 9.8, -1.0, 1.5)
    return np.clip(mean + 0.2 * rng.standard_normal(gas.shape), -3.6, -2.2)


def dust_attenuation(
    log_mass: FloatArray, quiescent: BoolArray, log_ssfr: FloatArray, axis: FloatArray, rng: Rng
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """(A_V of the diffuse dust, A_V of the birth clouds, slope delta, bump) of each galaxy.

    Star-forming: A(Ha) from mass (Garn & Best 2010, MNRAS 409, 421, eq. 5, scatter 0.28 mag; mass clipped), of which
    stars see A_V = 0.535 A(Ha) (Calzetti et al. 2000: E_star = 0.44 E_gas, k(Ha) = 3.33), more when inclined (after
    Battisti et al. 2017; strength chosen here); quiescent: exponential, mean 0.05 mag (chosen). Birth clouds carry the
    rest, 1.27 = 1/0.44 - 1 times A_V with 0.2 dex scatter. Slopes: steeper where A_V is low (after Salim et al. 2018)
    and shallower where sSFR is high (after Kriek & Conroy 2013), scatter 0.2, coefficients chosen; bump
    0.85 - 1.9 delta (Kriek & Conroy 2013, eq. 3) times 0.3-1, for weaker bumps are seen too.
    """
    x = np.clip(log_mass, 8.5, 11.3) - 10.0
    halpha = 0.91 + 0.77 * x + 0.11 * x**2 - 0.09 * x**3 + 0.28 * rng.standard_normal(x.shape)
    inclined = 1.0 + 0.7 * (0.55 - axis)
    active = np.maximum(0.535 * halpha * inclined, 0.02) * 10 ** (0.12 * rng.standard_normal(x.shape))
    passive = rng.exponential(0.05, x.shape)
    av = np.where(quiescent, passive, active)
    clouds = 1.27 * av * 10 ** (0.2 * rng.standard_normal(x.shape))
    active_slope = 0.25 * np.clip(log_ssfr + 10.0, 0.0, 1.5)
    slope = np.clip(-0.55 + 0.6 * np.minimum(av, 0.8) + active_slope + 0.2 * rng.standard_normal(x.shape), -1.2, 0.4)
    return av, clouds, slope, np.maximum(0.85 - 1.9 * slope, 0.0) * rng.uniform(0.3, 1.0, x.shape)


def bulge_mass_fraction(log_mass: FloatArray, log_ssfr: FloatArray, rng: Rng) -> FloatArray:
    """Bulge share of the mass: rises with mass and falls with sSFR, after Bluck et al. (2014) and Lang et al. (2014);
    rough, coefficients chosen here, scatter 1 in logit."""
    passive = 1.0 / (1.0 + np.exp((log_ssfr + 11.0) / 0.3))
    logit = -1.6 + 1.0 * (log_mass - 10.3) + 2.2 * passive + 1.0 * rng.standard_normal(log_mass.shape)
    return np.clip(1.0 / (1.0 + np.exp(-logit)), 0.02, 0.98)


_SIZE_Z = np.array([0.25, 0.75, 1.25, 1.75])
_LATE = np.array([[0.86, 0.78, 0.70, 0.65], [0.25, 0.22, 0.22, 0.23], [0.16, 0.16, 0.17, 0.18]])
_EARLY = np.array([[0.60, 0.42, 0.22, 0.09], [0.75, 0.71, 0.76, 0.76], [0.10, 0.11, 0.12, 0.14]])


def half_light_radius_kpc(log_mass: FloatArray, quiescent: BoolArray, z: FloatArray, rng: Rng) -> FloatArray:
    """Half-light radius: log R = A + alpha log(M / 5e10) and its scatter, van der Wel et al. (2014, ApJ 788, 28, table
    1; rest-frame 5000 A), linear in z between their bins and held outside. Early types below 2e10 Msun, where that
    fit ends, flatten to the slope of late ones (their data flatten; 0.25 is chosen here)."""
    x = log_mass - np.log10(5e10)
    late, early = ([np.interp(z, _SIZE_Z, row) for row in table] for table in (_LATE, _EARLY))
    early_mean = early[0] + early[1] * np.maximum(x, -0.4) + 0.25 * np.minimum(x + 0.4, 0.0)
    mean = np.where(quiescent, early_mean, late[0] + late[1] * x)
    scatter = np.where(quiescent, early[2], late[2])
    return np.asarray(10 ** (mean + scatter * rng.standard_normal(z.shape)))


def axis_ratio(bulge: FloatArray, rng: Rng) -> FloatArray:
    """Apparent axis ratio: randomly oriented disks of thickness 0.22 (median of Unterborn & Ryden 2008, ApJ 687, 976;
    their ellipticity of 0.08 left out) blended with rounder spheroids by bulge share (rough)."""
    cosine = rng.uniform(0.0, 1.0, bulge.shape)
    disk = np.sqrt(cosine**2 + 0.22**2 * (1.0 - cosine**2))
    spheroid = np.clip(rng.normal(0.75, 0.13, bulge.shape), 0.35, 1.0)
    return np.asarray(np.clip((1.0 - bulge) * disk + bulge * spheroid, 0.15, 1.0))


def velocity_dispersion(log_mass: FloatArray, rng: Rng) -> FloatArray:
    """Stellar velocity dispersion, km/s: Zahid et al. (2016, ApJ 832, 203, eq. 5 and table 1), measured on quiescent
    galaxies and used for all; scatter 0.08 dex."""
    x = log_mass - 10.26
    mean = np.log10(118.3) + np.where(x > 0.0, 0.293, 0.403) * x
    return np.clip(10 ** (mean + 0.08 * rng.standard_normal(x.shape)), 35.0, 380.0)


def gas_dispersion(
    log_mass: FloatArray, axis: FloatArray, quiescent: BoolArray, stellar: FloatArray, rng: Rng
) -> FloatArray:
    """Width of the integrated lines, km/s: turbulence of 30 km/s and the rotation seen by a fibre, 0.45 V sin i with
    the Tully-Fisher relation log V = 2.13 + 0.29 (log M - 10), after Reyes et al. (2011, MNRAS 417, 2347, eq. 39:
    2.142 + 0.278 (log M - 10.102)); turbulence and the 0.45 are rough. Quiescent galaxies as their stars."""
    sine = np.sqrt(np.clip(1.0 - axis**2, 0.02, 1.0))
    rotation = 0.45 * 10 ** (2.13 + 0.29 * (log_mass - 10.0)) * sine
    disk = np.sqrt(30.0**2 + rotation**2) * 10 ** (0.08 * rng.standard_normal(axis.shape))
    return np.clip(np.where(quiescent, 0.9 * stellar, disk), 25.0, 300.0)
