"""The split's objects for the evaluation: labels, photometry, and embeddings made shard by shard.

Arrays on an encoder's grid come from `training.data`, the reader the models are trained with; nothing but one shard is
held at a time, and every encoder sees it in the same pass. With a cache, vectors are kept by the encoder's key and the
SHA-256 of the shard's file, so that a second run with one more encoder embeds with that encoder alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from astroclip.preprocess import ImageGrid, SpectrumGrid
from astroclip.types import Modality
from training.benchmark.release import file_sha256
from training.data import PROPERTIES, load_survey
from training.evaluate.encoders import Source

__all__ = ["MORPHOLOGY", "EncodedPart", "VectorCache", "encode_part", "photometry", "read_columns"]

Array = npt.NDArray[Any]
AB_ZERO = 22.5  # AB magnitude of one nanomaggy
CALIBRATION_ERROR = 0.01  # Legacy Surveys' zero points, about 1 % (Dey et al. 2019)
PHOTOMETRY_COLUMNS = ("flux_g", "flux_r", "flux_z", "half_light_radius_arcsec", "image_psf_fwhm", "image_sky_sigma")
MORPHOLOGY = ("bulge_fraction", "axis_ratio", "half_light_radius_arcsec")


@dataclass(frozen=True)
class EncodedPart:
    """Objects of one part of the split, in shard order, those with an unknown property left out.

    vectors:    (encoder name, modality) -> (N, D) float32.
    targets:    (N, P) float64 in the order of `PROPERTIES`.
    morphology: (N, M) float64 in the order of `MORPHOLOGY`, None where the survey has no such columns.
    left_out:   how many had a property that is not finite; known: (all,) bool, which rows of the shards are here.
    """

    vectors: dict[tuple[str, Modality], Array]
    targets: Array
    morphology: Array | None
    left_out: int
    known: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def redshift(self) -> Array:
        return self.targets[:, PROPERTIES.index("redshift")]


@dataclass(frozen=True)
class VectorCache:
    """Embeddings of whole shards on disk: `<folder>/<encoder key>/<shard digest>.npy`, written aside and renamed."""

    folder: Path

    def path(self, source: Source, shard_sha256: str) -> Path:
        return self.folder / source.key[:24] / f"{shard_sha256[:24]}.npy"

    def get(self, source: Source, shard_sha256: str, rows: int) -> Array | None:
        """(rows, D) float32, or None where there is nothing usable (a damaged file is made again)."""
        path = self.path(source, shard_sha256)
        try:
            found: Array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.ndim == 2 and len(found) == rows and found.dtype == np.float32 else None

    def put(self, source: Source, shard_sha256: str, vectors: Array) -> None:
        path = self.path(source, shard_sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.save(file, np.asarray(vectors, np.float32))
        os.replace(aside, path)


def encode_part(
    shards: Sequence[Path],
    sources: Mapping[tuple[str, Modality], Source],
    *,
    cache: VectorCache | None = None,
    batch: int = 256,
    report: Callable[[int], None] = lambda n: None,
) -> EncodedPart:
    """Embed every object of `shards` with every encoder, in the modality that stands beside its name."""
    parts: dict[tuple[str, Modality], list[Array]] = {key: [] for key in sources}
    targets, shapes = [], []
    for shard in shards:
        targets.append(_optional_columns(shard, PROPERTIES))
        shapes.append(_optional_columns(shard, MORPHOLOGY))
        for key, vectors in _encode_shard(shard, len(targets[-1]), sources, cache, batch).items():
            parts[key].append(vectors)
        report(len(targets[-1]))
    labels = np.concatenate(targets)
    known = np.isfinite(labels).all(axis=1)
    morphology = np.concatenate(shapes)[known]
    return EncodedPart(
        {key: np.concatenate(chunks)[known] for key, chunks in parts.items()},
        labels[known],
        morphology if np.isfinite(morphology).all() else None,
        int((~known).sum()),
        known,
    )


def _encode_shard(
    shard: Path,
    rows: int,
    sources: Mapping[tuple[str, Modality], Source],
    cache: VectorCache | None,
    batch: int,
) -> dict[tuple[str, Modality], Array]:
    """Vectors of all rows by every source; the shard is read once for each pair of grids that is still needed."""
    found: dict[tuple[str, Modality], Array] = {}
    digest = file_sha256(shard) if cache else ""
    if cache:
        stored = {key: cache.get(source, digest, rows) for key, source in sources.items()}
        found = {key: vectors for key, vectors in stored.items() if vectors is not None}
    wanted: dict[tuple[ImageGrid, SpectrumGrid], dict[tuple[str, Modality], Source]] = {}
    for key, source in sources.items():
        if key not in found:
            wanted.setdefault((source.images, source.spectra), {})[key] = source
    for grids, some in wanted.items():
        made = _embed(shard, grids, some, batch)
        found.update(made)
        if cache:
            for key, vectors in made.items():
                cache.put(some[key], digest, vectors)
    return found


def _embed(
    shard: Path,
    grids: tuple[ImageGrid, SpectrumGrid],
    sources: Mapping[tuple[str, Modality], Source],
    batch: int,
) -> dict[tuple[str, Modality], Array]:
    # The cache beside the shards is for the grids one trains on; another's would take 70 MB a shard.
    survey = load_survey([shard], *grids, cache=grids == (ImageGrid(), SpectrumGrid()))
    chunks: dict[tuple[str, Modality], list[Array]] = {key: [] for key in sources}
    for start in range(0, len(survey), batch):
        rows = slice(start, start + batch)
        for key, source in sources.items():
            if key[1] == "image":
                made = source.encoder.encode_images(survey.image_batch(rows, grids[0].size).numpy())
            else:
                flux, ivar = (tensor.numpy() for tensor in survey.spectrum_batch(rows))
                made = source.encoder.encode_spectra(flux, ivar)
            chunks[key].append(made)
    return {key: np.concatenate(parts) for key, parts in chunks.items()}


def _optional_columns(shard: Path, names: Sequence[str]) -> Array:
    """(N, columns) float64 of one shard, NaN for a column it lacks; `Z` stands for a missing `redshift`."""
    with h5py.File(shard, "r") as file:
        n = len(file["object_id"])
        stored = ["Z" if name == "redshift" and name not in file else name for name in names]
        columns = [file[name][:].astype(np.float64) if name in file else np.full(n, np.nan) for name in stored]
    return np.stack(columns, axis=1)


def read_columns(shards: Sequence[Path], names: Sequence[str] = PHOTOMETRY_COLUMNS) -> dict[str, Array]:
    """Named columns of the shards, one after the other; raises ValueError naming a shard that lacks one."""
    columns: dict[str, list[Array]] = {name: [] for name in names}
    for shard in shards:
        with h5py.File(shard, "r") as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(
                    f"{shard.parent.name}/{shard.name} lacks {', '.join(missing)}; wanted a survey made by "
                    "`astroclip simulate`"
                )
            for name in names:
                columns[name].append(file[name][:])
    return {name: np.concatenate(chunks) for name, chunks in columns.items()}


def photometry(columns: Mapping[str, Array], scale_arcsec: float = 0.262, seed: int = 0) -> Array:
    """(N, 5) asinh magnitudes g, r, z and colours g - r, r - z, with the noise of a model fit to these cutouts.

    From the true total fluxes (nanomaggies) with Gaussian noise of sky_sigma sqrt(4 pi (s_psf^2 + r_half^2)) pixels
    (a matched filter's effective area) and 1 % of calibration: no blending and no wrong profile, hence kinder to this
    baseline than a real catalogue. asinh magnitudes (Lupton, Gunn & Szalay 1999) stay finite at negative flux.
    """
    rng = np.random.default_rng(seed)
    size = np.asarray(columns["half_light_radius_arcsec"], np.float64)
    magnitudes = []
    for index, band in enumerate("grz"):
        flux = np.asarray(columns[f"flux_{band}"], np.float64)
        psf = np.asarray(columns["image_psf_fwhm"], np.float64)[:, index] / 2.355
        sky = np.asarray(columns["image_sky_sigma"], np.float64)[:, index]
        noise = sky * np.sqrt(4 * np.pi * (psf**2 + size**2)) / scale_arcsec
        seen = flux * (1 + CALIBRATION_ERROR * rng.standard_normal(len(flux))) + noise * rng.standard_normal(len(flux))
        soft = float(np.median(noise))
        magnitudes.append(AB_ZERO - 2.5 / np.log(10) * (np.arcsinh(seen / (2 * soft)) + np.log(soft)))
    g, r, z = magnitudes
    return np.stack([g, r, z, g - r, r - z], axis=1)
