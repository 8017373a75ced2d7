"""Previews survive packing: pictures decode, spectra keep their lines, sizes stay within the budget."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from astroclip.errors import IndexFileError
from index.previews import BINS, FIELD, SIZE, Previews, legacy_rgb


def shard(toy):
    import h5py

    return h5py.File(next(toy.survey.rglob("*.hdf5")), "r")


def _coarse(picture):
    """Means of 8 x 8 pixel blocks."""
    return picture.reshape(SIZE // 8, 8, SIZE // 8, 8, 3).mean(axis=(1, 3))


def test_pictures_equal_the_legacy_mapping(toy, index):
    with shard(toy) as data:
        image = data["image_array"][:]
    cut = (152 - FIELD) // 2
    for place, row in ((0, 10), (5, 15), (39, 49)):
        wanted = legacy_rgb(image[place : place + 1, :, cut : cut + FIELD, cut : cut + FIELD], ("g", "r", "z"))[0]
        small = np.asarray(PIL.Image.fromarray(wanted).resize((SIZE, SIZE), PIL.Image.Resampling.LANCZOS), float)
        with PIL.Image.open(io.BytesIO(index.previews.image_jpeg(row))) as picture:
            assert picture.format == "JPEG" and picture.size == (SIZE, SIZE)
            found = np.asarray(picture, float)
        assert np.abs(_coarse(found) - _coarse(small)).mean() < 1.5  # of 255; single pixels lose their noise
        assert found[SIZE // 2, SIZE // 2].sum() > found[:4].mean() * 3


def test_spectra_keep_their_line(toy, index):
    with shard(toy) as data:
        wave, flux = data["spectrum_lambda"][3], data["spectrum_flux"][3]
    grid, found = index.previews.spectrum(13)
    assert grid.shape == found.shape == (BINS,) and np.all(np.diff(grid) > 0)
    assert abs(grid[np.argmax(found)] - wave[np.argmax(flux)]) < 40
    assert np.median(found) == pytest.approx(3.0, abs=0.1)
    bins = np.digitize(wave, np.sqrt(grid[1:] * grid[:-1]))
    mean = np.array([flux[bins == i].mean() for i in range(BINS)])
    assert np.abs(found - mean).max() < 0.02 * np.ptp(mean)


def test_objects_without_preview(index):
    assert index.previews.image_jpeg(0) is None and index.previews.spectrum(0) is None
    assert index.catalog.flag("preview_image").sum() == index.catalog.flag("preview_spectrum").sum() == 40


def test_budget_of_ten_thousand_objects(index):
    size = sum(e.bytes for n, e in index.manifest.files.items() if n.startswith("previews/images.bin"))
    assert size / 40 + BINS + 16 < 1200


def test_masked_and_short_spectra_have_gaps():
    from index.previews import _quantise

    flux = np.full((2, BINS), np.nan, np.float32)
    flux[0, 10:20] = np.linspace(-1, 5, 10)
    levels, ranges = _quantise(flux)
    empty = np.zeros((2, 3), np.int64)
    previews = Previews(np.zeros(0, np.uint8), empty[0], 0, levels, ranges)
    _, found = previews.spectrum(0)
    assert np.isnan(found[:10]).all() and found[10:20] == pytest.approx(np.linspace(-1, 5, 10), abs=0.02)
    assert previews.spectrum(1) is None


def test_noisy_bins_do_not_set_the_scale():
    from index.previews import _tame

    flux, ivar = np.array([[900.0, 1.0, 2.0, 50.0, np.nan], [np.nan] * 5]), np.array([[1e-4, 1, 1, 1, 0], [0.0] * 5])
    np.testing.assert_array_equal(_tame(flux, ivar), [[50.0, 1.0, 2.0, 50.0, np.nan], [np.nan] * 5])


def test_legacy_rgb_of_nothing_and_of_a_red_source():
    black = legacy_rgb(np.zeros((1, 3, 2, 2), np.float32), ("g", "r", "z"))
    assert black.max() < 60
    red = np.zeros((1, 3, 1, 1), np.float32)
    red[0, 2] = 1.0
    r, g, b = legacy_rgb(red, ("g", "r", "z"))[0, 0, 0].astype(int)
    assert r > 2 * g and r > 2 * b
    assert np.array_equal(legacy_rgb(red[:, ::-1], ("z", "r", "g")), legacy_rgb(red, ("g", "r", "z")))


def test_offsets_that_point_outside_are_refused(index):
    offsets = np.load(index.folder / "previews/images-offsets.npy")
    record = dict(index.manifest.previews, header_bytes=int(offsets[0]) + 5)
    with pytest.raises(IndexFileError, match="images-offsets"):
        Previews.read(index.folder, record, len(index))
