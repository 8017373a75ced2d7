"""Masked-spectrum pretraining: hide runs of tokens, predict their pixels (SpecFormer, Parker+2024, 3.2)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from astroclip.models import SpectrumTower
from astroclip.models.spectrum_tower import normalise
from training.data import SurveyArrays
from training.distributed import joined_mean
from training.run import Stage, new_model, run_stage, save_tower
from training.settings import SpectrumSettings
from training.stream import staged

__all__ = ["MaskedSpectrum", "draw_mask", "train_spectrum"]


def draw_mask(n: int, tokens: int, fraction: float, span: int, generator: torch.Generator) -> torch.Tensor:
    """(n, tokens) bool, True = hidden: random runs of `span` tokens until about `fraction` is hidden.

    Runs, because a hidden token between two seen ones is interpolation; a run hides a whole line complex.
    """
    starts = torch.rand(n, tokens, generator=generator)
    # The union of `m` random runs covers 1 - (1 - span/tokens)^m of the tokens.
    runs = max(1, round(torch.log1p(torch.tensor(-fraction)).item() / torch.log1p(torch.tensor(-span / tokens)).item()))
    chosen = torch.zeros(n, tokens, dtype=torch.bool)
    chosen.scatter_(1, starts.topk(runs, dim=1).indices, True)
    hidden = chosen.clone()
    for offset in range(1, span):
        hidden[:, offset:] |= chosen[:, :-offset]
    return hidden


class MaskedSpectrum(Stage):
    """The tower and a linear decoder; loss = mean squared error of hidden pixels, weighted by what is known of them."""

    settings: SpectrumSettings

    def __init__(self, settings: SpectrumSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__(settings, survey, validation)
        model = new_model(settings)
        self.tower: SpectrumTower = model.spectrum_tower
        self.tower.head.requires_grad_(False)  # trained in alignment
        # The template stays at the known lines: reconstruction is served by any landmark (it moves its zero to
        # ln(1 + z) = 0.37), and what it has learned by then is a poorer start than physics.
        self.tower.match.template.requires_grad_(False)
        self.tower.match.bias.requires_grad_(False)
        self.tower.match.reduce.requires_grad_(False)
        self.decoder = nn.Linear(model.config.spectrum_tower.embed_dim, self.tower.patch)

    def loss(self, flux: torch.Tensor, ivar: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        spectrum = normalise(flux, ivar)
        hidden = draw_mask(
            len(flux), self.tower.n_tokens, self.settings.mask_fraction, self.settings.mask_span, generator
        ).to(flux.device)
        tokens, _, _ = self.tower.encode(spectrum, hidden)
        predicted = self.decoder(tokens[:, self.tower.N_GLOBAL :]).reshape(len(flux), -1).float()
        information = torch.expm1(3 * spectrum.known).square()  # (scale / sigma)^2
        weight = information / (1 + information) * hidden.repeat_interleave(self.tower.patch, dim=1)
        return joined_mean((weight * (predicted - spectrum.x).square()).sum(), weight.sum())

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        generator = self.step_generator()
        rows = rows.cpu()
        survey = self.survey
        true = None if survey.flux_true is None else survey.flux_true[rows].to(self.device)
        flux, ivar = self.settings.augmentation(
            survey.flux[rows].to(self.device), survey.sigma[rows].to(self.device), true, generator
        )
        loss = self.loss(flux, ivar, generator)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, rows: torch.Tensor) -> None:
        flux, ivar = self.validation.spectrum_batch(rows.cpu())
        loss = self.loss(flux.to(self.device), ivar.to(self.device), torch.Generator().manual_seed(0))
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(rows))


def train_spectrum(settings: SpectrumSettings, progress: bool = True) -> Path:
    """Run the stage; the tower's weights are written as `<out>/tower.safetensors`, which is returned."""
    module = staged(MaskedSpectrum, settings, ("spectrum",))
    out = run_stage(module, progress=progress)
    return save_tower(module.tower, out)
