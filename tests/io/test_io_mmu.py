"""Multimodal Universe HDF5: rows, bands, padding, damage."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import survey_files as files

from astroclip.errors import InputError
from astroclip.io.mmu import MmuFile, iter_mmu


def write_shard(path: Path, rng: np.random.Generator, n: int = 5, size: int = 64, **changes: object) -> Path:
    """A shard in the survey layout; `changes` replace columns, None drops one."""
    wave, flux, ivar = files.spectrum_columns(rng, 400)
    columns: dict[str, object] = {
        "object_id": np.array([f"sim-{i:08d}" for i in range(n)], dtype="S"),
        "ra": 10.0 + np.arange(n),
        "dec": -5.0 + np.arange(n),
        "Z": np.linspace(0.1, 0.5, n).astype("f4"),
        "target_class": np.array(["BGS"] * n, dtype="S3"),
        "image_array": np.stack([files.galaxy(rng, size) for _ in range(n)]),
        "image_band": np.array([["DES-G", "DES-R", "DES-Z"]] * n, dtype="S"),
        "image_scale": np.full((n, 3), 0.262, "f4"),
        "spectrum_lambda": np.tile(wave.astype("f4"), (n, 1)),
        "spectrum_flux": np.tile(flux.astype("f4"), (n, 1)),
        "spectrum_ivar": np.tile(ivar.astype("f4"), (n, 1)),
        "spectrum_mask": np.zeros((n, 400), bool),
    } | changes
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            if values is not None:
                file.create_dataset(name, data=values)
    return path


def test_rows(tmp_path, rng):
    path = write_shard(tmp_path / "shard.hdf5", rng)
    rows = list(iter_mmu(path))
    assert [r.row for r in rows] == list(range(5)) and not any(r.errors for r in rows)
    third = rows[2]
    assert third.image.bands == ("g", "r", "z") and third.image.object_id == third.spectrum.object_id == "sim-00000002"
    assert (third.image.ra, third.image.dec) == (12.0, -3.0)
    assert np.isclose(third.spectrum.redshift, 0.3)
    assert third.columns["target_class"] == "BGS" and set(third.columns) == {
        "object_id",
        "ra",
        "dec",
        "Z",
        "target_class",
    }
    assert third.image.quality.flags == third.spectrum.quality.flags == ()
    with MmuFile(path) as file:
        np.testing.assert_array_equal(third.image.pixels, file.datasets["image_array"][2])


def test_a_range_of_rows_equals_the_slice(tmp_path, rng):
    path = write_shard(tmp_path / "shard.hdf5", rng, n=130)
    some = list(iter_mmu(path, 60, 70))
    assert [r.columns["object_id"] for r in some] == [f"sim-{i:08d}" for i in range(60, 70)]


def test_images_or_spectra_alone(tmp_path, rng):
    images = write_shard(tmp_path / "i.hdf5", rng, spectrum_lambda=None)
    spectra = write_shard(tmp_path / "s.hdf5", rng, image_array=None)
    assert all(r.image and not r.spectrum for r in iter_mmu(images))
    assert all(r.spectrum and not r.image for r in iter_mmu(spectra))


def test_padding_is_dropped(tmp_path, rng):
    wave = np.tile(np.linspace(3600, 9600, 400), (5, 1))
    wave[1, 300:] = -1.0
    rows = list(iter_mmu(write_shard(tmp_path / "p.hdf5", rng, spectrum_lambda=wave)))
    assert [r.spectrum.wave.size for r in rows] == [400, 300, 400, 400, 400]


def test_a_bad_row_carries_its_error_and_stops_nothing(tmp_path, rng):
    pixels = np.stack([files.galaxy(rng) for _ in range(5)])
    pixels[3] = np.nan
    ivar = np.ones((5, 400))
    ivar[1] = 0
    path = write_shard(tmp_path / "b.hdf5", rng, image_array=pixels, spectrum_ivar=ivar)
    rows = list(iter_mmu(path))
    assert [[e.code for e in r.errors] for r in rows] == [[], ["zero_ivar"], [], ["no_finite_pixels"], []]
    assert rows[3].image is None and rows[3].spectrum is not None


def test_invvar_and_mask_planes(tmp_path, rng):
    ivar = np.ones((5, 3, 64, 64), "f4")
    ivar[0, 1, 2, 3] = 0
    (first, *_) = iter_mmu(write_shard(tmp_path / "m.hdf5", rng, image_ivar=ivar))
    assert np.argwhere(first.image.mask).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda p, rng: p.write_bytes(b"not HDF5"), "damaged_hdf5"),
        (lambda p, rng: p.write_bytes(write_shard(p, rng).read_bytes()[:3000]), "damaged_hdf5"),
        (lambda p, rng: write_shard(p, rng, image_array=None, spectrum_flux=None), "missing_column"),
        (lambda p, rng: write_shard(p, rng, ra=np.ones(4)), "length_mismatch"),
    ],
)
def test_unusable_files(tmp_path, rng, damage, code):
    path = tmp_path / "x.hdf5"
    damage(path, rng)
    with pytest.raises(InputError) as caught:
        list(iter_mmu(path))
    assert caught.value.code == code and "x.hdf5" in caught.value.message
