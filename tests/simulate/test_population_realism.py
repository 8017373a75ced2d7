"""The realism check's own parts: its figures of merit, its features, and the agreement of the colours."""

from __future__ import annotations

import numpy as np
import pytest

from training.simulate.realism import ColourSample, features, metrics, predict

pytest.importorskip("kcorrect", reason="the real galaxies of the check ship with the package kcorrect")


def test_metrics_of_a_known_error() -> None:
    true = np.linspace(0.0, 1.0, 1001)
    perfect = metrics(true, true)
    assert perfect["sigma_nmad"] == 0.0 and perfect["r2"] == 1.0 and perfect["outliers_0.05"] == 0.0
    shifted = metrics(true + 0.1 * (1.0 + true), true)
    assert shifted["bias"] == pytest.approx(0.1) and shifted["sigma_nmad"] == pytest.approx(0.0, abs=1e-12)
    assert shifted["outliers_0.05"] == 1.0 and shifted["outliers_0.15"] == 0.0


def test_neighbours_leave_the_galaxy_itself_out() -> None:
    rng = np.random.default_rng(0)
    sample = ColourSample(rng.normal(size=(200, 5)), rng.normal(size=200))
    assert features(sample).shape == (200, 5)
    alone = predict(sample, sample, exclude_self=True)
    kept = predict(sample, sample)
    assert np.corrcoef(kept, sample.redshift)[0, 1] > np.corrcoef(alone, sample.redshift)[0, 1]


def test_real_sample_is_on_the_ab_system() -> None:
    from training.simulate.realism import real_sample

    real = real_sample()
    assert real.magnitude.shape == (10000, 5)
    red = (real.redshift > 0.08) & (real.redshift < 0.12)
    assert np.median(real.colour[red, 1]) == pytest.approx(0.9, abs=0.08)


@pytest.mark.slow
def test_mark_on_the_real_galaxies() -> None:
    from training.simulate.realism import run

    record = run(6000, 1)
    figures = record["simulated_on_real"]
    assert isinstance(figures, dict)
    assert figures["sigma_nmad"] <= 0.020 and figures["r2"] >= 0.80
