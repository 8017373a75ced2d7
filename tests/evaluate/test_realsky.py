"""Real objects: every file is read, the estimators are tuned off the sky, strangers stand out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from astroclip.preprocess import ImageGrid, SpectrumGrid
from training.evaluate.realsky import (
    KnnRedshift,
    RealObject,
    load_objects,
    load_pairs,
    out_of_class,
    partner_rank,
    redshift_table,
)


def test_real_files_give_the_objects_they_hold(shared_data: Path):
    objects, refused = load_objects(shared_data, SpectrumGrid())
    kinds = Counter((item.group, item.spectype) for item in objects)
    assert refused == []
    assert kinds["desi", "GALAXY"] == 80 and kinds["desi", "QSO"] == 10 and kinds["desi", "STAR"] == 19
    assert kinds["sdss", "GALAXY"] >= 13 and kinds["sdss", "QSO"] >= 15
    assert all(np.isfinite(item.flux).all() and (item.ivar > 0).any() for item in objects)
    by_name = {item.name: item for item in objects}
    assert by_name["coadd-39089837499744649"].redshift == pytest.approx(0.00727, abs=1e-4)
    pairs = load_pairs(shared_data, ImageGrid(), objects)
    assert len(pairs) == 5 and all(0.02 < pair.spectrum.redshift < 0.15 for pair in pairs)
    assert all(pair.image.pixels.shape == (3, 96, 96) and pair.image.pixels.std() > 0 for pair in pairs)


def test_an_absent_folder_gives_nothing(tmp_path: Path):
    assert load_objects(tmp_path, SpectrumGrid()) == ([], [])
    assert load_pairs(tmp_path, ImageGrid(), []) == []


def thing(i: int, z: float, snr: float = 2.0, group: str = "desi", spectype: str = "GALAXY") -> RealObject:
    return RealObject(f"t{i}", group, spectype, z, snr, np.zeros(4), np.ones(4))


def curve(redshift: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Embeddings on an arc of a circle in 8-d: one angle a redshift."""
    rng = np.random.default_rng(seed)
    points = np.zeros((len(redshift), 8))
    points[:, 0], points[:, 1] = np.cos(redshift), np.sin(redshift)
    return points + noise * rng.normal(size=points.shape)


def test_knn_redshift_is_tuned_on_validation():
    rng = np.random.default_rng(0)
    z = rng.uniform(0, 1.4, 900)
    knn = KnnRedshift.tuned(curve(z[:700], 0.0, 1), z[:700], curve(z[700:800], 0.0, 2), z[700:800])
    error = np.abs(knn(curve(z[800:], 0.0, 3)) - z[800:])
    assert np.median(error) < 0.002 and knn.k in (1, 2, 4, 8, 16, 32)
    noisy = KnnRedshift.tuned(curve(z[:700], 0.05, 1), z[:700], curve(z[700:800], 0.05, 2), z[700:800])
    assert noisy.k > 2


def test_redshift_table_bins_by_redshift_and_noise_and_leaves_out_other_classes():
    objects = [thing(i, 0.1 * (i + 1), snr=0.5 if i % 2 else 5.0) for i in range(12)]  # z 0.1 to 1.2
    objects += [thing(99, 0.3, spectype="QSO"), thing(98, 0.3, group="sdss")]
    truth = np.array([item.redshift for item in objects])
    predicted = {"knn": np.where(np.arange(14) == 2, truth + 1.0, truth), "wrong": np.full(14, 9.0)}
    table = redshift_table(objects, predicted, "desi", n_bootstrap=20)
    assert table["z<0.6"]["n"] == 5 and table["0.6<z<1.5"]["n"] == 7 and table["z<1.5"]["n"] == 12
    assert table["z<0.6"]["knn"]["outliers_0.05"]["value"] == pytest.approx(0.2)
    assert table["z<0.6"]["wrong"]["outliers_0.15"]["value"] == 1.0
    low, middle, high = table["z<0.6"]["by_snr"]
    assert (low["n"], middle["n"], high["n"]) == (2, 0, 3)
    assert high["knn"]["outliers_0.05"]["value"] == pytest.approx(1 / 3)
    assert redshift_table(objects, predicted, "nowhere") == {}


def test_partner_ranks_count_distractors_of_both_kinds():
    pairs = np.eye(6)[:3]
    spectra = pairs + 0.1 * np.eye(6)[[3, 4, 5]]
    pool = np.concatenate([np.eye(6)[3:], np.eye(6)[:1]])  # the last one is the first query itself
    got = partner_rank(pairs, spectra, pool, pool)["image->spectrum"]
    assert got["rank_among_pairs"] == [1, 1, 1]
    assert got["rank"] == [2, 1, 1] and got["pool_size"] == 7


def test_strangers_are_told_from_galaxies():
    rng = np.random.default_rng(5)
    z = rng.uniform(0, 1, 500)
    table, simulated = curve(z, 0.02, 1), curve(rng.uniform(0, 1, 200), 0.02, 2)
    objects = [thing(i, 0.5) for i in range(60)] + [thing(i, 2.0, spectype="QSO") for i in range(30)]
    real = np.concatenate([curve(rng.uniform(0, 1, 60), 0.02, 3), np.eye(8)[rng.integers(2, 8, 30)]])
    got = out_of_class(objects, real, table, simulated)
    assert got["QSO"]["auc_real_galaxies"] > 0.99 and got["QSO"]["detected_at_5pct_simulated"] == 1.0
    assert got["false_alarm_on_real_galaxies"] < 0.15
    assert got["STAR"]["n"] == 0 and np.isnan(got["STAR"]["auc_real_galaxies"])
    assert got["kth_cosine"]["QSO"][2] < got["kth_cosine"]["real galaxies"][0]
