"""Embedding parts as `astroclip embed` leaves them, of a made-up survey whose geometry carries its properties."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIM = 16
SHA = "ab" * 32


def embeddings(rng: np.random.Generator, z: np.ndarray, modality: str, dim: int = DIM) -> np.ndarray:
    """Unit vectors on a curve of the redshift, plus noise, plus an offset by modality (the gap)."""
    waves = np.arange(1, dim // 2 + 1)
    angle = z[:, None] * waves
    curve = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) / np.sqrt(waves.size)
    gap = np.zeros(dim)
    gap[0 if modality == "image" else 1] = 0.8
    vectors = curve + gap + 0.05 * rng.standard_normal((len(z), dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_parts(
    folder: Path,
    n: int = 600,
    *,
    seed: int = 1,
    dim: int = DIM,
    sha: str = SHA,
    per_part: int = 250,
    prefix: str = "obj",
    lacking: float = 0.1,
) -> dict[str, np.ndarray]:
    """Write parts of n objects, `lacking` of them without image, as many without spectrum, one without either.

    Returns what was written: id, ra, dec, redshift, image, spectrum (N, D), has_image, has_spectrum.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    z = rng.uniform(0.0, 1.2, n)
    truth = {
        "id": np.array([f"{prefix}-{i:06d}" for i in range(n)]),
        "ra": rng.uniform(0, 360, n),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
        "redshift": z,
        "image": embeddings(rng, z, "image", dim),
        "spectrum": embeddings(rng, z, "spectrum", dim),
    }
    u = rng.random(n)
    truth["has_image"], truth["has_spectrum"] = u > lacking, u < 1 - lacking
    truth["has_image"][n // 2] = truth["has_spectrum"][n // 2] = False
    for number, start in enumerate(range(0, n, per_part)):
        s = slice(start, min(start + per_part, n))
        _write_part(folder / f"part-{number:05d}.parquet", {k: v[s] for k, v in truth.items()}, rng, dim)
    record = {"format_version": 1, "model_id": "toy", "model_sha256": sha, "preprocess_version": "1", "dim": dim}
    (folder / "embedding.json").write_text(json.dumps(record))
    return truth


def _write_part(path: Path, t: dict[str, np.ndarray], rng: np.random.Generator, dim: int) -> None:
    n = len(t["id"])
    mass = 9.5 + t["redshift"] + 0.1 * rng.standard_normal(n)
    mass[::7] = np.nan
    failed = ~(t["has_image"] | t["has_spectrum"])
    columns = {
        "object_id": pa.array(t["id"].tolist()),
        "ra": pa.array(t["ra"]),
        "dec": pa.array(t["dec"]),
        "source": pa.array([f"toy.hdf5#{i}" for i in range(n)]),
        "error": pa.array([("constant image" if f else None) for f in failed], pa.string()),
        "image_embedding": _vectors(t["image"], t["has_image"], dim),
        "spectrum_embedding": _vectors(t["spectrum"], t["has_spectrum"], dim),
        "quality_flags": pa.array([["low_snr"] if i % 9 == 0 else [] for i in range(n)]),
        "redshift": pa.array(t["redshift"].astype(np.float32)),
        "log_stellar_mass": pa.array(mass),
        "target_class": pa.array(rng.choice(["BGS", "LRG", "ELG"], n).tolist()),
    }
    pq.write_table(pa.table(columns), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".done.json").write_text(
        json.dumps({"rows": n, "failed": int(failed.sum()), "parquet_sha256": digest})
    )


def _vectors(values: np.ndarray, has: np.ndarray, dim: int) -> pa.Array:
    flat = pa.array(values.ravel())
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(~has))


def write_shard(folder: Path, ids: list[str], seed: int = 3) -> None:
    """A Multimodal Universe shard with round galaxies and spectra with one line, for previews."""
    rng = np.random.default_rng(seed)
    n, side = len(ids), 152
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    profile = np.exp(-np.hypot(x, y)[None] / rng.uniform(2, 8, n)[:, None, None])
    image = (
        profile[:, None] * np.array([0.3, 0.6, 0.9])[None, :, None, None] * rng.uniform(0.2, 2, n)[:, None, None, None]
    )
    image = image + rng.normal(0, 0.004, image.shape)
    wave = np.broadcast_to(np.linspace(3600, 9824, 7781), (n, 7781))
    flux = 3.0 + 20.0 * np.exp(-0.5 * ((wave - rng.uniform(4000, 9500, n)[:, None]) / 8.0) ** 2)
    (folder / "healpix=0007").mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "healpix=0007" / "001-of-001.hdf5", "w") as shard:
        shard["object_id"] = np.array(ids, "S")
        shard["image_array"] = image.astype(np.float32)
        shard["image_band"] = np.tile(np.array([b"DES-G", b"DES-R", b"DES-Z"]), (n, 1))
        shard["spectrum_lambda"], shard["spectrum_flux"] = wave.astype(np.float32), flux.astype(np.float32)
        shard["spectrum_ivar"] = np.ones_like(flux, np.float32)
        shard["spectrum_mask"] = np.zeros(flux.shape, bool)
