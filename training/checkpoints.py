"""Checkpoints that outlive a kill: written aside and renamed, the one before kept, checked before they are used."""

from __future__ import annotations

import csv
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from astroclip.errors import InputError

__all__ = [
    "BestWeights",
    "CurveLogger",
    "SafeCheckpointIO",
    "first_process",
    "read_curves",
    "resume_point",
    "steps_done",
]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def first_process() -> bool:
    """Whether this is the process that writes files."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves beside the target, syncs to disk, then renames; the last `last.ckpt` becomes `previous.ckpt`.

    Lightning's own save goes through the system's temporary folder, whose rename is a copy where that is another disk,
    and syncs nothing. A kill at any moment leaves a whole `last.ckpt` or a whole `previous.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.partial")
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if target.name == LAST and target.exists():
            os.replace(target, target.with_name(PREVIOUS))
        os.replace(aside, target)


def resume_point(folder: Path) -> Path | None:
    """The checkpoint a run goes on from: `last.ckpt`, else `previous.ckpt` with a warning; None where there is none.

    Raises InputError where there are checkpoints and all are damaged.
    """
    there = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    damage: dict[str, str] = {}
    for path in there:
        fault = _fault(path)
        if fault is None:
            if damage:
                warnings.warn(f"{folder / LAST} is damaged ({damage[LAST]}); going on from {path.name}", stacklevel=2)
            return path
        damage[path.name] = fault
    if damage:
        found = "; ".join(f"{name}: {fault}" for name, fault in damage.items())
        raise InputError(
            f"found damaged checkpoints in {folder} ({found}); wanted one that is whole; remove them to start anew, or "
            "name another --out",
            code="damaged_checkpoint",
            field="out",
        )
    return None


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's archive, None if nothing; every entry's checksum is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return f"entry {broken} does not match its checksum" if broken else None


def steps_done(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint; no pickle in it is executed."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


class CurveLogger(CSVLogger):
    """Loss curves in `<out>/curves/metrics.csv` that a resumed run continues; Lightning's logger would delete them.

    Rows of steps that the checkpoint does not hold are dropped: the resumed run makes them again.
    """

    def __init__(self, out: Path, steps: int, flush_every: int) -> None:
        super().__init__(out, name="", version="curves", flush_logs_every_n_steps=flush_every)
        kept = [row for row in read_curves(out) if row["step"] < steps]
        if first_process() and kept:
            for row in kept:
                self.experiment.log_metrics(row, int(row["step"]))
            self.save()


def read_curves(out: Path) -> list[dict[str, float]]:
    """The rows of a run's `curves/metrics.csv`, empty cells left out; [] where there is none."""
    path = Path(out) / "curves" / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    # A kill may have cut the last row short.
    return [{k: float(v) for k, v in row.items()} for row in rows if "step" in row and _numbers(row)]


def _numbers(row: dict[str, str]) -> bool:
    try:
        return all(isinstance(float(value), float) for value in row.values())
    except ValueError:
        return False


class BestWeights(ModelCheckpoint):
    """Keeps the weights of the lowest `val_loss` in `<out>/best.ckpt`."""

    def __init__(self, out: Path) -> None:
        super().__init__(
            dirpath=out,
            filename="best",
            monitor="val_loss",
            save_top_k=1,
            save_weights_only=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def restore(self, module: LightningModule) -> None:
        """Put the best weights into the module, where a validation has been."""
        if self.best_model_path and Path(self.best_model_path).exists():
            found = torch.load(self.best_model_path, map_location=module.device, weights_only=True)
            module.load_state_dict(found["state_dict"])
