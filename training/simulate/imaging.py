"""Legacy-Survey-like cutouts: observing conditions, the target's light, detector noise and defects.

Seeing: median FWHM 1.29/1.18/1.11 arcsec in g/r/z for DECaLS and 1.61/1.47/1.01 for BASS and MzLS (Dey et al. 2019, AJ
157, 168). 5-sigma point-source depths of three passes: 24.65/23.61/22.84 (AB; DECaLS: Legacy Surveys' DR1 description)
and about 24.2/23.7/23.0 in the north, shallower or deeper with the number of passes as its square root; scatter and
shares of passes are rough. Moffat PSFs as in Trujillo et al. 2001 (MNRAS 328, 977), with beta about 3, below the 4.765
they find for turbulence alone: optics and coadding widen the wings. Images are not corrected for Galactic extinction,
as the surveys' own are not; nanomaggies per pixel, north up, east left. GalSim draws; one transform a band holds the
whole galaxy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import galsim
import numpy as np
import numpy.typing as npt

from training.simulate.extinction import BAND_COEFFICIENTS
from training.simulate.profiles import PARAMETERS, moffat, noise_equivalent_area, points, sersic

if TYPE_CHECKING:
    from training.simulate.populations import GalaxyPopulation

__all__ = [
    "BANDS",
    "PIXEL_SCALE",
    "STAMP",
    "Conditions",
    "Shape",
    "add_noise",
    "band_psfs",
    "bulge_axis_ratio",
    "draw_conditions",
    "draw_shape",
    "extinguish",
    "target_light",
]

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]

BANDS = ("g", "r", "z")
PIXEL_SCALE = 0.262  # arcsec, DECam
STAMP = 152  # pixels

_SEEING = {"S": (1.29, 1.18, 1.11), "N": (1.61, 1.47, 1.01)}
_DEPTH = {"S": (24.65, 23.61, 22.84), "N": (24.2, 23.7, 23.0)}
_SEEING_SCATTER = 0.11  # of the logarithm
_PASSES = (1, 2, 3, 4, 6, 10)  # ten: where the Dark Energy Survey went deeper
_PASS_SHARES = (0.10, 0.25, 0.35, 0.16, 0.08, 0.06)
# Electrons per nanomaggie of one pass: zero points of about 26.5/26.7/26.2 AB for 1 e-/s and 70/50/100 s exposures.
_GAIN = (2800.0, 2400.0, 3000.0)
_BETAS = (2.5, 3.5)  # GalSim transforms these in closed form, 3.0 at three times the cost
_ARM_BLOBS = 60  # enough, blurred, to look smooth


@dataclass(frozen=True)
class Conditions:
    """How N cutouts were observed.

    psf_fwhm (N,3) arcsec; psf_beta (N,); psf_axis_ratio, psf_pa_deg (N,); sky_sigma (N,3) nanomaggies a pixel;
    gain (N,3) electrons per nanomaggie; ebv (N,) mag; noise_correlation (N,) weight of the adjacent pixels.
    """

    psf_fwhm: FloatArray
    psf_beta: FloatArray
    psf_axis_ratio: FloatArray
    psf_pa_deg: FloatArray
    sky_sigma: FloatArray
    gain: FloatArray
    ebv: FloatArray
    noise_correlation: FloatArray


def draw_conditions(n: int, photsys: str, ebv: FloatArray, rng: np.random.Generator) -> Conditions:
    """Observing conditions of `n` cutouts; `photsys` "S" (DECaLS) or "N" (BASS + MzLS)."""
    fwhm = np.array(_SEEING[photsys]) * np.exp(
        0.6 * _SEEING_SCATTER * rng.standard_normal((n, 1)) + 0.8 * _SEEING_SCATTER * rng.standard_normal((n, 3))
    )
    beta = rng.choice(_BETAS, n)
    passes = rng.choice(_PASSES, (n, 3), p=_PASS_SHARES)
    depth = np.array(_DEPTH[photsys]) + 1.25 * np.log10(passes / 3.0) + rng.normal(0.0, 0.15, (n, 3))
    area = np.empty((n, 3))
    for value in _BETAS:
        for band in range(3):
            rows = beta == value
            area[rows, band] = noise_equivalent_area(value, fwhm[rows, band], PIXEL_SCALE)
    point_source_sigma = 10.0 ** (-0.4 * (depth - 22.5)) / 5.0
    return Conditions(
        psf_fwhm=fwhm,
        psf_beta=beta,
        psf_axis_ratio=1.0 - np.abs(rng.normal(0.0, 0.04, n)).clip(0, 0.2),
        psf_pa_deg=rng.uniform(0.0, 180.0, n),
        sky_sigma=point_source_sigma / np.sqrt(area) * PIXEL_SCALE,
        gain=np.array(_GAIN) * passes,
        ebv=ebv,
        noise_correlation=rng.uniform(0.0, 0.2, n),
    )


@dataclass(frozen=True)
class Shape:
    """One galaxy's geometry: arcsec, degrees.

    disk_radius, bulge_radius: half-light radii along the major axis; x, y: its place on the stamp (arcsec, west and
    north of the centre); knots: how many; arms: concentration to arms, 0..1; bar: share of the disk.
    """

    disk_radius: float
    bulge_radius: float
    bulge_index: float
    axis_ratio: float
    pa_deg: float
    x: float
    y: float
    knots: int
    arms: float
    bar: float = 0.0
    bar_angle_deg: float = 0.0


def bulge_axis_ratio(disk_axis_ratio: npt.ArrayLike) -> FloatArray:
    """Bulges are rounder than their disks: flattened 0.6 times as much."""
    return 1.0 - 0.6 * (1.0 - np.asarray(disk_axis_ratio, dtype=np.float64))


def draw_shape(population: GalaxyPopulation, row: int, disk_radius: float, rng: np.random.Generator) -> Shape:
    """Geometry of galaxy `row`, set down within half a pixel of the centre, with 0.1 arcsec of catalogue error."""
    # Bars in 40 % of disks: more than the 29 % seen by eye (Masters et al. 2011, MNRAS 411, 2026), since weak ones
    # count here, and less than automatic bar finders report.
    x, y = rng.uniform(-0.5, 0.5, 2) * PIXEL_SCALE + rng.normal(0.0, 0.1, 2)
    return Shape(
        disk_radius=disk_radius,
        bulge_radius=max(disk_radius * float(population.bulge_size_ratio[row]), 0.02),
        bulge_index=float(population.sersic_bulge[row]),
        axis_ratio=float(population.axis_ratio[row]),
        pa_deg=float(population.position_angle_deg[row]),
        x=float(x),
        y=float(y),
        knots=int(population.n_knots[row]),
        arms=float(rng.beta(1.5, 1.5)),
        bar=float(rng.uniform(0.03, 0.2) * (rng.random() < 0.4)),
        bar_angle_deg=float(rng.uniform(0.0, 180.0)),
    )


def band_psfs(conditions: Conditions, row: int) -> list[galsim.GSObject]:
    """PSFs of the three bands."""
    beta, ratio, pa = conditions.psf_beta[row], conditions.psf_axis_ratio[row], conditions.psf_pa_deg[row]
    return [moffat(float(fwhm), float(beta), float(ratio), float(pa)) for fwhm in conditions.psf_fwhm[row]]


def _pattern(shape: Shape, n: int, order: float, rng: np.random.Generator, seed_pattern: FloatArray) -> FloatArray:
    """`n` places (2, n) in a disk, arcsec from its centre: exponential in radius, the share `order` of them on arms.

    seed_pattern: pitch (radian), phase, number of arms, ring (1 or 0), one draw a galaxy, so that old arms and young
    knots agree. Arms are logarithmic spirals (pitch 10-30 degrees, rough; after Kennicutt 1981, AJ 86, 1847).
    """
    pitch, phase, arms, ring = seed_pattern
    radius = shape.disk_radius * rng.gamma(2.0, 1.0, n) / 1.678 * 1.15  # slightly wider than the smooth disk
    on_arm = rng.random(n) < order
    if ring:
        radius = np.where(on_arm, shape.disk_radius * rng.normal(1.1, 0.12, n), radius)
        theta = rng.uniform(-np.pi, np.pi, n)
    else:
        winding = np.log(np.maximum(radius, 0.05 * shape.disk_radius) / shape.disk_radius) / np.tan(pitch)
        spread = np.where(on_arm, rng.normal(0.0, 0.25, n), rng.uniform(-np.pi, np.pi, n))
        theta = winding + 2.0 * np.pi / arms * rng.integers(0, int(arms), n) + spread + phase
    along, across = radius * np.cos(theta), radius * np.sin(theta) * max(shape.axis_ratio, 0.15)
    angle = np.deg2rad(shape.pa_deg)
    return np.stack([-along * np.sin(angle) + across * np.cos(angle), along * np.cos(angle) + across * np.sin(angle)])


def _knots(shape: Shape, pattern: FloatArray, rng: np.random.Generator) -> galsim.GSObject:
    """Star-forming knots: luminosity function dN/dL ~ L^-1.8, within the -2 +- 0.5 of HII regions (Kennicutt, Edgar &
    Hodge 1989, ApJ 337, 761)."""
    n = max(shape.knots, 1)
    x, y = _pattern(shape, n, shape.arms, rng, pattern)
    flux = np.minimum(rng.pareto(0.8, n) + 1.0, 30.0)
    return points(x, y, flux, blur=0.06 * shape.disk_radius)


def _disk(shape: Shape, pattern: FloatArray, rng: np.random.Generator) -> galsim.GSObject:
    """Exponential disk of unit flux; where resolved and not edge-on, part of it is arms or a ring, and a bar."""
    disk = sersic(1.0, shape.disk_radius, shape.axis_ratio, shape.pa_deg)
    if shape.disk_radius < 1.0 or shape.axis_ratio < 0.35:
        return disk
    in_arms = 0.35 * shape.arms
    x, y = _pattern(shape, _ARM_BLOBS, 1.0, rng, pattern)
    parts = [
        (1.0 - in_arms - shape.bar) * disk,
        in_arms * points(x, y, np.ones(_ARM_BLOBS), blur=0.13 * shape.disk_radius),
    ]
    if shape.bar > 0.0:
        parts.append(shape.bar * sersic(0.5, 0.45 * shape.disk_radius, 0.35, shape.pa_deg + shape.bar_angle_deg))
    return galsim.Sum(parts)


def target_light(shape: Shape, flux: FloatArray, psfs: list[galsim.GSObject], rng: np.random.Generator) -> Array:
    """Noiseless image (3, S, S), nanomaggies a pixel, of bulge, disk and knots with fluxes (3 components, 3 bands)."""
    pitch, phase = np.deg2rad(rng.uniform(10.0, 30.0)), rng.uniform(0.0, 2.0 * np.pi)
    pattern = np.array([pitch, phase, rng.choice([2.0, 3.0, 4.0], p=[0.6, 0.2, 0.2]), rng.random() < 0.12])
    ratio = float(bulge_axis_ratio(shape.axis_ratio))
    components = (
        sersic(shape.bulge_index, shape.bulge_radius, ratio, shape.pa_deg),
        _disk(shape, pattern, rng),
        _knots(shape, pattern, rng),
    )
    light = np.zeros((len(psfs), STAMP, STAMP), np.float32)
    for band, psf in enumerate(psfs):
        lit = [float(f) * part for f, part in zip(flux[:, band], components, strict=True) if f > 0.0]
        if lit:
            scene = galsim.Convolve(psf, galsim.Sum(lit), gsparams=PARAMETERS).shift(shape.x, shape.y)
            scene.drawImage(galsim.Image(light[band], scale=PIXEL_SCALE))
    return light


def extinguish(flux: FloatArray, ebv: float | FloatArray) -> FloatArray:
    """Fluxes (..., 3 bands) behind Galactic dust of E(B-V) `ebv`."""
    return flux * 10.0 ** (-0.4 * np.asarray(ebv)[..., None] * BAND_COEFFICIENTS)


def _correlated(shape: tuple[int, ...], weight: float, rng: np.random.Generator) -> Array:
    """Unit noise whose adjacent pixels correlate, as in a resampled coadd: kernel (w, 1, w) along both axes."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if weight > 0.0:
        for axis in (-1, -2):
            noise = noise + np.float32(weight) * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
        noise /= np.float32(1.0 + 2.0 * weight**2)
    return noise


def add_noise(
    light: Array, conditions: Conditions, row: int, rng: np.random.Generator
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """A noisy cutout and its mask (True = bad) from noiseless light (3, S, S).

    Sky noise of `sky_sigma`, Poisson noise of the sources, a residual of the sky subtraction (a few per cent of the
    noise, with a gradient), and rare defects: bad columns, a missing corner where a CCD ends, cosmic rays, saturated
    cores with bleed trails. Bad pixels hold 0, as in the surveys' coadds.
    """
    sigma = conditions.sky_sigma[row].astype(np.float32)[:, None, None]
    gain = conditions.gain[row].astype(np.float32)[:, None, None]
    noise = np.sqrt(sigma**2 + np.maximum(light, 0.0) / gain)
    pixels = light + noise * _correlated(light.shape, float(conditions.noise_correlation[row]), rng)
    ramp = np.linspace(-1.0, 1.0, light.shape[-1], dtype=np.float32)
    level = rng.normal(0.0, (0.05, 0.02, 0.02), (3, 3)).astype(np.float32) * sigma[:, :, 0]
    pixels += level[:, 0, None, None] + level[:, 1, None, None] * ramp[:, None] + level[:, 2, None, None] * ramp
    mask = _defects(light, rng)
    pixels[mask] = 0.0
    return pixels.astype(np.float32), mask


# Peak surface brightness (nanomaggies a pixel) at which a detector saturates: a point source of about 15.5 mag.
_SATURATION = 60.0


def _defects(light: Array, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    mask = np.zeros(light.shape, dtype=bool)
    size = light.shape[-1]
    for band in range(light.shape[0]):
        luck = rng.random(4)
        if luck[0] < 0.03:  # bad column
            column = rng.integers(0, size)
            mask[band, :, column : column + rng.integers(1, 3)] = True
        if luck[1] < 0.01:  # the CCD's edge
            cut = rng.integers(4, size // 4)
            side = rng.integers(0, 4)
            np.rot90(mask[band], int(side))[:cut] = True
        if luck[2] < 0.05:  # cosmic ray
            x, y = rng.integers(2, size - 12, 2)
            length = rng.integers(2, 10)
            mask[band, y + np.arange(length) // 2, x + np.arange(length)] = True
        saturated = light[band] > _SATURATION
        if saturated.any():
            mask[band] |= saturated
            rows, columns = np.nonzero(saturated)
            middle, half = int(np.median(columns)), len(rows)
            mask[band, max(rows.min() - half, 0) : rows.max() + half, middle : middle + 2] = True
    return mask
