"""The image tower of Stein et al. and of AstroCLIP's first version: a torchvision ResNet and a two-layer projection."""

from __future__ import annotations

import torch
from torch import nn

from astroclip.models.colours import COLOURS
from astroclip.models.configuration import MocoTowerConfig
from astroclip.models.resnet import resnet

__all__ = ["MocoTower"]


class MocoTower(nn.Module):
    """(N, 3, S, S) nanomaggies in g, r, z -> embeddings (N, D), not normalised (MoCo v2; Stein+2021, 2022).

    The embedding is the projection, which contrastive training compares, or the pooled features before it
    (`output` "representation"), which Stein et al. search with.
    """

    def __init__(self, config: MocoTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = resnet(config.layers, config.bottleneck, config.width)
        self.head = nn.Sequential(
            nn.Linear(config.feature_dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.projection)
        )

    def mapping(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the backbone sees of (N, 3, S, S) nanomaggies."""
        return COLOURS[self.config.colours](pixels)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, F) pooled features."""
        return self.backbone(self.mapping(pixels))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.features(pixels)
        return self.head(features) if self.config.output == "projection" else features
