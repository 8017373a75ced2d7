"""Model configuration: one dataclass a tower, wrapped in a `transformers` config, and the named presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

__all__ = ["PRESETS", "AstroCLIPConfig", "ImageTowerConfig", "SpectrumTowerConfig"]


@dataclass(frozen=True)
class ImageTowerConfig:
    """A torchvision ResNet and its projection head.

    arch:       torchvision builder, "resnet18" or "resnet50".
    width:      channels of the first stage (64 as published, 16 in tests: at 8 the channels-last backward of oneDNN
                crashes now and then).
    softening:  nanomaggies per pixel at which the asinh mapping turns from linear to logarithmic, per band;
                about the sky noise of a three-pass DECaLS image (Dey+2019: depths 24.65/23.61/22.84 AB).
    photometry_width: width of the layer that reads the aperture photometry.
    hidden:     width of the two-layer head.
    """

    arch: str = "resnet18"
    width: int = 64
    softening: tuple[float, ...] = (0.005, 0.012, 0.025)
    photometry_width: int = 128
    hidden: int = 512


@dataclass(frozen=True)
class SpectrumTowerConfig:
    """A convolutional trunk, redshift by template matching, a transformer over tokens, and its cross-attention head.

    n_pixels, wave_min, wave_max: the input grid, equal bins of ln(wavelength / Angstrom).
    trunk_stride, trunk_width, trunk_blocks: pixels a feature place, channels, convolutions.
    match_width, redshift_max: channels of the template, and the redshift up to which it is tried.
    n_harmonics: frequencies that describe where it fits.
    patch:    pixels a token; a multiple of `trunk_stride`, and `n_pixels` one of it.
    head_width, head_heads: the learned query's attention (AstroCLIP, Parker+2024, section 4).
    """

    n_pixels: int = 4096
    wave_min: float = 3600.0
    wave_max: float = 9824.0
    trunk_stride: int = 4
    trunk_width: int = 32
    trunk_blocks: int = 5
    match_width: int = 16
    redshift_max: float = 1.7
    n_harmonics: int = 24
    patch: int = 128
    embed_dim: int = 256
    n_layers: int = 3
    n_heads: int = 4
    mlp_ratio: int = 2
    head_width: int = 256
    head_heads: int = 4


class AstroCLIPConfig(PretrainedConfig):
    """Config of `AstroCLIPModel`: two tower dicts, the shared dimension and the logit scale.

    logit_scale_init: multiplier of cosines at the start; upstream's fixed value is 15.5.
    logit_scale_max:  the learned scale is clamped here (CLIP, Radford+2021, section 2.5).
    """

    model_type = "astroclip"

    def __init__(
        self,
        image: dict[str, Any] | None = None,
        spectrum: dict[str, Any] | None = None,
        projection_dim: int = 128,
        logit_scale_init: float = 15.5,
        logit_scale_max: float = 100.0,
        model_name: str = "astroclip",
        **kwargs: Any,
    ) -> None:
        self.image = asdict(ImageTowerConfig(**(image or {})))
        self.spectrum = asdict(SpectrumTowerConfig(**(spectrum or {})))
        self.projection_dim = projection_dim
        self.logit_scale_init = logit_scale_init
        self.logit_scale_max = logit_scale_max
        self.model_name = model_name
        super().__init__(**kwargs)

    @property
    def image_tower(self) -> ImageTowerConfig:
        return ImageTowerConfig(**_with_tuples(self.image))

    @property
    def spectrum_tower(self) -> SpectrumTowerConfig:
        return SpectrumTowerConfig(**_with_tuples(self.spectrum))

    @classmethod
    def preset(cls, name: str) -> AstroCLIPConfig:
        """A named configuration: `demo` (shipped), `resnet50` (paper size) or `tiny` (tests)."""
        return cls(**PRESETS[name], model_name=f"astroclip-{name}")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "resnet50": {
        "image": {"arch": "resnet50", "hidden": 2048},
        "spectrum": {"embed_dim": 768, "n_layers": 6, "n_heads": 6, "mlp_ratio": 4, "head_width": 128},
    },
    "tiny": {
        "image": {"width": 16, "photometry_width": 8, "hidden": 16},
        "spectrum": {
            "embed_dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "trunk_width": 8,
            "trunk_blocks": 2,
            "match_width": 4,
            "n_harmonics": 8,
            "head_width": 16,
            "head_heads": 2,
        },
        "projection_dim": 16,
    },
}
