"""Settings of the published recipes, and which settings and stage a configuration file means.

A file whose `preset` is a published model (`astroclip-v1`, `astroclip-v2`, `specformer`) is a recipe of this module;
any other is a stage of the project's own towers (`training.settings`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from astroclip.errors import InputError
from training.settings import (
    AlignSettings,
    ImageSettings,
    SpectrumSettings,
    StageSettings,
    StreamSettings,
    read_settings,
)

__all__ = ["MaskedSettings", "PairSettings", "RecipeSettings", "Train", "read_recipe"]

RECIPES = ("astroclip-v1", "astroclip-v2", "specformer")


@dataclass(frozen=True)
class RecipeSettings(StageSettings):
    """What the published recipes add; the data are always streamed.

    switches:    "tower.name=value" of `docs/weights.md`, for models trained otherwise than published.
    betas:       AdamW's; floor: the learning rate ends at this fraction of its peak.
    cosine_steps: length of the cosine; 0 = the whole run. Afterwards the rate stays at the floor.
    decay_all:   weight decay on biases and norms too, as `torch.optim.AdamW` on all parameters does.
    tiny:        towers of test widths, with random weights where none are given (a dry run).
    """

    data: str = "data/astroclip_desi.1.1.5.h5"
    switches: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    floor: float = 0.01
    cosine_steps: int = 0
    decay_all: bool = True
    tiny: bool = False
    stream: StreamSettings = field(default_factory=lambda: StreamSettings(enabled=True))

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: found {self.floor}; wanted 0 to 1, a fraction of learning_rate")


@dataclass(frozen=True)
class MaskedSettings(RecipeSettings):
    """SpecFormer's masked modelling."""

    preset: str = "specformer"
    out: str = "runs/v2/spectrum"


@dataclass(frozen=True)
class PairSettings(RecipeSettings):
    """Alignment of frozen encoders.

    image_init, spectrum_init: model directories the encoders come from (`astroclip weights import`, or a pretraining
                 stage's `model`).
    scale:       "learned", from 15.5 and clamped at 100, or "fixed" at 15.5 as published.
    gather:      negatives from all processes; published: those of the own process alone.
    flips:       random mirror images (v1).
    """

    preset: str = "astroclip-v2"
    out: str = "runs/v2/align"
    image_init: str = ""
    spectrum_init: str = ""
    scale: str = "learned"
    gather: bool = True
    flips: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("learned", "fixed"):
            raise ValueError(f"scale: found {self.scale!r}; wanted learned or fixed")


Train = Callable[[Any, bool], Path]

_OWN: dict[str, type[StageSettings]] = {"spectrum": SpectrumSettings, "image": ImageSettings, "align": AlignSettings}
_PUBLISHED: dict[str, type[StageSettings]] = {"spectrum": MaskedSettings, "align": PairSettings}


def read_recipe(stage: str, config: str | Path | None, **overrides: Any) -> tuple[StageSettings, Train]:
    """The settings of a configuration file for `stage` (spectrum, image, align), and the function that trains them.

    Raises InputError for a file that is no TOML, has unknown keys, or values out of range.
    """
    try:
        preset = tomllib.loads(Path(config).read_text()).get("preset", "") if config else ""
        published = preset in RECIPES
        if published and stage not in _PUBLISHED:
            raise ValueError(f"{config}: preset {preset} has no {stage} stage; see docs/training.md")
        cls = (_PUBLISHED if published else _OWN)[stage]
        settings = read_settings(cls, config, **overrides)
        if published and not settings.stream.enabled:
            settings = replace(settings, stream=replace(settings.stream, enabled=True))
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error), code="bad_config", field="config") from error
    return settings, _train(stage, published)


def _train(stage: str, published: bool) -> Train:
    if published:
        from training.published import train_masked, train_pairs

        return train_masked if stage == "spectrum" else train_pairs
    if stage == "spectrum":
        from training.spectrum import train_spectrum

        return train_spectrum
    if stage == "image":
        from training.image import train_image

        return train_image
    from training.align import train_align

    return train_align
