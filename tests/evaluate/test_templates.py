"""Template redshifts: found to a fraction of a pixel on spectra made of the templates, and on real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from astroclip.preprocess import SpectrumGrid
from training.evaluate.metrics import outlier_fraction, sigma_nmad
from training.evaluate.realsky import load_objects
from training.evaluate.templates import FILE, TemplateRedshift

GRID = SpectrumGrid(n_pixels=1024)


@pytest.fixture(scope="module")
def templates() -> TemplateRedshift:
    """A continuum with a break and three sets of lines, on redrock's kind of rest-frame grid."""
    wave = 1166.7 + 0.5 * np.arange(17700)
    lines = [(2799.1, 3728.5), (4862.7, 4960.3, 5008.2), (6549.9, 6564.6, 6585.3)]
    basis = [(wave / 4000) ** 0.3 * np.where(wave < 4000, 0.5, 1.0)]
    basis += [sum(np.exp(-0.5 * ((wave - line) / 4) ** 2) for line in some) for some in lines]
    archetypes = np.array([[1, a, b, c] for a in (0.2, 2) for b in (0.1, 1.5) for c in (0.2, 2)], float)
    return TemplateRedshift(np.stack(basis), archetypes, 1166.7, 0.5, GRID)


def observed(templates: TemplateRedshift, z: np.ndarray, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    wave = templates.first + templates.step * np.arange(templates.basis.shape[1])
    flux = np.empty((len(z), GRID.n_pixels))
    for i, redshift in enumerate(z):
        mix = templates.archetypes[rng.integers(len(templates.archetypes))] * rng.uniform(0.8, 1.2, 4)
        fine = np.interp(GRID.edges[:-1, None] + np.diff(GRID.edges)[:, None] * np.linspace(0.05, 0.95, 10),
                         wave * (1 + redshift), mix @ templates.basis).mean(axis=1)  # fmt: skip
        tilt = 1 + 0.2 * np.linspace(-1, 1, GRID.n_pixels)  # calibration: the polynomial's share
        flux[i] = 3 * fine + tilt + noise * rng.normal(size=GRID.n_pixels)
    return flux, np.full_like(flux, noise**-2)


def test_redshifts_of_mixtures_are_found_within_a_fraction_of_a_pixel(templates: TemplateRedshift):
    z = np.array([0.02, 0.113, 0.35, 0.7, 0.95])
    flux, ivar = observed(templates, z, 0.3, 1)
    ivar[2, 100:200] = 0  # a gap, with rubbish in it
    flux[2, 100:200] = 1e4
    found = templates(flux, ivar)
    pixel = np.log(GRID.wave_max / GRID.wave_min) / GRID.n_pixels
    assert np.abs(np.log1p(found) - np.log1p(z)).max() < 0.35 * pixel


def test_nothing_known_gives_nan_and_short_templates_are_refused(templates: TemplateRedshift):
    found = templates(np.zeros((1, GRID.n_pixels)), np.zeros((1, GRID.n_pixels)))
    assert np.isnan(found).all()
    short = TemplateRedshift(templates.basis[:, :5000], templates.archetypes, templates.first, templates.step, GRID)
    with pytest.raises(ValueError, match="templates reach"):
        short(*observed(templates, np.array([0.1]), 0.3, 1))


def test_real_galaxies_with_redrocks_templates(shared_data: Path):
    fit = TemplateRedshift.load(shared_data / FILE, SpectrumGrid())
    objects = [o for o in load_objects(shared_data, SpectrumGrid())[0] if o.spectype == "GALAXY" and o.group == "sdss"]
    truth = np.array([item.redshift for item in objects])
    found = fit(np.stack([o.flux for o in objects]), np.stack([o.ivar for o in objects]))
    assert outlier_fraction(truth, found) <= 0.1 and sigma_nmad(truth, found) < 2e-4
