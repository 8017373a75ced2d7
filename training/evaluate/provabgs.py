"""AstroCLIP's own test set: its pairs joined with the PROVABGS catalogue, and the published tasks on them.

Pairs come from AstroCLIP's HDF5 file (`training.pairs`), properties from PROVABGS (Hahn et al. 2023, AJ 165, 253),
the file BGS_ANY_full.provabgs.sv3.v0.hdf5 after upstream's preprocessing, which adds Z_MW, TAGE_MW and AVG_SFR from
the posterior (without these three, redshift and stellar mass are evaluated). As upstream: rows with
PROVABGS_LOGMSTAR_BF > 0 and MAG_G, MAG_R, MAG_Z > 0; inner join on TARGETID with the train and test parts; the last
tenth of the joined training rows chooses the number of neighbours. Unlike upstream no incomplete batch is dropped,
and

    log sSFR = log10(AVG_SFR) - LOGMSTAR      (upstream: ln AVG_SFR - ln Z_MW, kept behind `published_ssfr`)

Upstream's file has no inverse variances: those of the spectra's own scatter are used, as for an upload without errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.io.spectrum import estimate_ivar
from astroclip.preprocess import ImageGrid, LinearSpectrumGrid, SpectrumGrid, overlap_matrix, rebin
from training.data import PROPERTIES
from training.evaluate.encoders import Source, Sources
from training.evaluate.fewshot import few_shot
from training.evaluate.retrieval import retrieval
from training.evaluate.tasks import TaskSettings
from training.evaluate.zeroshot import Parts, zero_shot
from training.pairs import AstroclipFile

__all__ = ["PairPlan", "Properties", "evaluate_pairs", "join", "read_provabgs"]

Array = npt.NDArray[Any]
NEEDED = ("TARGETID", "Z_HP", "PROVABGS_LOGMSTAR_BF", "MAG_G", "MAG_R", "MAG_Z")
DERIVED = ("Z_MW", "TAGE_MW", "AVG_SFR")
VALIDATION = 0.1
BATCH = 256


@dataclass(frozen=True)
class PairPlan:
    """AstroCLIP's file, the catalogue, and whether sSFR is upstream's."""

    pairs: Path | None
    catalogue: Path | None
    published_ssfr: bool = False


@dataclass(frozen=True)
class Properties:
    """target_id: (N,) int64, unique; values: (N, P) float64; names: P of `PROPERTIES`."""

    target_id: npt.NDArray[np.int64]
    values: Array
    names: tuple[str, ...]


def read_provabgs(path: Path, published_ssfr: bool = False) -> Properties:
    """The kept rows of the catalogue; raises InputError naming the columns it lacks.

    Metallicity is log10 Z_MW, age TAGE_MW in Gyr, masses log10 solar masses. A TARGETID that comes twice is kept once.
    """
    table = _columns(path)
    if missing := [name for name in NEEDED if name not in table]:
        raise InputError(
            f"{path.name} lacks {', '.join(missing)}; wanted the PROVABGS catalogue "
            "(BGS_ANY_full.provabgs.sv3.v0.hdf5); check --provabgs",
            code="missing_column",
            field="provabgs",
        )
    mass = np.asarray(table["PROVABGS_LOGMSTAR_BF"], np.float64)
    keep = np.isfinite(mass) & (mass > 0)
    for band in ("MAG_G", "MAG_R", "MAG_Z"):
        keep &= np.asarray(table[band], np.float64) > 0
    columns = {"redshift": np.asarray(table["Z_HP"], np.float64), "log_stellar_mass": mass}
    if all(name in table for name in DERIVED):
        metals, age, rate = (np.asarray(table[name], np.float64) for name in DERIVED)
        with np.errstate(divide="ignore", invalid="ignore"):
            right, published = np.log10(rate) - mass, np.log(rate) - np.log(metals)
            columns["log_metallicity"] = np.log10(metals)
        columns["age_gyr"] = age
        columns["log_ssfr"] = published if published_ssfr else right
    names = tuple(name for name in PROPERTIES if name in columns)
    values = np.stack([columns[name] for name in names], axis=1)
    keep &= np.isfinite(values).all(axis=1)
    ids, first = np.unique(np.asarray(table["TARGETID"], np.int64)[keep], return_index=True)
    return Properties(ids, values[keep][first], names)


def join(properties: Properties, object_id: npt.NDArray[np.str_]) -> tuple[npt.NDArray[np.int64], Array]:
    """(rows of `object_id` that the catalogue has, their (n, P) values), in the order of `object_id`."""
    ids = object_id.astype(np.int64)
    place = np.clip(np.searchsorted(properties.target_id, ids), 0, max(len(properties.target_id) - 1, 0))
    found = np.flatnonzero(properties.target_id[place] == ids) if len(properties.target_id) else np.empty(0, np.int64)
    return found, properties.values[place[found]]


def evaluate_pairs(
    plan: PairPlan, sources: Sources, settings: TaskSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Zero-shot, few-shot and retrieval on the joined pairs for every encoder, or {"skipped": why}."""
    for path, what in ((plan.pairs, "AstroCLIP's pairs (--pairs)"), (plan.catalogue, "PROVABGS (--provabgs)")):
        if path is None or not path.is_file():
            say(f"PROVABGS test set skipped: {what} not there")
            return {"skipped": f"{what} not there"}
    assert plan.pairs is not None and plan.catalogue is not None
    properties = read_provabgs(plan.catalogue, plan.published_ssfr)
    rows, values = {}, {}
    for part in ("train", "test"):
        reader = AstroclipFile(plan.pairs, part, columns=())
        names = np.concatenate([reader.read(chunk).object_id for chunk in _chunks(np.arange(len(reader)))])
        rows[part], values[part] = join(properties, names)
        if len(rows[part]) < 3:
            raise InputError(
                f"{len(rows[part])} of {len(reader)} {part} pairs are in the catalogue by TARGETID; wanted three or "
                "more; check that --pairs and --provabgs belong together",
                code="no_match",
                field="provabgs",
            )
    order = np.random.default_rng(settings.seed).permutation(len(rows["train"]))
    cut = len(order) - max(1, round(VALIDATION * len(order)))
    train, val = np.sort(order[:cut]), np.sort(order[cut:])
    targets = Parts(values["train"][train], values["train"][val], values["test"])
    say(f"PROVABGS: {len(train)} train, {len(val)} validation, {len(values['test'])} test pairs")
    out: dict[str, Any] = {
        "objects": {"train": len(train), "val": len(val), "test": len(values["test"])},
        "ssfr": "published" if plan.published_ssfr else "right",
        "encoders": {},
    }
    for name in dict.fromkeys(name for name, _ in sources):
        vectors = {}
        for (other, modality), source in sources.items():
            if other == name:
                made = {part: _embed(plan.pairs, part, rows[part], source, modality) for part in rows}
                vectors[str(modality)] = Parts(made["train"][train], made["train"][val], made["test"])
        out["encoders"][name] = _tasks(vectors, targets, properties.names, name != "unaligned", settings)
    return out


def _tasks(
    vectors: Mapping[str, Parts], targets: Parts, names: tuple[str, ...], shared_space: bool, settings: TaskSettings
) -> dict[str, Any]:
    ways: dict[str, Any] = {} if shared_space else {"directions": [(modality, modality) for modality in vectors]}
    out: dict[str, Any] = {
        "zero_shot": zero_shot(vectors, targets, names=names, **ways, **settings.repeat),
        "few_shot": few_shot(vectors, targets, names, labels={"all": (0, 1)}, **ways, **settings.repeat),
    }
    if shared_space and len(vectors) == 2:
        pair = vectors["image"].test, vectors["spectrum"].test
        for size in settings.pools:
            out[f"retrieval_{size}"] = retrieval(*pair, pool_size=size, **settings.repeat)
    return out


def _embed(path: Path, part: str, rows: npt.NDArray[np.int64], source: Source, modality: str) -> Array:
    """(n, D) of the rows, read and embedded batch by batch."""
    image = modality == "image"
    reader = AstroclipFile(path, part, image_size=source.images.size, columns=("image",) if image else ("spectrum",))
    vectors = []
    for chunk in _chunks(rows):
        pairs = reader.read(chunk)
        if image:
            vectors.append(source.encoder.encode_images(_banded(pairs.images, source.images)))
        else:
            vectors.append(source.encoder.encode_spectra(*_with_noise(pairs.flux, source.spectra)))
    return np.concatenate(vectors)


def _banded(pixels: Array, grid: ImageGrid) -> Array:
    return np.ascontiguousarray(pixels[:, [("g", "r", "z").index(band) for band in grid.bands]])


def _with_noise(flux: Array, grid: SpectrumGrid) -> tuple[Array, Array]:
    """Flux and ivar on `grid` of spectra on DESI's grid without ivar."""
    wave = LinearSpectrumGrid().wave
    known = np.isfinite(flux)
    ivar = np.stack([estimate_ivar(row, good) for row, good in zip(flux, known, strict=True)])
    return rebin(np.where(known, flux, 0), np.where(known, ivar, 0), overlap_matrix(wave, grid))


def _chunks(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _columns(path: Path) -> dict[str, Array]:
    """Columns of an HDF5 table: one compound dataset (as astropy writes it), or one dataset a column."""
    try:
        with h5py.File(path, "r") as file:
            for node in file.values():
                if isinstance(node, h5py.Dataset) and node.dtype.names:
                    wanted = [name for name in (*NEEDED, *DERIVED) if name in node.dtype.names]
                    return {name: node[name] for name in wanted}
            return {name: file[name][:] for name in (*NEEDED, *DERIVED) if isinstance(file.get(name), h5py.Dataset)}
    except OSError as error:
        raise InputError(
            f"{path.name} cannot be read as HDF5 ({str(error)[:120]}); download it again",
            code="damaged_hdf5",
            field="provabgs",
        ) from error
