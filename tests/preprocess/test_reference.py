"""The fast preparation gives the plain one's numbers: on noise, galaxies, masks, other scales, gaps and other grids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reference import elsewhere, image_quality, reference_image, reference_spectrum
from reference import image_statistics as plain_statistics
from sky import make_image, make_spectrum

from astroclip.medians import chosen_pixels, level_and_noise, medians
from astroclip.preprocess import ImageGrid, LinearSpectrumGrid, SpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.preprocess.doubts import image_doubts
from astroclip.preprocess.statistics import image_statistics
from astroclip.types import Image, Quality, Spectrum

TOLERANCE = 1e-6


def random_image(rng: np.random.Generator) -> Image:
    """Any size, brightness, place, scale and mask that a survey's cutout may have."""
    scale = rng.choice([0.262, 0.262, 0.262, 0.25, 0.1, 0.168, 0.396, 0.5])
    size = int(rng.choice([int(25 / scale), 101, 152, 256, *([64, 96, 160] if scale > 0.2 else [])]))
    image = make_image(rng, size, flux=10 ** rng.uniform(-2, 3), radius=rng.uniform(0.7, 9), noise=rng.uniform(0.3, 3))
    pixels = image.pixels[:, :, : size - rng.integers(0, 6)]
    if rng.random() < 0.3:
        pixels = np.roll(pixels, rng.integers(-40, 40, 2), (1, 2))
    mask = np.zeros(pixels.shape, bool)
    kind = rng.integers(4)
    if kind == 1:  # one band lacks a corner
        mask[rng.integers(3), :20, :30] = True
    elif kind == 2:  # single pixels, each band its own
        mask = rng.random(pixels.shape) < 0.02
    elif kind == 3:  # a trail in all bands, through the centre at times
        mask[:, :, rng.integers(size - 8)] = True
    if rng.random() < 0.2:  # a cosmic ray, a plateau
        pixels = pixels.copy()
        pixels[1, 10, 10:14] = 50.0
    return Image(np.where(mask, 0, pixels).astype(np.float32), mask, ("g", "r", "z"), float(scale))


def random_spectrum(rng: np.random.Generator) -> Spectrum:
    """DESI's and other samplings, with gaps, dead pixels and any signal-to-noise."""
    spectrum = make_spectrum(rng, redshift=rng.uniform(0, 1), noise=10 ** rng.uniform(-2, 2))
    ivar = spectrum.ivar * rng.uniform(0.1, 3, spectrum.ivar.shape).astype(np.float32)
    mask = rng.random(ivar.shape) < rng.choice([0, 0.01, 0.3])
    if rng.random() < 0.4:
        start = rng.integers(0, 6000)
        mask[start : start + 1500] = True
    if rng.random() < 0.3:
        ivar[rng.random(ivar.shape) < 0.1] = 0
    wave = spectrum.wave
    if rng.random() < 0.3:
        wave = 10 ** (3.58 + 1e-4 * np.arange(len(wave)) * 0.49)
    keep = np.ones(len(wave), bool)
    if rng.random() < 0.4:  # no pixels at all between two arms
        keep[2500:2900] = False
    return Spectrum(wave[keep], spectrum.flux[keep], ivar[keep], mask[keep])


def agree(found: Quality, wanted: Quality) -> None:
    assert found.coverage == wanted.coverage
    assert found.snr == pytest.approx(wanted.snr, rel=TOLERANCE, abs=TOLERANCE)
    np.testing.assert_allclose(found.statistics, wanted.statistics, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(60))
def test_images(seed):
    rng = np.random.default_rng(seed)
    image, grid = random_image(rng), ImageGrid(size=int(rng.choice([96, 96, 144, 97])))
    wanted, found = reference_image(image, grid), image_to_grid(image, grid)
    np.testing.assert_array_equal(found.valid, wanted.valid)
    resampled = "resampled" in {flag.code for flag in found.quality.flags}
    digit = TOLERANCE * float(np.abs(wanted.pixels).max()) if resampled else 0.0  # sums in another order
    np.testing.assert_allclose(found.pixels, wanted.pixels, rtol=0, atol=digit)
    assert found.pixels.flags.c_contiguous and found.pixels.dtype == np.float32
    agree(found.quality, image_quality(found.pixels, found.valid, grid))
    away = elsewhere(found.pixels, found.valid)
    codes = {flag.code for flag in image_doubts(image, found.pixels, found.valid, found.quality.snr)}
    assert ("off_centre" in codes) == (away is not None)


@pytest.mark.parametrize("seed", range(60))
def test_spectra(seed):
    rng = np.random.default_rng(seed)
    spectrum, grid = random_spectrum(rng), LinearSpectrumGrid() if seed % 3 == 0 else SpectrumGrid()
    wanted = reference_spectrum(spectrum, grid)
    for _ in range(2):  # the second with the overlaps kept from the first
        found = spectrum_to_grid(spectrum, grid)
        np.testing.assert_allclose(found.flux, wanted.flux, rtol=TOLERANCE, atol=TOLERANCE * np.abs(wanted.flux).max())
        np.testing.assert_allclose(found.ivar, wanted.ivar, rtol=TOLERANCE)
        agree(found.quality, wanted.quality)


@pytest.mark.parametrize("shape", [(1,), (2,), (9,), (10,), (3, 8), (4, 9215), (16, 576)])
def test_medians(rng, shape):
    values = rng.normal(3, 2, shape).astype(np.float32)
    kept = values.copy()
    assert (medians(values) == np.median(values, axis=-1)).all()
    level, noise = level_and_noise(values)
    assert (noise == 1.4826 * np.median(np.abs(values - level[..., None]), axis=-1).astype(float)).all()
    np.testing.assert_array_equal(values, kept)


def test_chosen_pixels(rng):
    pixels, one = rng.normal(size=(3, 5, 4)), rng.random((5, 4)) < 0.5
    (found,) = chosen_pixels(pixels, np.stack([one] * 3))
    np.testing.assert_array_equal(found, pixels[:, one])
    each = rng.random((3, 5, 4)) < 0.5
    for values, plane, good in zip(chosen_pixels(pixels, each), pixels, each, strict=True):
        np.testing.assert_array_equal(values[0], plane[good])


def test_wavelengths_that_differ_in_the_middle_do_not_share_overlaps(rng):
    one = make_spectrum(rng)
    other = replace(one, wave=one.wave + np.where(np.abs(one.wave - 6500) < 400, 0.3, 0.0))
    for spectrum in (one, other, one):
        np.testing.assert_allclose(
            spectrum_to_grid(spectrum).flux, reference_spectrum(spectrum, SpectrumGrid()).flux, rtol=1e-5
        )


@pytest.mark.parametrize("pixels", [np.zeros((3, 96, 96)), np.full((2, 32, 32), 1e30)])
@pytest.mark.parametrize("bands_known", [(0, 0, 0), (0, 1, 1), (1, 1, 1)])
def test_statistics_of_drawings_and_missing_bands(rng, pixels, bands_known):
    pixels = pixels.astype(np.float32)
    valid = np.array(bands_known[: len(pixels)], bool)[:, None, None] & np.ones(pixels.shape, bool)
    only_centre = valid.copy()
    only_centre[:, :8] = False
    for good in (valid, only_centre):
        np.testing.assert_allclose(
            image_statistics(pixels, good), plain_statistics(pixels, good), rtol=TOLERANCE, atol=TOLERANCE
        )
