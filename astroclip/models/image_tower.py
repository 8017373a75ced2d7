"""The image tower: asinh colour mapping, a torchvision ResNet, aperture photometry, a two-layer head."""

from __future__ import annotations

import torch
from torch import nn

from astroclip.models.configuration import ImageTowerConfig
from astroclip.models.resnet import resnet, resnet_features

__all__ = ["AperturePhotometry", "AsinhMapping", "ImageTower"]

APERTURES = (3.0, 6.0, 12.0, 24.0)  # radii in pixels; at 0.262 arcsec the first is a DESI fibre (1.5 arcsec wide)


class AsinhMapping(nn.Module):
    """(N, B, H, W) nanomaggies -> asinh(flux / softening) / 2, so that the sky has scatter of about a half.

    The asinh stretch is Lupton, Gunn & Szalay (1999); fluxes of both signs stay finite and their order is kept,
    so brightness (hence luminosity and mass) is not lost as it is in a clipped colour picture.
    """

    def __init__(self, softening: tuple[float, ...]) -> None:
        super().__init__()
        self.softening = softening

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # Built here, not a buffer: it belongs to the config, and float16 weight files must not round it.
        softening = torch.tensor(self.softening, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1)
        return torch.asinh(pixels / softening) / 2


class AperturePhotometry(nn.Module):
    """(N, B, S, S) nanomaggies -> (N, P) what a catalogue would say of the object at the centre.

    Fluxes in circular apertures as asinh magnitudes (Lupton, Gunn & Szalay 1999) of the middle band, and the
    differences of neighbouring bands. A ResNet's pooled features hold colours to some hundredths of a magnitude at
    best, and the light within a fibre, which is what a spectrum shares with the picture, hardly at all.
    """

    def __init__(self, softening: tuple[float, ...]) -> None:
        super().__init__()
        self.softening = softening
        self.n_features = len(softening) * (len(APERTURES) + 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            weight = _aperture_weights(pixels.shape[-2], pixels.shape[-1]).to(pixels.device)
            flux = pixels.flatten(2) @ weight.flatten(1).T
            noise = torch.tensor(self.softening, device=pixels.device)[:, None] * weight.square().sum((1, 2)).sqrt()
            # asinh magnitudes about a common zero point, so that differences are colours
            magnitude = torch.asinh(flux / (2 * noise)) + noise.log()
            middle = magnitude.shape[1] // 2
            colours = magnitude.diff(dim=1)
            return torch.cat([magnitude[:, middle] / 3, colours.flatten(1)], dim=1)


def _aperture_weights(height: int, width: int) -> torch.Tensor:
    """(A + 1, H, W): discs with edges of a pixel's width, then the whole image."""
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    radius = torch.hypot(y.expand(height, width), x.expand(height, width))
    discs = [(edge + 0.5 - radius).clamp(0, 1) for edge in APERTURES]
    return torch.stack([*discs, torch.ones(height, width)])


class ImageTower(nn.Module):
    """(N, B, S, S) nanomaggies -> features (N, F) and, through the head, embeddings (N, D) not yet normalised.

    The head sees the backbone's features and the aperture photometry; `features` is the backbone's alone.
    """

    def __init__(self, config: ImageTowerConfig, projection_dim: int) -> None:
        super().__init__()
        self.mapping = AsinhMapping(config.softening)
        layers, bottleneck = _ARCHITECTURES[config.arch]
        self.backbone = resnet(layers, bottleneck, config.width, len(config.softening))
        self.feature_dim = resnet_features(bottleneck, config.width)
        self.photometry = AperturePhotometry(config.softening)
        self.photometry_embed = nn.Sequential(
            nn.BatchNorm1d(self.photometry.n_features),
            nn.Linear(self.photometry.n_features, config.photometry_width),
            nn.GELU(),
        )
        self.head = nn.Sequential(
            nn.Linear(self.feature_dim + config.photometry_width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, projection_dim),
        )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's pooled representation, (N, F)."""
        mapped = self.mapping(pixels).contiguous(memory_format=torch.channels_last)
        return self.backbone(mapped)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        photometry = self.photometry_embed(self.photometry(pixels))
        return self.head(torch.cat([self.features(pixels), photometry], dim=1))


_ARCHITECTURES = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}  # layers, bottleneck
