"""Occlusion finds the feature that makes the match, and nothing where nothing does."""

from __future__ import annotations

import numpy as np
import pytest
from sky import make_image, make_spectrum

from astroclip.explain import DEFAULT_PASSES, LEAST_PASSES, Occlusion, explain
from astroclip.preprocess import ImageGrid, SpectrumGrid, image_to_grid, spectrum_to_grid

GRID = SpectrumGrid()
REFERENCE = np.array([1.0, 0.0], np.float32)


@pytest.fixture(scope="module")
def spectrum():
    return spectrum_to_grid(make_spectrum(np.random.default_rng(3), redshift=0.2), GRID)


@pytest.fixture(scope="module")
def image():
    """A galaxy and, above and to the right of it, a second blob."""
    found = make_image(np.random.default_rng(4))
    y, x = np.mgrid[: found.pixels.shape[1], : found.pixels.shape[2]]
    found.pixels[:] += 2.0 * np.exp(-0.5 * ((x - 100) ** 2 + (y - 50) ** 2) / 2.0**2).astype(np.float32)
    return image_to_grid(found, ImageGrid())  # the blob is at (72, 22) of the model's 96 pixels


def unit(strength: float) -> np.ndarray:
    vector = np.array([strength, 1.0], np.float32)
    return vector / np.linalg.norm(vector)


def sees_a_line(place: int):
    """A model whose first number is the light of a line above its surroundings, of the pixels that are known."""

    def encode(grids):
        out = []
        for grid in grids:
            near, line = slice(place - 100, place + 100), slice(place - 6, place + 7)
            known = grid.ivar[line] > 0
            level = np.median(grid.flux[near][grid.ivar[near] > 0])
            out.append(unit(float(((grid.flux[line] - level) * known).sum()) / 50))
        return np.stack(out)

    return encode


def sees_a_blob(grids):
    return np.stack([unit(float(grid.pixels[:, 17:28, 67:78].sum()) / 50) for grid in grids])


def test_the_planted_line_is_found(spectrum):
    place = int(np.searchsorted(GRID.wave, 6564.6 * 1.2))
    found = explain(sees_a_line(place), spectrum, REFERENCE)
    first, last = found.windows[np.argmax(found.drop)]
    assert first <= place < last
    assert abs(int(np.argmax(found.importance)) - place) < 32
    far = np.abs(found.windows.mean(axis=1) - place) > 120
    assert found.drop.max() > 20 * np.abs(found.drop[far]).max() and found.drop.max() > 5 * found.control > 0
    assert found.share.sum() == pytest.approx(1, abs=1e-5)
    assert found.score == pytest.approx(float(sees_a_line(place)([spectrum])[0] @ REFERENCE))


def test_the_second_blob_is_found(image):
    found = explain(sees_a_blob, image, REFERENCE)
    x0, y0, x1, y1 = found.windows[np.argmax(found.drop)]
    assert x0 <= 72 < x1 and y0 <= 22 < y1
    y, x = np.unravel_index(np.argmax(found.importance), found.importance.shape)
    assert np.hypot(x - 72, y - 22) < 6
    galaxy = found.importance[42:54, 42:54]
    assert found.importance.max() > 50 * np.abs(galaxy).max()  # bright, but not what the model looks at


def test_hidden_pixels_are_unknown_or_sky(spectrum, image):
    occlusion = Occlusion(spectrum)
    view = occlusion.view(1 + 100)
    first, last = occlusion.windows[100]
    hidden = np.zeros(len(spectrum.ivar), bool)
    hidden[first:last] = True
    assert not view.ivar[hidden].any() and not view.flux[hidden].any()
    np.testing.assert_array_equal(view.ivar[~hidden], spectrum.ivar[~hidden])
    occlusion = Occlusion(image)
    centre = int(np.flatnonzero((occlusion.windows == [42, 42, 54, 54]).all(axis=1))[0])
    view = occlusion.view(1 + centre)
    for plane, sigma in zip(view.pixels[:, 42:54, 42:54], (0.004, 0.011, 0.023), strict=True):
        assert abs(plane.mean()) < 5 * sigma and 0.6 * sigma < plane.std() < 1.5 * sigma
    assert view.pixels[:, :42].tolist() == image.pixels[:, :42].tolist()


def test_windows_cover_everything_known_and_missing_ranges_cost_nothing(spectrum):
    from dataclasses import replace

    occlusion = Occlusion(spectrum)
    assert occlusion.windows[0, 0] == 0 and occlusion.windows[-1, 1] == GRID.n_pixels
    assert (np.diff(occlusion.windows[:, 0]) == 16).all() and len(occlusion) == DEFAULT_PASSES
    cut = replace(spectrum, ivar=np.where(GRID.wave > 9206, 0, spectrum.ivar).astype(np.float32))
    assert len(Occlusion(cut)) < DEFAULT_PASSES - 10
    assert GRID.wave[Occlusion(cut).windows[-1, 0]] < 9206


@pytest.mark.parametrize("passes", [LEAST_PASSES, 100, DEFAULT_PASSES, 1000])
def test_the_limit_of_passes_is_kept(spectrum, image, passes):
    for grid in (spectrum, image):
        occlusion = Occlusion(grid, passes)
        assert passes / 3 < len(occlusion) <= passes or passes > DEFAULT_PASSES
        covered = np.zeros(occlusion.read(np.tile(REFERENCE, (len(occlusion), 1)), REFERENCE).importance.shape, bool)
        for window in occlusion.windows:
            if len(window) == 2:
                covered[window[0] : window[1]] = True
            else:
                covered[window[1] : window[3], window[0] : window[2]] = True
        assert covered.all()


def test_too_few_passes_are_refused(spectrum):
    with pytest.raises(ValueError, match="at least 32"):
        Occlusion(spectrum, LEAST_PASSES - 1)


def test_the_same_question_has_the_same_answer(tiny_embedder, image):
    reference = tiny_embedder.encode([image])[0]
    first, second = (explain(tiny_embedder.encode, image, reference, 60) for _ in range(2))
    np.testing.assert_array_equal(first.drop, second.drop)
    assert first.score == pytest.approx(1, abs=1e-6) and first.passes <= 60
