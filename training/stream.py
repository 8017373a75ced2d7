"""Training on more pairs than memory holds: stages whose batches come from disk (`training.loader`)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from astroclip.errors import InputError
from training.data import IMAGE_MARGIN
from training.loader import Batch, PairLoader
from training.pairs import PairSource, open_pairs
from training.run import Stage, load_split, new_model
from training.settings import StageSettings

__all__ = ["PairStage", "Streamed", "open_parts", "staged"]


class PairStage(Stage):
    """A stage whose batches are read from disk: dictionaries of images, flux, ivar (n, ...) of this process."""

    sources: tuple[PairSource, PairSource]

    def steps_per_epoch(self) -> int:
        return len(self.sources[0]) // self.settings.batch_size

    def train_dataloader(self) -> Any:
        world = self.trainer.world_size
        if not self.steps_per_epoch():
            raise InputError(
                f"found {len(self.sources[0])} training pairs for batches of {self.settings.batch_size}; wanted at "
                "least one whole batch; lower batch_size or give more data",
                code="bad_batch",
                field="batch_size",
            )
        return PairLoader(
            self.sources[0],
            self.process_batch() * world,
            self.settings.stream,
            seed=self.settings.seed,
            rank=self.trainer.global_rank,
            world=world,
            position=lambda: self.global_step,
            pin=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> Any:
        """The first `val_objects` of the validation part, in order, shared out between the processes."""
        world = self.trainer.world_size
        n = min(len(self.sources[1]), self.settings.stream.val_objects)
        size = min(self.settings.batch_size, n) // world * world
        return PairLoader(
            _First(self.sources[1], n if size else 0),
            max(size, 1),
            self.settings.stream,
            rank=self.trainer.global_rank,
            world=world,
            shuffle=False,
        )


class _First:
    """The first n rows of a source."""

    def __init__(self, source: PairSource, n: int) -> None:
        self.source, self.n = source, n

    def __len__(self) -> int:
        return self.n

    def read(self, rows: npt.ArrayLike) -> Any:
        return self.source.read(rows)


class _Held:
    """A batch with the attributes that a stage reads from a survey in memory."""

    def __init__(self, batch: Batch) -> None:
        self.images, self.flux = batch["images"], batch["flux"]
        self.ivar = batch["ivar"]
        self.flux_true = batch.get("flux_true")
        self.sigma = torch.where(self.ivar > 0, self.ivar.clamp_min(1e-12).rsqrt(), torch.zeros_like(self.ivar))

    def __len__(self) -> int:
        return len(self.images)

    def image_batch(self, rows: torch.Tensor, size: int = 96) -> torch.Tensor:
        start = (self.images.shape[-1] - size) // 2
        return self.images[rows, :, start : start + size, start : start + size]

    def spectrum_batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.flux[rows], self.ivar[rows]


class Streamed(PairStage):
    """Put before a stage that works on a survey in memory: the batch of a step is the survey of that step."""

    def training_step(self, batch: Batch) -> Any:
        return super().training_step(self._hold(batch))

    def validation_step(self, batch: Batch) -> Any:
        return super().validation_step(self._hold(batch))

    def _hold(self, batch: Batch) -> torch.Tensor:
        held: Any = _Held(batch)
        self._surveys = (held, held)
        return torch.arange(len(held))


def open_parts(settings: StageSettings, **options: Any) -> tuple[PairSource, PairSource]:
    """The training and validation parts of `settings.data`."""
    held = settings.stream.val_fraction
    train, val = (open_pairs(settings.data, part, val_fraction=held, **options) for part in ("train", "val"))
    return (_First(train, min(len(train), settings.max_objects)) if settings.max_objects else train), val


def staged(cls: type[Stage], settings: StageSettings, columns: tuple[str, ...] = ("image", "spectrum")) -> Any:
    """A stage over the survey in memory or, where the settings say so, streamed from disk."""
    if not settings.stream.enabled:
        return cls(settings, *load_split(settings))
    if getattr(settings, "locked_views", 0):
        raise InputError(
            "found locked_views with a streamed survey; wanted one or the other: what a locked tower reads is kept for "
            "all galaxies in memory; set locked_views = 0, or stream.enabled = false",
            code="bad_setting",
            field="locked_views",
        )
    towers = new_model(settings).config
    streamed = type(f"Streamed{cls.__name__}", (Streamed, cls), {})
    module = streamed(settings, None, None)
    module.sources = open_parts(
        settings,
        image_size=towers.image_tower.grid.size + IMAGE_MARGIN,
        grid=towers.spectrum_tower.grid,
        columns=columns,
    )
    return module
