"""Batches of pairs read by worker processes, in an order that depends on the step.

Batch k of a run is a function of the seed and k alone. So it is the same for any number of worker processes, the joined
batch is the same for any number of training processes, and a run that was killed in mid-epoch goes on with the batch it
would have had. Nothing of the order has to be in a checkpoint but the number of steps.

The order is a shuffle in two stages, because rows far apart are slow to read from a large file: runs of `chunk` rows
are put in random order, then the rows of each `window` are shuffled among each other. A batch thus reads from a window
of the epoch, that is from window/chunk places of the file.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from astroclip.errors import InputError
from training.pairs import PairSource
from training.settings import StreamSettings

__all__ = ["Batch", "PairLoader", "epoch_order"]

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


def _context() -> Any:
    """Workers are forked from a server that has no threads: a fork of the training process, which has those of the
    process group and of earlier loaders, may inherit a lock that nobody holds and wait for it forever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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
            multiprocessing_context=_context() if self.stream.workers else None,
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
