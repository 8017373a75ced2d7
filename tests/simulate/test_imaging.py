"""Images: the same light as GalSim draws, flux conserved, PSF and noise as claimed, neighbours where they should be."""

from __future__ import annotations

import numpy as np
import pytest

from training.simulate import imaging, neighbours
from training.simulate.canvas import Canvas
from training.simulate.profiles import enclosed_flux, moffat, noise_equivalent_area, sersic

SCALE = imaging.PIXEL_SCALE
galsim = pytest.importorskip("galsim")


def _conditions(n: int = 40, photsys: str = "S") -> imaging.Conditions:
    rng = np.random.default_rng(3)
    return imaging.draw_conditions(n, photsys, np.zeros(n), rng)


@pytest.mark.parametrize(
    ("index", "radius", "q", "pa", "x", "y"),
    [(1.0, 2.0, 0.5, 30.0, 0.1, -0.05), (1.0, 0.4, 0.3, 100.0, 0.0, 0.0), (2.5, 1.2, 0.7, 150.0, 0.3, 0.2)],
)
def test_canvas_draws_what_galsim_draws(index, radius, q, pa, x, y):
    canvas = Canvas(192, SCALE)
    mine = canvas.image(canvas.sersic(index, radius, q, pa) * canvas.phase(x, y) * canvas.psf(1.2, 3.0))
    galaxy = galsim.Sersic(n=index, half_light_radius=radius * np.sqrt(q))
    galaxy = galaxy.shear(q=q, beta=(90.0 + pa) * galsim.degrees).shift(x, y)
    scene = galsim.Convolve(galaxy, galsim.Moffat(beta=3.0, fwhm=1.2))
    theirs = scene.drawImage(nx=192, ny=192, scale=SCALE, dtype=np.float64).array
    assert mine.sum() == pytest.approx(1.0, abs=1e-4)
    assert np.abs(mine - theirs).max() < 0.01 * theirs.max()


def test_cut_sersic_has_half_its_light_inside_its_radius():
    for index in (1.0, 2.5, 4.0, 6.0):
        profile = sersic(index)
        assert profile.weights @ -np.expm1(-0.5 / profile.sigmas**2) == pytest.approx(0.5, abs=1e-6)


def test_aperture_flux_equals_the_sum_over_a_drawn_image():
    canvas, radius, fwhm = Canvas(401, 0.05), 1.0, 1.1
    image = canvas.image(canvas.sersic(1.0, radius, 1.0, 0.0) * canvas.phase(0, 0) * canvas.psf(fwhm, 3.0))
    axis = (np.arange(401) - 200) * 0.05
    inside = np.hypot(axis[:, None], axis) < 0.75
    expected = enclosed_flux(sersic(1.0), np.array([radius]), moffat(3.0), np.array([fwhm]), 0.75)[0]
    assert image[inside].sum() == pytest.approx(expected, abs=0.01)


def test_noise_equivalent_area_matches_the_drawn_psf():
    canvas = Canvas(192, SCALE)
    psf = canvas.image(canvas.psf(1.3, 3.0))
    assert noise_equivalent_area(moffat(3.0), np.array([1.3]), SCALE)[0] == pytest.approx(
        SCALE**2 / (psf**2).sum(), rel=0.02
    )


def test_psf_has_its_width():
    canvas = Canvas(511, 0.02)
    profile = canvas.image(canvas.phase(0, 0) * canvas.psf(1.2, 3.0))[255]
    assert 2 * np.interp(-0.5, -profile[255:] / profile[255], np.arange(256)) * 0.02 == pytest.approx(1.2, rel=0.01)


def test_target_light_conserves_the_flux_of_every_band():
    canvas = Canvas(192, SCALE)
    psf = np.stack([canvas.psf(fwhm, 3.0) for fwhm in (1.3, 1.2, 1.1)])
    shape = imaging.Shape(1.4, 0.5, 4.0, 0.7, 35.0, 0.05, -0.1, 30, 0.5, 0.1, 20.0)
    flux = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.5, 0.3, 0.1]])  # component, band
    light = imaging.target_light(canvas, shape, flux, psf, np.random.default_rng(0))
    np.testing.assert_allclose(light.sum(axis=(1, 2)), flux.sum(axis=0), rtol=1e-4)
    centre = (light[1] * np.arange(192)).sum() / light[1].sum()
    assert centre == pytest.approx(95.5 + 0.05 / SCALE, abs=1.5)  # arms and knots are lopsided
    assert light.min() > -0.01 * light.max()


def test_position_angle_runs_from_north_through_east():
    canvas = Canvas(128, SCALE)
    image = canvas.image(canvas.sersic(1.0, 2.0, 0.2, 45.0) * canvas.phase(0, 0) * canvas.psf(1.0, 3.0))
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
    area = np.stack([noise_equivalent_area(moffat(3.0), conditions.psf_fwhm[:, b], SCALE) for b in range(3)], axis=1)
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


def test_a_painted_star_lies_where_it_was_put_and_keeps_its_flux():
    canvases = {s: Canvas(s, SCALE) for s in (neighbours.SMALL, neighbours.LARGE)}
    psfs = {s: np.stack([c.psf(1.1, 3.0)] * 3) for s, c in canvases.items()}
    for flux in (10.0, 1000.0):  # on the small and on the large canvas
        pixels = np.zeros((3, 152, 152), np.float32)
        one = np.ones(1)
        star = neighbours.Neighbours(7.03 * one, -4.4 * one, np.full((1, 3), flux), 0 * one, one, 0 * one, one)
        neighbours.paint(pixels, star, canvases, psfs)
        y, x = np.indices((152, 152))
        assert pixels[0].sum() == pytest.approx(flux, rel=0.01)
        assert (pixels[0] * x).sum() / pixels[0].sum() == pytest.approx(75.5 + 7.03 / SCALE, abs=0.2)
        assert (pixels[0] * y).sum() / pixels[0].sum() == pytest.approx(75.5 - 4.4 / SCALE, abs=0.2)


def test_a_source_beyond_the_edge_leaves_only_its_wing():
    canvases = {s: Canvas(s, SCALE) for s in (neighbours.SMALL, neighbours.LARGE)}
    psfs = {s: np.stack([c.psf(1.1, 3.0)] * 3) for s, c in canvases.items()}
    pixels = np.zeros((3, 152, 152), np.float32)
    one = np.ones(1)
    outside = neighbours.Neighbours(21.0 * one, 0 * one, np.full((1, 3), 10.0), 0 * one, one, 0 * one, one)
    neighbours.paint(pixels, outside, canvases, psfs)
    assert 0 < pixels[0].sum() < 2.0
    assert pixels[0, :, :70].max() < 1e-3
