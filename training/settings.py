"""Training settings: one dataclass a stage, read from TOML, unknown keys refused."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from training.augment import ImageAugmentation, SpectrumAugmentation

__all__ = ["AlignSettings", "ImageSettings", "SpectrumSettings", "StageSettings", "StreamSettings", "read_settings"]


@dataclass(frozen=True)
class StreamSettings:
    """Reading the data from disk while training; without `enabled` the survey is held in memory.

    workers:      processes that read, for each training process; 0 reads in the training process itself.
    prefetch:     batches each of them reads ahead.
    chunk:        neighbouring rows that stay together in the first shuffle; 64 of AstroCLIP's file are 20 MB.
    window:       rows that are shuffled among each other afterwards; at least some batches.
    val_fraction: end of each group of AstroCLIP's training rows that validates (shards have their own split).
    val_objects:  validate on at most so many.
    """

    enabled: bool = False
    workers: int = 4
    prefetch: int = 2
    chunk: int = 64
    window: int = 8192
    val_fraction: float = 0.02
    val_objects: int = 4096

    def __post_init__(self) -> None:
        least = {"workers": 0, "prefetch": 1, "chunk": 1, "window": 1, "val_objects": 1}
        if low := [f"{name} = {getattr(self, name)}" for name, value in least.items() if getattr(self, name) < value]:
            raise ValueError(f"stream: found {', '.join(low)}; wanted workers at least 0 and the others at least 1")


@dataclass(frozen=True)
class StageSettings:
    """What every stage needs.

    preset:      model configuration (`astroclip.models.PRESETS`).
    data, out:   survey folder; run folder (checkpoints, `metrics.csv`, the exported model).
    batch_size:  objects a step, of all processes together.
    max_steps:   stop after so many steps, whatever the epochs; 0 = no bound.
    epoch_steps: steps of an epoch, where not the whole of the data (a dry run); 0 = all.
    learning_rate, weight_decay, warmup_steps: AdamW with linear warm-up, then a cosine to a hundredth.
    precision:   Lightning's; bf16-mixed runs on CPUs too.
    max_minutes: stop early (the checkpoint resumes); 0 = no bound.
    max_objects: use at most this many training objects; 0 = all.
    log_steps:   a row of the loss curves every so many steps.
    stream:      read from disk rather than hold the survey in memory.
    """

    preset: str = "demo"
    data: str = "data/survey"
    out: str = "runs/stage"
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    clip: float = 1.0
    precision: str = "bf16-mixed"
    seed: int = 42
    devices: int | str = "auto"
    num_nodes: int = 1
    checkpoint_steps: int = 50
    max_minutes: float = 0.0
    max_objects: int = 0
    max_steps: int = 0
    epoch_steps: int = 0
    log_steps: int = 10
    stream: StreamSettings = field(default_factory=StreamSettings)


@dataclass(frozen=True)
class SpectrumSettings(StageSettings):
    """Masked-spectrum modelling: `mask_fraction` of the tokens hidden in contiguous `mask_span`s."""

    out: str = "runs/spectrum"
    mask_fraction: float = 0.4
    mask_span: int = 4
    augmentation: SpectrumAugmentation = field(default_factory=SpectrumAugmentation)


@dataclass(frozen=True)
class ImageSettings(StageSettings):
    """MoCo v2 (Chen+2020): `queue` negatives, key encoder momentum, softmax temperature."""

    out: str = "runs/image"
    queue: int = 8192
    momentum: float = 0.99
    temperature: float = 0.2
    augmentation: ImageAugmentation = field(default_factory=ImageAugmentation)


@dataclass(frozen=True)
class AlignSettings(StageSettings):
    """InfoNCE between the towers.

    image_init, spectrum_init: weights of the pretraining stages ("" = from scratch).
    spectrum_pair_weight: weight of InfoNCE between two views of one spectrum. Images know a redshift to a few per
        cent, so image-spectrum pairs alone let the spectrum tower forget what only it can see; a second observation of
        the same galaxy keeps it (no labels are used).
    moved_fraction, moved_pixels: so many of the batch enter the pair loss once more as negatives, moved in redshift by
        this least to this most number of pixels (0.000245 in ln(1 + z) each).
    model_init:  a model directory to go on from, both towers and their heads; instead of the other two.
    locked_views: with so many, the spectrum tower is locked but for its head, and reads each spectrum so many times
        before training (`training.locked`); 0 = both towers are trained.
    locked_backbone: lock the image tower's backbone too, and train the heads alone.
    keep_start: share of the weights training began with (`model_init`) in those it writes. The average of a model
        and its fine-tuning keeps most of what was won on the training sky, and loses less on another (WiSE-FT,
        Wortsman+2022, arXiv:2109.01903).
    spectrum_augmentation: of the view that meets the image. The survey's spectra carry calibration errors already,
        and what they say of brightness and colour is what finds the partner: hence little more of both.
    pair_augmentation: of the second view: another spectrograph on a worse night.
    """

    out: str = "runs/align"
    batch_size: int = 512
    image_init: str = ""
    spectrum_init: str = ""
    spectrum_pair_weight: float = 0.5
    moved_fraction: float = 0.5
    moved_pixels: tuple[int, int] = (3, 128)
    model_init: str = ""
    locked_views: int = 0
    locked_backbone: bool = False
    keep_start: float = 0.0
    # Pointing to a pixel: the photometry within a fibre's aperture is worth nothing about another centre.
    image_augmentation: ImageAugmentation = field(
        default_factory=lambda: ImageAugmentation(
            rotate=0.0,
            jitter_pixels=1,
            max_blur_pixels=0.6,
            max_noise=0.4,
            extinction_sigma=0.01,
            brightness_sigma=0.01,
        )
    )
    spectrum_augmentation: SpectrumAugmentation = field(
        default_factory=lambda: SpectrumAugmentation(
            max_noise=1.4, throughput_sigma=0.02, tilt=0.01, smooth=0.1, cut=0.2, gap=0.2
        )
    )
    pair_augmentation: SpectrumAugmentation = field(default_factory=SpectrumAugmentation)

    def __post_init__(self) -> None:
        if self.locked_backbone and not self.locked_views:
            raise ValueError("found locked_backbone without locked_views; wanted how many views the locked towers read")
        if not 0.0 <= self.keep_start < 1.0 or (self.keep_start and not self.model_init):
            raise ValueError(f"found keep_start {self.keep_start}; wanted 0 to below 1, and a model_init to keep of")


Settings = TypeVar("Settings", bound=StageSettings)


def read_settings(cls: type[Settings], path: str | Path | None, **overrides: Any) -> Settings:
    """Read `path` (TOML; tables for the augmentations) into `cls`; `overrides` that are not None win.

    Raises ValueError naming an unknown key and the known ones.
    """
    values = tomllib.loads(Path(path).read_text()) if path else {}
    values.update({key: value for key, value in overrides.items() if value is not None})
    return _build(cls(), values, str(path))


def _build(default: Any, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(default)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    built = {
        name: _build(getattr(default, name), value, f"{where}:{name}")
        if isinstance(value, dict)
        else (tuple(value) if isinstance(value, list) else value)
        for name, value in values.items()
    }
    return replace(default, **built)
