"""Input statistics: finite, named, and telling galaxies from what only shares their pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sky import make_image, make_spectrum

from astroclip.preprocess import GridSpectrum, LinearSpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.preprocess.statistics import STATISTICS, image_statistics, spectrum_statistics


def test_the_grids_carry_them_by_name(rng):
    image, spectrum = image_to_grid(make_image(rng)), spectrum_to_grid(make_spectrum(rng))
    for modality, grid in (("image", image), ("spectrum", spectrum)):
        assert len(grid.quality.statistics) == len(STATISTICS[modality]) == len(set(STATISTICS[modality]))
        assert np.isfinite(grid.quality.statistics).all()


def named(modality: str, values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(STATISTICS[modality], values, strict=True))


def image_of(pixels: np.ndarray) -> dict[str, float]:
    return named("image", image_statistics(pixels.astype(np.float32), np.ones(pixels.shape, bool)))


def test_an_image_and_its_permuted_pixels(rng):
    pixels = image_to_grid(make_image(rng, radius=3.0)).pixels
    permuted = pixels.reshape(3, -1)[:, rng.permutation(96 * 96)].reshape(pixels.shape)
    galaxy, junk, sky = image_of(pixels), image_of(permuted), image_of(image_to_grid(make_image(rng, flux=0.0)).pixels)
    assert galaxy["source_snr"] > junk["source_snr"] + 1 > sky["source_snr"]
    assert galaxy["concentration"] > junk["concentration"] + 0.2
    assert galaxy["sharp"] < 0.4 < junk["sharp"]
    assert galaxy["agreement"] > 0.9 and sky["agreement"] < 0.2
    assert image_of(-pixels)["dark"] > galaxy["dark"] + 2


def test_an_image_does_not_depend_on_its_unit(rng):
    pixels = image_to_grid(make_image(rng)).pixels
    assert list(image_of(pixels).values()) == pytest.approx(list(image_of(1000 * pixels).values()), rel=1e-3)


@pytest.mark.parametrize("pixels", [np.zeros((3, 96, 96)), np.eye(96)[None].repeat(3, 0), np.full((2, 32, 32), 1e30)])
def test_drawings_have_finite_ones(pixels):
    assert np.isfinite(list(image_of(pixels).values())).all()
    nothing = image_statistics(pixels.astype(np.float32), np.zeros(pixels.shape, bool))
    assert np.isfinite(nothing).all()


def spectrum_of(grid: GridSpectrum) -> dict[str, float]:
    return named("spectrum", grid.quality.statistics)


def test_a_spectrum_shuffled_reversed_and_drowned(rng):
    spectrum = make_spectrum(rng)
    galaxy = spectrum_of(spectrum_to_grid(spectrum))
    shuffled = spectrum_of(spectrum_to_grid(replace(spectrum, flux=rng.permutation(spectrum.flux))))
    reverse = spectrum_of(spectrum_to_grid(replace(spectrum, flux=spectrum.flux[::-1].copy())))
    noise = rng.normal(0, 0.5, spectrum.flux.shape).astype(np.float32)
    nothing = spectrum_of(spectrum_to_grid(replace(spectrum, flux=noise)))
    assert shuffled["structure_256"] < galaxy["structure_256"] - 1
    assert galaxy["shape_0"] < galaxy["shape_7"] and reverse["shape_0"] > reverse["shape_7"]
    assert abs(nothing["structure_16"]) < 0.5 and nothing["snr"] < 0.2 < galaxy["snr"]


def test_a_band_that_is_missing_takes_the_mean_of_the_others(rng):
    spectrum = make_spectrum(rng)
    ivar = np.where(spectrum.wave > 8700, 0, spectrum.ivar).astype(np.float32)
    found = spectrum_of(spectrum_to_grid(replace(spectrum, ivar=ivar)))
    assert found["shape_7"] == pytest.approx(np.mean([found[f"shape_{i}"] for i in range(7)]), abs=1e-4)


def test_other_grids_and_the_shortest_spectrum():
    grid = LinearSpectrumGrid()
    flux, ivar = np.ones(grid.n_pixels, np.float32), np.zeros(grid.n_pixels, np.float32)
    ivar[:100] = 1.0
    assert np.isfinite(spectrum_statistics(flux, ivar)).all()
