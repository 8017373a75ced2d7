"""Star-formation and enrichment histories: from a few numbers a galaxy to mass formed per metallicity and age bin.

History: double power law in cosmic time, psi ~ 1 / ((t/tau)^alpha + (t/tau)^-beta) (as in Carnall et al. 2018, MNRAS
480, 4379), with the last `recent_time` Gyr multiplied by `recent_factor` (bursts above 1, quenching below). Within a
galaxy the mean metallicity rises with the mass already formed; around that mean stars spread by 0.2 dex, and 3 % of
them are metal-poor, the tail that keeps red-sequence colours as blue as observed (Maraston et al. 2009, MNRAS 394,
L107, find about 3 % of the mass in luminous red galaxies; used for all galaxies here).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from training.simulate.cosmology import age_of_universe
from training.simulate.grid import TemplateGrid

__all__ = ["HistoryParameters", "age_weights", "bulge_split", "metal_weights", "solve_decline"]

FloatArray = npt.NDArray[np.float64]
_SUB = 6  # sub-steps an age bin
# Metallicities of stars about their mean (dex) and their mass shares: 97 % a Gaussian of 0.2 dex in equal quintiles
# (chosen here), 3 % (Maraston et al. 2009) at a twentieth of it (rough).
_SPREAD = np.append(0.2 * special.ndtri((np.arange(5) + 0.5) / 5.0), -1.3)
_SPREAD_SHARE = np.append(np.full(5, 0.97 / 5.0), 0.03)


@dataclass(frozen=True)
class HistoryParameters:
    """Per galaxy, all (N,): tau (Gyr of cosmic time), alpha (decline), beta (rise), recent_factor, recent_time
    (Gyr)."""

    redshift: FloatArray
    tau: FloatArray
    alpha: FloatArray
    beta: FloatArray
    recent_factor: FloatArray
    recent_time: FloatArray


def age_weights(history: HistoryParameters, edges: FloatArray) -> FloatArray:
    """Fraction of all mass formed in each age bin, (N, A), rows sum to 1. edges: (A+1,) Gyr, ascending."""
    fraction = (np.arange(_SUB) + 0.5) / _SUB
    age = (edges[:-1, None] + np.diff(edges)[:, None] * fraction).ravel()
    width = np.repeat(np.diff(edges) / _SUB, _SUB)
    time = age_of_universe(history.redshift)[:, None] - age
    rate = _rate(time, history)
    recent = age[None, :] < history.recent_time[:, None]
    rate *= np.where(recent, history.recent_factor[:, None], 1.0)
    mass = (rate * width).reshape(rate.shape[0], -1, _SUB).sum(axis=2)
    return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def _rate(time: FloatArray, history: HistoryParameters) -> FloatArray:
    log_x = np.log(np.maximum(time, 1e-3) / history.tau[:, None])
    exponent = np.logaddexp(history.alpha[:, None] * log_x, -history.beta[:, None] * log_x)
    return np.where(time > 0.05, np.exp(-np.minimum(exponent, 80.0)), 0.0)


def solve_decline(log_ssfr: FloatArray, redshift: FloatArray, tau: FloatArray, beta: FloatArray) -> FloatArray:
    """alpha (N,) that gives the wanted log10 of (rate now / mass formed) in 1/yr, as near as 0.02 <= alpha <= 60
    allows."""
    present = age_of_universe(redshift)
    grid = present[:, None] * (np.arange(80) + 0.5) / 80.0
    low, high = np.full(redshift.shape, np.log(0.02)), np.full(redshift.shape, np.log(60.0))
    for _ in range(14):
        middle = 0.5 * (low + high)
        trial = HistoryParameters(redshift, tau, np.exp(middle), beta, np.ones_like(tau), np.zeros_like(tau))
        now = _rate(present[:, None], trial)[:, 0]
        formed = _rate(grid, trial).mean(axis=1) * present * 1e9
        too_active = np.log10(np.maximum(now, 1e-40) / formed) > log_ssfr
        low, high = np.where(too_active, middle, low), np.where(too_active, high, middle)
    return np.exp(0.5 * (low + high))


def metal_weights(
    ages: FloatArray, log_metallicity: FloatArray, slope: FloatArray, grid: TemplateGrid
) -> tuple[FloatArray, FloatArray]:
    """Spread each age bin over metallicity: ((N, Z, A) mass weights summing to 1, (N,) log10 mass-weighted Z/Zsun).

    ages: (N, A) mass fractions; log_metallicity: (N,) wanted mean; slope: (N,) dex gained from the first to the last
    star.
    """
    formed_before = ages[:, ::-1].cumsum(axis=1)[:, ::-1] - 0.5 * ages
    centre = log_metallicity[:, None] + slope[:, None] * (formed_before - 0.5)
    nodes = grid.log_metallicity
    value = np.clip(centre[:, :, None] + _SPREAD, nodes[0], nodes[-1])
    upper = np.clip(np.searchsorted(nodes, value), 1, nodes.size - 1)
    share = (value - nodes[upper - 1]) / (nodes[upper] - nodes[upper - 1])
    weights = np.zeros((ages.shape[0], nodes.size, ages.shape[1]))
    for node in range(nodes.size):
        part = np.where(upper == node, share, 0.0) + np.where(upper - 1 == node, 1.0 - share, 0.0)
        weights[:, node] = (part @ _SPREAD_SHARE) * ages
    mean = np.log10(np.sum((10**value @ _SPREAD_SHARE) * ages, axis=1))
    return weights, mean


def bulge_split(ages: FloatArray, bulge_fraction: FloatArray, centres: FloatArray, width: float = 0.15) -> FloatArray:
    """Share (N, A) of each age bin that belongs to the bulge: a logistic in log age, older stars first.

    bulge_fraction: (N,) of the mass; the midpoint is solved so that the bulge holds exactly that mass (to 1e-4).
    """
    log_age = np.log10(centres)
    low, high = np.full(ages.shape[0], -6.0), np.full(ages.shape[0], 4.0)
    for _ in range(24):
        middle = 0.5 * (low + high)
        share = 1.0 / (1.0 + np.exp(np.clip((middle[:, None] - log_age) / width, -60.0, 60.0)))
        too_big = (share * ages).sum(axis=1) > bulge_fraction
        low, high = np.where(too_big, middle, low), np.where(too_big, high, middle)
    return share
