"""The image tower: asinh colour mapping, a torchvision ResNet, a two-layer head."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import nn

from astroclip.models.configuration import ImageTowerConfig

__all__ = ["AsinhMapping", "ImageTower"]


class AsinhMapping(nn.Module):
    """(N, B, H, W) nanomaggies -> asinh(flux / softening) / 2, so that the sky has scatter of about a half.

    The asinh stretch is Lupton, Szalay & Gunn (1999); fluxes of both signs stay finite and their order is kept,
    so brightness (hence luminosity and mass) is not lost as it is in a clipped colour picture.
    """

    def __init__(self, softening: tuple[float, ...]) -> None:
        super().__init__()
        self.softening = softening

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # Built here, not a buffer: it belongs to the config, and float16 weight files must not round it.
        softening = torch.tensor(self.softening, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1)
        return torch.asinh(pixels / softening) / 2


class ImageTower(nn.Module):
    """(N, B, S, S) nanomaggies -> features (N, F) and, through the head, embeddings (N, D) not yet normalised."""

    def __init__(self, config: ImageTowerConfig, projection_dim: int) -> None:
        super().__init__()
        self.mapping = AsinhMapping(config.softening)
        block, layers = _ARCHITECTURES[config.arch]
        self.backbone = torchvision.models.ResNet(block, layers)
        _set_width(self.backbone, block, layers, config.width, len(config.softening))
        self.feature_dim = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(self.feature_dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, projection_dim)
        )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's pooled representation, (N, F)."""
        mapped = self.mapping(pixels).contiguous(memory_format=torch.channels_last)
        return self.backbone(mapped)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


_ARCHITECTURES: dict[str, tuple[Any, list[int]]] = {
    "resnet18": (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet50": (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
}


def _set_width(net: torchvision.models.ResNet, block: Any, layers: list[int], width: int, in_channels: int) -> None:
    """Rebuild torchvision's stages at another base width (it fixes 64) or number of input bands."""
    if width == 64 and in_channels == 3:
        return
    net.inplanes = width
    net.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    net.bn1 = nn.BatchNorm2d(width)
    net.layer1 = net._make_layer(block, width, layers[0])
    net.layer2 = net._make_layer(block, 2 * width, layers[1], stride=2)
    net.layer3 = net._make_layer(block, 4 * width, layers[2], stride=2)
    net.layer4 = net._make_layer(block, 8 * width, layers[3], stride=2)
    net.fc = nn.Linear(8 * width * block.expansion, 1)
