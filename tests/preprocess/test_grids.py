"""Putting objects on the model's grids: flux, noise, masks, and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sky import make_image, make_spectrum

from astroclip.errors import InputError
from astroclip.preprocess import SpectrumGrid, image_to_grid, overlap_matrix, rebin, spectrum_to_grid


def test_centre_crop_is_the_published_one(rng):
    image = make_image(rng)
    grid = image_to_grid(image)
    np.testing.assert_array_equal(grid.pixels, image.pixels[:, 28:124, 28:124])  # 152 -> rows 28..123
    assert grid.quality.snr > 20


def test_band_order_follows_names_not_positions(rng):
    image = make_image(rng)
    shuffled = replace(image, pixels=image.pixels[[2, 0, 1]], bands=("z", "g", "r"))
    np.testing.assert_array_equal(image_to_grid(shuffled).pixels, image_to_grid(image).pixels)


@pytest.mark.parametrize("scale", [0.131, 0.5])
def test_resampling_conserves_flux(rng, scale):
    size = int(152 * 0.262 / scale)
    image = replace(make_image(rng, size=size, radius=8 * 0.262 / scale / 2, noise=1e-3), pixel_scale_arcsec=scale)
    grid = image_to_grid(image)
    assert grid.pixels[1].sum() == pytest.approx(30.0, rel=0.03)
    assert "resampled" in {flag.code for flag in grid.quality.flags}


def test_a_small_cutout_is_padded_and_flagged(rng):
    image = make_image(rng, size=60)
    grid = image_to_grid(image)
    assert grid.quality.coverage == pytest.approx(60**2 / 96**2)
    assert not grid.valid[:, 0].any() and (grid.pixels[~grid.valid] == 0).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda i: replace(i, bands=("g", "r", "i")), "missing_band"),
        (lambda i: replace(i, pixels=i.pixels[:, :1, :1], mask=i.mask[:, :1, :1]), "field_too_small"),
        (lambda i: replace(i, pixels=np.ones_like(i.pixels)), "constant_image"),
        (lambda i: replace(i, mask=np.ones_like(i.mask)), "mostly_masked"),
        (lambda i: replace(i, pixel_scale_arcsec=float("nan")), "bad_pixel_scale"),
    ],
)
def test_unusable_images_are_refused(rng, change, code):
    with pytest.raises(InputError) as caught:
        image_to_grid(change(make_image(rng)))
    assert caught.value.code == code


def test_rebinning_propagates_noise(rng):
    grid = SpectrumGrid()
    wave = 3600 + 0.8 * np.arange(7781)
    overlap = overlap_matrix(wave, grid)
    flux = 5 + rng.normal(0, 2, (64, wave.size))
    out, ivar = rebin(flux, np.full_like(flux, 0.25), overlap)
    chi = (out - 5) * np.sqrt(ivar)
    assert chi.std() == pytest.approx(1.0, abs=0.02)
    assert out.mean() == pytest.approx(5.0, abs=0.01)


def test_rebinning_keeps_a_line_in_its_place(rng):
    grid = SpectrumGrid()
    wave = 3600 + 0.8 * np.arange(7781)
    flux = np.exp(-0.5 * ((wave - 6564.6 * 1.1) / 2.0) ** 2)
    out, _ = rebin(flux, np.ones_like(flux), overlap_matrix(wave, grid))
    centroid = (out * grid.wave).sum() / out.sum()
    assert centroid == pytest.approx(6564.6 * 1.1, abs=0.1)


def test_gaps_between_arms_stay_gaps():
    wave = np.concatenate([np.arange(3600, 5700, 0.8), np.arange(6000, 9824, 0.8)])
    _, ivar = rebin(np.ones_like(wave), np.ones_like(wave), overlap_matrix(wave, SpectrumGrid()))
    inside = (SpectrumGrid().wave > 5710) & (SpectrumGrid().wave < 5990)
    assert (ivar[inside] == 0).all() and (ivar[~inside] > 0).mean() > 0.99


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: replace(s, ivar=np.zeros_like(s.ivar)), "no_valid_pixels"),
        (lambda s: replace(s, wave=s.wave / 10), "wavelength_range"),
        (lambda s: replace(s, flux=np.full_like(s.flux, 3.0)), "constant_spectrum"),
        (lambda s: replace(s, mask=np.arange(s.mask.size) % 50 > 0), "low_coverage"),
    ],
)
def test_unusable_spectra_are_refused(rng, change, code):
    with pytest.raises(InputError) as caught:
        spectrum_to_grid(change(make_spectrum(rng)))
    assert caught.value.code == code
    assert len(caught.value.message) > 40


def test_an_sdss_range_is_flagged(rng):
    spectrum = make_spectrum(rng)
    grid = spectrum_to_grid(replace(spectrum, mask=(spectrum.wave < 3800) | (spectrum.wave > 9206)))
    flag = {flag.code: flag.message for flag in grid.quality.flags}["wavelength_coverage"]
    assert "ends at 920" in flag
