"""Heads: properties read off frozen embeddings by a small network, the second estimator beside k-NN.

Two kinds. `point` is the few-shot protocol of AstroCLIP (Parker et al. 2024, MNRAS 531, 4990, section 6): an MLP with
two hidden layers of 64, ReLU, dropout 0.1, Adam at 1e-3, batches of 64, ten epochs, mean squared error on standardised
targets. `density` gives a probability density for every property (`index.density`), and intervals from it.

A head is fitted with torch (`index.head_fit`) and served with numpy: its matrices are small, and a forward pass in the
searching thread contends with no model for torch's threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError

__all__ = ["DENSITY", "POINT", "HeadSettings", "Kind", "Network", "PropertyHead", "fit_head"]

Array = npt.NDArray[np.float64]
Kind = Literal["density", "point"]


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
DENSITY = replace(POINT, epochs=40)


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
class PropertyHead:
    """A fitted head. names: its P properties; rows: labelled objects it was fitted on.

    offset, scale: (P,) mean and deviation of the targets (kind `point`).
    """

    kind: Kind
    names: tuple[str, ...]
    network: Network
    settings: HeadSettings
    seed: int
    rows: int
    offset: Array
    scale: Array

    @property
    def dim(self) -> int:
        return len(self.network.mean)

    def predict(self, vectors: npt.NDArray[Any]) -> Array:
        """(Q, P) float64: the value of every property for vectors (Q, D)."""
        return self.network(self._checked(vectors)) * self.scale + self.offset

    def _checked(self, vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"vectors of shape {vectors.shape}; wanted (Q, {self.dim}); embed with the model the head belongs to",
                code="wrong_dimension",
                field="vector",
            )
        return vectors


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
    from index.head_fit import fit

    return fit(vectors, targets, names, settings=settings or (POINT if kind == "point" else DENSITY), seed=seed,
               kind=kind)  # fmt: skip
