"""How far trust can be trusted: false alarms on held-out galaxies, junk found out, exchanged partners, and the cost.

    astroclip embed SHARDS... --out HELDOUT --model MODEL          (held-out galaxies, images and spectra)
    python benchmarks/trust.py --index INDEX --model MODEL --heldout HELDOUT --data SURVEY [--shared ../shared]
        [--out benchmarks/results/trust.json]

HELDOUT are embedding parts of galaxies that neither the model nor the index has seen. Junk (`benchmarks.trust_inputs`)
is made from seeded noise and from the survey's last test shard, and passes through the library's own preprocessing;
what that refuses counts as found out. Real objects are read as `astroclip evaluate` reads them; they belong to another
survey than the index, and their rates are reported as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy.spatial import cKDTree
from trust_inputs import DAMAGED_IMAGES, DAMAGED_SPECTRA, JUNK_IMAGES, JUNK_SPECTRA

from astroclip.embed import Embedder
from astroclip.errors import AstroClipError
from astroclip.io import read_images
from astroclip.io.sources import Entry, list_inputs, read_unit
from astroclip.preprocess.statistics import spectrum_statistics
from astroclip.types import MODALITIES, Modality
from index import SurveyIndex, assess, disagreement_p
from index.backends.exact import ExactBackend
from index.parts import read_info, read_parts
from index.trust import DISAGREEMENT_LEVEL, OOD_LEVEL
from index.vectors import VectorTable
from service.answer import search_answer
from service.engine import Engine
from service.schemas import SearchRequest
from service.settings import Settings
from training.data import find_shards
from training.evaluate.metrics import roc_auc
from training.evaluate.realsky import load_objects
from training.evaluate.report import provenance, write_json
from training.split import split_shards

Array = npt.NDArray[Any]
LEVELS = (0.01, OOD_LEVEL, 0.1)
SEED = 4
BATCH = 64
LARGE = 100_000  # vectors of the larger table that the cost is also compared with
HARD_Z, HARD_MAGNITUDE = 0.02, 0.2  # ln(1 + z) and magnitudes that weigh the same in looking for a similar partner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--per-kind", type=int, default=200, help="inputs of each kind of junk")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trust.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    index, embedder = SurveyIndex.open(arguments.index), Embedder.from_pretrained(arguments.model, device="cpu")
    heldout, catalog = _heldout(arguments.heldout)
    result = {
        "kind": "trust",
        "model": {"id": embedder.model_id, "sha256": embedder.model_sha256},
        "index": {"id": index.index_id, "objects": len(index)},
        "measures": {m: _about(index, m) for m in MODALITIES},
        "false_alarms": {m: _rates(_p_values(index, m, *heldout[m])) for m in MODALITIES},
        "pairs": _pairs(index, heldout, catalog),
        "input_flags": _input_flags(catalog),
        "cost": _cost(arguments),
        "real": _real(index, embedder, arguments.shared / "data"),
        "junk": _junk(index, embedder, arguments.data, arguments.per_kind),
    }
    write_json(arguments.out, {**result, **provenance(seed=SEED, started=started)})


# --- p-values ---------------------------------------------------------------------------------------------------------


def _about(index: SurveyIndex, modality: Modality) -> dict[str, Any]:
    typical = index.trust.typical[modality]
    sizes = {name: len(table) for name, table in typical.tables.items()}
    return {"k": typical.k, "reference": len(typical.rows), "calibration": sizes, "statistics": list(typical.names)}


def _p_values(
    index: SurveyIndex, modality: Modality, vectors: Array, statistics: Sequence[tuple[float, ...]]
) -> dict[str, Array]:
    found = assess(index, vectors, modality, statistics=statistics)
    names = {name for trust in found for name in trust.measures}
    p = {name: np.array([trust.measures.get(name, np.nan) for trust in found]) for name in sorted(names)}
    return {"ood": np.array([np.nan if trust.ood_p is None else trust.ood_p for trust in found]), **p}


def _rates(p: Mapping[str, Array]) -> dict[str, Any]:
    """Share at or below each level, by measure; `ood` is what flags."""
    return {
        "n": len(p["ood"]),
        **{name: {f"{level:g}": float(np.mean(values <= level)) for level in LEVELS} for name, values in p.items()},
    }


def _heldout(parts: Path) -> tuple[dict[Modality, tuple[Array, list[tuple[float, ...]]]], pa.Table]:
    """Vectors and statistics by modality, and the catalogue; objects that have both modalities."""
    info = read_info(parts)
    read = list(read_parts(parts, info))
    out: dict[Modality, tuple[Array, list[tuple[float, ...]]]] = {}
    for m in MODALITIES:
        values = np.concatenate([part.measured[m].values for part in read])
        out[m] = np.concatenate([part.vectors[m] for part in read]), [tuple(row.tolist()) for row in values]
    return out, pa.concat_tables([part.catalog for part in read])


# --- junk -------------------------------------------------------------------------------------------------------------


def _junk(index: SurveyIndex, embedder: Embedder, survey: Path, count: int) -> dict[str, Any]:
    shard = split_shards(find_shards(survey)).test[-1]
    galaxies: list[Entry] = []
    for unit in list_inputs([str(shard)]).units:
        if len(galaxies) < count:
            galaxies += read_unit(unit)
    kinds: dict[str, tuple[Modality, Mapping[str, Callable[..., Any]]]] = {
        "images": ("image", JUNK_IMAGES),
        "damaged images": ("image", DAMAGED_IMAGES),
        "spectra": ("spectrum", JUNK_SPECTRA),
        "damaged spectra": ("spectrum", DAMAGED_SPECTRA),
    }
    out: dict[str, Any] = {}
    for group, (modality, makers) in kinds.items():
        out[group] = {}
        for name, make in makers.items():
            rng = np.random.default_rng([SEED, len(out), len(out[group])])
            made = [make(rng, getattr(galaxy, modality)) for galaxy in galaxies[:count]]
            out[group][name] = _found_out(index, embedder, modality, made)
        detected = [entry["detected"] for entry in out[group].values()]
        out[group]["mean of the kinds"] = float(np.mean(detected))
    return out


def _found_out(index: SurveyIndex, embedder: Embedder, modality: Modality, made: Sequence[Any]) -> dict[str, Any]:
    grids = []
    for item in made:
        try:
            grids.append(embedder.prepare(item))
        except AstroClipError:
            continue
    flags = [{flag.code for flag in grid.quality.flags} for grid in grids]
    out: dict[str, Any] = {"n": len(made), "refused": len(made) - len(grids)}
    if not grids:
        return {**out, "detected": 1.0}
    statistics = [grid.quality.statistics for grid in grids]
    p = _p_values(index, modality, embedder.encode(grids), statistics)  # type: ignore[arg-type]
    found = p["ood"] <= OOD_LEVEL
    serious = {"low_snr", "off_centre", "masked_fraction", "pixel_scale"}
    warned = np.array([bool(codes & serious) for codes in flags])
    return {
        **out,
        "detected": float((np.count_nonzero(found) + out["refused"]) / len(made)),
        "detected_or_flagged": float((np.count_nonzero(found | warned) + out["refused"]) / len(made)),
        **{f"{name}_alone": float(np.mean(values <= OOD_LEVEL)) for name, values in p.items() if name != "ood"},
    }


# --- real objects -----------------------------------------------------------------------------------------------------


def _real(index: SurveyIndex, embedder: Embedder, data: Path) -> dict[str, Any]:
    if not data.is_dir():
        return {"skipped": "the folder of real data was not there"}
    objects, refused = load_objects(data, embedder.spectrum_grid)
    flux, ivar = np.stack([o.flux for o in objects]), np.stack([o.ivar for o in objects])
    vectors = np.concatenate([_encode(embedder, flux[i : i + 32], ivar[i : i + 32]) for i in range(0, len(flux), 32)])
    statistics = [spectrum_statistics(f, w) for f, w in zip(flux, ivar, strict=True)]
    p = _p_values(index, "spectrum", vectors, statistics)
    kinds = np.array([f"{o.spectype} {o.group}" for o in objects])
    spectra = {str(kind): _rates({name: v[kinds == kind] for name, v in p.items()}) for kind in np.unique(kinds)}
    images, grids = sorted((data / "legacy_fits").glob("*.fits.gz")), []
    for path in images:
        try:
            grids += [embedder.prepare(image) for image in read_images(path.read_bytes(), name=path.name)]
        except AstroClipError as error:
            refused.append(f"{path.name}: {error}")
    pictures: dict[str, Any] = {}
    if grids:
        given = [grid.quality.statistics for grid in grids]
        pictures = {"Legacy Surveys FITS": _rates(_p_values(index, "image", embedder.encode(grids), given))}  # type: ignore[arg-type]
    return {"spectra": spectra, "images": pictures, "refused": len(refused)}


def _encode(embedder: Embedder, flux: Array, ivar: Array) -> Array:
    with torch.inference_mode():
        found = embedder.model.get_spectrum_features(torch.from_numpy(flux), torch.from_numpy(ivar))
    return np.asarray(found.numpy())


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(index: SurveyIndex, heldout: Mapping[Modality, tuple[Array, Any]], catalog: pa.Table) -> dict[str, Any]:
    """Partners exchanged at random, and between galaxies of similar redshift and r magnitude."""
    image, spectrum = heldout["image"][0], heldout["spectrum"][0]
    rng = np.random.default_rng(SEED)
    place = np.stack(
        [
            np.log1p(catalog["redshift"].to_numpy()) / HARD_Z,
            2.5 * np.log10(np.maximum(catalog["flux_r"].to_numpy(), 1e-3)) / HARD_MAGNITUDE,
        ],
        axis=1,
    )
    similar = cKDTree(place).query(place, 2)[1]
    hard = np.where(similar[:, 0] == np.arange(len(place)), similar[:, 1], similar[:, 0])
    own = np.einsum("nd,nd->n", image, spectrum)
    out: dict[str, Any] = {"n": len(own), "table": len(index.trust.pairs)}
    out["false_alarms"] = _at_levels(index, image, spectrum)
    order = rng.permutation(len(own))
    other = np.empty(len(own), np.int64)
    other[order] = np.roll(order, 1)  # nobody keeps their own
    for name, partner in (("random", other), ("similar z and r", hard)):
        swapped = np.einsum("nd,nd->n", image, spectrum[partner])
        draws = rng.integers(0, len(own), (200, len(own)))
        aucs = [roc_auc(-own[draw], -swapped[draw]) for draw in draws]
        out[name] = {
            "auc": roc_auc(-own, -swapped),
            "auc_95": [float(q) for q in np.quantile(aucs, [0.025, 0.975])],
            "detected": _at_levels(index, image, spectrum[partner]),
        }
    return out


def _at_levels(index: SurveyIndex, image: Array, spectrum: Array) -> dict[str, float]:
    p = np.array([disagreement_p(index, i, s) for i, s in zip(image, spectrum, strict=True)], float)
    return {f"{level:g}": float(np.mean(p <= level)) for level in sorted({*LEVELS, DISAGREEMENT_LEVEL})}


def _input_flags(catalog: pa.Table) -> dict[str, float]:
    """Share of the held-out galaxies that carry each flag of their input."""
    flags = [flag for row in catalog["quality_flags"].to_pylist() for flag in set(row or ())]
    return {str(code): flags.count(code) / len(catalog) for code in sorted(set(flags))}


# --- cost -------------------------------------------------------------------------------------------------------------


def _cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds (medians, trust and search taking turns) on this index, in the service, and on a larger table."""
    engine = Engine.load(Settings(index_dir=arguments.index, model_dir=arguments.model, device="cpu"))
    index = engine.index
    rng = np.random.default_rng(SEED)
    wide = rng.standard_normal((LARGE, index.dim)).astype(np.float32)
    large = ExactBackend(VectorTable(wide / np.linalg.norm(wide, axis=1, keepdims=True), np.arange(LARGE)))
    out: dict[str, Any] = {"torch_threads": torch.get_num_threads(), "objects": len(index), "large": LARGE}
    for modality in MODALITIES:
        for count, repeats in ((1, 300), (BATCH, 40)):
            vectors = index.tables[modality].take(np.arange(count))
            given = [tuple(row) for row in index.trust.measured[modality].values[:count].astype(float)]
            calls: dict[str, Callable[[], Any]] = {
                "trust": partial(assess, index, vectors, modality, statistics=given),
                "search": partial(index.search, vectors, target=modality, k=16, query_modality=modality),
                "search_either": partial(index.search, vectors, target="either", k=16, query_modality=modality),
                "search_large": partial(large.search, vectors, 16),
            }
            found = _timed(calls, repeats)
            shares = {f"of_{name}": found["trust"] / found[name] for name in calls if name != "trust"}
            out[f"{modality} x {count}"] = {**found, **shares}
    object_id = index.catalog.take([0], ["object_id"]).column(0).to_pylist()[0]
    request = SearchRequest.model_validate({"query": {"object_id": object_id}})
    vector = index.tables["spectrum"].take(np.arange(1))
    given = [tuple(index.trust.measured["spectrum"].values[0].astype(float))]
    served: dict[str, Callable[[], Any]] = {
        "trust": lambda: assess(index, vector, "spectrum", statistics=given, exclude_rows=(0,)),
        "answer": lambda: search_answer(engine, request, {}, "benchmark"),
    }
    found = _timed(served, 200)
    out["service"] = {**found, "of_answer_without_trust": found["trust"] / (found["answer"] - found["trust"])}
    engine.close()
    return out


def _timed(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, one of each a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
