"""What turns arrays on the grid into embeddings: the aligned model, and the encoders before alignment.

An encoder is any object with `encode_images` or `encode_spectra` (or both): the evaluation asks no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from astroclip.embed import Embedder
from astroclip.models import AstroCLIPModel
from astroclip.preprocess import PREPROCESS_VERSION, ImageGrid, SpectrumGrid
from astroclip.types import Modality
from training.evaluate.fit import choose_device

__all__ = [
    "Encoder",
    "ModelEncoder",
    "Source",
    "Sources",
    "TowerEncoder",
    "load_tower",
    "model_sources",
    "tower_source",
]

Array = npt.NDArray[Any]


class Encoder(Protocol):
    """pixels (N, B, S, S) nanomaggies, flux and ivar (N, L) on the model's grid -> (N, D) float32."""

    def encode_images(self, pixels: Array) -> Array: ...

    def encode_spectra(self, flux: Array, ivar: Array) -> Array: ...


@dataclass(frozen=True)
class Source:
    """An encoder, the grids it reads, and what identifies its vectors.

    what: one line for the tables; key: SHA-256 over weights, configuration, grids and preprocessing version.
    """

    encoder: Encoder
    images: ImageGrid
    spectra: SpectrumGrid
    key: str
    what: str


Sources = dict[tuple[str, Modality], Source]


def model_sources(name: str, embedder: Embedder, device: str = "auto", what: str = "") -> Sources:
    """The modalities of a model directory's model, each a source under `name`."""
    encoder = ModelEncoder(embedder.model, device)
    made: Sources = {}
    for modality in embedder.modalities:
        key = _key(embedder, [embedder.model_sha256, "model", modality])
        said = what or f"{embedder.model_id}, {embedder.dim}-d"
        made[name, modality] = Source(encoder, embedder.image_grid, embedder.spectrum_grid, key, said)
    return made


def tower_source(embedder: Embedder, model_dir: Path, weights: Path, modality: Modality, device: str) -> Source:
    """The unaligned encoder of `modality` (`load_tower`) with the model's grids."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    encoder = load_tower(model_dir, weights, modality, device)
    key = _key(embedder, [digest, "tower", modality])
    return Source(encoder, embedder.image_grid, embedder.spectrum_grid, key, f"{modality} tower before alignment")


def _key(embedder: Embedder, parts: list[str]) -> str:
    settings = [
        *parts,
        embedder.model.config.to_json_string(use_diff=False),
        asdict(embedder.image_grid),
        asdict(embedder.spectrum_grid),
        PREPROCESS_VERSION,
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class ModelEncoder:
    """The aligned model: unit vectors in the shared space."""

    def __init__(self, model: AstroCLIPModel, device: str = "auto") -> None:
        self.device = choose_device(device)
        self.model = model.eval().float()
        torch.nn.Module.to(self.model, self.device)

    def encode_images(self, pixels: Array) -> Array:
        return _run(self.model.get_image_features, self.device, pixels)

    def encode_spectra(self, flux: Array, ivar: Array) -> Array:
        return _run(self.model.get_spectrum_features, self.device, flux, ivar)


class TowerEncoder(ModelEncoder):
    """The towers without their heads: pooled ResNet features, mean over spectrum tokens (upstream's unaligned)."""

    def encode_images(self, pixels: Array) -> Array:
        return _run(self.model.image_tower.features, self.device, pixels)

    def encode_spectra(self, flux: Array, ivar: Array) -> Array:
        return _run(self.model.spectrum_tower.features, self.device, flux, ivar)


def load_tower(model_dir: str | Path, weights: str | Path, modality: Modality, device: str = "auto") -> TowerEncoder:
    """The unaligned encoder of `modality` whose weights a pretraining stage left in `weights` (tower.safetensors).

    model_dir: a model directory, for the configuration. The head is not used and may be missing; any other missing
    weight is a ValueError.
    """
    config = AstroCLIPModel.config_class.from_pretrained(model_dir, local_files_only=True)
    model = AstroCLIPModel(config)
    tower = model.image_tower if modality == "image" else model.spectrum_tower
    found = {key: value.float() for key, value in load_file(weights).items()}
    missing, unexpected = tower.load_state_dict(found, strict=False)
    missing = [key for key in missing if not key.startswith(tower.HEAD)]
    if missing or unexpected:
        raise ValueError(
            f"{Path(weights).name} does not fit the {modality} tower: missing {missing[:2]}, unknown {unexpected[:2]}; "
            "wanted the tower.safetensors of a pretraining run with the model's configuration"
        )
    return TowerEncoder(model, device)


def _run(function: Callable[..., torch.Tensor], device: str, *arrays: Array) -> Array:
    with torch.inference_mode():
        tensors = [torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device) for array in arrays]
        out: Array = function(*tensors).float().cpu().numpy()
    return out
