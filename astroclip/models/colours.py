"""Colour mappings of published image encoders: (N, B, H, W) nanomaggies in g, r, z -> what the encoder was trained on.

Both published ones stretch by the intensity I = mean_b max(0, s_b x_b + m) with f = asinh(Q I) / sqrt(Q), and put
z, r, g into the red, green and blue planes. They differ by one pair of parentheses, and by 0.18 on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["COLOURS", "astroclip_rgb", "stein_rgb"]

SCALES = (6.0, 3.4, 2.2)  # of g, r, z
OFFSET = 0.03
SOFTENING = 20.0  # Q


def astroclip_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """AstroCLIP v2 and AstroDINO: clip((s x + m) f / I, 0, 1) (Lupton+2004 as in legacypipe's sdss_rgb)."""
    scales = pixels.new_tensor(SCALES).view(1, -1, 1, 1)
    stretched, intensity = _stretch(pixels * scales)
    return ((pixels * scales + OFFSET) * stretched / intensity).clamp(0, 1).flip(1)


def stein_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """Stein et al.: clip(x (s + m f / I), 0, 1), with the two image axes exchanged, as their pipeline feeds it."""
    scales = pixels.new_tensor(SCALES).view(1, -1, 1, 1)
    stretched, intensity = _stretch(pixels * scales)
    return (pixels * (scales + OFFSET * stretched / intensity)).clamp(0, 1).flip(1).transpose(2, 3)


def _stretch(scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and I, (N, 1, H, W), of s x; I is kept from 0 after f is taken."""
    intensity = (scaled + OFFSET).clamp_min(0).sum(1, keepdim=True) / 3
    stretched = torch.asinh(SOFTENING * intensity) / SOFTENING**0.5
    return stretched, intensity.masked_fill(intensity == 0, 1e-6)


COLOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "raw": lambda pixels: pixels,
    "astroclip": astroclip_rgb,
    "stein": stein_rgb,
}
