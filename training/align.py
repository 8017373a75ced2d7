"""Alignment: InfoNCE between images and spectra, with negatives from every process and a learned, clamped scale."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from astroclip.losses import info_nce
from training.data import SurveyArrays
from training.run import Stage, export_model, load_split, new_model, run_stage
from training.settings import AlignSettings

__all__ = ["Alignment", "train_align"]


class Alignment(Stage):
    """The joint model under loss = InfoNCE(image, spectrum) + w InfoNCE(spectrum, second view of the spectrum)."""

    settings: AlignSettings

    def __init__(self, settings: AlignSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__(settings, survey, validation)
        self.model = new_model(settings)
        _initialise(self.model.image_tower, settings.image_init)
        _initialise(self.model.spectrum_tower, settings.spectrum_init)
        # The pair loss has its own scale: two spectra of a galaxy agree far better than its image and spectrum do.
        self.pair_scale = nn.Parameter(self.model.logit_scale.detach().clone())

    def _contrast(self, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """InfoNCE against the negatives of all processes; gradients flow through the gathered vectors."""
        all_a, all_b = self.gathered(a), self.gathered(b)
        return info_nce(a, b, scale, all_a=all_a, all_b=all_b, first_row=self.global_rank * len(a))

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        generator = self.step_generator()
        rows = rows.cpu()
        survey, settings = self.survey, self.settings
        pixels = settings.image_augmentation(survey.images[rows].to(self.device), generator)
        image = self.model.get_image_features(pixels)
        observed = survey.flux[rows].to(self.device), survey.sigma[rows].to(self.device)
        true = None if survey.flux_true is None else survey.flux_true[rows].to(self.device)
        first = settings.spectrum_augmentation(*observed, true, generator)
        if settings.spectrum_pair_weight:
            second = settings.spectrum_augmentation(*observed, true, generator)
            both = self.model.get_spectrum_features(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
            spectrum, other = both.chunk(2)
            ceiling = torch.log(torch.tensor(self.model.config.logit_scale_max)).item()
            pair_loss = self._contrast(spectrum, other, self.pair_scale.clamp(max=ceiling).exp())
        else:
            spectrum, pair_loss = self.model.get_spectrum_features(*first), image.new_zeros(())
        cross_loss = self._contrast(image, spectrum, self.model.scale)
        self.log_dict(
            {"train_loss": cross_loss, "train_pair_loss": pair_loss, "logit_scale": self.model.scale.detach()},
            prog_bar=True,
        )
        return cross_loss + settings.spectrum_pair_weight * pair_loss

    def validation_step(self, rows: torch.Tensor) -> None:
        """The cross loss as serving sees the objects, and recall@10 within the batch, image -> spectrum."""
        rows = rows.cpu()
        flux, ivar = self.validation.spectrum_batch(rows)
        image = self.model.get_image_features(self.validation.image_batch(rows).to(self.device))
        spectrum = self.model.get_spectrum_features(flux.to(self.device), ivar.to(self.device))
        cosines = image @ spectrum.T
        rank = (cosines > cosines.diag()[:, None]).sum(1)
        values = {
            "val_loss": info_nce(image, spectrum, self.model.scale),
            "val_recall_at_10": (rank < 10).float().mean(),
            "val_cosine": F.cosine_similarity(image, spectrum).mean(),
        }
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(rows))


def _initialise(tower: nn.Module, weights: str) -> None:
    """Backbone weights from a pretraining stage; the head starts anew, since its target is another space."""
    if not weights:
        return
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("head.")}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith("head.")]
    if missing or unexpected:
        raise ValueError(f"{weights} does not fit the tower: missing {missing[:5]}, unexpected {unexpected[:5]}")


def train_align(settings: AlignSettings, progress: bool = True) -> Path:
    """Run the stage; the model directory `<out>/model` (float16 weights) is written and returned."""
    module = Alignment(settings, *load_split(settings))
    out = run_stage(module, progress=progress)
    return export_model(module.model, out, half=True)
