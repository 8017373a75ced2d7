"""Target selections: which galaxies a survey would have observed, from noisy photometry.

South cuts of the DESI main survey in extinction-free magnitudes: BGS (Hahn et al. 2023, AJ 165, 253), LRG (Zhou et
al. 2023, AJ 165, 58), ELG (Raichoor et al. 2023, AJ 165, 126; LOP and VLO together), as coded in desitarget. Left out:
star-galaxy separation, masks, the cuts on total flux in the fibre, and the north's other numbers. For the realism
check: the SDSS main sample (Strauss et al. 2002, AJ 124, 1810: r < 17.77) and LRGs (Eisenstein et al. 2001, AJ 122,
2267: cuts I and II without those on surface brightness and stars), both seen by 2MASS, since the real sample is a
GALEX-SDSS-2MASS match. SDSS magnitudes are true totals here, Petrosian ones there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.simulate.cosmology import distance_modulus
from training.simulate.photometry import ab_magnitude

__all__ = ["TARGET_CLASSES", "Proposal", "fiber_fraction", "noisy", "select"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Proposal:
    """Where candidates of a class are drawn, so that few are drawn in vain: redshift range, log mass range,
    star-forming only, and the faintest magnitude that could pass (None where only colours cut).

    limit: AB magnitude; solar_magnitude: of the Sun in that band, AB (Willmer 2018, ApJS 236, 47); mass_to_light: the
    least of any galaxy, solar; k_correction: the least, mag.
    """

    z_min: float
    z_max: float
    log_mass_min: float
    log_mass_max: float = 12.2
    star_forming_only: bool = False
    limit: float | None = None
    solar_magnitude: float = 4.65
    mass_to_light: float = 0.12
    k_correction: float = -0.2

    def least_log_mass(self, z: FloatArray) -> FloatArray:
        """Log mass below which nothing at z could pass the limit."""
        if self.limit is None:
            return np.full(z.shape, self.log_mass_min)
        absolute = self.limit - distance_modulus(z) - self.k_correction
        return np.asarray(np.log10(self.mass_to_light) - 0.4 * (absolute - self.solar_magnitude))


TARGET_CLASSES: dict[str, Proposal] = {
    "BGS": Proposal(0.003, 0.65, 7.0, limit=20.3),
    "LRG": Proposal(0.25, 1.25, 10.5),
    "ELG": Proposal(0.45, 1.50, 9.0, 11.6, star_forming_only=True),
    # Ks, at the faint end of the 2MASS completeness in `_sdss`.
    "SDSS": Proposal(0.003, 0.55, 7.5, limit=16.6, solar_magnitude=5.08, mass_to_light=0.3, k_correction=-0.6),
}

# 5-sigma point-source depths turned into the flux error of a galaxy, 1.5 times a point source's (rough). g, r, z:
# DECaLS where observed three times (Legacy Surveys' DR1 description). W1: rough, for forced photometry on the coadds
# of five years (Meisner et al. 2019); catalogues made of such data reach 20.4.
_DEPTH = {"g": 24.65, "r": 23.61, "z": 22.84, "W1": 21.5}


def noisy(flux: FloatArray, band: str, rng: np.random.Generator) -> FloatArray:
    """Flux (nanomaggies) with the noise of the imaging."""
    sigma = 1.5 * 10 ** (0.4 * (22.5 - _DEPTH[band])) / 5.0
    return flux + sigma * rng.standard_normal(flux.shape)


def fiber_fraction(radius_arcsec: FloatArray, axis_ratio: FloatArray, diameter_arcsec: float = 1.5) -> FloatArray:
    """Share of an exponential galaxy's light in a fibre under 1 arcsec seeing (half-light radii added in
    quadrature)."""
    effective = np.sqrt(radius_arcsec**2 * axis_ratio + 0.6**2)
    x = 1.678 * 0.5 * diameter_arcsec / effective
    return np.asarray(1.0 - (1.0 + x) * np.exp(-x))


def select(
    target_class: str,
    flux: dict[str, FloatArray],
    fraction: FloatArray,
    rng: np.random.Generator,
) -> BoolArray:
    """True for the candidates the class would target.

    flux: true total nanomaggies by band (g, r, z and W1 where used; class SDSS: u, g, r, i, z of SDSS and Ks);
    fraction: light in the fibre.
    """
    if target_class == "SDSS":
        return _sdss(flux, rng)
    observed = {band: noisy(value, band, rng) for band, value in flux.items()}
    mag = {band: ab_magnitude(value) for band, value in observed.items()}
    fiber = {band: ab_magnitude(value * fraction) for band, value in observed.items()}
    return {"BGS": _bgs, "LRG": _lrg, "ELG": _elg}[target_class](mag, fiber, rng)


def _bgs(mag: dict[str, FloatArray], fiber: dict[str, FloatArray], rng: np.random.Generator) -> BoolArray:
    """Bright: r < 19.5; faint: 19.5 <= r < 20.175 with a fibre magnitude limit that depends on colour; the faint
    half is observed less often, kept here with probability 0.5 (rough). The fibre cut of the bright sample is that
    of Hahn et al. (2023) for 17.8 < r < 20, taken for brighter galaxies too (theirs: fibre magnitude < r + 5.1)."""
    r, fib = mag["r"], fiber["r"]
    colour = (mag["z"] - mag["W1"]) - 1.2 * (mag["g"] - mag["r"]) + 1.2
    bright = (r < 19.5) & (fib < 22.9)
    faint = (r >= 19.5) & (r < 20.175) & ((fib < 20.75) | ((fib < 21.5) & (colour >= 0.0)))
    sane = (mag["g"] - r > -1.0) & (mag["g"] - r < 4.0) & (r - mag["z"] > -1.0) & (r - mag["z"] < 4.0)
    return np.asarray(sane & (r > 12.0) & (bright | (faint & (rng.random(r.shape) < 0.5))))


def _lrg(mag: dict[str, FloatArray], fiber: dict[str, FloatArray], rng: np.random.Generator) -> BoolArray:
    g, r, z, w1 = mag["g"], mag["r"], mag["z"], mag["W1"]
    non_stellar = z - w1 > 0.8 * (r - z) - 0.6
    low_z = (g - w1 > 2.9) | (r - w1 > 1.8)
    sliding = ((r - w1 > 1.8 * (w1 - 17.14)) & (r - w1 > w1 - 16.33)) | (r - w1 > 3.3)
    return np.asarray((fiber["z"] < 21.60) & non_stellar & low_z & sliding)


def _elg(mag: dict[str, FloatArray], fiber: dict[str, FloatArray], rng: np.random.Generator) -> BoolArray:
    g_r, r_z = mag["g"] - mag["r"], mag["r"] - mag["z"]
    common = (mag["g"] > 20.0) & (fiber["g"] < 24.1) & (r_z > 0.15) & (g_r < 0.5 * r_z + 0.1)
    return np.asarray(common & (g_r < -1.2 * r_z + 1.6))  # LOP: < 1.3; VLO: up to 1.6


def _sdss(flux: dict[str, FloatArray], rng: np.random.Generator) -> BoolArray:
    """Main (r < 17.77) or LRG cuts (I and II), times the completeness of the 2MASS Extended Source Catalog: 90 % at
    Ks = 13.5 (Vega; Jarrett et al. 2000, AJ 119, 2498), hardly any beyond 14.4 (the logistic is tuned, see `realism`);
    Ks(Vega) = Ks(AB) - 1.85 (Blanton & Roweis 2007, AJ 133, 734)."""
    g, r, i = (ab_magnitude(flux[band]) for band in ("g", "r", "i"))
    completeness = 1.0 / (1.0 + np.exp((ab_magnitude(flux["Ks"]) - 1.85 - 14.0) / 0.2))
    detected = rng.random(r.shape) < completeness
    parallel = 0.7 * (g - r) + 1.2 * ((r - i) - 0.18)
    across = (r - i) - (g - r) / 4.0 - 0.18
    cut_one = (r < 13.1 + parallel / 0.3) & (r < 19.2) & (np.abs(across) < 0.2)
    cut_two = (r < 19.5) & (across > 0.45 - (g - r) / 6.0) & (g - r > 1.30 + 0.25 * (r - i))
    return np.asarray(detected & (r > 12.0) & ((r < 17.77) | cut_one | cut_two))
