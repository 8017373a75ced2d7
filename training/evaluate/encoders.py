"""What turns arrays on the grid into embeddings: the aligned model, and the encoders before alignment.

An encoder is any object with `encode_images` or `encode_spectra` (or both): the evaluation asks no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from astroclip.models import AstroCLIPModel
from astroclip.types import Modality
from training.evaluate.fit import choose_device

__all__ = ["Encoder", "ModelEncoder", "TowerEncoder", "load_tower"]

Array = npt.NDArray[Any]


class Encoder(Protocol):
    """pixels (N, B, S, S) nanomaggies, flux and ivar (N, L) on the model's grid -> (N, D) float32."""

    def encode_images(self, pixels: Array) -> Array: ...

    def encode_spectra(self, flux: Array, ivar: Array) -> Array: ...


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
    missing = [key for key in missing if not key.startswith("head.")]
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
