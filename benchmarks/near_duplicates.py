"""From which cosine on two objects are the same: the reason for the threshold of the list of near-duplicates.

    python benchmarks/near_duplicates.py --data data/survey [--index service/demo/index] [--model service/demo/model]
        [--objects 150] [--out benchmarks/results/near_duplicates.json]

`repeats`: cosines of two observations of one simulated galaxy (first test shards): a spectrum with another draw of its
noise; an image with as much noise again, and one shifted by a pixel each way with half as much. `pairs`: how many pairs
of different galaxies of the index reach each threshold, of how many. One minute on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from astroclip.embed import Embedder
from astroclip.types import Image, Spectrum
from index import SurveyIndex
from training.data import find_shards
from training.evaluate.report import provenance, write_json
from training.split import split_shards

DEMO = Path(__file__).resolve().parents[1] / "service" / "demo"
THRESHOLDS = (0.9, 0.95, 0.96, 0.97, 0.98, 0.99)
SEED = 0

Vectors = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the simulated survey the demo index is a part of")
    parser.add_argument("--index", type=Path, default=DEMO / "index")
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--objects", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/near_duplicates.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    embedder = Embedder.from_pretrained(arguments.model, device="cpu")
    index = SurveyIndex.open(arguments.index)
    if embedder.model_sha256 != index.model_sha256:
        parser.error("the index was built with another model")
    with h5py.File(split_shards(find_shards(arguments.data)).test[0], "r") as shard:
        found = repeats(embedder, shard, arguments.objects)
    report = {
        "kind": "near_duplicates",
        **provenance(seed=SEED, started=started),
        "model": {"id": embedder.model_id, "sha256": embedder.model_sha256},
        "repeats": {name: summary(cosines) for name, cosines in found.items()},
        "pairs": pairs(index),
    }
    write_json(arguments.out, report)


def repeats(embedder: Embedder, shard: h5py.File, count: int) -> dict[str, npt.NDArray[np.float64]]:
    rng = np.random.default_rng(SEED)
    wave = np.asarray(shard["spectrum_lambda"][0], np.float64)
    true, ivar, mask = (np.asarray(shard[f"spectrum_{name}"][:count]) for name in ("flux_true", "ivar", "mask"))
    sigma = np.where(ivar > 0, 1 / np.sqrt(np.maximum(ivar, 1e-12)), 0)
    observed = np.asarray(shard["spectrum_flux"][:count])
    again = (true + sigma * rng.standard_normal(true.shape)).astype(np.float32)
    spectra = [
        embedder.embed([Spectrum(wave, *one) for one in zip(f, ivar, mask, strict=True)]) for f in (observed, again)
    ]
    pixels = np.asarray(shard["image_array"][:count])
    sky = np.asarray(shard["image_sky_sigma"][:count])[:, :, None, None]
    noisier = pixels + sky * rng.standard_normal(pixels.shape)
    moved = np.roll(pixels, (1, 1), (2, 3)) + 0.5 * sky * rng.standard_normal(pixels.shape)
    first, *others = (images(embedder, stack) for stack in (pixels, noisier, moved))
    return {
        "spectrum": cosines(*spectra),
        "image, noise of a second exposure added": cosines(first, others[0]),
        "image, moved by a pixel, half that noise": cosines(first, others[1]),
    }


def images(embedder: Embedder, stack: npt.NDArray[Any]) -> Vectors:
    good = np.zeros(stack.shape[1:], bool)
    return embedder.embed([Image(one.astype(np.float32), good, ("g", "r", "z"), 0.262) for one in stack])


def cosines(a: Vectors, b: Vectors) -> npt.NDArray[np.float64]:
    return np.einsum("nd,nd->n", a, b).astype(np.float64)


def summary(found: npt.NDArray[np.float64]) -> dict[str, Any]:
    reach = {f"{threshold:.2f}": float(np.mean(found >= threshold)) for threshold in THRESHOLDS}
    return {"objects": len(found), "median": float(np.median(found)), "share_at_least": reach}


def pairs(index: SurveyIndex) -> dict[str, Any]:
    """Pairs of different objects that have both: how many reach a threshold in one modality, and in both."""
    rows = np.intersect1d(index.tables["image"].rows, index.tables["spectrum"].rows)
    image, spectrum = (t.take(np.searchsorted(t.rows, rows)) for t in (index.tables["image"], index.tables["spectrum"]))
    counts = {f"{threshold:.2f}": dict.fromkeys(("image", "spectrum", "both"), 0) for threshold in THRESHOLDS}
    for start in range(0, len(rows), 1024):
        stop = min(start + 1024, len(rows))
        ahead = np.arange(len(rows))[None] > np.arange(start, stop)[:, None]
        near = [np.where(ahead, table[start:stop] @ table.T, -1.0) for table in (image, spectrum)]
        for threshold in THRESHOLDS:
            both = [scores >= threshold for scores in near]
            entry = counts[f"{threshold:.2f}"]
            for name, reached in (("image", both[0]), ("spectrum", both[1]), ("both", both[0] & both[1])):
                entry[name] += int(np.count_nonzero(reached))
    return {"of": len(rows) * (len(rows) - 1) // 2, "reach": counts}


if __name__ == "__main__":
    main()
