"""The split's objects for the evaluation: labels, photometry, and embeddings made shard by shard.

Arrays on the model's grid come from `training.data`, the reader the models are trained with; nothing but one shard is
held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from astroclip.preprocess import ImageGrid, SpectrumGrid
from astroclip.types import Modality
from training.data import PROPERTIES, load_survey
from training.evaluate.encoders import Encoder

__all__ = ["EncodedPart", "encode_part", "photometry", "read_columns"]

Array = npt.NDArray[Any]
AB_ZERO = 22.5  # AB magnitude of one nanomaggy
CALIBRATION_ERROR = 0.01  # Legacy Surveys' zero points, about 1 % (Dey et al. 2019)
PHOTOMETRY_COLUMNS = ("flux_g", "flux_r", "flux_z", "half_light_radius_arcsec", "image_psf_fwhm", "image_sky_sigma")


@dataclass(frozen=True)
class EncodedPart:
    """Objects of one part of the split, in shard order, those with an unknown property left out.

    vectors:  (encoder name, modality) -> (N, D) float32.
    targets:  (N, P) float64 in the order of `PROPERTIES`.
    left_out: how many had a property that is not finite.
    """

    vectors: dict[tuple[str, Modality], Array]
    targets: Array
    left_out: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def redshift(self) -> Array:
        return self.targets[:, PROPERTIES.index("redshift")]


def encode_part(
    shards: Sequence[Path],
    encoders: Mapping[tuple[str, Modality], Encoder],
    images: ImageGrid,
    spectra: SpectrumGrid,
    *,
    batch: int = 256,
    report: Callable[[int], None] = lambda n: None,
) -> EncodedPart:
    """Embed every object of `shards` with every encoder, in the modality that stands beside its name."""
    parts: dict[tuple[str, Modality], list[Array]] = {key: [] for key in encoders}
    targets = []
    for shard in shards:
        survey = load_survey([shard], images, spectra)
        targets.append(survey.targets())
        for start in range(0, len(survey), batch):
            rows = slice(start, start + batch)
            pixels = survey.image_batch(rows, images.size).numpy()
            flux, ivar = (tensor.numpy() for tensor in survey.spectrum_batch(rows))
            for key, encoder in encoders.items():
                image = key[1] == "image"
                parts[key].append(encoder.encode_images(pixels) if image else encoder.encode_spectra(flux, ivar))
            report(len(flux))
    labels = np.concatenate(targets)
    known = np.isfinite(labels).all(axis=1)
    vectors = {key: np.concatenate(chunks)[known] for key, chunks in parts.items()}
    return EncodedPart(vectors, labels[known], int((~known).sum()))


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
