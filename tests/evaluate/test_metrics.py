"""Each number of the evaluation against scikit-learn or a value worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from training.evaluate import metrics


def test_r2_agrees_with_sklearn_and_is_undefined_for_constant_truth():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    predicted = truth + 0.3 * rng.normal(size=200)
    assert metrics.r2(truth, predicted) == pytest.approx(r2_score(truth, predicted), abs=1e-12)
    assert np.isnan(metrics.r2(np.ones(5), np.arange(5.0)))


def test_redshift_numbers_by_hand():
    truth = np.array([0.0, 1.0, 1.0, 3.0, 0.0])
    predicted = np.array([0.01, 1.04, 1.0, 3.0, 0.2])  # dz = 0.01, 0.02, 0, 0, 0.2
    assert metrics.bias(truth, predicted) == pytest.approx(0.01)
    assert metrics.sigma_nmad(truth, predicted) == pytest.approx(1.4826 * 0.01)
    assert metrics.outlier_fraction(truth, predicted, 0.05) == pytest.approx(0.2)
    assert metrics.outlier_fraction(truth, predicted, 0.25) == 0.0
    # a constant shift is bias, not scatter
    assert metrics.sigma_nmad(np.zeros(3), np.full(3, 0.3)) == 0.0


def test_sigma_nmad_is_the_standard_deviation_of_a_gaussian():
    dz = np.random.default_rng(1).normal(0, 0.02, 200_000)
    assert metrics.sigma_nmad(np.zeros_like(dz), dz) == pytest.approx(0.02, rel=0.01)


def test_ranks_recall_and_ties():
    candidates = np.eye(4, dtype=np.float32)
    queries = np.array([[1, 0, 0, 0], [0.9, 0.8, 0, 0], [0.5, 0.4, 0.3, 0], [0, 0, 0, 1]], np.float32)
    ranks = metrics.partner_ranks(queries, candidates)
    assert ranks.tolist() == [1, 2, 3, 1]
    assert [metrics.recall_at_k(ranks, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    assert metrics.median_rank(ranks) == 1.5
    alike = np.ones((6, 2), np.float32) / np.sqrt(2).astype(np.float32)
    assert (metrics.partner_ranks(alike, alike) == 6).all()  # a collapsed encoder finds nothing


def test_out_of_class_numbers():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(size=300), rng.normal(1.0, 1.0, size=200)
    inside[:20] = outside[:20]  # ties
    labels = np.r_[np.zeros(300), np.ones(200)]
    assert metrics.roc_auc(inside, outside) == pytest.approx(roc_auc_score(labels, np.r_[inside, outside]))
    inside = np.arange(100.0)
    assert metrics.detection_rate(inside, np.array([94.0, 95.5, 200.0]), 0.05) == pytest.approx(2 / 3)
    assert np.mean(inside > np.quantile(inside, 0.95, method="higher")) <= 0.05


def test_bootstrap_interval_covers_as_promised():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        sample = rng.normal(size=60)
        lo, hi = metrics.bootstrap_interval(np.mean, sample, n=200, coverage=0.9, seed=trial)
        covered += lo <= 0.0 <= hi
    assert 80 <= covered <= 97
    assert np.isnan(metrics.bootstrap_interval(np.mean, np.ones(1))[0])


def test_bootstrap_is_seeded_and_keeps_arrays_together():
    x = np.random.default_rng(4).normal(size=50)
    first = metrics.bootstrap_interval(metrics.r2, x, x, seed=5)
    assert first == (1.0, 1.0)  # pairs stay pairs
    assert metrics.bootstrap_interval(np.mean, x, seed=5) == metrics.bootstrap_interval(np.mean, x, seed=5)
    assert metrics.bootstrap_interval(np.mean, x, seed=5) != metrics.bootstrap_interval(np.mean, x, seed=6)


@pytest.mark.parametrize("name", ["sigma_nmad", "bias", "outlier_fraction"])
def test_no_objects_give_nan(name: str):
    assert np.isnan(getattr(metrics, name)(np.array([]), np.array([])))
