"""Spectra: resolution, noise against the claimed ivar, fibre losses, masks, the sky."""

from __future__ import annotations

import numpy as np
import pytest

from training.simulate import sky, spectrograph
from training.simulate.extinction import BAND_COEFFICIENTS, transmission
from training.simulate.spectrograph import WAVE

INPUT = np.exp(np.arange(np.log(2950.0), np.log(11200.0), 1e-4))  # as the synthesizer's: 30 km/s


@pytest.fixture(scope="module")
def matrix():
    return spectrograph.resample(INPUT)


def _observe(matrix, n=60, target_class="LRG", level=0.3, seed=0):
    rng = np.random.default_rng(seed)
    exposures = spectrograph.draw_exposures(np.full(n, target_class), rng)
    components = np.full((n, 3, len(INPUT)), level, np.float32)
    return exposures, spectrograph.observe(components, np.ones((n, 3)), np.zeros(n), exposures, matrix, rng)


def test_a_constant_stays_constant(matrix):
    np.testing.assert_allclose(matrix @ np.ones(len(INPUT), np.float32), 1.0, rtol=1e-5)


@pytest.mark.parametrize("line", [3800.0, 5007.0, 6564.6, 8500.0, 9700.0])
def test_a_narrow_line_comes_out_with_the_line_spread_function(matrix, line):
    pixel = int(np.argmin(np.abs(INPUT - line)))
    spectrum = np.zeros(len(INPUT), np.float32)
    spectrum[pixel] = 1.0
    out = np.asarray(matrix @ spectrum, dtype=float)
    centre = (out * WAVE).sum() / out.sum()
    width = np.sqrt((out * (WAVE - centre) ** 2).sum() / out.sum())
    assert centre == pytest.approx(INPUT[pixel], abs=0.05)
    assert width == pytest.approx(float(np.interp(line, WAVE, spectrograph.lsf_sigma())), rel=0.05)
    assert out.sum() * 0.8 == pytest.approx(INPUT[pixel] * 1e-4, rel=0.02)  # the line's flux


def test_resolving_power_is_that_of_desi():
    power = WAVE / (2.355 * spectrograph.lsf_sigma())
    assert 2000 < power[0] < 2500
    assert 5000 < power[-1] < 5800


def test_noise_agrees_with_ivar(matrix):
    _, seen = _observe(matrix)
    pull = (seen.flux - seen.flux_true) * np.sqrt(seen.ivar)
    dark = sky.line_profile(WAVE, 0.68) < 0.05
    good = seen.ivar > 0
    core = good & dark[None, :] & (np.abs(pull) < 5)  # 4 % of cosmic rays pass unflagged
    assert pull[core].var() == pytest.approx(1.0, abs=0.02)
    assert 1.0 < np.mean(np.minimum(pull[good & ~dark[None, :]] ** 2, 25)) < 1.3  # sky residuals are not in ivar


def test_longer_exposures_are_deeper(matrix):
    exposures, seen = _observe(matrix, n=40, level=0.0)
    scaled = np.median(np.where(seen.ivar > 0, seen.ivar, np.nan)[:, 3000:3500] / exposures.exposure_s[:, None], axis=1)
    assert np.nanstd(scaled) / np.nanmean(scaled) < 0.05


def test_bright_sources_add_their_own_noise(matrix):
    _, faint = _observe(matrix, level=0.0)
    _, bright = _observe(matrix, level=30.0)
    assert np.median(bright.ivar[:, 3000]) < 0.5 * np.median(faint.ivar[:, 3000])


def test_masked_pixels_have_no_weight_and_are_few(matrix):
    _, seen = _observe(matrix)
    assert ((seen.ivar == 0) == seen.mask).all()
    assert 1e-4 < seen.mask.mean() < 0.02
    assert np.isfinite(seen.flux).all() and np.isfinite(seen.flux_true).all()


def test_noise_is_lowest_in_the_red_and_rises_at_the_ends_and_in_the_lines():
    ivar = spectrograph._floor_ivar()

    def sigma(wave: float) -> float:
        return float(ivar[np.argmin(np.abs(WAVE - wave))] ** -0.5)

    assert sigma(3610) > 2 * sigma(4500) > 2 * sigma(8500)
    assert sigma(9700) > 1.2 * sigma(9200)
    profile = sky.line_profile(WAVE, 0.68)
    for line in (5578.9, 6302.0, 7278.2, 8401.0, 8829.0):  # [O I] and OH, vacuum (Osterbrock et al. 1996)
        near = np.abs(WAVE - line) < 2.0
        assert profile[near].max() > 10


def test_overlap_of_two_arms_is_better_than_either():
    ivar = spectrograph._floor_ivar()
    pixel = int(np.argmin(np.abs(WAVE - 7560.0)))
    single = sky.floor_sigma("Z", WAVE)[pixel] ** -2
    assert ivar[pixel] > 1.2 * single


def test_fibre_fractions_fall_with_size_and_are_one_for_points():
    seeing = np.full(4, 1.1)
    radii = np.array([[1e-3, 1e-3], [0.3, 0.5], [0.6, 2.0], [2.0, 6.0]])
    fractions = spectrograph.fibre_fractions(radii, np.ones((4, 2)), np.full(4, 4.0), seeing)
    np.testing.assert_allclose(fractions[0], 1.0, atol=0.01)
    assert (np.diff(fractions, axis=0) < 0).all()
    assert (fractions[1:, 0] > fractions[1:, 1]).all()  # the bulge is smaller than the disk
    assert fractions[3, 1] < 0.08


def test_extinction_agrees_with_the_bands():
    bands = np.array([4750.0, 6400.0, 9200.0])  # effective wavelengths of DECam g, r, z
    depth = -2.5 * np.log10(transmission(bands, np.array([0.1])))[0] / 0.1
    assert depth == pytest.approx(BAND_COEFFICIENTS, rel=0.03)


def test_same_seed_same_spectra(matrix):
    first, second = _observe(matrix, n=3)[1], _observe(matrix, n=3)[1]
    np.testing.assert_array_equal(first.flux, second.flux)
    assert not np.array_equal(first.flux, _observe(matrix, n=3, seed=1)[1].flux)
