"""Fitting a head with torch: one thread, seeded, so that the same labels give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from astroclip.errors import InputError
from index.heads import HeadSettings, Kind, Network, PropertyHead

__all__ = ["TorchNet", "fit"]

MIN_LABELS = 20  # of every property: below, not even a mean and a deviation are known

Array = npt.NDArray[np.float64]


class TorchNet(nn.Module):
    """The network of `heads.Network`, to be fitted."""

    def __init__(self, dim: int, outputs: int, settings: HeadSettings, skip: bool) -> None:
        super().__init__()
        widths = (dim, *settings.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.out = nn.Linear(widths[-1], outputs)
        self.skip = nn.Linear(dim, outputs, bias=False) if skip else None
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for layer in self.hidden:
            h = self.dropout(torch.relu(layer(h)))
        out: torch.Tensor = self.out(h)
        return out if self.skip is None else out + self.skip(x)

    def network(self, mean: Array, spread: Array) -> Network:
        layers = [*self.hidden, self.out]
        return Network(
            mean,
            spread,
            tuple(_array(layer.weight) for layer in layers),
            tuple(_array(layer.bias) for layer in layers),
            None if self.skip is None else _array(self.skip.weight),
        )


def fit(
    vectors: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    names: Sequence[str],
    *,
    settings: HeadSettings,
    seed: int,
    kind: Kind,
) -> PropertyHead:
    """See `heads.fit_head`."""
    x, y = _checked(vectors, targets, names)
    with one_thread(seed):
        return _fit_point(x, y, tuple(names), settings, seed)


def _fit_point(x: Array, y: Array, names: tuple[str, ...], settings: HeadSettings, seed: int) -> PropertyHead:
    mean, spread = x.mean(axis=0), _deviation(x)
    offset, scale = np.nanmean(y, axis=0), _deviation(y)
    inputs = torch.from_numpy(((x - mean) / spread).astype(np.float32))
    known = torch.from_numpy(np.isfinite(y))
    wanted = torch.from_numpy(np.where(np.isfinite(y), (y - offset) / scale, 0.0).astype(np.float32))
    net = TorchNet(x.shape[1], y.shape[1], settings, skip=False)
    optimiser = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    for rows in _batches(len(x), settings):
        error = (net(inputs[rows]) - wanted[rows]).square() * known[rows]
        loss = error.sum() / known[rows].sum().clamp_min(1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return PropertyHead("point", names, net.network(mean, spread), settings, seed, len(x), offset, scale)


def _batches(count: int, settings: HeadSettings) -> Iterator[torch.Tensor]:
    """Rows of every step of the whole fit: the labels in a new order every epoch, no label dropped."""
    steps = -(-count // settings.batch_size)
    for _ in range(max(settings.epochs, -(-settings.min_steps // steps))):
        yield from torch.randperm(count).split(settings.batch_size)


def _checked(vectors: npt.NDArray[Any], targets: npt.NDArray[Any], names: Sequence[str]) -> tuple[Array, Array]:
    x, y = np.asarray(vectors, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 2 or y.shape != (len(x), len(names)) or not len(names):
        raise InputError(
            f"vectors {x.shape} and targets {y.shape} for {len(names)} names; wanted (N, D) and (N, P) with P names",
            code="bad_labels",
        )
    if not np.isfinite(x).all():
        raise InputError("the vectors hold NaN or infinity; wanted finite numbers; embed again", code="bad_vector")
    keep = np.isfinite(y).any(axis=1)
    x, y = x[keep], y[keep]
    counts = np.isfinite(y).sum(axis=0)
    for name, count in zip(names, counts, strict=True):
        if count < MIN_LABELS:
            raise InputError(
                f"{count} known values of {name!r}; wanted at least {MIN_LABELS}; leave this property out",
                code="too_few_labels",
                field=name,
            )
    return x, np.where(np.isfinite(y), y, np.nan)


def _deviation(values: Array) -> Array:
    spread = np.nanstd(values, axis=0)
    return np.where(spread > 1e-12, spread, 1.0)


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Seeded torch in one thread; the caller's generator and threads are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _array(parameter: torch.Tensor) -> Array:
    return parameter.detach().numpy().astype(np.float64)
