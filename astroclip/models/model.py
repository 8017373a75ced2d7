"""The joint model: two towers, one space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from astroclip.errors import InputError
from astroclip.losses import info_nce
from astroclip.models.configuration import (
    AnyImageTower,
    AnySpectrumTower,
    AstroCLIPConfig,
    ImageTowerConfig,
    MocoTowerConfig,
    SpectrumTowerConfig,
    VitTowerConfig,
)
from astroclip.models.image_tower import ImageTower
from astroclip.models.moco_tower import MocoTower
from astroclip.models.specformer_tower import SpecFormerTower
from astroclip.models.spectrum_tower import SpectrumTower
from astroclip.models.vit_tower import VitTower
from astroclip.types import MODALITIES, Modality

__all__ = ["AstroCLIPModel", "AstroCLIPOutput"]


@dataclass
class AstroCLIPOutput(ModelOutput):
    """image_embeds, spectrum_embeds: (N, D) unit vectors; logits_per_image: (N, N); loss where asked for."""

    loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    spectrum_embeds: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


class AstroCLIPModel(PreTrainedModel):
    """Galaxy images and optical spectra in one space (AstroCLIP, Parker+2024, MNRAS 531, 4990).

    One object alone or in a batch of any size gives the same vector: nothing in the forward pass looks at other
    rows (BatchNorm runs on its stored statistics in eval mode, which `from_pretrained` sets).
    """

    config_class = AstroCLIPConfig
    main_input_name = "pixel_values"
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: AstroCLIPConfig) -> None:
        super().__init__(config)
        self.image_tower = _tower(config.image_tower, config.projection_dim)
        self.spectrum_tower = _tower(config.spectrum_tower, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The layers' own initialisation stands (torchvision's for the ResNet, PyTorch's elsewhere)."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the model has towers for."""
        return tuple(m for m in MODALITIES if self.tower(m) is not None)

    def tower(self, modality: Modality) -> Any:
        """The tower of `modality`, None where the model has none."""
        return self.image_tower if modality == "image" else self.spectrum_tower

    def require(self, modality: Modality) -> None:
        """Raise InputError where the model has no tower for `modality`."""
        if self.tower(modality) is None:
            raise no_tower(self.config.model_name, self.modalities, modality)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, B, S, S) float32 nanomaggies on the image grid -> (N, D) float32 unit vectors."""
        self.require("image")
        return F.normalize(self.image_tower(pixel_values).float(), dim=-1)

    def get_spectrum_features(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        """(N, L) float32 flux (1e-17 erg/s/cm2/A) and ivar on the spectrum grid -> (N, D) float32 unit vectors."""
        self.require("spectrum")
        return F.normalize(self.spectrum_tower(flux, ivar).float(), dim=-1)

    @property
    def scale(self) -> torch.Tensor:
        """The clamped multiplier of cosines."""
        return self.logit_scale.clamp(max=math.log(self.config.logit_scale_max)).exp()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        flux: torch.Tensor | None = None,
        ivar: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> AstroCLIPOutput:
        """Either modality or both; with both, the logits, and the InfoNCE loss where asked for."""
        image = None if pixel_values is None else self.get_image_features(pixel_values)
        spectrum = None if flux is None or ivar is None else self.get_spectrum_features(flux, ivar)
        if image is None or spectrum is None:
            return AstroCLIPOutput(image_embeds=image, spectrum_embeds=spectrum)
        loss = info_nce(image, spectrum, self.scale) if return_loss else None
        return AstroCLIPOutput(loss, image, spectrum, self.scale * image @ spectrum.T)


def _tower(config: AnyImageTower | AnySpectrumTower | None, projection_dim: int) -> Any:
    """The tower of a config, or None. The published ones have the length of their vectors from their own layers."""
    if config is None:
        return None
    if isinstance(config, ImageTowerConfig):
        return ImageTower(config, projection_dim)
    if isinstance(config, SpectrumTowerConfig):
        return SpectrumTower(config, projection_dim)
    if config.dim != projection_dim:
        raise ValueError(f"the {config.KIND} tower gives {config.dim} numbers; projection_dim is {projection_dim}")
    if isinstance(config, VitTowerConfig):
        return VitTower(config)
    if isinstance(config, MocoTowerConfig):
        return MocoTower(config)
    return SpecFormerTower(config)


def no_tower(model_id: str, has: Sequence[Modality], found: Modality) -> InputError:
    """What to say where a model has no tower for `found`."""
    return InputError(
        f"The model {model_id} embeds {' and '.join(has)} only; found: {found}. Use a model with both towers, such as "
        "astroclip-v2 or the demo model.",
        code="no_tower",
        field=found,
    )
