"""A small survey in Multimodal Universe layout, made of the synthetic sky: labels that can be learned from both."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.sky import SKY_SIGMA, make_image, make_spectrum

SHARDS, ROWS = 5, 16


def write_shard(path: Path, n: int, seed: int) -> None:
    """`n` galaxies: nearer ones are brighter and larger, and their lines stand further to the blue."""
    rng = np.random.default_rng(seed)
    redshift = rng.uniform(0.05, 0.4, n)
    flux = 30 * (0.2 / redshift) ** 2
    images = [make_image(rng, flux=f, radius=np.clip(1.2 / z, 3, 12)) for f, z in zip(flux, redshift, strict=True)]
    spectra = [make_spectrum(rng, redshift=z) for z in redshift]
    columns = {
        "object_id": np.array([f"test-{seed:03d}-{i:03d}" for i in range(n)], "S"),
        "ra": rng.uniform(0, 360, n),
        "dec": rng.uniform(-20, 20, n),
        "Z": redshift.astype(np.float32),
        "redshift": redshift.astype(np.float32),
        "log_stellar_mass": (10 + 2 * redshift + 0.05 * rng.normal(size=n)).astype(np.float32),
        "log_metallicity": rng.normal(-0.3, 0.2, n).astype(np.float32),
        "age_gyr": rng.uniform(2, 10, n).astype(np.float32),
        "log_ssfr": rng.normal(-10, 0.5, n).astype(np.float32),
        "half_light_radius_arcsec": np.full(n, 1.0, np.float32),
        "flux_g": (0.5 * flux).astype(np.float32),
        "flux_r": flux.astype(np.float32),
        "flux_z": (1.6 * flux).astype(np.float32),
        "image_array": np.stack([image.pixels for image in images]),
        "image_band": np.array([[b"DES-G", b"DES-R", b"DES-Z"]] * n),
        "image_scale": np.full((n, 3), 0.262, np.float32),
        "image_psf_fwhm": np.full((n, 3), 1.2, np.float32),
        "image_sky_sigma": np.tile(np.array(SKY_SIGMA, np.float32), (n, 1)),
        "spectrum_lambda": np.stack([s.wave for s in spectra]).astype(np.float32),
        "spectrum_flux": np.stack([s.flux for s in spectra]),
        "spectrum_ivar": np.stack([s.ivar for s in spectra]),
        "spectrum_mask": np.stack([s.mask for s in spectra]),
    }
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = values


@pytest.fixture(scope="session")
def small_survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`SHARDS` shards of `ROWS` galaxies; the second row of the first shard lacks a metallicity."""
    root = tmp_path_factory.mktemp("survey")
    for shard in range(SHARDS):
        write_shard(root / f"healpix={100 + 7 * shard:04d}" / "001-of-001.hdf5", ROWS, seed=shard)
    with h5py.File(root / "healpix=0100" / "001-of-001.hdf5", "r+") as file:
        file["log_metallicity"][1] = np.nan
    return root
