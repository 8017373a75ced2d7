"""Training on more pairs than memory holds: batches read by worker processes, in an order that depends on the step.

Batch k of a run is a function of the seed and k alone. So it is the same for any number of worker processes, the joined
batch is the same for any number of training processes, and a run that was killed in mid-epoch goes on with the batch it
would have had. Nothing of the order has to be in a checkpoint but the number of steps.

The order is a shuffle in two stages, because rows far apart are slow to read from a large file: runs of `chunk` rows
are put in random order, then the rows of each `window` are shuffled among each other. A batch thus reads from a window
of the epoch, that is from window/chunk places of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from astroclip.errors import InputError
from training.data import IMAGE_MARGIN
from training.pairs import PairSource, open_pairs
from training.run import Stage, load_split, new_model
from training.settings import StageSettings, StreamSettings

__all__ = ["PairLoader", "PairStage", "Streamed", "epoch_order", "open_parts", "staged"]

Batch = dict[str, torch.Tensor]


def epoch_order(n: int, seed: int, epoch: int, chunk: int, window: int) -> npt.NDArray[np.int64]:
    """(n,) the rows of an epoch: chunks shuffled, then rows within windows."""
    rng = np.random.default_rng([seed, epoch])
    # The first chunk's length changes, so that the same rows are not neighbours in every epoch.
    edges = np.arange(int(rng.integers(0, chunk)), n + chunk, chunk).clip(0, n)
    chunks = [np.arange(a, b) for a, b in zip(np.concatenate([[0], edges[:-1]]), edges, strict=True) if b > a]
    order = np.concatenate([chunks[i] for i in rng.permutation(len(chunks))]) if chunks else np.arange(0)
    for start in range(0, n, window):
        rng.shuffle(order[start : start + window])
    return order


class _Rows(Dataset):
    """Rows -> a batch; errors travel back as values, since DataLoader would wrap them in a traceback."""

    def __init__(self, source: PairSource, augment: Callable[[Any], Batch]) -> None:
        self.source, self.augment = source, augment

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Batch | InputError:
        try:
            return self.augment(self.source.read(rows))
        except InputError as error:
            return error


def as_tensors(pairs: Any) -> Batch:
    """images, flux, ivar (and flux_true where there is one) of `Pairs` as tensors."""
    names = ["images", "flux", "ivar"] + ([] if pairs.flux_true is None else ["flux_true"])
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(pairs, name))) for name in names}


class PairLoader:
    """Iterates over the batches of this process from the run's current step to the end of the epoch.

    batch_size: of all processes together. position: steps done by now; the epoch and the place in it follow from it.
    Reading starts with the first batch asked for, not when the iterator is made: Lightning makes it before it has
    restored a checkpoint.
    """

    def __init__(
        self,
        source: PairSource,
        batch_size: int,
        stream: StreamSettings,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        position: Callable[[], int] = lambda: 0,
        pin: bool = False,
    ) -> None:
        self.source, self.batch_size, self.stream = source, batch_size, stream
        self.seed, self.rank, self.world = seed, rank, world
        self.shuffle, self.position, self.pin = shuffle, position, pin

    def __len__(self) -> int:
        return len(self.source) // self.batch_size

    def rows(self, step: int) -> list[npt.NDArray[np.int64]]:
        """This process's rows of every batch from `step` to the end of its epoch."""
        epoch, first = divmod(step, len(self))
        order = np.arange(len(self.source))
        if self.shuffle:
            order = epoch_order(len(self.source), self.seed, epoch, self.stream.chunk, self.stream.window)
        share = self.batch_size // self.world
        starts = [k * self.batch_size + self.rank * share for k in range(first, len(self))]
        return [order[start : start + share] for start in starts]

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Rows(self.source, as_tensors),
            sampler=self.rows(self.position()),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.stream.workers,
            prefetch_factor=self.stream.prefetch if self.stream.workers else None,
            pin_memory=self.pin,
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position follows from the number of steps. It tells Lightning that mid-epoch is no concern."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


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
