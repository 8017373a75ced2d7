"""Regression agrees with scikit-learn, and its intervals and gaps behave."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsRegressor

from astroclip.errors import InputError, NotFoundError
from index import estimate, knn_regress
from index.trust import assess
from index.typical import conformal_p


def test_value_equals_sklearn(toy, index):
    has = toy.truth["has_spectrum"][toy.indexed]
    rows = np.flatnonzero(has)
    vectors = index.tables["spectrum"].take(np.arange(len(rows)))
    queries = toy.truth["image"][toy.indexed[:50]]
    model = KNeighborsRegressor(16, weights="distance").fit(vectors, toy.truth["redshift"][toy.indexed[rows]])
    hits, _ = index.search(queries, target="spectrum", k=16, mode="exact")
    wanted = model.predict(queries)
    for h, value in zip(hits, wanted, strict=True):
        found = estimate(index, h, ["redshift"])[0]
        assert found.value == pytest.approx(value, abs=2e-5)
        assert found.lo <= found.value <= found.hi and found.unit == "" and 1 <= found.n_eff <= 16


def test_estimates_of_the_toy_survey_are_right(toy, index):
    """Curve embeddings hold the redshift, so neighbours must give it back, across modalities too."""
    queries, truth = toy.truth["image"][toy.indexed[::5]], toy.truth["redshift"][toy.indexed[::5]]
    hits, _ = index.search(queries, target="spectrum", k=16, query_modality="image")
    found = [estimate(index, h)[0] for h in hits]
    assert [e.name for e in estimate(index, hits[0])] == ["redshift", "log_stellar_mass"]
    assert np.median(np.abs(np.array([e.value for e in found]) - truth)) < 0.02
    inside = np.mean([e.lo <= z <= e.hi for e, z in zip(found, truth, strict=True)])
    assert inside > 0.6


def test_wider_coverage_gives_wider_intervals():
    rng = np.random.default_rng(2)
    values, d = rng.normal(size=(40, 16)), rng.uniform(0.1, 0.5, (40, 16))
    narrow, wide = knn_regress(values, d, 0.5), knn_regress(values, d, 0.95)
    assert np.all(wide.lo <= narrow.lo) and np.all(wide.hi >= narrow.hi)
    np.testing.assert_array_equal(narrow.value, wide.value)


def test_equal_distances_are_plain_statistics():
    values = np.arange(100.0)[None]
    found = knn_regress(values, np.ones((1, 100)), 0.68)
    assert found.value[0] == pytest.approx(49.5) and found.n_eff[0] == pytest.approx(100)
    assert (found.lo[0], found.hi[0]) == pytest.approx(np.quantile(values, [0.16, 0.84], method="hazen"))


def test_missing_neighbours_are_left_out():
    values, d = np.array([[1.0, np.nan, 3.0], [np.nan] * 3]), np.array([[0.5, 0.1, 0.5], [0.1, 0.2, 0.3]])
    found = knn_regress(values, d)
    assert found.value[0] == pytest.approx(2) and found.n_eff[0] == pytest.approx(2)
    assert np.isnan([found.value[1], found.lo[1], found.hi[1]]).all() and found.n_eff[1] == 0
    assert knn_regress(np.empty((2, 0)), np.empty((2, 0))).n_eff.tolist() == [0, 0]


def test_an_identical_neighbour_takes_all_the_weight():
    found = knn_regress(np.array([[5.0, 1.0, 1.0]]), np.array([[0.0, 0.3, 0.3]]))
    assert found.value[0] == pytest.approx(5, abs=1e-4) and found.n_eff[0] == pytest.approx(1, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0.05, 0.99))
def test_a_row_of_a_batch_equals_itself_alone(k, seed, coverage):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((5, k)) < 0.2, np.nan, rng.normal(size=(5, k)))
    d = rng.uniform(0, 1, (5, k))
    batch = knn_regress(values, d, coverage)
    for i in range(5):
        alone = knn_regress(values[i : i + 1], d[i : i + 1], coverage)
        for name in ("value", "lo", "hi", "n_eff"):
            np.testing.assert_array_equal(getattr(batch, name)[i], getattr(alone, name)[0])
        known = values[i][np.isfinite(values[i])]
        if len(known):
            assert known.min() - 1e-9 <= batch.lo[i] <= batch.value[i] <= batch.hi[i] <= known.max() + 1e-9


def test_refusals(index, toy):
    hits, _ = index.search(toy.truth["image"][0], target="image", k=4)
    with pytest.raises(NotFoundError, match="no property 'colour'.*redshift"):
        estimate(index, hits[0], ["colour"])
    with pytest.raises(InputError, match="coverage 1"):
        estimate(index, hits[0], coverage=1.0)


def test_trust_is_uniform_for_the_surveys_own_and_small_for_strangers(toy, index):
    own = toy.truth["image"][toy.indexed]
    rows = np.flatnonzero(toy.truth["has_image"][toy.indexed])[:150]
    p = np.array([assess(index, own[[r]], "image", exclude_rows=[r])[0].ood_p for r in rows])
    assert abs(np.mean(p < 0.3) - 0.3) < 0.12 and p.min() > 0
    stranger = -own[:1]
    trust = assess(index, stranger, "image")[0]
    assert trust.ood_p < 0.01 and trust.flags[0].code == "out_of_distribution"


def test_conformal_p_counts():
    table = np.array([0.1, 0.2, 0.3], np.float32)
    assert conformal_p(table, [0.05, 0.2, 0.9]).tolist() == [0.25, 0.75, 1.0]
