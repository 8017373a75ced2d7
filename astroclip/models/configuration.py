"""Model configuration: one dataclass a kind of tower, wrapped in a `transformers` config, and the named presets.

A tower is written as a dictionary whose `kind` names the dataclass; without one it is the project's own tower, and
`{"kind": "none"}` is a model without that modality. Fields listed in a dataclass's `SWITCHES` change the numbers and no
weight's shape: by default they are as published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PretrainedConfig

from astroclip.preprocess import ImageGrid, LinearSpectrumGrid, SpectrumGrid

__all__ = [
    "IMAGE_TOWERS",
    "PRESETS",
    "SPECTRUM_TOWERS",
    "AnyImageTower",
    "AnySpectrumTower",
    "AstroCLIPConfig",
    "ImageTowerConfig",
    "MocoTowerConfig",
    "SpecFormerTowerConfig",
    "SpectrumTowerConfig",
    "VitTowerConfig",
]


COLOURS = ("raw", "astroclip", "stein")
OUTPUTS = ("representation", "projection")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(choices)}")


@dataclass(frozen=True)
class ImageTowerConfig:
    """A torchvision ResNet and its projection head.

    arch:       torchvision builder, "resnet18" or "resnet50".
    width:      channels of the first stage (64 as published, 16 in tests: at 8 the channels-last backward of oneDNN
                crashes now and then).
    softening:  nanomaggies per pixel at which the asinh mapping turns from linear to logarithmic, per band;
                about the sky noise of a three-pass DECaLS image (Dey+2019: depths 24.65/23.61/22.84 AB).
    photometry_width: width of the layer that reads the aperture photometry.
    windows:    standard deviations, pixels, of the Gaussian windows whose fluxes and moments enter the head as well;
                none in models written before.
    hidden:     width of the two-layer heads.
    """

    KIND: ClassVar[str] = "resnet"
    SWITCHES: ClassVar[tuple[str, ...]] = ()

    arch: str = "resnet18"
    width: int = 64
    softening: tuple[float, ...] = (0.005, 0.012, 0.025)
    photometry_width: int = 128
    windows: tuple[float, ...] = ()
    hidden: int = 512

    @property
    def grid(self) -> ImageGrid:
        return ImageGrid()


@dataclass(frozen=True)
class VitTowerConfig:
    """DINOv2's vision transformer on colour pictures (AstroDINO), with AstroCLIP v2's head.

    image_size, patch: pixels a side.
    head_width:  length of the head's vectors; 0: no head, the embedding is the class token (AstroDINO).
    colours:     the mapping before the network: "astroclip", "stein" or "raw" (`astroclip.models.colours`).
    positions:   give the backbone class token and position embedding, as in its own training. The released AstroCLIP v2
                 leaves both out. (Without a head they are always there.)
    residual:    add the head's attention to its MLP, as the spectrum head does. The released image head does not.
    """

    KIND: ClassVar[str] = "vit"
    SWITCHES: ClassVar[tuple[str, ...]] = ("colours", "positions", "residual")

    image_size: int = 144
    patch: int = 12
    embed_dim: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    mlp_hidden: int = 4096
    head_width: int = 1024
    head_heads: int = 4
    head_hidden: int = 4096
    colours: str = "astroclip"
    positions: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        _choice("colours", self.colours, COLOURS)

    @property
    def dim(self) -> int:
        return self.head_width or self.embed_dim

    @property
    def grid(self) -> ImageGrid:
        return ImageGrid(size=self.image_size)


@dataclass(frozen=True)
class MocoTowerConfig:
    """A torchvision ResNet with MoCo v2's two-layer projection (Stein et al.; AstroCLIP v1).

    image_size: pixels a side of the central crop; the network takes any.
    layers, bottleneck, width: blocks a stage, their kind, channels of the first stage (3, 4, 6, 3, yes, 64: ResNet-50).
    hidden, projection: widths of the projection.
    colours:    the mapping before the network: "stein" (their pipeline, axes exchanged), "astroclip", or "raw" (v1).
    output:     "representation" (pooled features, before the projection) or "projection".
    """

    KIND: ClassVar[str] = "moco"
    SWITCHES: ClassVar[tuple[str, ...]] = ("image_size", "colours", "output")

    image_size: int = 96
    layers: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    hidden: int = 2048
    projection: int = 128
    colours: str = "stein"
    output: str = "representation"

    def __post_init__(self) -> None:
        _choice("colours", self.colours, COLOURS)
        _choice("output", self.output, OUTPUTS)

    @property
    def feature_dim(self) -> int:
        return 8 * self.width * (4 if self.bottleneck else 1)

    @property
    def dim(self) -> int:
        return self.projection if self.output == "projection" else self.feature_dim

    @property
    def grid(self) -> ImageGrid:
        return ImageGrid(size=self.image_size)


@dataclass(frozen=True)
class SpectrumTowerConfig:
    """A convolutional trunk, redshift by template matching, a transformer over tokens, and its cross-attention head.

    n_pixels, wave_min, wave_max: the input grid, equal bins of ln(wavelength / Angstrom).
    trunk_stride, trunk_width, trunk_blocks: pixels a feature place, channels, convolutions.
    match_width, redshift_max: channels of the template, and the redshift up to which it is tried.
    n_harmonics: frequencies that describe where it fits.
    patch:    pixels a token; a multiple of `trunk_stride`, and `n_pixels` one of it.
    head_width, head_heads: the learned query's attention (AstroCLIP, Parker+2024, section 4).
    n_bands:  broad bands whose mean fluxes enter the head as they are; 0 = none, as in models written before.
    """

    KIND: ClassVar[str] = "conv"
    SWITCHES: ClassVar[tuple[str, ...]] = ()

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
    n_bands: int = 0

    @property
    def grid(self) -> SpectrumGrid:
        return SpectrumGrid(self.wave_min, self.wave_max, self.n_pixels)


@dataclass(frozen=True)
class SpecFormerTowerConfig:
    """SpecFormer, with the cross-attention head of either AstroCLIP.

    n_pixels, wave_min, wave_max: the input grid, equal steps of wavelength (Angstrom); both ends are pixel centres.
    section, overlap: pixels a slice, and shared with the next.
    max_tokens:  length of the position embedding.
    head_width:  length of the head's vectors; 0: no head, the embedding is the mean over tokens (SpecFormer alone).
    last_slice:  keep the last slice, filled up with zeros; upstream drops it, complete or not.
    """

    KIND: ClassVar[str] = "specformer"
    SWITCHES: ClassVar[tuple[str, ...]] = ("last_slice",)

    n_pixels: int = 7781
    wave_min: float = 3600.0
    wave_max: float = 9824.0
    section: int = 20
    overlap: int = 10
    max_tokens: int = 800
    embed_dim: int = 768
    n_layers: int = 6
    n_heads: int = 6
    mlp_ratio: int = 4
    head_width: int = 1024
    head_heads: int = 4
    head_hidden: int = 4096
    last_slice: bool = False

    @property
    def dim(self) -> int:
        return self.head_width or self.embed_dim

    @property
    def grid(self) -> LinearSpectrumGrid:
        return LinearSpectrumGrid(self.wave_min, self.wave_max, self.n_pixels)


AnyImageTower = ImageTowerConfig | VitTowerConfig | MocoTowerConfig
AnySpectrumTower = SpectrumTowerConfig | SpecFormerTowerConfig
IMAGE_TOWERS: dict[str, type[AnyImageTower]] = {c.KIND: c for c in (ImageTowerConfig, VitTowerConfig, MocoTowerConfig)}
SPECTRUM_TOWERS: dict[str, type[AnySpectrumTower]] = {c.KIND: c for c in (SpectrumTowerConfig, SpecFormerTowerConfig)}
NONE = {"kind": "none"}


class AstroCLIPConfig(PretrainedConfig):
    """Config of `AstroCLIPModel`: two towers, the shared dimension and the logit scale.

    image, spectrum:  see the module; None is the project's own tower with its defaults.
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
        self.image = _written(_tower(image or {}, IMAGE_TOWERS, "resnet"), "resnet")
        self.spectrum = _written(_tower(spectrum or {}, SPECTRUM_TOWERS, "conv"), "conv")
        self.projection_dim = projection_dim
        self.logit_scale_init = logit_scale_init
        self.logit_scale_max = logit_scale_max
        self.model_name = model_name
        super().__init__(**kwargs)

    @property
    def image_tower(self) -> Any:
        """The image tower's dataclass (`AnyImageTower`), or None."""
        return _tower(self.image, IMAGE_TOWERS, "resnet")

    @property
    def spectrum_tower(self) -> Any:
        """The spectrum tower's dataclass (`AnySpectrumTower`), or None."""
        return _tower(self.spectrum, SPECTRUM_TOWERS, "conv")

    @classmethod
    def preset(cls, name: str) -> AstroCLIPConfig:
        """A named configuration: `demo` (shipped), `tiny` (tests), `resnet50`, or one of the published models."""
        return cls(**PRESETS[name], model_name=name if name in PUBLISHED else f"astroclip-{name}")


def _tower(values: dict[str, Any], kinds: dict[str, Any], default: str) -> Any:
    """The dataclass of a tower's dictionary; None for kind "none". JSON has lists where the dataclasses have tuples."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kind = settings.pop("kind", default)
    if kind == "none":
        return None
    if kind not in kinds:
        raise ValueError(f"tower kind {kind!r} is unknown; wanted one of {', '.join(kinds)} or none")
    return kinds[kind](**settings)


def _written(tower: Any, default: str) -> dict[str, Any]:
    """The dictionary of a tower; the default kind is left unsaid, as in the models written before there were others."""
    if tower is None:
        return dict(NONE)
    return ({} if tower.KIND == default else {"kind": tower.KIND}) | asdict(tower)


WINDOWS = (1.5, 2.5, 4.0, 6.5, 10.0)  # pixels: half the seeing to what a nearby galaxy fills

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"image": {"windows": WINDOWS}, "spectrum": {"n_bands": 16}},
    "resnet50": {
        "image": {"arch": "resnet50", "hidden": 2048, "windows": WINDOWS},
        "spectrum": {"embed_dim": 768, "n_layers": 6, "n_heads": 6, "mlp_ratio": 4, "head_width": 128, "n_bands": 16},
    },
    "tiny": {
        "image": {"width": 16, "photometry_width": 8, "hidden": 16, "windows": (2.0, 6.0)},
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
            "n_bands": 4,
        },
        "projection_dim": 16,
    },
    "astroclip-v2": {"image": {"kind": "vit"}, "spectrum": {"kind": "specformer"}, "projection_dim": 1024},
    "astroclip-v1": {
        "image": {"kind": "moco", "colours": "raw", "output": "projection"},
        "spectrum": {"kind": "specformer", "head_width": 128, "head_hidden": 512},
        "projection_dim": 128,
    },
    "specformer": {"image": NONE, "spectrum": {"kind": "specformer", "head_width": 0}, "projection_dim": 768},
    "astrodino": {"image": {"kind": "vit", "head_width": 0}, "spectrum": NONE, "projection_dim": 1024},
    "stein-moco": {"image": {"kind": "moco"}, "spectrum": NONE, "projection_dim": 2048},
}
PUBLISHED = ("astroclip-v2", "astroclip-v1", "specformer", "astrodino", "stein-moco")
