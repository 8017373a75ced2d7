"""The tasks of the benchmark for one encoder: zero-shot and few-shot properties, retrieval, morphology.

Every encoder, the model under test and each baseline that embeds, goes through the same function on the same arrays, so
their numbers stand in the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from astroclip.types import MODALITIES, Modality
from training.data import PROPERTIES
from training.evaluate.fewshot import few_shot
from training.evaluate.morphology import simulated_morphology
from training.evaluate.retrieval import POOL_SIZE, retrieval
from training.evaluate.survey import EncodedPart
from training.evaluate.zeroshot import Parts, zero_shot

__all__ = ["NEAR", "Encoded", "TaskSettings", "run_tasks"]

NEAR = 0.6  # DESI's bright galaxies end here, and with them AstroCLIP's sample


@dataclass(frozen=True)
class TaskSettings:
    """pools: sizes of the retrieval pools, the first for the validation objects too.

    seed: of pools, labels and bootstrap.
    """

    pools: tuple[int, ...] = (POOL_SIZE, 2000)
    n_bootstrap: int = 500
    seed: int = 0

    @property
    def repeat(self) -> dict[str, Any]:
        return {"n_bootstrap": self.n_bootstrap, "seed": self.seed}


@dataclass(frozen=True)
class Encoded:
    """The split's three parts, embedded."""

    train: EncodedPart
    val: EncodedPart
    test: EncodedPart

    def parts(self, name: str, modality: Modality) -> Parts:
        key = (name, modality)
        return Parts(self.train.vectors[key], self.val.vectors[key], self.test.vectors[key])

    def has(self, name: str) -> list[Modality]:
        """The modalities embedded under `name`."""
        return [modality for modality in MODALITIES if (name, modality) in self.train.vectors]

    @property
    def targets(self) -> Parts:
        return Parts(self.train.targets, self.val.targets, self.test.targets)

    @property
    def shapes(self) -> Parts | None:
        train, val, test = self.train.morphology, self.val.morphology, self.test.morphology
        return None if train is None or val is None or test is None else Parts(train, val, test)


def run_tasks(encoded: Encoded, name: str, settings: TaskSettings, *, shared_space: bool = True) -> dict[str, Any]:
    """All numbers of encoder `name`; without `shared_space` each modality stays alone, and nothing is retrieved.

    {"zero_shot", "few_shot", "retrieval", "retrieval_2000", "retrieval_validation", "morphology", "near"}; the last
    holds the zero-shot and retrieval numbers of validation and test objects nearer than `NEAR`, since R2 grows with the
    range of what is predicted. Retrieval among the validation objects is what training is steered by.
    """
    vectors: dict[str, Parts] = {modality: encoded.parts(name, modality) for modality in encoded.has(name)}
    targets = encoded.targets
    own = [(modality, modality) for modality in vectors]
    ways: dict[str, Any] = {} if shared_space else {"directions": own}
    out = _numbers(vectors, targets, settings, ways)
    out["few_shot"] = few_shot(vectors, targets, PROPERTIES, **ways, **settings.repeat)
    if shared_space and len(vectors) == len(MODALITIES):
        pair = vectors["image"].val, vectors["spectrum"].val
        out["retrieval_validation"] = retrieval(*pair, pool_size=settings.pools[0], **settings.repeat)
    if (shapes := encoded.shapes) is not None:
        out["morphology"] = simulated_morphology(vectors, shapes, **settings.repeat)
    if (near := _near(vectors, targets)) is not None:
        out["near"] = {
            "what": f"validation and test objects at z < {NEAR:g} alone (the published range); table of all",
            "objects": len(near[1].test),
            **_numbers(*near, settings, ways),
        }
    return out


def _numbers(
    vectors: Mapping[str, Parts], targets: Parts, settings: TaskSettings, ways: Mapping[str, Any]
) -> dict[str, Any]:
    out: dict[str, Any] = {"zero_shot": zero_shot(vectors, targets, **ways, **settings.repeat)}
    if not ways and len(vectors) == len(MODALITIES):
        pair = vectors["image"].test, vectors["spectrum"].test
        for size in settings.pools:
            key = "retrieval" if size == POOL_SIZE else f"retrieval_{size}"
            out[key] = retrieval(*pair, pool_size=size, **settings.repeat)
    return out


def _near(vectors: Mapping[str, Parts], targets: Parts) -> tuple[dict[str, Parts], Parts] | None:
    column = PROPERTIES.index("redshift")
    val, test = (np.flatnonzero(part[:, column] < NEAR) for part in (targets.val, targets.test))
    if min(len(val), len(test)) < 2:
        return None

    def near(parts: Parts) -> Parts:
        return Parts(parts.train, parts.val[val], parts.test[test])

    return {name: near(parts) for name, parts in vectors.items()}, near(targets)
