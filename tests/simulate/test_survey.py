"""The survey: same bytes for any number of workers and after an interruption, the layout, the footprint, refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec

import astropy_healpix
import h5py
import numpy as np
import pytest
from astropy import units

from astroclip.errors import InputError
from astroclip.io.mmu import iter_mmu
from training.simulate import footprint
from training.simulate.mmu import round_to_noise, sha256_of, shard_path
from training.simulate.survey import DEFAULT_MIX, SurveyPlan, parse_mix, simulate_survey

MIX = tuple(DEFAULT_MIX.items())
PLAN = SurveyPlan(n=10, seed=4, mix=MIX, shard_size=4)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    if find_spec("bagpipes") is None:
        pytest.skip("templates are derived from the package bagpipes (extra `simulate`)")
    out = tmp_path_factory.mktemp("survey")
    return out, simulate_survey(PLAN, out, workers=1)


def test_pixels_and_positions_agree_with_astropy_healpix():
    healpix = astropy_healpix.HEALPix(footprint.NSIDE, order="nested")
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.arange(12 * footprint.NSIDE**2), 5)
    ra, dec = footprint.pixel_positions(pixels, rng.random(len(pixels)), rng.random(len(pixels)))
    np.testing.assert_array_equal(healpix.lonlat_to_healpix(ra * units.deg, dec * units.deg), pixels)
    centres = np.arange(12 * footprint.NSIDE**2)
    ra, dec = footprint.pixel_positions(centres, np.full(len(centres), 0.5), np.full(len(centres), 0.5))
    lon, lat = healpix.healpix_to_lonlat(centres)
    np.testing.assert_allclose(dec, lat.deg, atol=1e-9)
    np.testing.assert_allclose(np.mod(ra - lon.deg + 180, 360), 180, atol=1e-9)


def test_positions_are_uniform_in_a_pixel():
    ra, dec = footprint.positions_in_pixel(1000, 20000, np.random.default_rng(1))
    fine = astropy_healpix.HEALPix(footprint.NSIDE * 4, order="nested")
    counts = np.bincount(fine.lonlat_to_healpix(ra * units.deg, dec * units.deg) - 16000, minlength=16)
    assert len(counts) == 16 and counts.min() > 1100 and counts.max() < 1400


def test_footprint_keeps_off_the_plane_and_holds_both_systems():
    pixels = footprint.footprint_pixels()
    assert 1000 < len(pixels) < 1800
    systems = {footprint.photometric_system(int(p)) for p in pixels}
    assert systems == {"N", "S"}


def test_layout(survey):
    out, manifest = survey
    assert manifest["complete"] and [f["rows"] for f in sorted(manifest["files"], key=lambda f: f["shard"])] == [
        4,
        4,
        2,
    ]
    ids = []
    for entry in manifest["files"]:
        assert sha256_of(out / entry["path"]) == entry["sha256"]
        with h5py.File(out / entry["path"]) as file:
            n = entry["rows"]
            assert {len(column) for column in file.values()} == {n}
            assert not any(column.dtype.hasobject for column in file.values())
            assert file["image_array"].shape == (n, 3, 152, 152) and file["image_array"].dtype == np.float32
            assert file["spectrum_flux"].shape == (n, 7781)
            wave = file["spectrum_lambda"][0]
            assert wave[0] == 3600 and wave[-1] == pytest.approx(9824, abs=1e-3)
            assert (file["image_band"][0] == [b"DES-G", b"DES-R", b"DES-Z"]).all()
            np.testing.assert_array_equal(file["Z"][:], file["redshift"][:])
            healpix = astropy_healpix.HEALPix(footprint.NSIDE, order="nested")
            inside = healpix.lonlat_to_healpix(file["ra"][:] * units.deg, file["dec"][:] * units.deg)
            assert (inside == file["healpix"][:]).all() and entry["path"].startswith(f"healpix={inside[0]:04d}/")
            good = file["spectrum_ivar"][:] > 0
            assert (good == ~file["spectrum_mask"][:]).all()
            pull = (file["spectrum_flux"][:] - file["spectrum_flux_true"][:]) * np.sqrt(file["spectrum_ivar"][:])
            assert np.median(pull[good] ** 2) / 0.4549 == pytest.approx(1.0, abs=0.05)
            ids += list(file["object_id"][:])
    assert sorted(ids) == [f"sim-{i:08d}".encode() for i in range(10)]


def test_the_reader_of_the_library_reads_it(survey):
    out, manifest = survey
    rows = list(iter_mmu(out / manifest["files"][0]["path"]))
    assert all(row.image is not None and row.spectrum is not None and not row.errors for row in rows)
    assert rows[0].image.bands == ("g", "r", "z")


def test_any_number_of_workers_and_any_interruption_give_the_same_bytes(survey, tmp_path):
    out, manifest = survey
    first = PLAN.shards()[0]
    other = tmp_path / "other"

    def stop_after_one(done, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_survey(PLAN, other, workers=2, report=stop_after_one)
    assert not json.loads((other / "survey.json").read_text())["complete"]
    # What a kill leaves behind: a file under its working name, and a shard that is missing.
    path = shard_path(other, first.pixel)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.with_suffix(".partial").write_bytes(b"half a shard")
    again = simulate_survey(PLAN, other, workers=2)
    assert again["files"] == manifest["files"]
    assert (other / "survey.json").read_bytes() == (out / "survey.json").read_bytes()


def test_another_seed_is_another_survey_and_is_refused_in_the_same_folder(survey):
    out, _ = survey
    with pytest.raises(InputError, match="seed = 4.*wanted seed = 5"):
        simulate_survey(SurveyPlan(n=10, seed=5, mix=MIX, shard_size=4), out)
    assert [s.pixel for s in PLAN.shards()] != [s.pixel for s in SurveyPlan(10, 5, MIX, 4).shards()]


@pytest.mark.parametrize("n", [0, -1, 10**8])
def test_impossible_counts_are_refused(n):
    with pytest.raises(InputError, match="wanted 1 to"):
        SurveyPlan(n=n, seed=0, mix=MIX)


def test_mix():
    assert parse_mix("elg=1, bgs=3") == (("BGS", 0.75), ("ELG", 0.25))
    assert parse_mix("bgs=0.45,lrg=0.2,elg=0.25,sdss=0.1") == MIX
    for bad in ("", "qso=1", "bgs", "bgs=x", "bgs=-1,elg=2", "bgs=0", "bgs=nan", "bgs=inf"):
        with pytest.raises(InputError, match="wanted shares"):
            parse_mix(bad)


def test_rounding_stays_far_below_the_noise():
    rng = np.random.default_rng(0)
    sigma = np.float32(0.013)
    values = rng.normal(0.0, 0.05, 5000).astype(np.float32)
    error = round_to_noise(values, sigma) - values
    assert 0 < np.abs(error).max() <= sigma / 64
    assert len(np.unique(round_to_noise(values, sigma))) < 2000
