"""The image tower: asinh colour mapping, a torchvision ResNet, photometry in apertures and windows, two-layer heads."""

from __future__ import annotations

import torch
from torch import nn

from astroclip.models.blocks import asinh
from astroclip.models.configuration import ImageTowerConfig
from astroclip.models.resnet import resnet, resnet_features

__all__ = ["AperturePhotometry", "AsinhMapping", "ImageTower", "WindowPhotometry"]

APERTURES = (3.0, 6.0, 12.0, 24.0)  # radii in pixels; at 0.262 arcsec the first is a DESI fibre (1.5 arcsec wide)
MOMENT_WINDOW = 6.0  # pixels; standard deviation of the Gaussian the second moments are taken under


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
        return asinh(pixels / softening) / 2


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
            weights = _aperture_weights(pixels.shape[-2], pixels.shape[-1]).to(pixels.device)
            return _magnitude_and_colours(pixels.float(), weights, self.softening)


class WindowPhotometry(nn.Module):
    """(N, B, S, S) nanomaggies -> (N, P) fluxes and second moments under Gaussian windows about the centre.

    Fluxes as in `AperturePhotometry`. Where the discs' edges lie in the light, their fluxes follow the seeing of each
    band; smooth windows of several widths say how much. Second moments, weighted by a Gaussian as in weak lensing
    (Kaiser, Squires & Broadhurst 1995), give the size and the ellipticity of each band.
    """

    def __init__(self, softening: tuple[float, ...], widths: tuple[float, ...]) -> None:
        super().__init__()
        self.softening, self.widths = softening, widths
        self.n_features = len(softening) * (len(widths) + 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            x, y = (axis.to(pixels.device) for axis in _from_centre(*pixels.shape[-2:]))
            square = x.square() + y.square()
            windows = torch.stack([torch.exp(-0.5 * square / width**2) for width in self.widths])
            light = torch.exp(-0.5 * square / MOMENT_WINDOW**2)
            moments = torch.stack([light, light * square, light * (x.square() - y.square()), light * 2 * x * y])
            flux, size, plus, cross = (pixels.flatten(2) @ moments.flatten(1).T).unbind(-1)
            # Ten sigma of a window's noise: sizes of what is fainter tend to 0 instead of to noise over noise.
            floor = 10 * torch.tensor(self.softening, device=pixels.device) * light.square().sum().sqrt() / 2
            flux = flux.abs() + floor
            size, ellipticity = size / flux / MOMENT_WINDOW**2, torch.hypot(plus, cross) / flux / MOMENT_WINDOW**2
            shapes = torch.cat([size, 3 * ellipticity], dim=1).clamp(-3, 3)
            return torch.cat([_magnitude_and_colours(pixels, windows, self.softening), shapes], dim=1)


def _magnitude_and_colours(pixels: torch.Tensor, weights: torch.Tensor, softening: tuple[float, ...]) -> torch.Tensor:
    """(N, B, H, W) and (A, H, W) -> (N, B A): asinh magnitudes of the middle band, then colours of neighbours."""
    flux = pixels.flatten(2) @ weights.flatten(1).T
    noise = torch.tensor(softening, device=pixels.device)[:, None] * weights.square().sum((1, 2)).sqrt()
    # asinh magnitudes about a common zero point, so that differences are colours
    magnitude = torch.asinh(flux / (2 * noise)) + noise.log()
    middle = magnitude.shape[1] // 2
    return torch.cat([magnitude[:, middle] / 3, magnitude.diff(dim=1).flatten(1)], dim=1)


def _from_centre(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of every pixel, (H, W) each."""
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    return x.expand(height, width), y.expand(height, width)


def _aperture_weights(height: int, width: int) -> torch.Tensor:
    """(A + 1, H, W): discs with edges of a pixel's width, then the whole image."""
    radius = torch.hypot(*_from_centre(height, width))
    discs = [(edge + 0.5 - radius).clamp(0, 1) for edge in APERTURES]
    return torch.stack([*discs, torch.ones(height, width)])


class ImageTower(nn.Module):
    """(N, B, S, S) nanomaggies -> features (N, F) and, through the head, embeddings (N, D) not yet normalised.

    The head sees the backbone's features and the aperture photometry; the window photometry, in models that have it,
    enters through a second one whose output is added. `features` is the backbone's alone.
    """

    # Where the weights of the head's own layers lie: pretraining leaves them alone, alignment begins them anew.
    HEAD = ("head.", "photometry_embed.", "window_scale.", "window_head.")

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
        self.head = _two_layers(self.feature_dim + config.photometry_width, config.hidden, projection_dim)
        self.windows = WindowPhotometry(config.softening, config.windows) if config.windows else None
        if self.windows is not None:
            self.window_scale = nn.BatchNorm1d(self.windows.n_features)
            self.window_head = _two_layers(self.feature_dim + self.windows.n_features, config.hidden, projection_dim)
            for silent in self.window_head[-1].parameters():
                nn.init.zeros_(silent)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The backbone's pooled representation, (N, F)."""
        mapped = self.mapping(pixels).contiguous(memory_format=torch.channels_last)
        return self.backbone(mapped)

    def read(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the head needs: features, aperture photometry and, where the model has windows, theirs."""
        windows = None if self.windows is None else self.windows(pixels)
        return self.features(pixels), self.photometry(pixels), windows

    def embed(self, features: torch.Tensor, photometry: torch.Tensor, windows: torch.Tensor | None) -> torch.Tensor:
        """What `read` gives -> embeddings (N, D), not yet normalised."""
        out = self.head(torch.cat([features, self.photometry_embed(photometry)], dim=1))
        if windows is not None:
            out = out + self.window_head(torch.cat([features, self.window_scale(windows)], dim=1))
        return out

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.embed(*self.read(pixels))


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


_ARCHITECTURES = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}  # layers, bottleneck
