"""The whole evaluation: a model directory and a survey in, one report out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astroclip.embed import Embedder
from astroclip.preprocess import SpectrumGrid
from astroclip.types import MODALITIES, Modality
from training.data import PROPERTIES, find_shards
from training.evaluate.baselines import load_redshift_net
from training.evaluate.encoders import Encoder, ModelEncoder, load_tower
from training.evaluate.fit import predict
from training.evaluate.realsky import (
    KnnRedshift,
    RealObject,
    load_objects,
    load_pairs,
    out_of_class,
    partner_rank,
    redshift_table,
)
from training.evaluate.report import data_checksum, judge, provenance
from training.evaluate.retrieval import POOL_SIZE, retrieval
from training.evaluate.survey import EncodedPart, encode_part
from training.evaluate.zeroshot import Parts, zero_shot
from training.split import Split, split_shards

__all__ = ["Plan", "evaluate"]

Array = npt.NDArray[Any]
Say = Callable[[str], None]
GROUPS = ("desi", "sdss", "desi_edr_scaled")
NEAR = 0.6  # DESI's bright galaxies end here, and with them AstroCLIP's sample


@dataclass(frozen=True)
class Plan:
    """What to evaluate, and against what.

    model, data:                 model directory; survey folder (the split decides which shards are held out).
    image_tower, spectrum_tower: tower.safetensors of the pretraining stages: the unaligned encoders.
    baselines:                   folders of `astroclip baseline` runs.
    shared:                      folder of the real data; skipped with a line where it does not exist.
    realism:                     JSON of the photometric realism check.
    max_train_shards:            use at most so many training shards as the table; 0 = all.
    """

    model: Path
    data: Path
    image_tower: Path | None = None
    spectrum_tower: Path | None = None
    baselines: tuple[Path, ...] = ()
    shared: Path | None = None
    realism: Path | None = None
    max_train_shards: int = 0
    pool_size: int = POOL_SIZE
    n_bootstrap: int = 500
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class _Survey:
    train: EncodedPart
    val: EncodedPart
    test: EncodedPart

    def parts(self, name: str, modality: Modality) -> Parts:
        key = (name, modality)
        return Parts(self.train.vectors[key], self.val.vectors[key], self.test.vectors[key])

    @property
    def targets(self) -> Parts:
        return Parts(self.train.targets, self.val.targets, self.test.targets)


def evaluate(plan: Plan, say: Say = lambda line: None) -> dict[str, Any]:
    """Run everything `plan` names and return the report, marks judged."""
    started = time.perf_counter()
    embedder = Embedder.from_pretrained(plan.model, device=plan.device)
    split = split_shards(find_shards(plan.data))
    if plan.max_train_shards:
        split = Split(split.train[: plan.max_train_shards], split.val, split.test)
    encoders = _encoders(plan, embedder)
    survey = _embed(split, encoders, embedder, say)
    say("zero-shot regression and retrieval")
    report: dict[str, Any] = {
        "model": {
            "id": embedder.model_id,
            "sha256": embedder.model_sha256,
            "preprocess_version": embedder.preprocess_version,
            "dim": embedder.dim,
        },
        "data": _describe(plan.data, split, survey),
        "simulated": _simulated(plan, survey),
        "unaligned": _unaligned(plan, survey, encoders),
        "supervised": {entry["kind"]: entry for entry in map(_baseline, plan.baselines)},
        "real": _real(plan, embedder, encoders, survey, say),
    }
    if plan.realism is not None:
        report["photometric_realism"] = json.loads(plan.realism.read_text(encoding="utf-8"))
    report["marks"] = judge(report)
    return {"kind": "evaluation", **provenance(seed=plan.seed, started=started), **report}


def _encoders(plan: Plan, embedder: Embedder) -> dict[tuple[str, Modality], Encoder]:
    aligned = ModelEncoder(embedder.model, plan.device)
    encoders: dict[tuple[str, Modality], Encoder] = {("aligned", modality): aligned for modality in embedder.modalities}
    towers: tuple[tuple[Modality, Path | None], ...] = (
        ("image", plan.image_tower),
        ("spectrum", plan.spectrum_tower),
    )
    for modality, weights in towers:
        if weights is not None:
            encoders["unaligned", modality] = load_tower(plan.model, weights, modality, plan.device)
    return encoders


def _embed(split: Split, encoders: dict[tuple[str, Modality], Encoder], embedder: Embedder, say: Say) -> _Survey:
    done = 0
    began = time.perf_counter()

    def progress(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        if done // 2000 > before // 2000:
            say(f"{done} objects embedded, {done / (time.perf_counter() - began):.0f} a second")

    grids = (embedder.image_grid, embedder.spectrum_grid)
    parts = [encode_part(shards, encoders, *grids, report=progress) for shards in (split.train, split.val, split.test)]
    return _Survey(*parts)


def _describe(data: Path, split: Split, survey: _Survey) -> dict[str, Any]:
    manifest = data / "survey.json"
    if manifest.is_file():
        checksum = {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    else:
        checksum = {"shards_sha256": data_checksum([*split.train, *split.val, *split.test])}
    named = {"train": survey.train, "val": survey.val, "test": survey.test}
    return {
        **checksum,
        "objects": {name: len(part) for name, part in named.items()},
        "left_out": {name: part.left_out for name, part in named.items()},
        "split": split.names(),
        "properties": list(PROPERTIES),
    }


def _simulated(plan: Plan, survey: _Survey) -> dict[str, Any]:
    """All held-out objects; and those nearer than `NEAR` alone, since R2 grows with the range of what is predicted."""
    has = [modality for modality in MODALITIES if ("aligned", modality) in survey.train.vectors]
    vectors: dict[str, Parts] = {modality: survey.parts("aligned", modality) for modality in has}
    targets, column = survey.targets, PROPERTIES.index("redshift")
    val, test = (np.flatnonzero(part[:, column] < NEAR) for part in (targets.val, targets.test))

    def near(parts: Parts) -> Parts:
        return Parts(parts.train, parts.val[val], parts.test[test])

    out = _numbers(plan, vectors, targets)
    if min(len(val), len(test)) > 1:
        out["near"] = {
            "what": f"validation and test objects at z < {NEAR:g} alone (the published range); table of all",
            "objects": len(test),
            **_numbers(plan, {name: near(parts) for name, parts in vectors.items()}, near(targets)),
        }
    return out


def _numbers(plan: Plan, vectors: dict[str, Parts], targets: Parts) -> dict[str, Any]:
    repeat: dict[str, Any] = {"n_bootstrap": plan.n_bootstrap, "seed": plan.seed}
    out = {"zero_shot": zero_shot(vectors, targets, **repeat)}
    if len(vectors) == len(MODALITIES):
        pair = vectors["image"].test, vectors["spectrum"].test
        out["retrieval"] = retrieval(*pair, pool_size=plan.pool_size, **repeat)
    return out


def _unaligned(plan: Plan, survey: _Survey, encoders: dict[tuple[str, Modality], Encoder]) -> dict[str, Any]:
    """Each tower as pretraining left it; the two spaces have nothing in common, so there is no crossing."""
    vectors = {key[1]: survey.parts(*key) for key in encoders if key[0] == "unaligned"}
    if not vectors:
        return {}
    own: Sequence[tuple[str, str]] = [(modality, modality) for modality in vectors]
    table = zero_shot(vectors, survey.targets, directions=own, n_bootstrap=plan.n_bootstrap, seed=plan.seed)  # type: ignore[arg-type]
    return {"zero_shot": table}


def _baseline(folder: Path) -> dict[str, Any]:
    """A baseline's result without its training curve, which stays beside its weights."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {key: value for key, value in result.items() if key not in ("history", "format")}


def _real(
    plan: Plan,
    embedder: Embedder,
    encoders: dict[tuple[str, Modality], Encoder],
    survey: _Survey,
    say: Say,
) -> dict[str, Any]:
    if plan.shared is None or not plan.shared.is_dir():
        line = f"real sky skipped: {plan.shared or 'no folder'} is not there (give it with --shared)"
        say(line)
        return {"skipped": "the folder of real data was not there"}
    if ("aligned", "spectrum") not in encoders:
        return {"skipped": "the model has no spectrum tower"}
    say("real sky")
    objects, refused = load_objects(plan.shared, embedder.spectrum_grid)
    if not objects:
        return {"skipped": "the folder of real data holds no spectrum"}
    flux, ivar = np.stack([o.flux for o in objects]), np.stack([o.ivar for o in objects])
    vectors = encoders["aligned", "spectrum"].encode_spectra(flux, ivar)
    predicted, chosen = _redshifts(plan, encoders, survey, flux, ivar)
    tables = {
        group: redshift_table(objects, predicted, group, n_bootstrap=plan.n_bootstrap, seed=plan.seed)
        for group in GROUPS
    }
    table = survey.train.vectors["aligned", "spectrum"]
    simulated = survey.test.vectors["aligned", "spectrum"]
    return {
        "redshift": {"estimators": chosen, **tables},
        "pairs": _pairs(plan.shared, embedder, encoders.get(("aligned", "image")), objects, vectors, survey),
        "out_of_class": out_of_class(objects, vectors, table, simulated),
        "objects": _rows(objects, predicted),
        "refused": refused,
    }


def _redshifts(
    plan: Plan, encoders: dict[tuple[str, Modality], Encoder], survey: _Survey, flux: Array, ivar: Array
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Redshifts of the real spectra by every method there is, and how each was set up."""
    predicted: dict[str, Array] = {}
    chosen: dict[str, Any] = {}
    for name, label in (("aligned", "knn"), ("unaligned", "knn_unaligned")):
        if (name, "spectrum") not in encoders:
            continue
        parts = survey.parts(name, "spectrum")
        knn = KnnRedshift.tuned(parts.train, survey.train.redshift, parts.val, survey.val.redshift)
        predicted[label] = knn(encoders[name, "spectrum"].encode_spectra(flux, ivar))
        chosen[label] = {"k": knn.k, "how": knn.how, "chosen_on": "simulated validation objects"}
    for folder in plan.baselines:
        # the network reads the project's own grid, which a published encoder does not
        if _baseline(folder)["kind"] == "redshift" and flux.shape[1] == SpectrumGrid().n_pixels:
            net = load_redshift_net(folder, plan.device)
            device = str(next(net.parameters()).device)
            logits = predict(net, lambda rows: _tensors(flux[rows], ivar[rows]), np.arange(len(flux)), device)
            predicted["cnn"] = net.redshift(logits)
            chosen["cnn"] = {"what": "supervised 1-D CNN on the same simulated spectra"}
    return predicted, chosen


def _pairs(
    shared: Path,
    embedder: Embedder,
    encoder: Encoder | None,
    objects: list[RealObject],
    vectors: Array,
    survey: _Survey,
) -> dict[str, Any]:
    if encoder is None:
        return {}
    pairs = load_pairs(shared, embedder.image_grid, objects)
    if len(pairs) < 2:
        return {}
    rows = [objects.index(pair.spectrum) for pair in pairs]
    pictures = encoder.encode_images(np.stack([pair.image.pixels for pair in pairs]))
    pools = survey.test.vectors["aligned", "image"], survey.test.vectors["aligned", "spectrum"]
    return {"names": [pair.name for pair in pairs], **partner_rank(pictures, vectors[rows], *pools)}


def _rows(objects: list[RealObject], predicted: dict[str, Array]) -> list[dict[str, Any]]:
    """Every real object with its estimates: what the error analysis needs."""
    return [
        {
            "name": item.name,
            "group": item.group,
            "spectype": item.spectype,
            "z": item.redshift,
            "snr": item.snr,
            **{f"z_{method}": float(values[i]) for method, values in predicted.items()},
        }
        for i, item in enumerate(objects)
    ]


def _tensors(*arrays: Array) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in arrays)
