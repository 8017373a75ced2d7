"""The real-sky section of a result: redshifts by every method on the same objects, partners, strangers, morphology.

Neighbours and heads come from the simulated table; nothing is tuned on the sky. Each method reads the spectra on its
own grid; an object that some grid cannot take is left out for all, so that methods are compared on the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from astroclip.preprocess import SpectrumGrid
from training.data import load_survey
from training.evaluate.baselines import load_redshift_net
from training.evaluate.encoders import Source, Sources
from training.evaluate.fit import predict
from training.evaluate.morphology import load_votes, real_morphology
from training.evaluate.realsky import (
    KnnRedshift,
    RealObject,
    load_objects,
    load_pairs,
    out_of_class,
    partner_rank,
    redshift_table,
)
from training.evaluate.tasks import Encoded, TaskSettings
from training.evaluate.templates import FILE as TEMPLATES
from training.evaluate.templates import TemplateRedshift

__all__ = ["GROUPS", "SIMULATED", "Sky", "real_sky"]

Array = npt.NDArray[Any]
Say = Callable[[str], None]
GROUPS = ("desi", "sdss", "desi_edr_scaled")
SIMULATED = "simulated"
# Simulated test spectra beside the real ones: enough for a per cent of outliers, half a minute of template fits.
N_SIMULATED = 300


@dataclass(frozen=True)
class Sky:
    """What the section is measured with. shared: folder of real data; redshift_nets: runs of `baseline redshift`;
    test_shards: of the survey, for the simulated counterpart."""

    shared: Path
    redshift_nets: tuple[Path, ...]
    test_shards: tuple[Path, ...]
    settings: TaskSettings
    device: str


@dataclass(frozen=True)
class _Method:
    """A redshift estimator: (N, L) flux and ivar on `grid` -> (N,) redshifts."""

    grid: SpectrumGrid
    estimate: Callable[[Array, Array], Array]
    about: dict[str, Any]


def real_sky(sky: Sky, sources: Sources, encoded: Encoded, say: Say) -> dict[str, Any]:
    """The section, or {"skipped": why}."""
    if not sky.shared.is_dir():
        say(f"real sky skipped: {sky.shared} is not there (give its parent with --shared)")
        return {"skipped": "the folder of real data was not there"}
    morphology = _morphology(sky, sources)
    if ("aligned", "spectrum") not in sources:
        return {"skipped": "the model has no spectrum tower", **morphology}
    say("real sky")
    source = sources["aligned", "spectrum"]
    methods = _methods(sky, sources, encoded)
    objects, refused = _objects(sky.shared, source.spectra, [method.grid for method in methods.values()])
    if not objects[source.spectra]:
        return {"skipped": "the folder of real data holds no spectrum", **morphology}
    placed = objects[source.spectra]
    predicted = {name: method.estimate(*_stacked(objects[method.grid])) for name, method in methods.items()}
    repeat = sky.settings.repeat
    tables = {group: redshift_table(placed, predicted, group, **repeat) for group in GROUPS}
    tables[SIMULATED] = _simulated(sky, methods, encoded)
    vectors = source.encoder.encode_spectra(*_stacked(placed))
    table, simulated = (part.vectors["aligned", "spectrum"] for part in (encoded.train, encoded.test))
    return {
        "redshift": {"estimators": {name: method.about for name, method in methods.items()}, **tables},
        "pairs": _pairs(sky.shared, sources.get(("aligned", "image")), placed, vectors, encoded),
        "out_of_class": out_of_class(placed, vectors, table, simulated),
        **morphology,
        "objects": _rows(placed, predicted),
        "refused": refused,
    }


def _methods(sky: Sky, sources: Sources, encoded: Encoded) -> dict[str, _Method]:
    """Neighbours by every spectrum encoder, the supervised network, template fits; by the name their rows carry."""
    methods: dict[str, _Method] = {}
    for (name, modality), source in sources.items():
        if modality == "spectrum":
            parts = encoded.parts(name, modality)
            knn = KnnRedshift.tuned(parts.train, encoded.train.redshift, parts.val, encoded.val.redshift)
            about = {"k": knn.k, "how": knn.how, "chosen_on": "simulated validation objects", "what": source.what}
            label = "knn" if name == "aligned" else f"knn_{name}"
            methods[label] = _Method(source.spectra, _by_neighbours(knn, source), about)
    for folder in sky.redshift_nets:
        net = load_redshift_net(folder, sky.device)
        about = {"what": "supervised 1-D CNN on the same simulated spectra"}
        methods["cnn"] = _Method(SpectrumGrid(), _by_net(net), about)
    file = sky.shared / TEMPLATES
    if file.is_file():
        fit = TemplateRedshift.load(file, SpectrumGrid())
        about = {"what": "template fit: redrock's five galaxy vectors, chi2 over redshift"}
        methods["templates"] = _Method(SpectrumGrid(), fit, about)
    return methods


def _by_neighbours(knn: KnnRedshift, source: Source) -> Callable[[Array, Array], Array]:
    return lambda flux, ivar: knn(source.encoder.encode_spectra(flux, ivar))


def _by_net(net: Any) -> Callable[[Array, Array], Array]:
    def estimate(flux: Array, ivar: Array) -> Array:
        device = str(next(net.parameters()).device)
        logits = predict(net, lambda rows: _tensors(flux[rows], ivar[rows]), np.arange(len(flux)), device)
        return np.asarray(net.redshift(logits))

    return estimate


def _objects(
    shared: Path, own: SpectrumGrid, grids: Sequence[SpectrumGrid]
) -> tuple[dict[SpectrumGrid, list[RealObject]], list[str]]:
    """grid -> the objects that every grid takes, in one order; and a line for each refused by any."""
    loaded: dict[SpectrumGrid, list[RealObject]] = {}
    refused: list[str] = []
    for grid in {own, *grids}:
        loaded[grid], lines = load_objects(shared, grid)
        refused += [line for line in lines if line not in refused]
    common = set.intersection(*({item.name for item in items} for items in loaded.values()))
    return {grid: [item for item in items if item.name in common] for grid, items in loaded.items()}, refused


def _stacked(objects: Sequence[RealObject]) -> tuple[Array, Array]:
    return np.stack([o.flux for o in objects]), np.stack([o.ivar for o in objects])


def _simulated(sky: Sky, methods: Mapping[str, _Method], encoded: Encoded) -> dict[str, Any]:
    """The same methods on the first simulated test spectra: what the sky adds is the difference."""
    predicted: dict[str, Array] = {}
    objects: list[RealObject] = []
    for grid in {method.grid for method in methods.values()}:
        flux, ivar, snr = _first_test_spectra(sky.test_shards, grid, encoded)
        objects = [
            RealObject(str(i), SIMULATED, "GALAXY", float(z), float(snr[i]), flux[i], ivar[i])
            for i, z in enumerate(encoded.test.redshift[: len(flux)])
        ]
        for name, method in methods.items():
            if method.grid == grid:
                predicted[name] = method.estimate(flux, ivar)
    ordered = {name: predicted[name] for name in methods}
    return redshift_table(objects, ordered, SIMULATED, **sky.settings.repeat)


def _first_test_spectra(
    shards: Sequence[Path], grid: SpectrumGrid, encoded: Encoded
) -> tuple[Array, Array, npt.NDArray[np.float64]]:
    """Flux, ivar (n, L) and median signal-to-noise of the first `N_SIMULATED` test objects that `encoded` holds."""
    flux, ivar, read = [], [], 0
    for shard in shards:
        survey = load_survey([shard], spectrum_grid=grid, cache=grid == SpectrumGrid())
        known = encoded.test.known[read : read + len(survey)]
        read += len(survey)
        some = [tensor.numpy()[known] for tensor in survey.spectrum_batch(slice(None))]
        flux.append(some[0])
        ivar.append(some[1])
        if sum(map(len, flux)) >= N_SIMULATED:
            break
    joined, information = np.concatenate(flux)[:N_SIMULATED], np.concatenate(ivar)[:N_SIMULATED]
    ratio = np.where(information > 0, joined * np.sqrt(information), np.nan)
    return joined, information, np.nan_to_num(np.nanmedian(ratio, axis=1))


def _morphology(sky: Sky, sources: Sources) -> dict[str, Any]:
    """Votes on the real pictures by every image encoder."""
    out: dict[str, Any] = {}
    for (name, modality), source in sources.items():
        voted = load_votes(sky.shared, source.images) if modality == "image" else None
        if voted is None:
            continue
        vectors = np.concatenate(
            [source.encoder.encode_images(voted.pixels[i : i + 64]) for i in range(0, len(voted), 64)]
        )
        numbers = real_morphology(vectors, voted.votes, **sky.settings.repeat)
        out[name] = {"objects": len(voted), "refused": voted.refused, **numbers}
    return {"morphology": out} if out else {}


def _pairs(
    shared: Path, source: Source | None, objects: list[RealObject], vectors: Array, encoded: Encoded
) -> dict[str, Any]:
    if source is None:
        return {}
    pairs = load_pairs(shared, source.images, objects)
    if len(pairs) < 2:
        return {}
    rows = [objects.index(pair.spectrum) for pair in pairs]
    pictures = source.encoder.encode_images(np.stack([pair.image.pixels for pair in pairs]))
    pools = encoded.test.vectors["aligned", "image"], encoded.test.vectors["aligned", "spectrum"]
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
