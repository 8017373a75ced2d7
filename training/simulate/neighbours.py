"""What else falls on a cutout: foreground stars and other galaxies, with the sky's number counts.

Rough numbers. Galaxies: N(<r) of about 10^4.55 a square degree at r = 23, slope 0.34 dex a magnitude, after Capak et
al. (2007, ApJS 172, 99). Counts of bright galaxies are steeper (Yasuda et al. 2001, AJ 122, 1104: 0.6 at r < 16), so
the one slope gives 2-3 times too many at r < 19.5, where DESI's bright sample has about 800. Colours and shapes are
borrowed from a pool of simulated galaxies; sizes: median 0.5 arcsec at r = 22.5, chosen here. Stars: 10^3.6 a square
degree at r = 22 at high latitude, slope 0.13, after Bahcall & Soneira (1980), colours along the stellar locus, after
Covey et al. (2007, AJ 134, 2398).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import galsim
import numpy as np
import numpy.typing as npt

from training.simulate.profiles import PARAMETERS, sersic

__all__ = ["Neighbours", "Pool", "draw_neighbours", "paint"]

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]

FAINTEST, BRIGHTEST = 23.5, 14.0  # r magnitudes
_GALAXY_COUNT_23, _GALAXY_SLOPE = 10.0**4.55, 0.34  # per square degree brighter than r = 23
_STAR_COUNT_22, _STAR_SLOPE = 10.0**3.6, 0.13
_GALAXY_BRIGHTEST = 17.0
_SMALL = 48  # pixels: the box that a faint source is drawn in


@dataclass(frozen=True)
class Pool:
    """r (N,) mag, colours (N,2: g-r, r-z), axis ratios and bulge fractions (N,) of galaxies to borrow from."""

    r_mag: FloatArray
    colours: FloatArray
    axis_ratio: FloatArray
    bulge_fraction: FloatArray

    def borrow(self, r_mag: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """For each magnitude a galaxy of the pool near it (one of the 30 nearest), so that colours suit brightness."""
        order = np.argsort(self.r_mag, kind="stable")
        place = np.searchsorted(self.r_mag[order], r_mag) + rng.integers(-15, 16, len(r_mag))
        return order[np.clip(place, 0, len(order) - 1)]


@dataclass(frozen=True)
class Neighbours:
    """M sources: x, y arcsec from the stamp's centre; flux (M,3) nanomaggies; radius arcsec, 0 for a star."""

    x: FloatArray
    y: FloatArray
    flux: FloatArray
    radius: FloatArray
    axis_ratio: FloatArray
    pa_deg: FloatArray
    index: FloatArray

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> Neighbours:
        return Neighbours(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _magnitudes(
    count: float, pivot: float, slope: float, bright: float, area: float, rng: np.random.Generator
) -> FloatArray:
    """A Poisson draw of magnitudes with N(<m) = count 10^(slope (m - pivot)) a square degree over `area` of them."""
    low, high = (10.0 ** (slope * (m - pivot)) for m in (bright, FAINTEST))
    n = rng.poisson(count * (high - low) * area)
    return pivot + np.log10(rng.uniform(low, high, n)) / slope


def draw_neighbours(pool: Pool, half_width: float, rng: np.random.Generator) -> Neighbours:
    """Sources over a square of +-`half_width` arcsec."""
    area = (2.0 * half_width / 3600.0) ** 2
    galaxies = _magnitudes(_GALAXY_COUNT_23, 23.0, _GALAXY_SLOPE, _GALAXY_BRIGHTEST, area, rng)
    stars = _magnitudes(_STAR_COUNT_22, 22.0, _STAR_SLOPE, BRIGHTEST, area, rng)
    n_gal, n_star = len(galaxies), len(stars)
    borrowed = pool.borrow(galaxies, rng)
    size = 0.5 * 10.0 ** (-0.11 * (galaxies - 22.5)) * rng.lognormal(0.0, 0.45, n_gal)
    g_r = np.where(rng.random(n_star) < 0.4, rng.normal(1.42, 0.09, n_star), rng.uniform(0.25, 1.4, n_star))
    r_z = np.where(g_r > 1.25, rng.triangular(0.85, 1.05, 2.2, n_star), 0.75 * g_r - 0.1)
    colours = np.concatenate([pool.colours[borrowed], np.stack([g_r, r_z], axis=1)])
    r_mag = np.concatenate([galaxies, stars])
    magnitudes = np.stack([r_mag + colours[:, 0], r_mag, r_mag - colours[:, 1]], axis=1)
    n = n_gal + n_star
    x, y = rng.uniform(-half_width, half_width, (2, n))
    # Targeting avoids objects under bright sources (masks of Myers et al. 2023, AJ 165, 50). A rough stand-in: none
    # brighter than 19 mag within 1.5 arcsec, and 2 arcsec more for each magnitude; fainter ones may blend.
    clear = np.hypot(x, y) > np.where(r_mag < 19.0, 1.5 + 2.0 * (19.0 - r_mag), 0.0)
    return Neighbours(
        x=x,
        y=y,
        flux=10.0 ** (-0.4 * (magnitudes - 22.5)),
        radius=np.concatenate([size, np.zeros(n_star)]),
        axis_ratio=np.concatenate([pool.axis_ratio[borrowed], np.ones(n_star)]),
        pa_deg=rng.uniform(0.0, 180.0, n),
        index=np.concatenate([np.where(pool.bulge_fraction[borrowed] > 0.5, 4.0, 1.0), np.ones(n_star)]),
    )[clear]


def paint(pixels: Array, sources: Neighbours, psfs: list[galsim.GSObject], scale: float) -> None:
    """Add the sources' light to `pixels` (3, S, S; `scale` arcsec each) in place.

    Faint sources are drawn in a small box; bright and wide ones over the whole image, for their wings.
    """
    images = [galsim.Image(band, scale=scale) for band in pixels]
    whole = images[0].bounds
    for i in range(len(sources.x)):
        place = whole.true_center + galsim.PositionD(sources.x[i], sources.y[i]) / scale
        bright = sources.flux[i, 1] > 100.0 or sources.radius[i] > 2.0
        box = whole if bright else whole & _box(place)
        if not box.isDefined():
            continue
        galaxy = None
        if sources.radius[i] > 0.0:
            galaxy = sersic(sources.index[i], sources.radius[i], sources.axis_ratio[i], sources.pa_deg[i])
        for image, psf, flux in zip(images, psfs, sources.flux[i], strict=True):
            seen = psf if galaxy is None else galsim.Convolve(psf, galaxy, gsparams=PARAMETERS)
            seen.withFlux(float(flux)).drawImage(image[box], center=place, add_to_image=True)


def _box(place: galsim.PositionD) -> galsim.BoundsI:
    middle = place.round()
    return galsim.BoundsI(middle.x, middle.x, middle.y, middle.y).withBorder(_SMALL // 2)
