"""Alignment against locked towers (after locked-image tuning, Zhai+2022).

A spectrum tower that knows redshifts to a pixel has little to gain from images, and costs two thirds of a step. Locked
but for its head, it reads every spectrum a few times before training, each time another view; what it read stays in
memory (18 kB a view in half precision), and an epoch is the image tower and the two heads alone.

With the image tower's backbone locked too, its features and photometry are kept likewise (1 kB a view), and only the
heads are left: batches of thousands, in seconds. That is the last part of the shipped model's training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.align import Alignment
from training.data import SurveyArrays
from training.settings import AlignSettings

__all__ = ["LockedAlignment"]

_CHUNK = 256


@dataclass(frozen=True)
class _Reading:
    """What a tower read of every object of the survey in one view (`SpectrumTower.read`, `ImageTower.read`).

    Wide features are kept in half precision; photometry, whose differences are colours, in float32."""

    parts: tuple[torch.Tensor | None, ...]

    def rows(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        read = (None if part is None else part[rows].to(device) for part in self.parts)
        return tuple(part.float() if part is not None and part.dtype == torch.float16 else part for part in read)


class LockedAlignment(Alignment):
    """As `Alignment`; the views are drawn once, and an epoch takes the next of them and, for the pair loss, the one
    after. Views are seeded by their number, so that a resumed run reads the same."""

    def __init__(self, settings: AlignSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__(settings, survey, validation)
        if not settings.model_init:
            raise ValueError(
                f"locked_views is {settings.locked_views}: wanted model_init, a model to lock the tower of"
            )
        _lock(self.model.spectrum_tower, self.model.spectrum_tower.head)
        image = self.model.image_tower
        if settings.locked_backbone:
            # The trainer keeps the modes it finds: BatchNorm's statistics of the backbone are locked too, while those
            # of the photometry, which the heads begin with, go on.
            image.backbone.requires_grad_(False)
            image.backbone.eval()
        self._spectrum_readings: tuple[_Reading, ...] = ()
        self._image_readings: tuple[_Reading, ...] = ()

    @property
    def _near(self) -> int:
        """The first half of the views is drawn as those that meet the image, the rest as the pair loss's second."""
        return max(1, (self.settings.locked_views + 1) // 2)

    def on_fit_start(self) -> None:
        views = range(self.settings.locked_views)
        self._spectrum_readings = tuple(self._read(self._spectrum_view, view) for view in views)
        if self.settings.locked_backbone:
            self._image_readings = tuple(self._read(self._image_view, view) for view in views[: self._near])

    def _read(self, view_of: Callable[..., tuple[torch.Tensor | None, ...]], view: int) -> _Reading:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + view)
        chunks = []
        for rows in torch.arange(len(self.survey)).split(_CHUNK):
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                chunks.append([None if part is None else part.cpu() for part in view_of(rows, view, generator)])
        return _Reading(tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def _spectrum_view(
        self, rows: torch.Tensor, view: int, generator: torch.Generator
    ) -> tuple[torch.Tensor | None, ...]:
        settings, survey = self.settings, self.survey
        augment = settings.spectrum_augmentation if view < self._near else settings.pair_augmentation
        true = None if survey.flux_true is None else survey.flux_true[rows].to(self.device)
        flux, ivar = augment(survey.flux[rows].to(self.device), survey.sigma[rows].to(self.device), true, generator)
        tokens, missing, characteristic, photometry = self.model.spectrum_tower.read(flux, ivar)
        return tokens.half(), missing, characteristic.half(), photometry

    def _image_view(self, rows: torch.Tensor, view: int, generator: torch.Generator) -> tuple[torch.Tensor | None, ...]:
        pixels = self.settings.image_augmentation(self.survey.images[rows].to(self.device), generator)
        features, apertures, windows = self.model.image_tower.read(pixels)
        return features.half(), apertures, windows

    def _images(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if not self._image_readings:
            return super()._images(rows, generator)
        reading = self._image_readings[self.current_epoch % len(self._image_readings)]
        return F.normalize(self.model.image_tower.embed(*reading.rows(rows, self.device)).float(), dim=-1)

    def _spectra(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        near, readings = self._near, self._spectrum_readings
        first = self._embed(readings[self.current_epoch % near], rows)
        if not self.settings.spectrum_pair_weight or len(readings) < 2:
            return first, None, None
        far = len(readings) - near
        return first, self._embed(readings[near + self.current_epoch % far], rows), None

    def _embed(self, reading: _Reading, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.spectrum_tower.head(*reading.rows(rows, self.device)).float(), dim=-1)


def _lock(tower: torch.nn.Module, head: torch.nn.Module) -> None:
    tower.requires_grad_(False)
    head.requires_grad_(True)
    tower.eval()  # the trainer keeps the modes it finds; BatchNorm's statistics are locked too
    head.train()
