"""Explanations judged: do the windows said to matter hold the lines, and does hiding them cost the match?

    python benchmarks/explain.py --data data/survey [--index service/demo/index] [--model service/demo/model]
        [--spectra 200] [--images 100] [--out benchmarks/results/explain.json]

With 0 of one kind, what the file holds of it stays, if it is of the same model.

Held-out simulated galaxies (test shards) are explained against their nearest object of the index, a spectrum by its
nearest spectrum, an image by its nearest image.

* `lines`: of star-forming galaxies (log sSFR > -10.5), how often the most important windows hold a strong emission
  line at the galaxy's own redshift, which nothing here is told, and how many windows do (chance).
* `centre`: how often an image's most important window lies within 3 arcsec of the galaxy, and how many windows do.
* `deletion`, `insertion` (Petsiuk et al. 2018, arXiv:1806.07421): the cosine, over the one of the whole object, with
  the most important share of the pixels hidden, or with nothing else shown; the mean over the shares. `random` takes
  the windows in random order.
* `empty`: root mean square drop of image windows farther than 9 arcsec from the galaxy, hidden by sky and by zeros.

Seconds are of the processor. Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from astroclip.embed import Embedder
from astroclip.explain import Explanation, Occlusion
from astroclip.preprocess import GridImage, GridSpectrum
from astroclip.types import Image, Modality, Spectrum
from index import SurveyIndex
from training.data import find_shards
from training.evaluate.report import provenance, write_json
from training.split import split_shards

DEMO = Path(__file__).resolve().parents[1] / "service" / "demo"
LINES = (3728.5, 4862.7, 4960.3, 5008.2, 6564.6, 6585.3, 6718.3, 6732.7)  # vacuum Angstrom, as in the spectrum tower
STAR_FORMING = -10.5
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
DRAWS = 3
SEED = 0

Grid = GridImage | GridSpectrum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the simulated survey the demo index is a part of")
    parser.add_argument("--index", type=Path, default=DEMO / "index")
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--spectra", type=int, default=200)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/explain.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    index = SurveyIndex.open(arguments.index)
    embedder = Embedder.from_pretrained(arguments.model, device="cpu")
    if embedder.model_sha256 != index.model_sha256:
        parser.error("the index was built with another model")
    report: dict[str, Any] = {"kind": "explain", "model": {"id": embedder.model_id, "sha256": embedder.model_sha256}}
    parts: dict[str, Any] = {}
    if arguments.spectra:
        parts["spectrum"] = spectra(arguments.data, arguments.spectra, embedder, index)
    if arguments.images:
        parts["image"] = images(arguments.data, arguments.images, embedder, index)
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if earlier["model"] == report["model"]:
            report = earlier
    made = provenance(seed=SEED, started=started)
    for part in parts.values():
        part["made"] = {name: made[name] for name in ("created", "command", "seconds")}
    write_json(arguments.out, {**report, **parts, **made})


def spectra(data: Path, count: int, embedder: Embedder, index: SurveyIndex) -> dict[str, Any]:
    wave = embedder.spectrum_grid.wave
    judged = Judge(embedder, index, "spectrum")
    tops: dict[int, list[float]] = {1: [], 3: [], 5: []}
    chance = []
    for shard, row in held_out(data, count, star_forming=True):
        z = float(shard["Z"][row])
        spectrum = Spectrum(
            np.asarray(shard["spectrum_lambda"][row], np.float64),
            *(shard[f"spectrum_{name}"][row] for name in ("flux", "ivar", "mask")),
        )
        found = judged.explain(embedder.prepare(spectrum))
        rest = wave[np.stack([found.windows[:, 0], found.windows[:, 1] - 1], axis=1)] / (1 + z)
        holds = np.any([(rest[:, 0] <= line) & (line <= rest[:, 1]) for line in LINES], axis=0)
        order = np.argsort(-found.drop)
        for n, share in tops.items():
            share.append(float(holds[order[:n]].mean()))
        chance.append(float(holds.mean()))
    lines = {f"first {n}": float(np.mean(share)) for n, share in tops.items()}
    return {"lines": {**lines, "chance": float(np.mean(chance))}, **judged.report()}


def images(data: Path, count: int, embedder: Embedder, index: SurveyIndex) -> dict[str, Any]:
    judged = Judge(embedder, index, "image")
    top, chance = [], []
    empty: dict[str, list[float]] = {"sky": [], "zeros": []}
    scale, middle = embedder.image_grid.pixel_scale_arcsec, embedder.image_grid.size / 2
    for shard, row in held_out(data, count):
        pixels = shard["image_array"][row]
        bands = tuple(name.decode().lower().rsplit("-", 1)[-1] for name in shard["image_band"][row])
        grid = embedder.prepare(Image(pixels, shard["image_mask"][row], bands, float(shard["image_scale"][row][0])))
        found = judged.explain(grid)
        centre = (found.windows[:, :2] + found.windows[:, 2:]) / 2
        away = np.hypot(*(centre - middle).T) * scale
        top.append(bool(away[np.argmax(found.drop)] <= 3))
        chance.append(float((away <= 3).mean()))
        empty["sky"].append(float(np.mean(found.drop[away > 9] ** 2)))
        zeros = Occlusion(grid)
        zeros._sky = np.zeros_like(zeros._sky)
        drop = zeros.read(judged.encode(zeros), judged.reference).drop
        empty["zeros"].append(float(np.mean(drop[away > 9] ** 2)))
    return {
        "centre": {"first": float(np.mean(top)), "chance": float(np.mean(chance))},
        "empty": {name: float(np.sqrt(np.mean(values))) for name, values in empty.items()},
        **judged.report(),
    }


def held_out(data: Path, count: int, star_forming: bool = False) -> Iterator[tuple[h5py.File, int]]:
    """So many galaxies of the test shards, of every shard alike."""
    shards = split_shards(find_shards(data)).test
    each = -(-count // len(shards))
    given = 0
    for path in shards:
        with h5py.File(path, "r") as shard:
            fit = np.asarray(shard["log_ssfr"]) > STAR_FORMING if star_forming else np.ones(len(shard["Z"]), bool)
            for row in np.flatnonzero(fit)[:each]:
                if given < count:
                    given += 1
                    yield shard, int(row)


class Judge:
    """Explains, and follows what hiding costs."""

    def __init__(self, embedder: Embedder, index: SurveyIndex, modality: Modality) -> None:
        self.embedder, self.index, self.modality = embedder, index, modality
        self.reference = np.empty(0, np.float32)
        self.rng = np.random.default_rng(SEED)
        self.curves: dict[str, list[npt.NDArray[np.float64]]] = {}
        self.seconds: list[float] = []
        self.facts: list[tuple[float, float, float]] = []

    def encode(self, occlusion: Occlusion) -> npt.NDArray[np.float32]:
        return self.embedder.encode(occlusion.views(0, len(occlusion)))

    def explain(self, grid: Grid) -> Explanation:
        occlusion = Occlusion(grid)
        vector = self.embedder.encode(occlusion.views(0, 1))
        hits, _ = self.index.search(vector, target=self.modality, k=1, query_modality=self.modality)
        stored = self.index.vector(int(hits[0].rows[0]), self.modality)
        assert stored is not None
        self.reference = stored
        began = time.process_time()
        occlusion = Occlusion(grid)  # its cost counts
        found = occlusion.read(self.encode(occlusion), self.reference)
        self.seconds.append(time.process_time() - began)
        self.facts.append((found.score, float(found.drop.max()), found.control))
        self._follow("important", occlusion, found, np.argsort(-found.drop))
        for _ in range(DRAWS):
            self._follow("random", occlusion, found, self.rng.permutation(len(found.windows)))
        return found

    def _follow(self, name: str, occlusion: Occlusion, found: Explanation, order: npt.NDArray[np.int64]) -> None:
        """The cosine with the first windows of `order` hidden, and with nothing but them shown, at every share."""
        covered = np.zeros(found.importance.shape, bool)
        steps = []
        for window in order:
            covered |= occlusion.window(found.windows[window])
            steps.append(covered.copy())
        reached = np.array([step.mean() for step in steps])
        masks = [steps[int(np.argmax(reached >= share))] for share in SHARES]
        inside = len(occlusion.hidden)
        occlusion.hidden += [*masks, *(~mask for mask in masks)]
        views = occlusion.views(1 + inside, 1 + inside + 2 * len(masks))
        del occlusion.hidden[inside:]
        cosines = (self.embedder.encode(views) @ self.reference) / found.score
        self.curves.setdefault(f"deletion {name}", []).append(cosines[: len(masks)].astype(np.float64))
        self.curves.setdefault(f"insertion {name}", []).append(cosines[len(masks) :].astype(np.float64))

    def report(self) -> dict[str, Any]:
        curves = {name: np.mean(values, axis=0) for name, values in self.curves.items()}
        score, drop, control = np.median(self.facts, axis=0)
        return {
            "objects": len(self.seconds),
            "cpu_seconds_each": float(np.mean(self.seconds)),
            "median": {"score": score, "largest_drop": drop, "control": control},
            "shares": list(SHARES),
            **{name: {"curve": curve, "mean": float(curve.mean())} for name, curve in curves.items()},
        }


if __name__ == "__main__":
    main()
