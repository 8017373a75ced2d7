"""Neighbours, regression, zero-shot R2 and retrieval against scikit-learn and against built-in truths."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from training.evaluate.neighbours import nearest, standardise, unit, weighted_mean, weighted_median
from training.evaluate.retrieval import pool_ranks, retrieval
from training.evaluate.zeroshot import Parts, zero_shot


def cloud(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, 64])
def test_regression_agrees_with_sklearn(k: int):
    table, queries = cloud(300), cloud(90, seed=1)
    queries[:3] = table[:3]  # exact matches: distance 0
    targets = np.random.default_rng(2).normal(size=(300, 2))
    ours = weighted_mean(nearest(queries, table, k, chunk=37), targets)
    theirs = KNeighborsRegressor(k, weights="distance", algorithm="brute").fit(table, targets).predict(queries)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(ours[:3], targets[:3])


def test_standardise_agrees_with_sklearn_and_survives_a_constant_feature():
    table, other = cloud(50), cloud(20, seed=1)
    table[:, 2] = 3.0
    scaler = StandardScaler().fit(table)
    ours = standardise(table, other)
    np.testing.assert_allclose(ours[0], scaler.transform(table), atol=1e-5)
    np.testing.assert_allclose(ours[1], scaler.transform(other), atol=1e-5)


def test_near_pairs_keep_their_digits():
    table = np.concatenate([np.full((1, 128), 100.0), np.full((1, 128), 100.0)]).astype(np.float32)
    table[1, 0] += 1e-2
    found = nearest(table[:1], table, 2)
    assert found.distance[0] == pytest.approx([0.0, 1e-2], rel=1e-2)


def test_k_larger_than_the_table_and_bad_shapes():
    assert nearest(cloud(4), cloud(3, seed=1), 10).rows.shape == (4, 3)
    with pytest.raises(ValueError, match="one D"):
        nearest(cloud(4, 8), cloud(4, 7), 1)


def test_weighted_median_resists_what_drags_a_mean():
    table = np.zeros((5, 2), np.float32)
    table[:, 0] = [1.0, 1.1, 1.2, 1.3, 1.4]
    found = nearest(np.zeros((1, 2), np.float32), table, 5)
    targets = np.array([0.30, 0.31, 0.32, 3.0, 3.0])
    # weights 1, 0.909, 0.833, 0.769, 0.714: half of their sum, 2.113, is passed at the third
    assert weighted_median(found, targets)[0] == pytest.approx(0.32)
    assert weighted_mean(found, targets)[0] > 1.0
    equal = np.full(5, 0.7)
    assert weighted_median(found, equal)[0] == pytest.approx(0.7)


def split_cloud(seed: int = 0) -> tuple[dict[str, Parts], Parts]:
    """Two modalities of one latent; target 0 is the latent's first coordinate, target 1 is pure noise."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(700, 4))
    turned = latent @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    targets = np.stack([latent[:, 0], rng.normal(size=700)], axis=1)
    cut = lambda a: Parts(a[:500], a[500:600], a[600:])  # noqa: E731
    noisy = latent + 0.05 * rng.normal(size=latent.shape)
    return {"image": cut(latent), "spectrum": cut(noisy), "other": cut(turned)}, cut(targets)


def test_zero_shot_upstream_protocol_is_sklearn():
    embeddings, targets = split_cloud()
    table = zero_shot(embeddings, targets, names=("redshift", "noise"), n_bootstrap=20)
    scaler = StandardScaler().fit(embeddings["image"].train)
    knn = KNeighborsRegressor(64, weights="distance").fit(scaler.transform(embeddings["image"].train), targets.train)
    predicted = knn.predict(scaler.transform(embeddings["image"].test))
    got = table["upstream"]["image->image"]
    assert got["redshift"]["value"] == pytest.approx(r2_score(targets.test[:, 0], predicted[:, 0]), abs=1e-4)
    assert got["redshift"]["k"] == 64
    assert got["redshift"]["lo"] < got["redshift"]["value"] < got["redshift"]["hi"]


def test_zero_shot_tells_signal_from_noise_and_shared_from_unshared_space():
    embeddings, targets = split_cloud()
    tuned = zero_shot(embeddings, targets, names=("redshift", "noise"), n_bootstrap=20)["tuned"]
    assert tuned["image->spectrum"]["redshift"]["value"] > 0.6
    assert tuned["image->image"]["noise"]["value"] < 0.1
    turned = {"image": embeddings["image"], "spectrum": embeddings["other"]}
    apart = zero_shot(turned, targets, names=("redshift", "noise"), n_bootstrap=20)["tuned"]
    assert apart["image->spectrum"]["redshift"]["value"] < tuned["image->spectrum"]["redshift"]["value"] - 0.3
    alone = zero_shot({"image": embeddings["image"]}, targets, names=("a", "b"), n_bootstrap=20)
    assert list(alone["tuned"]) == ["image->image"]


def test_k_is_chosen_on_validation_and_never_on_test():
    embeddings, targets = split_cloud()
    shuffled = Parts(targets.train, targets.val, np.random.default_rng(9).permutation(targets.test))
    first = zero_shot(embeddings, targets, names=("a", "b"), n_bootstrap=2)["tuned"]
    second = zero_shot(embeddings, shuffled, names=("a", "b"), n_bootstrap=2)["tuned"]
    assert [first[d]["a"]["k"] for d in first] == [second[d]["a"]["k"] for d in second]


def test_retrieval_extremes():
    vectors = cloud(230, 16)
    perfect = retrieval(vectors, vectors, pool_size=100, shuffles=3, n_bootstrap=50)
    for way in ("image->spectrum", "spectrum->image"):
        assert perfect[way]["recall@1"]["value"] == 1.0 and perfect[way]["median_rank"]["value"] == 1.0
        assert perfect[way]["pools"] == 6 and perfect[way]["pool_size"] == 100
    chance = retrieval(vectors, cloud(230, 16, seed=7), pool_size=100, shuffles=3, n_bootstrap=50)
    entry = chance["image->spectrum"]
    assert entry["recall@10"]["value"] == pytest.approx(0.1, abs=0.07)
    assert entry["median_rank"]["value"] == pytest.approx(50.5, abs=12)
    assert entry["recall@10"]["lo"] <= entry["recall@10"]["value"] <= entry["recall@10"]["hi"]


def test_pools_are_disjoint_seeded_and_one_small_pool_is_stated():
    vectors, others = cloud(50), cloud(50, seed=1)
    ranks = pool_ranks(vectors, others, pool_size=20, shuffles=4, seed=3)
    assert ranks.shape == (4, 50) and np.isfinite(ranks).sum(axis=1).tolist() == [40] * 4
    assert np.nanmax(ranks) <= 20
    np.testing.assert_array_equal(ranks, pool_ranks(vectors, others, pool_size=20, shuffles=4, seed=3))
    assert pool_ranks(vectors, others).shape == (1, 50)
    assert retrieval(vectors, others, n_bootstrap=5)["image->spectrum"]["pool_size"] == 50
    with pytest.raises(ValueError, match="equally many"):
        pool_ranks(vectors, others[:10])


def test_unit_leaves_a_zero_vector_alone():
    scaled = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(scaled, [[0.6, 0.8], [0.0, 0.0]])
