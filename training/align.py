"""Alignment: InfoNCE between images and spectra, with negatives from every process and a learned, clamped scale."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from astroclip.losses import info_nce
from astroclip.models import AstroCLIPModel
from astroclip.models.image_tower import ImageTower
from astroclip.models.spectrum_tower import SpectrumTower
from training.augment import draw_shifts, move_in_redshift
from training.data import SurveyArrays
from training.run import Stage, export_model, new_model, run_stage
from training.settings import AlignSettings
from training.stream import staged

__all__ = ["Alignment", "train_align"]


class Alignment(Stage):
    """The joint model under loss = InfoNCE(image, spectrum) + w InfoNCE(spectrum, second view of the spectrum).

    The second term has further negatives: some of the batch's own galaxies at a slightly other redshift.
    """

    settings: AlignSettings

    def __init__(self, settings: AlignSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__(settings, survey, validation)
        self.model = new_model(settings)
        if settings.model_init:
            _go_on_from(self.model, settings.model_init)
        _initialise(self.model.image_tower, settings.image_init)
        _initialise(self.model.spectrum_tower, settings.spectrum_init)
        # The pair loss has its own scale: two spectra of a galaxy agree far better than its image and spectrum do.
        self.pair_scale = nn.Parameter(self.model.logit_scale.detach().clone())
        # Several processes wait for the gradient of every parameter that wants one.
        self.pair_scale.requires_grad_(bool(settings.spectrum_pair_weight))

    def _contrast(
        self, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, negatives: torch.Tensor | None = None
    ) -> torch.Tensor:
        """InfoNCE against the rows and `negatives` of all processes; gradients flow through all."""
        all_a, all_b = self.gathered(a), self.gathered(b)
        if negatives is not None:
            further = self.gathered(negatives)
            all_a, all_b = torch.cat([all_a, further]), torch.cat([all_b, further])
        return info_nce(a, b, scale, all_a=all_a, all_b=all_b, first_row=self.global_rank * len(a))

    def _images(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Embeddings of a view of each row."""
        pixels = self.settings.image_augmentation(self.survey.images[rows].to(self.device), generator)
        return self.model.get_image_features(pixels)

    def _spectra(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Embeddings of a view of each row and, with a pair loss, of a second view and of moved galaxies."""
        survey, settings = self.survey, self.settings
        second = settings.pair_augmentation
        true = None if survey.flux_true is None else survey.flux_true[rows].to(self.device)
        flux, sigma = survey.flux[rows].to(self.device), survey.sigma[rows].to(self.device)
        views = [settings.spectrum_augmentation(flux, sigma, true, generator)]
        if settings.spectrum_pair_weight:
            views.append(second(flux, sigma, true, generator))
            n = int(settings.moved_fraction * len(rows))
            if n:
                shift = draw_shifts(n, *settings.moved_pixels, generator)
                moved_true = None if true is None else true[:n]
                views.append(second(*move_in_redshift(flux[:n], sigma[:n], moved_true, shift), generator))
        joined = (torch.cat(parts) for parts in zip(*views, strict=True))
        embedded = self.model.get_spectrum_features(*joined).split([len(view[0]) for view in views])
        first, again, moved = (*embedded, None, None)[:3]
        return first, again, moved

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        generator = self.step_generator()
        rows = rows.cpu()
        settings = self.settings
        image = self._images(rows, generator)
        spectrum, second, moved = self._spectra(rows, generator)
        pair_loss = image.new_zeros(())
        if second is not None:
            ceiling = math.log(self.model.config.logit_scale_max)
            pair_loss = self._contrast(spectrum, second, self.pair_scale.clamp(max=ceiling).exp(), moved)
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


# Layers a model may have that an earlier one has not: their output is added, and is nothing before training.
_SILENT = ("image_tower.window_head.", "image_tower.window_scale.", "spectrum_tower.head.bands.")


def _go_on_from(model: AstroCLIPModel, directory: str) -> None:
    """The weights of a trained model; layers it was written without stay silent."""
    state = AstroCLIPModel.from_pretrained(directory).state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(_SILENT)]
    if missing or unexpected:
        raise ValueError(f"{directory} does not fit the preset: missing {missing[:5]}, unexpected {unexpected[:5]}")


def _averaged(model: AstroCLIPModel, settings: AlignSettings) -> None:
    """Move the trained weights back by the share `keep_start` of the way from where they began."""
    begin = new_model(settings)
    _go_on_from(begin, settings.model_init)
    start = begin.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), settings.keep_start)


def _initialise(tower: ImageTower | SpectrumTower, weights: str) -> None:
    """Backbone weights from a pretraining stage; the head starts anew, since its target is another space."""
    if not weights:
        return
    state = {k: v for k, v in load_file(weights).items() if not k.startswith(tower.HEAD)}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(tower.HEAD)]
    if missing or unexpected:
        raise ValueError(f"{weights} does not fit the tower: missing {missing[:5]}, unexpected {unexpected[:5]}")


def train_align(settings: AlignSettings, progress: bool = True) -> Path:
    """Run the stage; the model directory `<out>/model` (float16 weights) is written and returned."""
    from training.locked import LockedAlignment

    module = staged(LockedAlignment if settings.locked_views else Alignment, settings)
    out = run_stage(module, progress=progress)
    if settings.keep_start:
        _averaged(module.model, settings)
    return export_model(module.model, out, half=True)
