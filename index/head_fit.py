"""Fitting a head with torch: one thread, seeded, so that the same labels give the same bytes.

A density is fitted in four steps, each on labels of its own where it must be. A tenth of a property's labels (drawn by
the seed) is kept for calibration, a tenth for early stopping, the rest are fitted on:

1. frequencies: which waves of the property the vectors hold, found by linear regression on one half of the fitting
   labels and scored on the other; those of R2 above `_HELD` join `_BASE`;
2. the network, by maximum likelihood, the epoch with the best likelihood of the stopping labels kept;
3. one temperature, to the same labels;
4. conformal scores on the calibration labels, and coverages measured across two halves of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from astroclip.errors import InputError
from index.density import CELLS_PER_CYCLE, MAX_CELLS, Axis, cdf, probabilities
from index.heads import DensityHead, HeadSettings, Network, PointHead, PropertyDensity

__all__ = ["COVERAGES", "MIN_DENSITY", "MIN_POINT", "TorchNet", "fit_density", "fit_point"]

MIN_POINT = 20  # labels of a property: below, not even a mean and a deviation are known
MIN_DENSITY = 200  # 20 of them calibrate, from which a 95 % interval is finite
COVERAGES = (0.68, 0.90, 0.95)

_BASE = tuple(0.5 * m for m in range(1, 9))  # cycles over the axis: modes an eighth of it apart
_HELD = 0.1  # R2 above which a wave is worth two outputs; 0.03 and 0.3 gave the same likelihood
_SCANNED = np.geomspace(_BASE[-1], MAX_CELLS / CELLS_PER_CYCLE, 500)
_SCAN_ROWS = 10_000
_RIDGE = 10.0
_EDGE = 5e-4  # quantile at which an axis ends, so that one absurd label does not stretch it
_MARGIN = 0.05  # of the axis, beyond those quantiles
_TEMPERATURES = np.geomspace(0.5, 2.0, 41)

Array = npt.NDArray[np.float64]


class TorchNet(nn.Module):
    """The network of `heads.Network`, to be fitted. skip: with a linear path; outputs then start at zero."""

    def __init__(self, dim: int, outputs: int, settings: HeadSettings, skip: bool) -> None:
        super().__init__()
        widths = (dim, *settings.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.out = nn.Linear(widths[-1], outputs)
        self.skip = nn.Linear(dim, outputs, bias=False) if skip else None
        self.dropout = nn.Dropout(settings.dropout)
        if self.skip is not None:
            for parameter in (*self.out.parameters(), *self.skip.parameters()):
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for layer in self.hidden:
            h = self.dropout(torch.relu(layer(h)))
        out: torch.Tensor = self.out(h)
        return out if self.skip is None else out + self.skip(x)

    def network(self, mean: Array, spread: Array, temperature: float = 1.0, half: bool = False) -> Network:
        """As arrays rounded to float32, as they are stored; outputs divided by the temperature.

        half: matrices to float16, half a file's size; what is calibrated is the network so rounded.
        """
        layers = [*self.hidden, self.out]
        scales = [1.0] * len(self.hidden) + [temperature]
        matrix = np.float16 if half else np.float32
        return Network(
            _rounded(mean),
            _rounded(spread),
            tuple(_array(layer.weight, s, matrix) for layer, s in zip(layers, scales, strict=True)),
            tuple(_array(layer.bias, s) for layer, s in zip(layers, scales, strict=True)),
            None if self.skip is None else _array(self.skip.weight, temperature, matrix),
        )


# --- point ---------------------------------------------------------------------------------------------------------


def fit_point(
    vectors: npt.NDArray[Any], targets: npt.NDArray[Any], names: tuple[str, ...], settings: HeadSettings, seed: int
) -> PointHead:
    """See `heads.fit_head`: one network for all properties, unknown targets masked in the loss."""
    x, y = _checked(vectors, targets, names, MIN_POINT)
    keep = np.isfinite(y).any(axis=1)
    x, y = x[keep], y[keep]
    mean, spread, offset, scale = x.mean(axis=0), _deviation(x), np.nanmean(y, axis=0), _deviation(y)
    inputs = _tensor((x - mean) / spread)
    known = torch.from_numpy(np.isfinite(y))
    wanted = _tensor(np.nan_to_num((y - offset) / scale))
    with _one_thread(seed):
        net = TorchNet(x.shape[1], y.shape[1], settings, skip=False)
        optimiser = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
        for epoch in _epochs(torch.arange(len(x)), settings):
            for rows in epoch:
                error = (net(inputs[rows]) - wanted[rows]).square() * known[rows]
                _step(optimiser, error.sum() / known[rows].sum().clamp_min(1))
    return PointHead("point", names, settings, seed, x.shape[1], net.network(mean, spread), offset, scale)


# --- density -------------------------------------------------------------------------------------------------------


def fit_density(
    vectors: npt.NDArray[Any], targets: npt.NDArray[Any], names: tuple[str, ...], settings: HeadSettings, seed: int
) -> DensityHead:
    """See `heads.fit_head`: a network a property, so that each stops when it is best and unknowns cost nothing."""
    x, y = _checked(vectors, targets, names, MIN_DENSITY)
    order = np.random.default_rng(seed).permutation(len(x))
    properties = []
    with _one_thread(seed):
        for i, name in enumerate(names):
            rows = order[np.isfinite(y[order, i])]
            properties.append(_fit_property(x[rows], y[rows, i], name, settings))
    return DensityHead("density", names, settings, seed, x.shape[1], tuple(properties))


def _fit_property(x: Array, y: Array, name: str, settings: HeadSettings) -> PropertyDensity:
    """One property; rows in random order: the first tenth calibrates, the second stops, the rest are fitted on."""
    tenth = len(x) // 10
    aside, stop, fitted = slice(tenth), slice(tenth, 2 * tenth), slice(2 * tenth, len(x))
    mean, spread = x[fitted].mean(axis=0), _deviation(x[fitted])
    standard = (x - mean) / spread
    axis = _axis(name, standard[fitted], y[fitted])
    net = _likeliest(_tensor(standard), axis, y, stop, fitted, settings)
    with torch.no_grad():
        loss = _Loss(axis, y[stop])
        coefficients, every = net(_tensor(standard[stop])), torch.arange(tenth)
        temperature = min(_TEMPERATURES, key=lambda t: float(loss(coefficients / t, every)))
    network = net.network(mean, spread, float(temperature), half=True)
    truth = y[aside]
    p = probabilities(axis, network(x[aside]))
    scores = np.abs(cdf(axis, p, truth) - 0.5)
    half = len(scores) // 2
    parts = (scores[:half], scores[half:])
    conformal = {
        f"{c:.2f}": float(np.mean(np.concatenate([_inside(a, b, c), _inside(b, a, c)])))
        for c in COVERAGES
        for a, b in (parts,)
    }
    report = {
        "held_out": len(truth),
        "coverage": conformal,
        "coverage_uncorrected": {f"{c:.2f}": float(np.mean(scores <= c / 2.0)) for c in COVERAGES},
        "temperature": float(temperature),
        "frequencies": len(axis.frequencies),
        "cycles_max": float(axis.frequencies[-1]),
    }
    return PropertyDensity(axis, network, _rounded(np.sort(scores)), len(x) - tenth, report)


def _inside(calibrating: Array, judged: Array, coverage: float) -> npt.NDArray[np.bool_]:
    """Which of the judged scores lie in the interval that the calibrating ones give."""
    rank = int(np.ceil((len(calibrating) + 1) * coverage - 1e-9))
    limit = 0.5 if rank > len(calibrating) else np.sort(calibrating)[rank - 1]
    return np.asarray(judged <= limit, np.bool_)


def _axis(name: str, x: Array, y: Array) -> Axis:
    log1p = name == "redshift"
    v = np.log1p(np.maximum(y, -0.5)) if log1p else y
    lo, hi = np.quantile(v, [_EDGE, 1.0 - _EDGE])
    if not hi - lo > 1e-9 * max(abs(lo), abs(hi), 1e-30):
        raise InputError(
            f"the property {name!r} has one value only ({y[0]:g}); wanted one that differs; leave it out",
            code="too_few_labels",
            field=name,
        )
    margin = _MARGIN * (hi - lo)
    bare = Axis(name, float(lo - margin), float(hi + margin), log1p, _BASE)
    u = bare.to_unit(y)
    return Axis(name, bare.lo, bare.hi, log1p, (*_BASE, *_held(x[:_SCAN_ROWS], u[:_SCAN_ROWS])))


def _held(x: Array, u: Array) -> list[float]:
    """Frequencies at whose waves of u the standardised vectors x point: local maxima of R2 on the other half."""
    half = len(x) // 2
    one = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    a, b = one[:half], one[half:]
    waves = np.exp(2j * np.pi * np.outer(u, _SCANNED))
    solved = np.linalg.solve(a.T @ a + _RIDGE * np.eye(a.shape[1]), a.T @ waves[:half])
    held = waves[half:]
    r2 = 1.0 - np.mean(np.abs(held - b @ solved) ** 2, axis=0) / (1.0 - np.abs(held.mean(axis=0)) ** 2 + 1e-9)
    peak = (r2[1:-1] > _HELD) & (r2[1:-1] >= r2[:-2]) & (r2[1:-1] > r2[2:])
    return [float(f) for f in _SCANNED[1:-1][peak]]


class _Loss:
    """Mean negative log likelihood of labels (in the order of `y`), from coefficients."""

    def __init__(self, axis: Axis, y: Array) -> None:
        self.cells = _tensor(axis.basis(axis.centres(axis.cells)).T.copy())
        self.at = _tensor(axis.basis(axis.to_unit(y)))
        self.log_cells = float(np.log(axis.cells))

    def __call__(self, coefficients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        log_z = torch.logsumexp(coefficients @ self.cells, dim=1) - self.log_cells
        return (log_z - (coefficients * self.at[rows]).sum(dim=1)).mean()


def _likeliest(x: torch.Tensor, axis: Axis, y: Array, stop: slice, fitted: slice, settings: HeadSettings) -> TorchNet:
    """The network after its best epoch, judged by the rows `stop`; the rate falls as a cosine."""
    loss = _Loss(axis, y)
    every = torch.arange(len(y))
    judged = every[stop]
    net = TorchNet(x.shape[1], axis.outputs, settings, skip=True)
    optimiser = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    epochs = list(_epochs(every[fitted], settings))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, sum(map(len, epochs)))
    best, state = np.inf, {}
    for epoch in epochs:
        net.train()
        for rows in epoch:
            _step(optimiser, loss(net(x[rows]), rows))
            scheduler.step()
        net.eval()
        with torch.no_grad():
            found = float(loss(net(x[judged]), judged))
        if found < best:
            best, state = found, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    return net


# --- both ----------------------------------------------------------------------------------------------------------


def _epochs(rows: torch.Tensor, settings: HeadSettings) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of every epoch: the rows in a new order each, none dropped."""
    steps = -(-len(rows) // settings.batch_size)
    for _ in range(max(settings.epochs, -(-settings.min_steps // steps))):
        yield rows[torch.randperm(len(rows))].split(settings.batch_size)


def _step(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _checked(
    vectors: npt.NDArray[Any], targets: npt.NDArray[Any], names: tuple[str, ...], least: int
) -> tuple[Array, Array]:
    """float64 arrays, unknown targets NaN. Raises InputError."""
    x, y = np.asarray(vectors, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 2 or y.shape != (len(x), len(names)) or not names:
        raise InputError(
            f"vectors {x.shape} and targets {y.shape} for {len(names)} names; wanted (N, D) and (N, P) with P names",
            code="bad_labels",
        )
    if not np.isfinite(x).all():
        raise InputError("the vectors hold NaN or infinity; wanted finite numbers; embed again", code="bad_vector")
    y = np.where(np.isfinite(y), y, np.nan)
    for name, count in zip(names, np.isfinite(y).sum(axis=0), strict=True):
        if count < least:
            raise InputError(
                f"{count} known values of {name!r}; wanted at least {least}; leave this property out",
                code="too_few_labels",
                field=name,
            )
    return x, y


def _deviation(values: Array) -> Array:
    spread = np.nanstd(values, axis=0)
    return np.where(spread > 1e-12, spread, 1.0)


@contextmanager
def _one_thread(seed: int) -> Iterator[None]:
    """Seeded torch in one thread; the caller's generator and threads are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _array(parameter: torch.Tensor, over: float = 1.0, kind: type = np.float32) -> Array:
    return _rounded(parameter.detach().numpy().astype(np.float64) / over, kind)


def _rounded(values: Array, kind: type = np.float32) -> Array:
    """float64 holding numbers of `kind`: what a file gives back."""
    return np.asarray(values, kind).astype(np.float64)
