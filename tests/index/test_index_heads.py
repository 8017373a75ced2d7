"""Heads on frozen vectors: fitting, masking, determinism, refusals."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from astroclip.errors import IndexFileError, InputError, NotFoundError
from index.density import cdf, probabilities, quantiles
from index.head_files import read_head, write_head
from index.head_fit import TorchNet
from index.heads import DENSITY, POINT, DensityHead, HeadSettings, fit_head

NAMES = ("redshift", "mass")
QUICK = replace(DENSITY, hidden=(32,), batch_size=64, dropout=0.1, learning_rate=3e-3, min_steps=600)


def labelled(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (n, 8) and two properties that depend on them smoothly, with a little scatter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    redshift = 0.8 + 0.5 * x[:, 0] + 0.01 * rng.standard_normal(n)
    mass = 10 + x[:, 1] - x[:, 2] ** 2 + 0.1 * rng.standard_normal(n)
    return x.astype(np.float32), np.stack([redshift, mass], axis=1)


def r2(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(1 - np.mean((truth - predicted) ** 2) / np.var(truth))


def test_a_point_head_learns_a_relation() -> None:
    head = fit_head(*labelled(), NAMES, kind="point", seed=1)
    vectors, targets = labelled(300, seed=1)
    predicted = head.predict(vectors)
    assert predicted.shape == (300, 2)
    assert predicted.dtype == np.float64
    assert min(r2(targets[:, i], predicted[:, i]) for i in range(2)) > 0.9


def test_unknown_labels_are_left_out_of_the_loss() -> None:
    vectors, targets = labelled()
    targets[:400, 1] = np.nan
    head = fit_head(vectors, targets, NAMES, kind="point")
    held_out, truth = labelled(300, seed=1)
    assert r2(truth[:, 1], head.predict(held_out)[:, 1]) > 0.8
    poisoned = targets.copy()
    poisoned[:400, 1] = np.inf
    again = fit_head(vectors, poisoned, NAMES, kind="point")
    np.testing.assert_array_equal(again.predict(held_out), head.predict(held_out))


def test_the_same_labels_give_the_same_head_whatever_the_threads() -> None:
    before = torch.get_num_threads(), torch.random.get_rng_state()
    one = fit_head(*labelled(), NAMES, kind="point", seed=3).network
    torch.set_num_threads(2)
    torch.manual_seed(99)
    try:
        two = fit_head(*labelled(), NAMES, kind="point", seed=3).network
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
        torch.random.set_rng_state(before[1])
    other = fit_head(*labelled(), NAMES, kind="point", seed=4).network
    for a, b, c in zip(one.weights, two.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)


@pytest.mark.parametrize("skip", [False, True])
def test_the_numpy_forward_pass_is_torchs(skip: bool) -> None:
    torch.manual_seed(0)
    net = TorchNet(8, 5, HeadSettings(hidden=(16, 12)), skip=skip).eval()
    mean, spread = np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8)
    vectors = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    inputs = torch.from_numpy(((vectors - mean) / spread).astype(np.float32))
    np.testing.assert_allclose(net.network(mean, spread)(vectors), net(inputs).detach().numpy(), atol=1e-5)


def test_few_labels_are_seen_often_enough() -> None:
    """Ten epochs of a hundred labels are 20 steps: the least number of steps is what makes them a fit."""
    vectors, targets = labelled(100)
    held_out, truth = labelled(300, seed=1)
    short = fit_head(vectors, targets, NAMES, kind="point", settings=HeadSettings(min_steps=0))
    full = fit_head(vectors, targets, NAMES, kind="point", settings=POINT)
    assert r2(truth[:, 0], short.predict(held_out)[:, 0]) < 0.5 < r2(truth[:, 0], full.predict(held_out)[:, 0])


def test_labels_that_do_not_fit_are_refused() -> None:
    vectors, targets = labelled(100)
    with pytest.raises(InputError, match=r"\(100, 8\) and targets \(99, 2\)"):
        fit_head(vectors, targets[:-1], NAMES)
    with pytest.raises(InputError, match="NaN or infinity"):
        fit_head(np.full_like(vectors, np.nan), targets, NAMES)
    targets[19:, 1] = np.nan
    with pytest.raises(InputError, match="19 known values of 'mass'") as caught:
        fit_head(vectors, targets, NAMES, kind="point")
    assert (caught.value.code, caught.value.field) == ("too_few_labels", "mass")
    with pytest.raises(InputError, match="wanted \\(Q, 8\\)"):
        fit_head(vectors, labelled(100)[1], NAMES, kind="point").predict(vectors[:, :7])


# --- densities -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> DensityHead:
    found = fit_head(*labelled(2000), NAMES, settings=QUICK)
    assert isinstance(found, DensityHead)
    return found


def test_intervals_hold_what_they_say(head: DensityHead) -> None:
    vectors, targets = labelled(2000, seed=1)
    for coverage in (0.68, 0.9, 0.95):
        tail = (1 - coverage) / 2
        ends = head.quantiles(vectors, [tail, 1 - tail])
        inside = (ends[:, :, 0] <= targets) & (targets <= ends[:, :, 1])
        np.testing.assert_allclose(inside.mean(axis=0), coverage, atol=0.07)  # 200 scores: 0.033 at one sigma
    assert min(r2(targets[:, i], head.predict(vectors)[:, i]) for i in range(2)) > 0.85
    for entry in head.properties:
        assert entry.report["held_out"] == 200
        assert abs(entry.report["coverage"]["0.68"] - 0.68) < 0.1


def test_calibration_mends_intervals_that_are_too_narrow(head: DensityHead) -> None:
    """The same network, told to be several times as sure of itself, needs its scores."""
    vectors, targets = labelled(1000, seed=2)
    entry = head.properties[0]
    network = entry.network
    assert network.skip is not None
    sure = replace(
        network,
        weights=(*network.weights[:-1], 16 * network.weights[-1]),
        biases=(*network.biases[:-1], 16 * network.biases[-1]),
        skip=16 * network.skip,
    )
    pit = cdf(entry.axis, probabilities(entry.axis, sure(vectors)), targets[:, 0])
    assert np.mean(np.abs(pit - 0.5) <= 0.34) < 0.5
    mended = replace(entry, network=sure, scores=np.sort(np.abs(pit[:500] - 0.5)))
    lo, hi = quantiles(entry.axis, mended.probabilities(vectors[500:]), mended.calibrated(np.array([0.16, 0.84]))).T
    assert abs(np.mean((lo <= targets[500:, 0]) & (targets[500:, 0] <= hi)) - 0.68) < 0.07


def test_too_few_scores_give_the_whole_axis(head: DensityHead) -> None:
    few = replace(head.properties[0], scores=np.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(few.half_width(np.array([0.0, 0.25, 0.5, 0.75, 0.76])), [0, 0.1, 0.2, 0.3, 0.5])
    np.testing.assert_allclose(few.calibrated(np.array([0.1, 0.5, 0.9])), [0.0, 0.5, 1.0])


def test_a_density_is_one_and_knows_two_modes() -> None:
    """Labels that are 0.3 or 0.9 with no way to tell: both are offered, the gap between is not."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1500, 4)).astype(np.float32)
    redshift = np.where(rng.random(1500) < 0.5, 0.3, 0.9) + 0.02 * rng.standard_normal(1500)
    head = fit_head(vectors, redshift[:, None], ["redshift"], settings=QUICK)
    assert isinstance(head, DensityHead)
    grid = np.linspace(-0.2, 1.5, 3000)
    found = head.density(vectors[:5], "redshift", grid)
    np.testing.assert_allclose(np.trapezoid(found, grid, axis=1), 1.0, atol=0.02)
    at = {z: found[:, np.argmin(np.abs(grid - z))] for z in (0.3, 0.6, 0.9)}
    assert np.all(at[0.3] > 5 * at[0.6]) and np.all(at[0.9] > 5 * at[0.6])
    with pytest.raises(NotFoundError, match="no property 'age'"):
        head.density(vectors[:5], "age", grid)


def test_phases_in_the_vectors_make_a_sharp_redshift() -> None:
    """Vectors that hold exp(i w ln(1 + z)) give redshifts to a small part of the shortest wave's length."""
    rng = np.random.default_rng(1)
    cycles = np.array([0.7, 2.0, 6.0, 18.0, 54.0])

    def survey(n: int) -> tuple[np.ndarray, np.ndarray]:
        z = rng.uniform(0, 1.5, n)
        phase = 2 * np.pi * np.outer(np.log1p(z), cycles)
        x = np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
        return (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), z

    vectors, z = survey(2500)
    head = fit_head(vectors, z[:, None], ["redshift"], settings=QUICK)
    assert isinstance(head, DensityHead)
    assert head.properties[0].axis.frequencies[-1] > 40
    held_out, truth = survey(300)
    error = (head.predict(held_out)[:, 0] - truth) / (1 + truth)
    assert 1.48 * np.median(np.abs(error)) < 1e-3
    point = fit_head(vectors, z[:, None], ["redshift"], kind="point")
    assert 1.48 * np.median(np.abs((point.predict(held_out)[:, 0] - truth) / (1 + truth))) > 5e-3


def test_quantiles_and_distribution_are_inverse(head: DensityHead) -> None:
    vectors, _ = labelled(50, seed=3)
    entry = head.properties[1]
    p = entry.probabilities(vectors)
    levels = np.array([0.01, 0.3, 0.5, 0.97])
    np.testing.assert_allclose(
        cdf(entry.axis, p, quantiles(entry.axis, p, levels)), np.tile(levels, (50, 1)), atol=1e-9
    )
    with pytest.raises(InputError, match="wanted probabilities"):
        head.quantiles(vectors, [1.5])


def test_unknown_labels_cost_a_density_nothing() -> None:
    vectors, targets = labelled(1200)
    targets[::3, 1] = np.nan
    head = fit_head(vectors, targets, NAMES, settings=QUICK)
    assert isinstance(head, DensityHead)
    assert [entry.rows + entry.report["held_out"] for entry in head.properties] == [1200, 800]
    held_out, truth = labelled(300, seed=1)
    assert r2(truth[:, 1], head.predict(held_out)[:, 1]) > 0.8


def test_a_property_of_one_value_or_too_few_labels_has_no_density() -> None:
    vectors, targets = labelled(400)
    with pytest.raises(InputError, match="one value only"):
        fit_head(vectors, np.full((400, 1), 3.0), ["flat"], settings=QUICK)
    with pytest.raises(InputError, match="199 known values of 'redshift'; wanted at least 200"):
        fit_head(vectors[:199], targets[:199], NAMES)
    fit_head(vectors[:200], targets[:200], NAMES, settings=replace(QUICK, min_steps=0, epochs=1))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_head_comes_back_from_its_file_as_it_was(head: DensityHead, tmp_path: Path) -> None:
    write_head(tmp_path / "a", head)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by who serves
    back = read_head(tmp_path / "a", "a", dim=8)
    vectors, _ = labelled(20, seed=4)
    np.testing.assert_array_equal(back.quantiles(vectors, [0.1, 0.5]), head.quantiles(vectors, [0.1, 0.5]))
    assert (back.names, back.settings, back.seed) == (head.names, head.settings, head.seed)
    again = fit_head(*labelled(2000), NAMES, settings=QUICK)
    assert isinstance(again, DensityHead)
    write_head(tmp_path / "b", again)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_damaged_head_is_refused_by_name(head: DensityHead, tmp_path: Path) -> None:
    write_head(tmp_path / "good", head)
    with safe_open(tmp_path / "good", framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        record = json.loads(file.metadata()["head"])

    def refused(match: str, dim: int = 8, **changed: object) -> None:
        metadata = {"head": json.dumps({**record, **changed})}
        save_file(tensors, tmp_path / "bad", metadata=metadata)
        with pytest.raises(IndexFileError, match=match) as caught:
            read_head(tmp_path / "bad", "heads/image.safetensors", dim=dim)
        assert caught.value.field == "heads/image.safetensors"

    refused("vectors of 8 dimensions, wanted 16", dim=16)
    refused("format 9", format=9)
    refused("belongs to nothing", properties=record["properties"][:1])
    refused("KeyError", properties=record["properties"] * 2)
    refused("unexpected keyword", settings={**record["settings"], "surprise": 1})
    axis = record["properties"][0]["axis"]
    for name, value, match in (
        ("frequencies", [*axis["frequencies"], 1e9], "not ascending"),
        ("frequencies", axis["frequencies"][:-1], "0.weight.1 is float16"),
        ("hi", axis["lo"], "goes from"),
        ("hi", float("nan"), "goes from"),
    ):
        entry = {**record["properties"][0], "axis": {**axis, name: value}}
        refused(match, properties=[entry, record["properties"][1]])
    for key, array, match in (
        ("0.mean", np.zeros(7, np.float32), r"0.mean is float32 \(7,\), wanted float32 \(8,\)"),
        ("0.skip", np.full_like(tensors["0.skip"], np.nan), "0.skip holds NaN"),
        ("0.spread", np.zeros(8, np.float32), "not positive"),
        ("0.scores", np.array([0.3, 0.1], np.float32), "do not ascend"),
        ("0.bias.0", tensors["0.bias.0"].astype(np.float64), "0.bias.0 is float64"),
    ):
        good, tensors[key] = tensors[key], array
        refused(match)
        tensors[key] = good
    (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:-9])
    with pytest.raises(IndexFileError, match="not a head as written"):
        read_head(tmp_path / "bad", "bad", dim=8)
    (tmp_path / "bad").write_bytes(pickle.dumps({"head": 1}))
    with pytest.raises(IndexFileError, match="not a head as written"):
        read_head(tmp_path / "bad", "bad", dim=8)
