"""Flags of doubtful inputs: each limit from both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sky import SKY_SIGMA, make_image, make_spectrum

from astroclip.preprocess import image_to_grid, spectrum_to_grid
from astroclip.preprocess.doubts import MAX_MASKED, MIN_IMAGE_SNR, MIN_SPECTRUM_SNR
from astroclip.types import Image, Quality, Spectrum

DOUBTS = {"low_snr", "masked_fraction", "pixel_scale", "saturated", "off_centre"}


def codes(item: Image | Spectrum) -> set[str]:
    grid = image_to_grid(item) if isinstance(item, Image) else spectrum_to_grid(item)
    return {flag.code for flag in grid.quality.flags} & DOUBTS


def test_a_good_galaxy_has_none(rng):
    assert codes(make_image(rng)) == codes(make_spectrum(rng)) == set()


def test_faint_images_are_flagged_below_five_sigma(rng):
    image = make_image(rng, flux=0.0, noise=1.0)
    y, x = np.mgrid[:152, :152] - 75.5
    aperture = np.hypot(x, y) <= 3 / 0.262
    noise = SKY_SIGMA[1] * np.sqrt(aperture.sum())

    def with_flux(snr: float) -> Image:
        present = float(image.pixels[1][aperture].sum())
        source = aperture * (snr * noise - present) / aperture.sum()
        return replace(image, pixels=(image.pixels + source).astype(np.float32))

    assert "low_snr" in codes(with_flux(MIN_IMAGE_SNR - 1))
    assert "low_snr" not in codes(with_flux(MIN_IMAGE_SNR + 1))


def test_noisy_spectra_are_flagged(rng):
    spectrum = make_spectrum(rng, noise=0.5)
    median = spectrum_to_grid(spectrum).quality.snr

    def with_snr(snr: float) -> Spectrum:  # the noise as stated is what counts
        return replace(spectrum, ivar=(spectrum.ivar * (snr / median) ** 2).astype(np.float32))

    assert "low_snr" in codes(with_snr(0.98 * MIN_SPECTRUM_SNR))
    assert "low_snr" not in codes(with_snr(1.02 * MIN_SPECTRUM_SNR))


@pytest.mark.parametrize("make", [make_image, make_spectrum])
def test_masks_are_flagged_above_a_tenth(rng, make):
    item = make(rng)
    assert "masked_fraction" not in codes(replace(item, quality=Quality(masked_fraction=MAX_MASKED)))
    assert "masked_fraction" in codes(replace(item, quality=Quality(masked_fraction=MAX_MASKED + 0.01)))


@pytest.mark.parametrize(("scale", "flagged"), [(0.08, True), (0.1, False), (0.5, False), (0.6, True)])
def test_pixel_scales_outside_training(rng, scale, flagged):
    size = int(100 * 0.262 / scale)
    image = replace(make_image(rng, size=size, radius=6 * 0.262 / scale), pixel_scale_arcsec=scale)
    assert ("pixel_scale" in codes(image)) == flagged


def test_plateaus_look_saturated(rng):
    image = make_image(rng)
    pixels = image.pixels.copy()
    top = np.sort(pixels[1].ravel())
    three, four = (np.where(pixels[1] > top[-n], top[-n], pixels[1]) for n in (3, 4))
    assert "saturated" not in codes(replace(image, pixels=np.stack([pixels[0], three, pixels[2]])))
    clipped = replace(image, pixels=np.stack([pixels[0], four, pixels[2]]))
    assert "saturated" in codes(clipped)
    assert "saturated" not in codes(replace(clipped, calibrated=False))  # a picture's reader says so itself


@pytest.mark.parametrize(("shift", "flagged"), [(0, False), (6, False), (24, True)])
def test_a_source_away_from_the_centre(rng, shift, flagged):
    image = make_image(rng, flux=1.0, radius=0.7)
    assert ("off_centre" in codes(replace(image, pixels=np.roll(image.pixels, shift, axis=2)))) == flagged


def test_empty_sky_is_faint_but_not_off_centre(rng):
    assert codes(make_image(rng, flux=0.0)) == {"low_snr"}
