"""Image self-supervision: MoCo v2 (He+2020, Chen+2020) with a galaxy's own augmentations (Stein+2021)."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models import ImageTower
from training.data import SurveyArrays
from training.run import Stage, new_model, run_stage, save_tower
from training.settings import ImageSettings
from training.stream import staged

__all__ = ["MomentumContrast", "train_image"]


PROJECTION = 128  # dimensions that are contrasted (Chen+2020)


class _Encoder(nn.Module):
    """The backbone's features and the two-layer projector of MoCo v2."""

    def __init__(self, tower: ImageTower, width: int) -> None:
        super().__init__()
        self.tower = tower
        hidden = tower.feature_dim
        self.projector = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projector(self.tower.features(pixels))


class MomentumContrast(Stage):
    """Query and momentum (key) encoders, a queue of past keys as negatives.

    Batches are shuffled over the key encoder's halves so that BatchNorm cannot tell which key belongs to which query
    (He+2020, section 3.3): keys are encoded in another order and put back.

    What is contrasted are the backbone's features through a projector of their own: with the tower's aperture
    photometry in view, telling two galaxies apart would need no backbone.
    """

    settings: ImageSettings
    queue: torch.Tensor
    position: torch.Tensor

    def __init__(self, settings: ImageSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__(settings, survey, validation)
        self.tower: ImageTower = new_model(settings).image_tower
        for name, weight in self.tower.named_parameters():
            if name.startswith(ImageTower.HEAD):
                weight.requires_grad_(False)  # trained in alignment
        width = PROJECTION
        self.query = _Encoder(self.tower, width)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        generator = torch.Generator().manual_seed(settings.seed)
        self.register_buffer("queue", F.normalize(torch.randn(settings.queue, width, generator=generator), dim=1))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _keys(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        momentum = self.settings.momentum
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.lerp_(query, 1 - momentum)
        order = self._shuffle(len(images), generator).to(images.device)
        # Every other of the shuffled: over several processes, the halves are halves of the joined batch.
        halves = [order[0::2], order[1::2]]
        keys = [F.normalize(self.key(images[half]).float(), dim=1) for half in halves]
        return torch.cat(keys)[torch.cat(halves).argsort()]

    def _shuffle(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(n, generator=generator)

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor) -> None:
        keys = self.gathered(keys)
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[slots] = keys.to(self.queue.dtype)
        self.position[0] = (self.position[0] + len(keys)) % len(self.queue)

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        generator = self.step_generator()
        images = self.survey.images[rows.cpu()].to(self.device)
        augment = self.settings.augmentation
        query_view, key_view = augment(images, generator), augment(images, generator)
        query = F.normalize(self.query(query_view).float(), dim=1)
        keys = self._keys(key_view, generator)
        positive = (query * keys).sum(1, keepdim=True)
        negative = query @ self.queue.clone().T
        logits = torch.cat([positive, negative], dim=1) / self.settings.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=self.device))
        self._enqueue(keys)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_top1", (logits.argmax(1) == 0).float().mean())
        return loss

    def validation_step(self, rows: torch.Tensor) -> None:
        """How often the other view of an object is the nearest of the batch."""
        generator = torch.Generator().manual_seed(0)
        images = self.validation.images[rows.cpu()].to(self.device)
        views = [self.settings.augmentation(images, generator) for _ in range(2)]
        a, b = (F.normalize(self.query(view).float(), dim=1) for view in views)
        found = ((a @ b.T).argmax(1) == torch.arange(len(a), device=self.device)).float().mean()
        self.log("val_top1", found, prog_bar=True, sync_dist=True, batch_size=len(rows))


def train_image(settings: ImageSettings, progress: bool = True) -> Path:
    """Run the stage; the query tower's weights are written as `<out>/tower.safetensors`, which is returned."""
    module = staged(MomentumContrast, settings, ("image",))
    out = run_stage(module, progress=progress)
    return save_tower(module.tower, out)
