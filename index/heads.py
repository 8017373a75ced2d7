"""Heads: properties read off frozen embeddings by a small network, the second estimator beside k-NN.

Two kinds. `point` is the few-shot protocol of AstroCLIP (Parker et al. 2024, MNRAS 531, 4990, section 6): an MLP with
two hidden layers of 64, ReLU, dropout 0.1, Adam at 1e-3, batches of 64, ten epochs, mean squared error on standardised
targets. `density` gives a probability density for every property (`index.density`), a network each, and intervals
from it: that is what an index stores (`index.head_files`) and the service answers with.

Stored intervals are conformal. A network's own probabilities are not to be relied on (its 68 % intervals of the
demo's spectroscopic redshifts held 59 to 74 % of held-out truths, from fit to fit), so a tenth of the labels is kept
from fit and early stopping, and the score s = |F(truth) - 1/2| is taken there, F the predicted distribution function.
The interval of coverage c is [F^-1(1/2 - q), F^-1(1/2 + q)], q the ceil((n + 1) c)-th smallest of the n scores: it
holds the truth of an object drawn like the labelled ones with probability c at least, averaged over objects
(distributional conformal prediction: Chernozhukov, Wuethrich & Zhu 2021, PNAS 118, e2107794118). For one kind of
object it may be off.

A head is fitted with torch (`index.head_fit`) and served with numpy: its matrices are small, and the searching threads
then do not contend with the model for torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError, NotFoundError
from index import density
from index.density import Axis

__all__ = [
    "DENSITY",
    "POINT",
    "DensityHead",
    "HeadSettings",
    "Kind",
    "Network",
    "PointHead",
    "PropertyDensity",
    "PropertyHead",
    "fit_head",
]

Array = npt.NDArray[np.float64]
Kind = Literal["density", "point"]

_CHUNK = 256  # queries at a time: 256 rows of 16,384 cells are 32 MiB


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted; the defaults are upstream's few-shot protocol.

    hidden: widths of the hidden layers. epochs: passes over the labels, raised where `min_steps` asks for more: ten
    epochs are thousands of steps on upstream's labels, but twenty on a hundred of them, which leaves the network as it
    was drawn. From 9,600 labels on, the default is upstream's ten epochs exactly.
    """

    hidden: tuple[int, ...] = (64, 64)
    dropout: float = 0.1
    learning_rate: float = 1e-3
    epochs: int = 10
    batch_size: int = 64
    min_steps: int = 1500


POINT = HeadSettings()
# Wider, more dropout and 15 epochs under a cosine rate: chosen on validation objects of the demo survey, where they
# gave the lowest negative log likelihood for redshifts from images and from spectra alike; all differences were small.
# Batches of 128 at twice the rate gave the same figures in half the time.
DENSITY = replace(POINT, hidden=(128, 128), dropout=0.25, learning_rate=2e-3, epochs=15, batch_size=128, min_steps=750)


@dataclass(frozen=True)
class Network:
    """An MLP with ReLU, as arrays: inputs are standardised by `mean` and `spread` (D,); `weights` (out, in), `biases`.

    skip: (out, D) of a linear path beside the hidden layers, None where there is none.
    """

    mean: Array
    spread: Array
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    skip: Array | None = None

    def __call__(self, vectors: npt.NDArray[Any]) -> Array:
        """(Q, D) -> (Q, outputs) float64, without dropout."""
        x = (np.asarray(vectors, np.float64) - self.mean) / self.spread
        h = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = np.maximum(h @ weight.T + bias, 0.0)
        out: Array = h @ self.weights[-1].T + self.biases[-1]
        return out if self.skip is None else out + x @ self.skip.T


@dataclass(frozen=True)
class PropertyDensity:
    """The density of one property.

    scores: (n,) ascending conformal scores of the labels kept aside. rows: labels fitted on, those for early stopping
    included. report: what was measured on the labels kept aside, see `head_fit`.
    """

    axis: Axis
    network: Network
    scores: Array
    rows: int
    report: dict[str, Any] = field(default_factory=dict)

    def probabilities(self, vectors: npt.NDArray[Any]) -> Array:
        return density.probabilities(self.axis, self.network(vectors))

    def half_width(self, coverage: Array) -> Array:
        """q of the module's text, for coverages in [0, 1]; 1/2 (the whole axis) where the scores are too few."""
        n = len(self.scores)
        rank = np.ceil((n + 1) * np.asarray(coverage, np.float64) - 1e-9).astype(np.int64)
        padded = np.concatenate([[0.0], self.scores, [0.5]])
        return np.asarray(padded[np.clip(rank, 0, n + 1)], np.float64)

    def calibrated(self, levels: Array) -> Array:
        """Levels of F to read so that the truth is below with probability `levels`, by the same scores both ways."""
        return np.asarray(0.5 + np.sign(levels - 0.5) * self.half_width(np.abs(2.0 * levels - 1.0)), np.float64)


@dataclass(frozen=True)
class PropertyHead:
    """A fitted head: names of its P properties, how it was fitted, the dimension of the vectors it takes."""

    kind: Kind
    names: tuple[str, ...]
    settings: HeadSettings
    seed: int
    dim: int

    def predict(self, vectors: npt.NDArray[Any]) -> Array:
        """(Q, P) float64: the value of every property for vectors (Q, D)."""
        raise NotImplementedError

    def _checked(self, vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"vectors of shape {vectors.shape}; wanted (Q, {self.dim}); embed with the model the head belongs to",
                code="wrong_dimension",
                field="vector",
            )
        return vectors


@dataclass(frozen=True)
class PointHead(PropertyHead):
    """One network for all properties; offset, scale: (P,) mean and deviation of the targets."""

    network: Network
    offset: Array
    scale: Array

    def predict(self, vectors: npt.NDArray[Any]) -> Array:
        return self.network(self._checked(vectors)) * self.scale + self.offset


@dataclass(frozen=True)
class DensityHead(PropertyHead):
    """A density for every property."""

    properties: tuple[PropertyDensity, ...]

    def predict(self, vectors: npt.NDArray[Any]) -> Array:
        """Medians: least affected by a far second mode, and the same in z as in ln(1 + z)."""
        return self.quantiles(vectors, [0.5])[:, :, 0]

    def quantiles(self, vectors: npt.NDArray[Any], levels: Sequence[float]) -> Array:
        """(Q, P, L) calibrated quantiles at levels in [0, 1]; (1 -+ c)/2 are the conformal interval of coverage c."""
        vectors, wanted = self._checked(vectors), np.asarray(levels, np.float64)
        if wanted.ndim != 1 or not np.all((wanted >= 0) & (wanted <= 1)):
            raise InputError(
                f"levels {levels}; wanted probabilities from 0 to 1", code="bad_coverage", field="coverage"
            )
        out = np.empty((len(vectors), len(self.properties), len(wanted)))
        for i, entry in enumerate(self.properties):
            out[:, i] = _in_chunks(vectors, entry, partial(_quantiles, entry.axis, entry.calibrated(wanted)))
        return out

    def density(self, vectors: npt.NDArray[Any], name: str, grid: npt.ArrayLike) -> Array:
        """(Q, G) probability density of a property, per its unit, at values `grid` (G,): the network's own.

        Raises NotFoundError for a property the head does not have.
        """
        entry, values = self.entry(name), np.asarray(grid, np.float64)
        return _in_chunks(self._checked(vectors), entry, lambda p, _: density.pdf(entry.axis, p, values))

    def pit(self, vectors: npt.NDArray[Any], name: str, truth: npt.ArrayLike) -> Array:
        """(Q,) the network's own distribution function at the truth, uniform in [0, 1] where it is calibrated."""
        entry, values = self.entry(name), np.asarray(truth, np.float64)
        return _in_chunks(self._checked(vectors), entry, lambda p, rows: density.cdf(entry.axis, p, values[rows]))

    def entry(self, name: str) -> PropertyDensity:
        if name not in self.names:
            raise NotFoundError(
                f"the head has no property {name[:80]!r}; wanted one of {', '.join(self.names)}; estimate others with "
                "method knn",
                code="no_head_for_property",
                field="properties",
            )
        return self.properties[self.names.index(name)]


def _quantiles(axis: Axis, levels: Array, p: Array, rows: slice) -> Array:
    return density.quantiles(axis, p, levels)


def _in_chunks(vectors: npt.NDArray[Any], entry: PropertyDensity, read: Callable[[Array, slice], Array]) -> Array:
    """`read` of the probabilities of some rows at a time, put together."""

    def parts() -> Iterator[Array]:
        for start in range(0, max(len(vectors), 1), _CHUNK):
            rows = slice(start, start + _CHUNK)
            yield read(entry.probabilities(vectors[rows]), rows)

    return np.concatenate(list(parts()))


def fit_head(
    vectors: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    names: Sequence[str],
    *,
    settings: HeadSettings | None = None,
    seed: int = 0,
    kind: Kind = "density",
) -> PropertyHead:
    """Fit a head: vectors (N, D) float32 of one modality, targets (N, P) float64 in the order of `names`.

    A target that is not finite is unknown: it is left out of the loss, its row's other targets count. settings: default
    `POINT` or `DENSITY`. The same input and seed give the same head, whatever the number of threads.
    Raises InputError for shapes that do not fit, vectors that are not finite, and a property with too few labels.
    """
    from index import head_fit

    fit = head_fit.fit_point if kind == "point" else head_fit.fit_density
    return fit(vectors, targets, tuple(names), settings or (POINT if kind == "point" else DENSITY), seed)
