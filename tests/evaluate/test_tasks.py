"""Few-shot heads, fixed pools, morphology and AstroCLIP's own pairs, on vectors and files whose answer is known."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from astroclip.embed import Embedder
from astroclip.errors import InputError
from astroclip.preprocess import ImageGrid
from training.evaluate.encoders import model_sources
from training.evaluate.fewshot import few_shot
from training.evaluate.morphology import VOTES, load_votes, real_morphology, simulated_morphology
from training.evaluate.provabgs import PairPlan, evaluate_pairs, join, read_provabgs
from training.evaluate.retrieval import draw_pools, pools_sha256, retrieval
from training.evaluate.tasks import TaskSettings
from training.evaluate.zeroshot import Parts


def latent(n: int = 700, seed: int = 0) -> tuple[dict[str, Parts], Parts]:
    """Two views of one latent with an offset between them (the modality gap); the target is its first coordinate."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 6))
    cut = lambda a: Parts(a[: n - 200], a[n - 200 : n - 100], a[n - 100 :])  # noqa: E731
    other = z + 0.05 * rng.normal(size=z.shape) + 3.0
    return {"image": cut(z), "spectrum": cut(other)}, cut(np.stack([z[:, 0], rng.normal(size=n)], axis=1))


def test_few_shot_learns_crosses_the_gap_and_more_labels_help():
    vectors, targets = latent()
    got = few_shot(vectors, targets, ("a", "noise"), labels={"all": (0, 1), "20": (20, 3), "900": (900, 1)},
                   n_bootstrap=20)  # fmt: skip
    assert set(got) == {"all", "20"}  # nobody has 900 labels
    for way in ("image->image", "image->spectrum", "spectrum->image", "spectrum->spectrum"):
        assert got["all"][way]["a"]["value"] > 0.9 and got["all"][way]["noise"]["value"] < 0.15
    assert got["20"]["image->image"]["a"]["value"] < got["all"]["image->image"]["a"]["value"]
    assert (got["20"]["image->image"]["a"]["labels"], got["20"]["image->image"]["a"]["draws"]) == (20, 3)


def test_pools_are_fixed_disjoint_and_recorded():
    pools = draw_pools(50, 20, shuffles=3, seed=4)
    assert pools.shape == (3, 2, 20) and all(len(np.unique(shuffle)) == 40 for shuffle in pools)
    assert pools_sha256(pools) == pools_sha256(draw_pools(50, 20, shuffles=3, seed=4))
    assert pools_sha256(pools) != pools_sha256(draw_pools(50, 20, shuffles=3, seed=5))
    vectors = np.random.default_rng(0).normal(size=(50, 4))
    entry = retrieval(vectors, vectors, pool_size=20, shuffles=3, seed=4, n_bootstrap=5)["image->spectrum"]
    assert entry["pools_sha256"] == pools_sha256(pools) and entry["pools"] == 6


def test_simulated_morphology_stays_within_a_modality():
    vectors, targets = latent()
    shapes = Parts(*(np.c_[part, part[:, :1]] for part in (targets.train, targets.val, targets.test)))
    got = simulated_morphology(vectors, shapes, n_bootstrap=5)
    assert set(got["tuned"]) == {"image->image", "spectrum->spectrum"}
    assert got["few_shot"]["image->image"]["bulge_fraction"]["value"] > 0.9


def test_real_votes_are_predicted_out_of_fold():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(120, 5))
    votes = np.c_[vectors[:, 0] > 0, vectors[:, 1], vectors[:, 2], rng.normal(size=120)].astype(float)
    got = real_morphology(vectors, votes, n_bootstrap=20)
    assert set(got) == {"k-NN", "few-shot"} and set(got["k-NN"]) == set(VOTES.values())
    assert got["few-shot"]["ring"]["value"] > 0.8 and got["k-NN"]["no_spiral_arms"]["value"] < 0.15
    shuffled = real_morphology(vectors, rng.permutation(votes), n_bootstrap=20)
    assert shuffled["few-shot"]["ring"]["value"] < 0.7  # nothing leaks from a picture to its own prediction


def test_real_pictures_are_read_as_uploads(shared_data: Path, tmp_path: Path):
    voted = load_votes(shared_data, ImageGrid())
    assert voted is not None and len(voted) == 235 and voted.refused == []
    assert voted.pixels.shape[1:] == (3, 96, 96) and set(voted.votes[:, 0]) == {0.0, 1.0}
    assert load_votes(tmp_path, ImageGrid()) is None


# --- AstroCLIP's pairs and PROVABGS -----------------------------------------------------------------------------------

N = 30


def write_pairs(path: Path) -> None:
    rng = np.random.default_rng(2)
    with h5py.File(path, "w") as file:
        for group in ("0", "1"):
            node = file.create_group(group)
            node["images"] = rng.normal(0.1, 0.02, (N, 152, 152, 3)).astype(np.float32)
            node["spectra"] = rng.normal(3, 1, (N, 7781, 1)).astype(np.float32)
            node["redshifts"] = rng.uniform(0, 0.5, N).astype(np.float32)
            node["targetids"] = 39_000_000_000_000_000 + 100 * int(group) + np.arange(N)


def write_catalogue(path: Path, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    n = 2 * N + 5
    ids = 39_000_000_000_000_000 + np.r_[np.arange(N), 100 + np.arange(N), 900 + np.arange(5)]
    columns = {
        "TARGETID": rng.permutation(ids),
        "Z_HP": rng.uniform(0, 0.5, n),
        "PROVABGS_LOGMSTAR_BF": rng.uniform(9, 11, n),
        **{f"MAG_{band}": rng.uniform(17, 20, n) for band in "GRZ"},
        "Z_MW": rng.uniform(0.01, 0.03, n),
        "TAGE_MW": rng.uniform(2, 10, n),
        "AVG_SFR": rng.uniform(0.1, 3, n),
        **changes,
    }
    table = np.zeros(n, dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    with h5py.File(path, "w") as file:
        file["__astropy_table__"] = table
    return columns


def test_provabgs_rows_are_kept_joined_and_ssfr_is_right(tmp_path: Path):
    path = tmp_path / "p.hdf5"
    columns = write_catalogue(path)
    columns["PROVABGS_LOGMSTAR_BF"][:2] = -1
    columns["MAG_Z"][2] = -99
    columns = write_catalogue(path, **columns)
    found = read_provabgs(path)
    assert len(found.target_id) == 2 * N + 5 - 3
    assert found.names == ("redshift", "log_stellar_mass", "log_metallicity", "age_gyr", "log_ssfr")
    wanted = columns["TARGETID"][7]
    rows, values = join(found, np.array(["1", str(wanted)]))
    assert rows.tolist() == [1]
    right = np.log10(columns["AVG_SFR"][7]) - columns["PROVABGS_LOGMSTAR_BF"][7]
    np.testing.assert_allclose(values[0, [0, 4]], [columns["Z_HP"][7], right])
    published = join(read_provabgs(path, published_ssfr=True), np.array([str(wanted)]))[1]
    np.testing.assert_allclose(published[0, 4], np.log(columns["AVG_SFR"][7]) - np.log(columns["Z_MW"][7]))


def test_astroclips_test_set_goes_through_every_task(tmp_path: Path, tiny_model_dir: Path):
    write_pairs(tmp_path / "pairs.h5")
    write_catalogue(tmp_path / "p.hdf5")
    sources = model_sources("aligned", Embedder.from_pretrained(tiny_model_dir, device="cpu"), "cpu")
    plan = PairPlan(tmp_path / "pairs.h5", tmp_path / "p.hdf5")
    settings = TaskSettings(pools=(5,), n_bootstrap=5)
    got = evaluate_pairs(plan, sources, settings, lambda line: None)
    assert got["objects"] == {"train": 43, "val": 5, "test": 12} and got["ssfr"] == "right"
    tasks = got["encoders"]["aligned"]
    assert set(tasks["zero_shot"]["tuned"]["image->spectrum"]) >= {"redshift", "log_ssfr"}
    assert tasks["retrieval_5"]["image->spectrum"]["pool_size"] == 5 and "all" in tasks["few_shot"]


def test_absent_and_wrong_catalogues_are_said(tmp_path: Path):
    said: list[str] = []
    got = evaluate_pairs(PairPlan(tmp_path / "no.h5", None), {}, TaskSettings(), said.append)
    assert "skipped" in got and len(said) == 1
    (tmp_path / "bad.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        read_provabgs(tmp_path / "bad.hdf5")
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file["TARGETID"] = np.arange(3)
    with pytest.raises(InputError, match="lacks Z_HP"):
        read_provabgs(tmp_path / "empty.hdf5")
