"""The embedder: a model directory, a device, and vectors that do not depend on the batch they came in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from astroclip.errors import InputError, ProvenanceError
from astroclip.models import AstroCLIPConfig, AstroCLIPModel, AstroCLIPProcessor
from astroclip.preprocess import PREPROCESS_VERSION, GridImage, GridSpectrum, image_to_grid, spectrum_to_grid
from astroclip.types import Image, Modality, Spectrum

__all__ = ["Embedder"]

WEIGHTS_NAME = "model.safetensors"


class Embedder:
    """Turns images and spectra into unit vectors.

    `prepare` is numpy only and may run in any thread; `encode` runs the model and belongs to one thread.

    model_id, model_sha256: the directory's name for itself and the SHA-256 of its weights file.
    modalities: what the model embeds; some published models have one tower only.
    device, dtype, dtype_reason: what was chosen, and why.
    """

    def __init__(
        self,
        model: AstroCLIPModel,
        processor: AstroCLIPProcessor,
        *,
        model_sha256: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
    ) -> None:
        if processor.preprocess_version != PREPROCESS_VERSION:
            raise ProvenanceError(
                f"The model was trained with preprocessing version {processor.preprocess_version}; this code has "
                f"version {PREPROCESS_VERSION}. Install the matching release or re-export the model."
            )
        wanted = AstroCLIPProcessor.for_model(cast(AstroCLIPConfig, model.config))
        if (processor.images, processor.spectra) != (wanted.images, wanted.spectra):
            raise ProvenanceError(
                f"The model's preprocessor_config.json puts objects on {processor.images} and {processor.spectra}; its "
                f"towers take {wanted.images} and {wanted.spectra}. Copy both files from the same model."
            )
        self.device = _choose_device(device)
        self.dtype, self.dtype_reason = _choose_dtype(dtype, self.device)
        self.model = model.eval()
        # Convolutions read their weights channels last, as they do the pixels: otherwise each pass turns them round
        # first, 45 MB of a ResNet-18, which costs a single image as much as its own arithmetic.
        torch.nn.Module.to(self.model, self.device).to(memory_format=torch.channels_last)
        self.modalities: tuple[Modality, ...] = model.modalities
        self.processor = processor
        self.image_grid = processor.images
        self.spectrum_grid = processor.spectra
        self.model_id: str = model.config.model_name
        self.model_sha256 = model_sha256
        self.preprocess_version: str = processor.preprocess_version
        self.dim: int = model.config.projection_dim
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, device: str = "auto", dtype: str = "auto", batch_size: int = 64
    ) -> Embedder:
        """Load a model directory (config.json, model.safetensors, preprocessor_config.json); no pickles, no network."""
        path = Path(model_dir)
        weights = path / WEIGHTS_NAME
        if not weights.is_file():
            raise InputError(
                f"{path} holds no {WEIGHTS_NAME}; wanted a model directory (config.json, {WEIGHTS_NAME}, "
                "preprocessor_config.json). Train one or import published weights.",
                code="no_model",
            )
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        model = AstroCLIPModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        processor = AstroCLIPProcessor.from_pretrained(path, local_files_only=True)
        return cls(model, processor, model_sha256=digest, device=device, dtype=dtype, batch_size=batch_size)

    def prepare(self, item: Image | Spectrum, *, statistics: bool = True) -> GridImage | GridSpectrum:
        """One object onto the model's grid, with its quality brought up to date; raises InputError.

        statistics: False where nobody will judge whether it is like others: a third of the time of a spectrum.
        """
        if isinstance(item, Image):
            self.model.require("image")
            return image_to_grid(item, self.image_grid, statistics=statistics)
        self.model.require("spectrum")
        return spectrum_to_grid(item, self.spectrum_grid, statistics=statistics)

    def encode(self, prepared: Sequence[GridImage] | Sequence[GridSpectrum]) -> npt.NDArray[np.float32]:
        """(N, D) float32 unit vectors of prepared objects of one modality, in order."""
        out = np.empty((len(prepared), self.dim), dtype=np.float32)
        for start in range(0, len(prepared), self.batch_size):
            batch = prepared[start : start + self.batch_size]
            out[start : start + len(batch)] = self._encode_batch(batch)
        return out

    def encode_arrays(self, *arrays: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same of stacked grids: pixels (N, B, S, S), or flux and ivar (N, L), as one batch."""
        tensors = [torch.from_numpy(array).to(self.device) for array in arrays]
        autocast = torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")
        with torch.inference_mode(), autocast:
            features = self.model.get_image_features if len(tensors) == 1 else self.model.get_spectrum_features
            vectors = features(*tensors)
        return vectors.float().cpu().numpy()

    def embed(self, items: Sequence[Image] | Sequence[Spectrum]) -> npt.NDArray[np.float32]:
        """`prepare` and `encode` in one call."""
        return self.encode([self.prepare(item, statistics=False) for item in items])  # type: ignore[arg-type]

    def _encode_batch(self, batch: Sequence[GridImage] | Sequence[GridSpectrum]) -> npt.NDArray[np.float32]:
        if isinstance(batch[0], GridImage):
            return self.encode_arrays(np.stack([b.pixels for b in batch]))  # type: ignore[union-attr]
        flux, ivar = ([getattr(b, name) for b in batch] for name in ("flux", "ivar"))
        return self.encode_arrays(np.stack(flux), np.stack(ivar))


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("No CUDA device is visible; use --device cpu, or install a driver.", code="no_gpu")
    return device


def _choose_dtype(dtype: str, device: str) -> tuple[str, str]:
    """float32 unless asked: bfloat16 moves vectors by about 1e-3, more than the promise of 1e-5 across batches."""
    if dtype == "auto":
        return "float32", f"float32 on {device}: vectors agree to 1e-5 whatever the batch"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r} is unknown; wanted float32 or bfloat16.", code="bad_dtype")
    return dtype, "as asked"
