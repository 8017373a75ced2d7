"""Small data files in the two layouts that training streams from, with line positions and colours that go with z."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from sky import make_image, make_spectrum


def galaxies(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, 3, 152, 152), spectra (n, 7781), redshifts (n,)."""
    z = rng.uniform(0.05, 0.5, n)
    images = np.stack([make_image(rng, flux=20 / (1 + 5 * value)).pixels for value in z])
    spectra = np.stack([make_spectrum(rng, value).flux for value in z])
    return images, spectra, z.astype("f4")


def write_astroclip(path: Path, groups: int = 2, rows: int = 20, seed: int = 5) -> Path:
    """AstroCLIP's layout: images transposed, targetids 1000 * group + row."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for name in range(groups):
            images, spectra, z = galaxies(rng, rows)
            group = file.create_group(str(name))
            group["images"] = images.transpose(0, 3, 2, 1)
            group["spectra"] = spectra[..., None]
            group["redshifts"] = z
            group["targetids"] = np.arange(rows, dtype="i8") + 1000 * name
    return path


def write_shards(root: Path, shards: int = 4, rows: int = 16, seed: int = 3, true: bool = True) -> Path:
    """Multimodal Universe layout, object ids sim-<shard>-<row>."""
    rng = np.random.default_rng(seed)
    wave = make_spectrum(rng).wave.astype("f4")
    for shard in range(shards):
        images, spectra, z = galaxies(rng, rows)
        folder = root / f"healpix={shard:04d}"
        folder.mkdir(parents=True)
        with h5py.File(folder / "001-of-001.hdf5", "w") as file:
            file["object_id"] = np.array([f"sim-{shard}-{i}".encode() for i in range(rows)])
            file["image_array"] = images
            file["image_band"] = np.array([[b"DES-G", b"DES-R", b"DES-Z"]] * rows)
            file["image_scale"] = np.full((rows, 3), 0.262, "f4")
            file["spectrum_lambda"] = np.tile(wave, (rows, 1))
            file["spectrum_flux"] = spectra
            if true:
                file["spectrum_flux_true"] = spectra
            file["spectrum_ivar"] = np.full(spectra.shape, 4.0, "f4")
            file["spectrum_mask"] = np.zeros(spectra.shape, bool)
            file["redshift"] = z
    return root
