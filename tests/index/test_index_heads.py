"""Heads on frozen vectors: fitting, masking, determinism, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from astroclip.errors import InputError
from index.head_fit import TorchNet
from index.heads import POINT, HeadSettings, fit_head

NAMES = ("redshift", "mass")


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
        fit_head(vectors, targets, NAMES)
    assert (caught.value.code, caught.value.field) == ("too_few_labels", "mass")
    with pytest.raises(InputError, match="wanted \\(Q, 8\\)"):
        fit_head(vectors, labelled(100)[1], NAMES, kind="point").predict(vectors[:, :7])
