"""Alignment against a locked spectrum tower (locked-image tuning, Zhai+2022, with the roles exchanged).

A spectrum tower that knows redshifts to a pixel has little to gain from images, and costs two thirds of a step. Locked
but for its head, it reads every spectrum a few times before training, each time another view; what it read stays in
memory (18 kB a view in half precision), and an epoch is the image tower and the two heads alone.
"""

from __future__ import annotations

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
    """What the tower read of every spectrum of the survey in one view; see `SpectrumTower.read`."""

    tokens: torch.Tensor
    missing: torch.Tensor
    characteristic: torch.Tensor
    photometry: torch.Tensor | None

    def rows(self, rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        parts = (self.tokens, self.missing, self.characteristic, self.photometry)
        read = (None if part is None else part[rows].to(device) for part in parts)
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
        tower = self.model.spectrum_tower
        tower.requires_grad_(False)
        tower.head.requires_grad_(True)
        tower.eval()  # the trainer keeps the modes it finds; BatchNorm's statistics are locked too
        tower.head.train()
        self._readings: tuple[_Reading, ...] = ()

    def on_fit_start(self) -> None:
        self._readings = tuple(self._read(view) for view in range(self.settings.locked_views))

    def _read(self, view: int) -> _Reading:
        """The first half of the views is drawn as those that meet the image, the rest as the pair loss's second."""
        settings, survey, tower = self.settings, self.survey, self.model.spectrum_tower
        wide = view > 0 and view >= (settings.locked_views + 1) // 2
        augment = settings.pair_augmentation if wide else settings.spectrum_augmentation
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + view)
        parts = []
        for rows in torch.arange(len(survey)).split(_CHUNK):
            true = None if survey.flux_true is None else survey.flux_true[rows].to(self.device)
            flux, ivar = augment(survey.flux[rows].to(self.device), survey.sigma[rows].to(self.device), true, generator)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                tokens, missing, characteristic, photometry = tower.read(flux, ivar)
            parts.append((tokens.half().cpu(), missing.cpu(), characteristic.half().cpu(), photometry))
        tokens, missing, characteristic = (torch.cat([part[i] for part in parts]) for i in range(3))
        photometry = None if parts[0][3] is None else torch.cat([part[3].cpu() for part in parts])
        return _Reading(tokens, missing, characteristic, photometry)

    def _spectra(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        near = max(1, (len(self._readings) + 1) // 2)
        first = self._embed(self._readings[self.current_epoch % near], rows)
        if not self.settings.spectrum_pair_weight or len(self._readings) < 2:
            return first, None, None
        far = len(self._readings) - near
        return first, self._embed(self._readings[near + self.current_epoch % far], rows), None

    def _embed(self, reading: _Reading, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.spectrum_tower.head(*reading.rows(rows, self.device)).float(), dim=-1)
