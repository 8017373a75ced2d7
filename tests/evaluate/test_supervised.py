"""Baselines learn what can be learned, resume where they stopped, and keep to their time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from astroclip.models import ImageTowerConfig
from astroclip.models.spectrum_tower import normalise
from astroclip.preprocess import SpectrumGrid
from training.evaluate.baselines import load_redshift_net, run_baseline
from training.evaluate.fit import FitOptions, fit
from training.evaluate.supervised import ImageRegression, RedshiftClasses, RedshiftNet, TableRegression, table_net
from training.evaluate.survey import photometry

CPU = FitOptions(minutes=5, epochs=60, batch_size=32, learning_rate=3e-3, seed=0, device="cpu")


def table_task(n: int = 600) -> tuple[TableRegression, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = 50 + 10 * rng.normal(size=(n, 5))
    targets = np.stack([np.tanh((features[:, 0] - 50) / 10), 1e3 * features[:, 1]], axis=1)
    train, val, test = np.split(np.arange(n), [n - 200, n - 100])
    return TableRegression(features, targets, train), train, val, test


def test_table_baseline_learns_in_the_targets_own_units():
    task, train, val, test = table_task()
    torch.manual_seed(0)
    net = table_net(5, 2, width=32)
    history = fit(net, task, train, val, CPU)
    assert len(history) == 60 and history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert task.score(net, test, "cpu") > 0.9
    assert abs(task.predict(net, test, "cpu")[:, 1].mean() - task.targets[test, 1].mean()) < 1500


def test_best_validation_epoch_is_kept():
    class Worsening:
        """A loss that moves the weight by one an epoch; the score is best at the second epoch."""

        calls = 0

        def loss(self, model, rows, rng, device):
            return (model.weight * 0).sum()

        def score(self, model, rows, device):
            self.calls += 1
            with torch.no_grad():
                model.weight.fill_(float(self.calls))
            return -abs(self.calls - 2.0)

    net = nn.Linear(1, 1, bias=False)
    options = FitOptions(minutes=5, epochs=4, batch_size=4, device="cpu", weight_decay=0.0)
    fit(net, Worsening(), np.arange(8), np.arange(2), options)
    assert float(net.weight.detach()) == 2.0


def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path: Path):
    task, train, val, _ = table_task()
    torch.manual_seed(0)
    first = fit(table_net(5, 2, 16), task, train, val, FitOptions(epochs=3, device="cpu"), tmp_path / "c.pt")
    seen: list[dict] = []
    net = table_net(5, 2, 16)
    history = fit(net, task, train, val, FitOptions(epochs=5, device="cpu"), tmp_path / "c.pt", seen.append)
    assert history[:3] == first and [entry["epoch"] for entry in seen] == [3, 4]
    again = fit(table_net(5, 2, 16), task, train, val, FitOptions(epochs=5, device="cpu"), tmp_path / "c.pt")
    assert again == history  # finished: nothing more is done
    assert history[3]["seconds"] >= first[-1]["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_training_keeps_to_its_minutes():
    task, train, val, _ = table_task()
    began = time.perf_counter()
    history = fit(table_net(5, 2), task, train, val, FitOptions(minutes=0.01, epochs=10**6, device="cpu"))
    assert time.perf_counter() - began < 5 and history


def test_image_augmentation_turns_and_mirrors_but_keeps_pixels():
    images = np.arange(64 * 3 * 5 * 5, dtype=np.float32).reshape(64, 3, 5, 5)
    task = ImageRegression(lambda rows: torch.from_numpy(images[rows]), np.zeros((64, 1)), np.arange(64))
    (turned,) = task.augmented(np.arange(64), np.random.default_rng(0))
    assert (images == np.arange(64 * 75, dtype=np.float32).reshape(images.shape)).all()  # the survey is not touched
    for row in range(64):
        variants = [torch.rot90(torch.from_numpy(images[row]), k, (1, 2)) for k in range(4)]
        variants += [variant.flip(2) for variant in variants]
        assert any(torch.equal(turned[row], variant) for variant in variants)
    assert sum(not np.array_equal(turned[row].numpy(), images[row]) for row in range(64)) > 40


def lines_at(redshift: np.ndarray, grid: SpectrumGrid, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    wave = grid.wave
    flux = 1 + 0.2 * rng.normal(size=(len(redshift), len(wave)))
    for rest in (3728.5, 4862.7, 5008.2, 6564.6):
        flux += 5 * np.exp(-0.5 * (np.log(wave / rest)[None] - np.log1p(redshift)[:, None]) ** 2 / 0.002**2)
    return flux.astype(np.float32), np.full(flux.shape, 25.0, np.float32)


def redshift_task(n: int = 400) -> tuple[RedshiftClasses, RedshiftNet, np.ndarray]:
    rng, grid = np.random.default_rng(1), SpectrumGrid(n_pixels=512)
    redshift = rng.uniform(0.02, 0.5, n)
    flux, ivar = lines_at(redshift, grid, rng)
    torch.manual_seed(0)
    net = RedshiftNet(512, float(np.log(grid.wave_max / grid.wave_min)), z_max=0.7, width=8)
    task = RedshiftClasses(
        lambda rows: (torch.from_numpy(flux[rows]), torch.from_numpy(ivar[rows])), redshift, net, grid, max_shift=16
    )
    return task, net, redshift


def test_redshift_net_learns_redshifts_finer_than_its_classes():
    task, net, redshift = redshift_task(700)
    train, test = np.arange(600), np.arange(600, 700)
    fit(net, task, train, test, FitOptions(minutes=5, epochs=20, batch_size=32, learning_rate=2e-3, device="cpu"))
    error = np.abs(task.predict(net, test, "cpu") - redshift[test]) / (1 + redshift[test])
    assert np.median(error) < net.step / 2  # of a class


def test_logits_are_the_template_laid_over_the_features_at_each_redshift():
    torch.manual_seed(3)
    net = RedshiftNet(512, 1.00389, z_max=0.7, width=8).eval()
    flux, ivar = torch.randn(2, 512), torch.ones(2, 512)
    with torch.no_grad():
        got = net(flux, ivar)
        scaled = normalise(flux, ivar)
        features = net.blocks(torch.stack([scaled.x, scaled.known], dim=1))
        for cls in (0, 1, 17, net.n_classes - 1):
            start = net.n_classes - cls  # redder spectra meet a bluer part of the rest frame
            laid = (features * net.template[:, start : start + net.length]).sum(dim=(1, 2))
            torch.testing.assert_close(got[:, cls], laid, rtol=1e-4, atol=1e-5)
    assert got.shape == (2, net.n_classes) and net.n_classes * net.step >= np.log1p(0.7)


def test_shifting_a_spectrum_shifts_its_lines_and_its_label_alike():
    task, _, redshift = redshift_task(40)
    rows = np.arange(40)
    flux, ivar, log1z = task.augmented(rows, np.random.default_rng(2))
    moved = np.log1p(redshift) - log1z
    assert np.abs(moved).max() > 10 * task.step
    grid = SpectrumGrid(n_pixels=512)
    for row in rows:
        place = np.log(5008.2 / grid.wave_min) + log1z[row]
        pixel = int(place / task.step)
        if 2 <= pixel < 510:
            assert flux[row, pixel - 1 : pixel + 2].max() > 3.5
    assert ((ivar == 0) | ((ivar > 12.4) & (ivar <= 25.0))).all() and (ivar == 0).any()
    assert np.isfinite(flux).all()


def test_class_labels_have_the_redshift_as_their_mean():
    task, net, redshift = redshift_task(50)
    labels = task._labels(np.log1p(redshift)).numpy()
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    got = net.redshift(np.log(labels + 1e-12))
    np.testing.assert_allclose(got, redshift, atol=1e-4)


def test_photometry_has_the_noise_it_states_and_is_seeded():
    n = 4000
    columns = {
        "half_light_radius_arcsec": np.full(n, 0.8),
        "image_psf_fwhm": np.full((n, 3), 1.2),
        "image_sky_sigma": np.full((n, 3), 0.01),
        **{f"flux_{b}": np.full(n, 30.0) for b in "grz"},
    }
    got = photometry(columns, seed=1)
    np.testing.assert_array_equal(got, photometry(columns, seed=1))
    assert not np.array_equal(got, photometry(columns, seed=2))
    noise = 0.01 * np.sqrt(4 * np.pi * ((1.2 / 2.355) ** 2 + 0.8**2)) / 0.262
    scatter = np.hypot(noise / 30, 0.01) * 2.5 / np.log(10)
    assert got[:, 0].std() == pytest.approx(scatter, rel=0.05)
    assert got[:, 0].mean() == pytest.approx(22.5 - 2.5 * np.log10(30), abs=0.01)
    np.testing.assert_allclose(got[:, 3], got[:, 0] - got[:, 1], atol=1e-9)


@pytest.mark.parametrize("kind", ["resnet", "photometry", "redshift"])
def test_every_baseline_runs_on_a_survey(kind: str, small_survey: Path, tmp_path: Path):
    options = FitOptions(minutes=1, epochs=1, batch_size=16, device="cpu")
    result = run_baseline(kind, small_survey, tmp_path, options, image_config=ImageTowerConfig(width=8, hidden=16))
    read = json.loads((tmp_path / "result.json").read_text())
    assert read["kind"] == kind and read["objects"]["train"] + read["objects"]["val"] + read["objects"]["test"] == 79
    assert set(result["test"]) >= {"redshift"} if kind != "redshift" else {"sigma_nmad", "r2"} <= set(result["test"])
    if kind == "redshift":
        net = load_redshift_net(tmp_path, "cpu")
        assert not net.training and net.settings == read["net"]
    with pytest.raises(ValueError, match="unknown"):
        run_baseline("forest", small_survey, tmp_path, options)


def test_finished_baseline_is_not_run_again_unless_more_is_asked(small_survey: Path, tmp_path: Path, monkeypatch):
    options = FitOptions(minutes=1, epochs=1, batch_size=16, device="cpu")
    first = run_baseline("photometry", small_survey, tmp_path, options)
    with monkeypatch.context() as no_reading:
        no_reading.setattr("training.evaluate.baselines.load_survey", lambda *_, **__: pytest.fail("read again"))
        assert run_baseline("photometry", small_survey, tmp_path, options)["test"] == first["test"]
    longer = run_baseline("photometry", small_survey, tmp_path, replace(options, epochs=2))
    assert longer["epochs"] == 2
