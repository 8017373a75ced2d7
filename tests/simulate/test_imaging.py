"""Images: flux conserved, places and angles right, PSF and noise as claimed, neighbours where they should be."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

galsim = pytest.importorskip("galsim")

from training.simulate import imaging, neighbours  # noqa: E402
from training.simulate.profiles import fibre_flux, moffat, noise_equivalent_area, sersic  # noqa: E402

SCALE = imaging.PIXEL_SCALE
SHAPE = imaging.Shape(1.4, 0.5, 4.0, 0.7, 35.0, 0.05, -0.1, 30, 0.5, 0.1, 20.0)
FLUX = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.5, 0.3, 0.1]])  # component, band


def _psfs(fwhm: tuple[float, ...] = (1.3, 1.2, 1.1)) -> list[galsim.GSObject]:
    return [moffat(f, 3.0) for f in fwhm]


def _conditions(n: int = 40, photsys: str = "S") -> imaging.Conditions:
    rng = np.random.default_rng(3)
    return imaging.draw_conditions(n, photsys, np.zeros(n), rng)


@pytest.mark.parametrize("index", [1.0, 2.5, 4.0, 6.0])
def test_sersic_has_half_its_light_inside_its_radius(index):
    assert fibre_flux(galsim.Convolve(sersic(index, 2.0), moffat(0.2, 3.5)), 2.0) == pytest.approx(0.5, abs=0.015)


def test_fibre_flux_equals_the_sum_over_a_drawn_image():
    galaxy = galsim.Convolve(sersic(1.0, 1.0, 0.6), moffat(1.1, 3.0))
    image = galaxy.drawImage(nx=401, ny=401, scale=0.05).array
    axis = (np.arange(401) - 200) * 0.05
    inside = np.hypot(axis[:, None], axis) < 0.75
    assert fibre_flux(galaxy, 0.75) == pytest.approx(image[inside].sum(), abs=0.01)


def test_noise_equivalent_area_matches_the_drawn_psf():
    for beta in (2.5, 3.5):
        psf = moffat(1.33, beta).drawImage(nx=192, ny=192, scale=SCALE).array
        assert noise_equivalent_area(beta, np.array([1.33]), SCALE)[0] == pytest.approx(
            SCALE**2 / (psf**2).sum(), rel=0.01
        )


def test_every_band_of_an_image_has_its_own_seeing():
    """A point-like galaxy is as wide as the PSF: width from the brightness of the centre and its neighbour rows."""
    shape = imaging.Shape(0.02, 0.02, 1.0, 1.0, 0.0, 0.0, 0.0, 1, 0.0)
    flux = np.array([[0.0] * 3, [1.0] * 3, [0.0] * 3])
    psfs = [moffat(f, 3.0) for f in (1.0, 1.5, 2.0)]
    light = imaging.target_light(shape, flux, psfs, np.random.default_rng(0))
    y, x = np.indices(light.shape[1:]) - 75.5
    for band, fwhm in enumerate((1.0, 1.5, 2.0)):
        radius = np.hypot(x, y).ravel() * SCALE
        order = np.argsort(radius)
        half = light[band].max() / 2
        width = 2 * np.interp(-half, -light[band].ravel()[order], radius[order])
        assert width == pytest.approx(fwhm, rel=0.12)  # the pixel widens it a little


def test_target_light_conserves_the_flux_of_every_band():
    light = imaging.target_light(SHAPE, FLUX, _psfs(), np.random.default_rng(0))
    np.testing.assert_allclose(light.sum(axis=(1, 2)), FLUX.sum(axis=0), rtol=0.02)  # wings leave the stamp
    centre = (light[1] * np.arange(imaging.STAMP)).sum() / light[1].sum()
    assert centre == pytest.approx(75.5 + 0.05 / SCALE, abs=1.5)  # arms and knots are lopsided
    assert light.min() > -0.01 * light.max()


def test_each_component_keeps_its_own_colour():
    """Bulge light only in z, disk light only in g: z is the more concentrated."""
    flux = np.array([[0.0, 0.0, 5.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    light = imaging.target_light(SHAPE, flux, _psfs((1.2, 1.2, 1.2)), np.random.default_rng(0))
    assert light[1].sum() == 0.0
    assert light[2].max() > 2.0 * light[0].max()


def test_images_are_the_same_in_another_process():
    light = _light(7)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_light, (7,)), light)
    assert (_light(8) != light).any()


def _light(seed: int) -> np.ndarray:
    return imaging.target_light(SHAPE, FLUX, _psfs(), np.random.default_rng(seed))


def test_position_angle_runs_from_north_through_east():
    image = galsim.Convolve(sersic(1.0, 2.0, 0.2, 45.0), moffat(1.0, 3.0)).drawImage(nx=128, ny=128, scale=SCALE).array
    axis = np.arange(128) - 63.5
    moment = (image * axis[:, None] * axis).sum() / image.sum()
    assert moment < -1.0  # north up, east left: 45 degrees leans to the upper left


def test_sky_noise_is_what_is_claimed():
    conditions = _conditions()
    rng = np.random.default_rng(1)
    ratios = []
    for row in range(40):
        pixels, mask = imaging.add_noise(np.zeros((3, 152, 152), np.float32), conditions, row, rng)
        ratios.append([pixels[b][~mask[b]].std() / conditions.sky_sigma[row, b] for b in range(3)])
        assert (pixels[mask] == 0).all()
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.01)
    assert np.ptp(ratios) < 0.1


def test_a_source_at_the_stated_depth_has_five_sigma():
    """Depth is a point source seen at S/N 5 by a matched filter: flux = 5 sigma_pixel sqrt(area) / pixel."""
    conditions = _conditions(2000)
    area = np.stack([noise_equivalent_area(3.0, conditions.psf_fwhm[:, b], SCALE) for b in range(3)], axis=1)
    depth = 22.5 - 2.5 * np.log10(5.0 * conditions.sky_sigma * np.sqrt(area) / SCALE)
    assert np.median(depth, axis=0) == pytest.approx([24.65, 23.61, 22.84], abs=0.15)


def test_poisson_noise_grows_with_the_source():
    conditions = _conditions(1)
    light = np.full((3, 152, 152), 5.0, np.float32)  # below saturation
    pixels, mask = imaging.add_noise(light, conditions, 0, np.random.default_rng(2))
    expected = np.sqrt(conditions.sky_sigma[0] ** 2 + 5.0 / conditions.gain[0])
    measured = [(pixels[b] - light[b])[~mask[b]].std() for b in range(3)]
    assert measured == pytest.approx(list(expected), rel=0.03)


def test_saturated_cores_are_masked():
    light = np.zeros((3, 152, 152), np.float32)
    light[:, 70:73, 80:83] = 1000.0
    _, mask = imaging.add_noise(light, _conditions(1), 0, np.random.default_rng(2))
    assert mask[:, 70:73, 80:83].all()
    assert mask.mean() < 0.2


def _pool() -> neighbours.Pool:
    rng = np.random.default_rng(5)
    return neighbours.Pool(rng.uniform(18, 23, 100), rng.uniform(0, 1, (100, 2)), np.full(100, 0.7), rng.random(100))


def test_number_counts_and_the_clear_zone():
    rng = np.random.default_rng(0)
    found = [neighbours.draw_neighbours(_pool(), 20.0, rng) for _ in range(2000)]
    r_mag = np.concatenate([22.5 - 2.5 * np.log10(f.flux[:, 1]) for f in found])
    star = np.concatenate([f.radius == 0 for f in found])
    area = 2000 * (40.0 / 3600.0) ** 2
    assert (r_mag[~star] < 23).sum() / area == pytest.approx(10**4.55, rel=0.05)
    assert (r_mag[star] < 22).sum() / area == pytest.approx(10**3.6, rel=0.1)
    distance = np.concatenate([np.hypot(f.x, f.y) for f in found])
    assert distance[r_mag < 18].min() > 3.5


def _one(x: float, y: float, flux: float, radius: float = 0.0) -> neighbours.Neighbours:
    values = [np.array([v]) for v in (x, y)]
    rest = [np.array([v]) for v in (radius, 0.7, 20.0, 1.0)]
    return neighbours.Neighbours(*values, np.full((1, 3), flux), *rest)


@pytest.mark.parametrize("flux", [10.0, 1000.0])  # in the small box and over the whole image
@pytest.mark.parametrize("radius", [0.0, 0.6])
def test_a_painted_source_lies_where_it_was_put_and_keeps_its_flux(flux, radius):
    pixels = np.zeros((3, 152, 152), np.float32)
    neighbours.paint(pixels, _one(7.03, -4.4, flux, radius), _psfs(), SCALE)
    y, x = np.indices((152, 152))
    assert pixels[0].sum() == pytest.approx(flux, rel=0.02)
    assert (pixels[0] * x).sum() / pixels[0].sum() == pytest.approx(75.5 + 7.03 / SCALE, abs=0.25)
    assert (pixels[0] * y).sum() / pixels[0].sum() == pytest.approx(75.5 - 4.4 / SCALE, abs=0.25)


def test_painting_adds_to_what_is_there():
    pixels = np.ones((3, 152, 152), np.float32)
    neighbours.paint(pixels, _one(0.0, 0.0, 10.0), _psfs(), SCALE)
    assert pixels[0].sum() == pytest.approx(152**2 + 10.0, rel=1e-4)


def test_a_source_beyond_the_edge_leaves_only_its_wing():
    pixels = np.zeros((3, 152, 152), np.float32)
    neighbours.paint(pixels, _one(21.0, 0.0, 10.0), _psfs(), SCALE)
    assert 0 < pixels[0].sum() < 2.0
    assert np.abs(pixels[0, :, :70]).max() < 1e-3
    neighbours.paint(pixels, _one(40.0, 40.0, 10.0), _psfs(), SCALE)  # nowhere near
    assert pixels[0].sum() < 2.0
