"""What limits the search for a galaxy's spectrum by its image: what the image would have to say.

    python benchmarks/retrieval_limits.py --data data/survey [--model service/demo/model] [--shards 30]
        [--out benchmarks/results/retrieval_limits.json]

The spectrum tower is locked but for its head. In place of the image tower stands a small network that is told what an
image might say, as a table of numbers; both are trained alike on the same galaxies, and validation galaxies are looked
for in pools of 2,000. From what the pixels can be made to say to what no picture says:

* `photometry`: apertures, windows and moments of the simulated pixels, as the image tower measures them.
* `photometry, seeing known`: the FWHM of the point spread function of each band besides.
* `fluxes with noise`: true total fluxes and the true light of the fibre, each with the noise of the pixels under it;
  true size, axis ratio and bulge fraction; the fibre's flux scale and tilt off by an error drawn like the
  spectrograph's. No neighbour, no blurring, no wrong profile: more than a measurement can say.
* `fluxes`: the same without the noise of the pixels.
* `fluxes and redshift`: and the redshift.

About twelve minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from astroclip.losses import info_nce
from astroclip.models import AstroCLIPModel
from training.data import find_shards, load_survey
from training.evaluate.report import provenance, write_json
from training.evaluate.retrieval import pool_ranks, retrieval
from training.split import split_shards

POOL = 2000
EPOCHS, BATCH, RATE, WARMUP = 24, 1024, 1e-3, 15
SEED = 0
PIXEL = 0.262  # arcsec
# Wavelengths (A) over which the fibre's light is averaged for g, r, z; their middles turn f_lambda into nanomaggies.
FIBRE_BANDS = ((4000, 5500), (5600, 7100), (8400, 9800))
MIDDLES = np.array([4800.0, 6400.0, 9100.0])
NANOMAGGY = 3.631e-29  # erg/s/cm2/Hz
# The spectrograph's calibration errors (training/simulate/spectrograph.py): grey, tilt, curvature.
GREY, TILT, CURVATURE = 0.12, 0.03, 0.015
SOFTENING = torch.tensor([0.04, 0.06, 0.13])  # nanomaggies; noise of a point source


@dataclass(frozen=True)
class Galaxies:
    """One part of the survey: what the spectrum tower read, and what is known of the image.

    readings: `SpectrumTower.read`, tokens in half precision; photometry (N, P); seeing (N, 3) arcsec;
    flux, fibre, flux_noise, fibre_noise (N, 3) nanomaggies; shape (N, 3); redshift (N, 1).
    """

    readings: tuple[torch.Tensor | None, ...]
    photometry: torch.Tensor
    seeing: torch.Tensor
    flux: torch.Tensor
    fibre: torch.Tensor
    flux_noise: torch.Tensor
    fibre_noise: torch.Tensor
    shape: torch.Tensor
    redshift: torch.Tensor
    target_class: np.ndarray

    def __len__(self) -> int:
        return len(self.redshift)

    def read(self, rows: torch.Tensor) -> list[torch.Tensor | None]:
        return [
            None if part is None else part[rows].float() if part.is_floating_point() else part[rows]
            for part in self.readings
        ]


def load(model: AstroCLIPModel, shards: list[Path]) -> Galaxies:
    readings: list[tuple[torch.Tensor | None, ...]] = []
    columns: dict[str, list[Any]] = {}
    for shard in shards:
        survey = load_survey([shard])
        rows = torch.arange(len(survey))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for some in rows.split(250):
                tokens, missing, characteristic, bands = model.spectrum_tower.read(*survey.spectrum_batch(some))
                readings.append((tokens.half(), missing, characteristic.half(), bands))
            tower = model.image_tower
            pixels = survey.image_batch(rows)
            seen = [tower.photometry(pixels)] + ([] if tower.windows is None else [tower.windows(pixels)])
        for key, value in {"photometry": torch.cat(seen, dim=1).numpy(), **_truth(shard)}.items():
            columns.setdefault(key, []).append(value)
    joined = {key: np.concatenate(parts) for key, parts in columns.items()}
    classes = joined.pop("target_class")
    parts = tuple(None if some[0] is None else torch.cat(some) for some in zip(*readings, strict=True))
    return Galaxies(
        parts, **{key: torch.from_numpy(value).float() for key, value in joined.items()}, target_class=classes
    )


def _truth(shard: Path) -> dict[str, Any]:
    with h5py.File(shard) as file:
        flux = np.stack([file[f"flux_{band}"][:] for band in "grz"], axis=1)
        radius = file["half_light_radius_arcsec"][:]
        seeing, sky = file["image_psf_fwhm"][:], file["image_sky_sigma"][:]
        wave, light = file["spectrum_lambda"][0], file["spectrum_flux_true"][:]
        shape = np.stack([np.log(radius), file["axis_ratio"][:], file["bulge_fraction"][:]], axis=1)
        redshift, classes = file["redshift"][:][:, None], file["target_class"][:].astype(str)
    means = [light[:, (wave > low) & (wave < high)].mean(axis=1) for low, high in FIBRE_BANDS]
    fibre = np.stack(means, axis=1).clip(0) * 1e-17 * MIDDLES**2 / 2.998e18 / NANOMAGGY
    # A matched filter's noise: sky times the square root of 4 pi (s_psf^2 + r^2), in pixels (King 1983).
    psf, size = seeing / 2.355 / PIXEL, radius[:, None] / PIXEL
    return {
        "seeing": seeing,
        "flux": flux,
        "fibre": fibre,
        "flux_noise": sky * np.sqrt(4 * np.pi * (psf**2 + size**2)),
        "fibre_noise": sky * np.sqrt(4 * np.pi * psf**2),
        "shape": shape,
        "redshift": redshift,
        "target_class": classes,
    }


def fluxes(galaxies: Galaxies, noise: float, generator: torch.Generator) -> torch.Tensor:
    """(N, 10): total and fibre magnitudes and colours, and shape, drawn anew at each call."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n = len(galaxies)
    x = (torch.from_numpy(MIDDLES).float() - 6700) / 3100
    smooth = 1 + TILT * normal(n, 1) * x + CURVATURE * normal(n, 1) * (1.5 * x**2 - 0.5)
    fibre = galaxies.fibre * smooth * torch.exp(GREY * normal(n, 1))
    total = galaxies.flux + noise * galaxies.flux_noise * normal(n, 3)
    fibre = fibre + noise * galaxies.fibre_noise * normal(n, 3)
    big, small = (torch.asinh(flux / (2 * SOFTENING)) + SOFTENING.log() for flux in (total, fibre))
    level, light = big[:, 1:2], small[:, 1:2]
    return torch.cat([level, big.diff(dim=1), light, small.diff(dim=1), light - level, galaxies.shape], dim=1)


Say = Callable[[Galaxies, torch.Generator], torch.Tensor]
KNOWN: dict[str, Say] = {
    "photometry": lambda g, _: g.photometry,
    "photometry, seeing known": lambda g, _: torch.cat([g.photometry, g.seeing], dim=1),
    "fluxes with noise": lambda g, random: fluxes(g, 1.0, random),
    "fluxes": lambda g, random: fluxes(g, 0.0, random),
    "fluxes and redshift": lambda g, random: torch.cat([fluxes(g, 0.0, random), g.redshift], dim=1),
}


def search(model_dir: Path, say: Say, train: Galaxies, val: Galaxies) -> dict[str, Any]:
    """Train heads on `train`, look for `val`'s spectra by what `say` knows of their images."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    model = AstroCLIPModel.from_pretrained(model_dir).float()
    head = model.spectrum_tower.head
    example = say(train, random)
    mean, spread = example.mean(0), example.std(0)

    def scaled(galaxies: Galaxies) -> torch.Tensor:
        return ((say(galaxies, random) - mean) / spread).clamp(-5, 5)

    dim = model.config.projection_dim
    net = nn.Sequential(
        nn.Linear(example.shape[1], 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, dim)
    )
    parameters = [*net.parameters(), *head.parameters(), model.logit_scale]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    per_epoch = len(train) // BATCH
    steps = EPOCHS * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / WARMUP) * (0.01 + 0.495 * (1 + math.cos(math.pi * k / steps)))
    )
    for _ in range(EPOCHS):
        said, order = scaled(train), torch.randperm(len(train))
        for rows in order[: per_epoch * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                image = F.normalize(net(said[rows]).float(), dim=-1)
                spectrum = F.normalize(head(*train.read(rows)).float(), dim=-1)
                loss = info_nce(image, spectrum, model.scale)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        chunks = torch.arange(len(val)).split(500)
        spectra = torch.cat([F.normalize(head(*val.read(rows)), dim=-1) for rows in chunks]).numpy()
        images = F.normalize(net(scaled(val)), dim=-1).numpy()
    found = retrieval(images, spectra, pool_size=POOL, seed=SEED)["image->spectrum"]
    ranks = pool_ranks(images, spectra, POOL, seed=SEED)
    hit = np.where(np.isfinite(ranks), ranks <= 10, np.nan)
    by_class = {str(c): float(np.nanmean(hit[:, val.target_class == c])) for c in np.unique(val.target_class)}
    return {"inputs": example.shape[1], "image->spectrum": found, "recall@10 by class": by_class}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a survey made by `astroclip simulate`")
    parser.add_argument("--model", type=Path, default=Path("service/demo/model"))
    parser.add_argument("--shards", type=int, default=30, help="training shards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retrieval_limits.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    model = AstroCLIPModel.from_pretrained(arguments.model).float().eval()
    split = split_shards(find_shards(arguments.data))
    train, val = load(model, list(split.train[: arguments.shards])), load(model, list(split.val))
    results = {}
    for name, say in KNOWN.items():
        results[name] = search(arguments.model, say, train, val)
        print(f"{name:28s} {results[name]['image->spectrum']['recall@10']}", flush=True)
    report = {
        "kind": "retrieval_limits",
        **provenance(seed=SEED, started=started),
        "pool": POOL,
        "objects": {"train": len(train), "val": len(val)},
        "known": results,
    }
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()
