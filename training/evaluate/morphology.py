"""Morphology: shape parameters of simulated galaxies, and Galaxy Zoo's votes on real pictures.

The real sample is small (235 Legacy Surveys pictures with a ring label and three vote fractions, chosen for their
rings and all of them featured disks), so it is judged by cross-validation, and its intervals are wide: it says whether
there is a signal, not which of two good encoders is better. The pictures are colour PNGs of unknown pixel scale, read
as the service reads an upload (`calibrated=False`, 0.262" assumed). The simulated counterpart is large, but knows
nothing of arms, bars or rings: only bulge, inclination and size.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError
from astroclip.io import read_images
from astroclip.preprocess import ImageGrid, image_to_grid
from index.heads import fit_head
from training.evaluate.fewshot import few_shot
from training.evaluate.metrics import r2, roc_auc, with_interval
from training.evaluate.neighbours import nearest, standardise, unit, weighted_mean
from training.evaluate.survey import MORPHOLOGY
from training.evaluate.zeroshot import Parts, zero_shot

__all__ = ["VOTES", "Voted", "load_votes", "real_morphology", "simulated_morphology"]

Array = npt.NDArray[Any]
# Columns of the catalogue -> names here; debiased vote fractions (Walmsley et al. 2022) and the ring label (0 / 1).
VOTES = {
    "ring": "ring",
    "smooth-or-featured_featured-or-disk_fraction": "featured",
    "disk-edge-on_no_fraction": "face_on",
    "has-spiral-arms_no_fraction": "no_spiral_arms",
}
FOLDS = 5
K_GRID = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Voted:
    """Pictures with votes. pixels: (N, 3, S, S) nanomaggies, approximate; votes: (N, 4) in the order of `VOTES`."""

    pixels: Array
    votes: Array
    refused: list[str]

    def __len__(self) -> int:
        return len(self.votes)


def simulated_morphology(
    vectors: Mapping[str, Parts], shapes: Parts, *, n_bootstrap: int = 500, seed: int = 0
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """R2 of bulge fraction, axis ratio and half-light radius by neighbours ("tuned") and by a head on all labels."""
    own = [(modality, modality) for modality in vectors]
    options: dict[str, Any] = {"names": MORPHOLOGY, "directions": own, "n_bootstrap": n_bootstrap, "seed": seed}
    near = zero_shot(vectors, shapes, **options)
    heads = few_shot(vectors, shapes, labels={"all": (0, 1)}, **options)
    return {"tuned": near["tuned"], "few_shot": heads["all"]}


def load_votes(shared: Path, grid: ImageGrid) -> Voted | None:
    """The pictures of `shared`/decals_rgb on the grid, None where the folder or its catalogue is absent."""
    catalogue = shared / "decals_rgb" / "catalog.csv"
    if not catalogue.is_file():
        return None
    pixels, votes, refused = [], [], []
    for row in csv.DictReader(io.StringIO(catalogue.read_text(encoding="utf-8"))):
        path = catalogue.parent / f"{Path(row['file']).name}.png"
        try:
            (image,) = read_images(path.read_bytes(), name=path.name)
            placed = image_to_grid(image, grid)
            values = [float(row[column]) for column in VOTES]
        except (AstroClipError, OSError, ValueError) as error:
            refused.append(f"{path.name}: {error}")
            continue
        pixels.append(placed.pixels)
        votes.append(values)
    return Voted(np.stack(pixels), np.array(votes, np.float64), refused) if pixels else None


def real_morphology(vectors: Array, votes: Array, *, n_bootstrap: int = 500, seed: int = 0) -> dict[str, Any]:
    """{"k-NN" | "few-shot": {"ring": AUC, votes: R2}}, each {"value", "lo", "hi"}; out-of-fold predictions.

    vectors: (N, D); votes: (N, 4). The number of neighbours is chosen within each training fold, by leaving one out.
    """
    fold = np.random.default_rng(seed).permutation(len(votes)) % FOLDS
    predicted = {"k-NN": np.empty(votes.shape), "few-shot": np.empty(votes.shape)}
    for number in range(FOLDS):
        test, train = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        predicted["k-NN"][test] = _neighbours(unit(vectors[train]), votes[train], unit(vectors[test]))
        scaled = [part.astype(np.float32) for part in standardise(vectors[train], vectors[test])]
        head = fit_head(scaled[0], votes[train], tuple(VOTES.values()), seed=seed, kind="point")
        predicted["few-shot"][test] = head.predict(scaled[1])
    return {method: _numbers(votes, found, n_bootstrap, seed) for method, found in predicted.items()}


def _neighbours(table: Array, votes: Array, queries: Array) -> Array:
    grid = [k for k in K_GRID if k < len(table)]
    inner = nearest(table, table, grid[-1] + 1)
    left_out = type(inner)(inner.rows[:, 1:], inner.distance[:, 1:])  # nearest to itself is itself
    error = [np.mean((weighted_mean(left_out.first(k), votes) - votes) ** 2, axis=0) for k in grid]
    best = [grid[i] for i in np.argmin(error, axis=0)]
    found = nearest(queries, table, max(best))
    return np.stack([weighted_mean(found.first(k), votes[:, i]) for i, k in enumerate(best)], axis=1)


def _auc(truth: Array, score: Array) -> float:
    return roc_auc(score[truth < 0.5], score[truth >= 0.5])


def _numbers(votes: Array, predicted: Array, n_bootstrap: int, seed: int) -> dict[str, dict[str, float]]:
    options: dict[str, Any] = {"n": n_bootstrap, "seed": seed}
    return {
        name: with_interval(_auc if name == "ring" else r2, votes[:, i], predicted[:, i], **options)
        for i, name in enumerate(VOTES.values())
    }
