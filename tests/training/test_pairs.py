"""Reading pairs from disk: both layouts, the splits, any order of rows, worker processes, and damaged files by name."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from pair_files import write_astroclip, write_shards

from astroclip.errors import InputError
from astroclip.preprocess import SpectrumGrid
from training.data import find_shards, load_survey
from training.pairs import AstroclipFile, MmuShards, open_pairs
from training.split import split_shards


@pytest.fixture(scope="module")
def astroclip_file(tmp_path_factory):
    return write_astroclip(tmp_path_factory.mktemp("astroclip") / "astroclip_desi.h5")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_images_come_out_as_they_were_before_the_file_transposed_them(astroclip_file):
    with h5py.File(astroclip_file) as file:
        stored, spectrum, redshift = file["1/images"][3], file["1/spectra"][3, :, 0], file["1/redshifts"][3]
    pairs = AstroclipFile(astroclip_file).read([16 + 3])
    np.testing.assert_array_equal(pairs.images[0], stored.T)
    assert pairs.images.shape == (1, 3, 152, 152) and pairs.images.dtype == np.float32
    np.testing.assert_array_equal(pairs.flux[0], spectrum)
    assert (pairs.ivar == 1).all() and pairs.flux_true is None
    assert pairs.redshift[0] == redshift and pairs.object_id[0] == "1003"
    cropped = AstroclipFile(astroclip_file, image_size=144).read([19])
    np.testing.assert_array_equal(cropped.images[0], stored.T[:, 4:148, 4:148])


def test_the_split_of_astroclip_is_upstreams(astroclip_file):
    def ids(part: str, **options: float) -> list[int]:
        source = AstroclipFile(astroclip_file, part, **options)
        return [int(name) for name in source.read(range(len(source))).object_id]

    train = [*range(16), *range(1000, 1016)]
    test = [*range(16, 20), *range(1016, 1020)]
    assert ids("train") == train and ids("test") == test and ids("val") == test
    held = {"val_fraction": 0.25}
    assert ids("val", **held) == [*range(12, 16), *range(1012, 1016)]
    assert ids("train", **held) == [*range(12), *range(1000, 1012)] and ids("test", **held) == test


def test_rows_come_in_the_order_asked_for(astroclip_file):
    source = AstroclipFile(astroclip_file, image_size=8)
    rows = [31, 0, 5, 4, 5, 17, 16, 15]
    pairs = source.read(rows)
    for i, row in enumerate(rows):
        one = source.read([row])
        np.testing.assert_array_equal(pairs.images[i], one.images[0])
        np.testing.assert_array_equal(pairs.flux[i], one.flux[0])
        assert pairs.object_id[i] == one.object_id[0]
    assert len(source.read([])) == 0
    for wrong in ([-1], [32]):
        with pytest.raises(IndexError, match="rows 0 to 31"):
            source.read(wrong)


def test_shards_are_read_as_the_survey_in_memory_is(shards):
    grid = SpectrumGrid()
    source = MmuShards(shards, "train", image_size=136, grid=grid)
    survey = load_survey(split_shards(find_shards(shards)).train)
    rows = [20, 3, 17]
    pairs = source.read(rows)
    assert len(source) == len(survey) and pairs.object_id.tolist() == survey.object_id[rows].tolist()
    np.testing.assert_allclose(pairs.images, survey.images[rows], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pairs.flux, survey.flux[rows], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(pairs.flux_true, survey.flux_true[rows], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(pairs.ivar**-0.5, survey.sigma[rows], rtol=1e-3)


def test_parts_of_shards_are_those_of_evaluation(shards):
    split = split_shards(find_shards(shards))
    for part in ("train", "val", "test"):
        assert set(MmuShards(shards, part).files) == set(getattr(split, part))


def test_masked_and_missing_pixels_have_no_weight(tmp_path):
    root = write_shards(tmp_path, shards=3, rows=3)
    for shard in find_shards(root):
        with h5py.File(shard, "r+") as file:
            mask = file["spectrum_mask"][:]
            mask[:, 100:110] = True
            file["spectrum_mask"][...] = mask
            file["spectrum_flux"][0, 200] = np.nan
            wave = file["spectrum_lambda"][:]
            wave[1, 5000:] = 0  # padded
            file["spectrum_lambda"][...] = wave
    pairs = MmuShards(root).read([0, 1, 2])
    assert (pairs.ivar[:, 101:109] == 0).all() and pairs.ivar[0, 200] == 0 and pairs.flux[0, 200] == 0
    assert (pairs.ivar[1, 5001:] == 0).all() and (pairs.ivar[1, 4000:4990] > 0).all()
    assert np.isfinite(pairs.flux).all() and (pairs.ivar[2, 5000:] > 0).all()


def test_only_what_is_asked_for_is_read(astroclip_file, shards):
    for source in (AstroclipFile(astroclip_file, columns=("spectrum",)), MmuShards(shards, columns=("spectrum",))):
        pairs = source.read([0, 1])
        assert pairs.images.shape == (2, 3, 0, 0) and pairs.flux.shape == (2, 7781)
    for source in (AstroclipFile(astroclip_file, columns=("image",)), MmuShards(shards, columns=("image",))):
        pairs = source.read([0, 1])
        assert pairs.images.shape == (2, 3, 152, 152) and pairs.flux.shape == (2, 0)


def _first_ids(source: AstroclipFile) -> list[str]:
    return source.read([0, 1]).object_id.tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_that_was_read_can_be_handed_to_a_process(astroclip_file, method):
    source = AstroclipFile(astroclip_file)
    here = _first_ids(source)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_first_ids, (source,)) == here
    assert _first_ids(pickle.loads(pickle.dumps(source))) == here
    source.close()
    assert _first_ids(source) == here


def test_the_right_source_is_chosen(astroclip_file, shards, tmp_path):
    assert isinstance(open_pairs(astroclip_file), AstroclipFile)
    assert isinstance(open_pairs(shards), MmuShards)
    with pytest.raises(InputError, match="found nothing at"):
        open_pairs(tmp_path / "absent.h5")
    with pytest.raises(InputError, match="no .hdf5 shards"):
        open_pairs(tmp_path)
    with pytest.raises(InputError, match="'validation'"):
        open_pairs(shards, "validation")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: f.__delitem__("1/targetids"), "group '1' without targetids"),
        (
            lambda f: _replace(f, "0/images", np.zeros((20, 3, 152, 152), "f4")),
            r"0/images of shape \(20, 3, 152, 152\)",
        ),
        (lambda f: _replace(f, "0/spectra", np.zeros((20, 4096), "f4")), r"0/spectra of shape \(20, 4096\)"),
        (lambda f: _replace(f, "1/redshifts", np.zeros(7, "f4")), "columns of lengths"),
        (lambda f: [f.__delitem__(n) for n in list(f)], "nothing at its top"),
    ],
)
def test_a_bad_astroclip_file_is_refused_by_name(tmp_path, spoil, named):
    path = write_astroclip(tmp_path / "bad.h5")
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(InputError, match=named) as caught:
        AstroclipFile(path)
    assert "bad.h5" in str(caught.value) and "wanted" in str(caught.value)


def _replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: f.__delitem__("image_array"), "no dataset image_array"),
        (lambda f: f.__delitem__("spectrum_flux"), "no dataset spectrum_flux"),
        (lambda f: _replace(f, "image_array", np.zeros((16, 2, 152, 152), "f4")), "2 planes"),
        (lambda f: _replace(f, "image_scale", np.full((16, 3), 0.5, "f4")), "0.5 arcsec"),
        (lambda f: _replace(f, "image_array", np.zeros((16, 3, 64, 64), "f4")), "images of 64 pixels"),
        (lambda f: _replace(f, "spectrum_flux", np.zeros((3, 7781), "f4")), "columns of lengths"),
    ],
)
def test_a_bad_shard_is_refused_by_name(tmp_path, spoil, named):
    root = write_shards(tmp_path)
    shard = split_shards(find_shards(root)).train[0]
    with h5py.File(shard, "r+") as file:
        spoil(file)
    with pytest.raises(InputError, match=named) as caught:
        MmuShards(root, image_size=96)
    assert str(shard) in str(caught.value)


def test_truncated_files_are_refused_by_name(tmp_path):
    path = write_astroclip(tmp_path / "cut.h5", rows=5)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.h5, which HDF5 cannot open"):
        AstroclipFile(path)


def test_a_chunk_that_is_damaged_inside_is_named_with_its_rows(tmp_path):
    path = tmp_path / "inside.h5"
    write_astroclip(path, groups=1, rows=10)
    with h5py.File(path, "r+") as file:
        spectra = file["0/spectra"][:]
        del file["0/spectra"]
        made = file.create_dataset("0/spectra", data=spectra, chunks=(1, 7781, 1), compression="gzip", fletcher32=True)
        place = made.id.get_chunk_info(4)
    with path.open("r+b") as raw:
        raw.seek(place.byte_offset + 10)
        raw.write(b"\xff" * 64)
    source = AstroclipFile(path)
    assert len(source.read([3])) == 1
    with pytest.raises(InputError, match=r"rows 4 to 4 of .*inside\.h5 group '0' unreadable"):
        source.read([4])


def test_an_image_smaller_than_the_model_wants_is_refused(astroclip_file):
    with pytest.raises(InputError, match="images of 152 pixels"):
        AstroclipFile(astroclip_file, image_size=160)
    assert Path(AstroclipFile(astroclip_file, image_size=152).files[0]) == astroclip_file
