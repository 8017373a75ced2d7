"""The training log: what a run does and when, as MLPerf lines in `<run>/mllog.txt`, through kills and restarts.

The time of a run is the wall-clock time of its processes from `run_start`, evaluation included; `run_time_ms` at an
event is that of all sessions so far. A session that was killed counts up to its last line, and a line is written at
least every `HEARTBEAT_S` seconds. The quality is `training.benchmark.targets.QUALITY`, measured after every epoch on
the first validation objects, whatever the batch size; stages without a joint model, and those that stream their pairs
from disk, log their validation loss alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from training.benchmark.mllog import EventLog, LogError, cut_torn_line, read_log
from training.benchmark.release import find_release, verify
from training.benchmark.targets import QUALITY
from training.benchmark.timing import RunSoFar, run_so_far
from training.evaluate.report import BENCHMARK_VERSION, machine
from training.settings import StageSettings

__all__ = ["FILE", "TrainingLog", "recall_at_10"]

FILE = "mllog.txt"
HEARTBEAT_S = 60.0
BATCH = 128


class TrainingLog(Callback):
    """Writes `<out>/mllog.txt` on the first process; goes on in the file of the run it resumes.

    A finished log, or one whose checkpoint is gone, is set aside as mllog-1.txt, mllog-2.txt ...; the time of a
    finished one that is trained further carries over.
    """

    def __init__(self, out: Path, settings: StageSettings) -> None:
        self.out, self.settings = Path(out), settings
        self.events: EventLog | None = None
        self.before = RunSoFar(0.0, 0, 0, False)
        self.first_step = 0
        self.in_epoch = False
        self.began = self.latest = 0.0

    # --- Lightning's hooks --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        resumed = trainer.global_step > 0
        self.first_step = trainer.global_step
        path, goes_on = self._open(resumed)
        self.events = EventLog(path, append=goes_on)
        if not goes_on:
            self._announce(trainer, module)
        self.began = self.latest = time.time()
        self.events.start(
            "session_start",
            run_time_ms=self.before.run_time_ms,
            step_num=trainer.global_step,
            samples_count=self.before.samples,
        )
        if goes_on:
            self._platform(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Not in on_train_epoch_start, which an epoch resumed in its middle does not have.
        if self.events and not self.in_epoch:
            self.in_epoch = True
            self.events.start("epoch_start", epoch_num=trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.events and time.time() - self.latest > HEARTBEAT_S:
            self.latest = time.time()
            self.events.event("trained_samples", self._samples(trainer), **self._so_far(trainer))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.events or trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        self.events.start("eval_start", epoch_num=epoch)
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.events.event("eval_error", float(loss), name="val_loss", epoch_num=epoch, **self._so_far(trainer))
        found = recall_at_10(module)
        if found is not None:
            value, pool = found
            about = {"name": QUALITY.key, "pool": pool, "epoch_num": epoch, **self._so_far(trainer)}
            self.events.event("eval_accuracy", value, **about)
        self.events.end("eval_stop", epoch_num=epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.events and self.in_epoch:
            self.in_epoch = False
            self.events.end("epoch_stop", epoch_num=trainer.current_epoch, **self._so_far(trainer))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.events:
            return
        done = trainer.current_epoch >= self.settings.epochs
        key, status = ("run_stop", "success") if done else ("session_stop", "stopped")
        self.events.end(key, status=status, **self._so_far(trainer))
        self.events.close()
        self.events = None

    # --- what stands in the lines -------------------------------------------------------------------------------------

    def _open(self, resumed: bool) -> tuple[Path, bool]:
        """The file to write, and whether the run it holds goes on."""
        path = self.out / FILE
        if not path.is_file():
            return path, False
        cut_torn_line(path)
        try:
            so_far = run_so_far(read_log(path))
        except LogError:
            so_far, resumed = RunSoFar(0.0, 0, 0, True), False
        if resumed:
            self.before = so_far
        if resumed and not so_far.finished and so_far.sessions:
            return path, True
        number = next(i for i in range(1, 10_000) if not self._aside(i).exists())
        path.rename(self._aside(number))
        return path, False

    def _aside(self, number: int) -> Path:
        return self.out / f"{Path(FILE).stem}-{number}.txt"

    def _announce(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        events, settings = self.events, self.settings
        assert events is not None
        events.start("init_start")
        train, held_out = _parts(module)
        optimizer = type(trainer.optimizers[0]).__name__.lower()
        events.event("submission_benchmark", "astroclip_training")
        events.event("benchmark_version", BENCHMARK_VERSION)
        release = self._release()
        official = release["status"] in ("identical", "equal within tolerance") and not settings.max_objects
        events.event("submission_division", "closed" if official else "open")
        events.event("submission_org", "astroclip")
        events.event("submission_status", "research")
        events.event("stage", type(module).__name__)
        self._platform(trainer)
        events.event("data_release", **release)
        events.event("seed", settings.seed)
        events.event("global_batch_size", settings.batch_size)
        events.event("train_samples", max(len(train), 1))
        events.event("eval_samples", max(len(held_out), 1))
        events.event("opt_name", optimizer)
        events.event("opt_base_learning_rate", settings.learning_rate)
        events.event("opt_weight_decay", settings.weight_decay)
        events.end("init_stop")
        events.start("run_start")

    def _platform(self, trainer: L.Trainer) -> None:
        assert self.events is not None
        about = machine()
        self.events.event(
            "submission_platform",
            str(about["processor"]),
            **about,
            number_of_nodes=trainer.num_nodes,
            processes=trainer.world_size,
        )

    def _release(self) -> dict[str, Any]:
        """The data release of the survey, training and validation shards verified; it never stops a run."""
        folder = Path(self.settings.data)
        release = find_release(folder)
        if release is None:
            return {"value": "none", "sha256": None, "status": "no release"}
        verdict = verify(folder, release, parts=("train", "val"))
        return {"value": release.name, "sha256": release.sha256, "status": verdict.status}

    def _samples(self, trainer: L.Trainer) -> int:
        """Objects shown to the model, those of steps that a kill undid included."""
        steps = trainer.global_step - self.first_step
        return self.before.samples + steps * self.settings.batch_size  # of the joined batch

    def _so_far(self, trainer: L.Trainer) -> dict[str, Any]:
        spent = self.before.run_time_ms + 1e3 * (time.time() - self.began)
        return {"run_time_ms": round(spent), "samples_count": self._samples(trainer), "step_num": trainer.global_step}


def _parts(module: L.LightningModule) -> Any:
    """Training and validation objects of a stage: its sources where it streams them, else the surveys in memory."""
    return getattr(module, "sources", None) or (getattr(module, "survey", ()), getattr(module, "validation", ()))


def recall_at_10(module: L.LightningModule) -> tuple[float, int] | None:
    """(recall@10 image to spectrum, pool) among the first validation objects; None without joint model or survey.

    In eval mode and float32, as the model will serve; the module's mode is restored.
    """
    model: Any
    model, validation = getattr(module, "model", None), getattr(module, "validation", None)
    if hasattr(module, "sources"):
        return None
    if not hasattr(model, "get_spectrum_features") or validation is None or not hasattr(validation, "image_batch"):
        return None
    pool = min(QUALITY.pool, len(validation))
    training = model.training
    model.eval()
    parts: dict[str, list[np.ndarray]] = {"image": [], "spectrum": []}
    with torch.no_grad(), torch.autocast(module.device.type, enabled=False):
        for start in range(0, pool, BATCH):
            rows = slice(start, min(start + BATCH, pool))
            flux, ivar = (tensor.to(module.device) for tensor in validation.spectrum_batch(rows))
            pixels = validation.image_batch(rows).to(module.device)
            parts["image"].append(model.get_image_features(pixels).float().cpu().numpy())
            parts["spectrum"].append(model.get_spectrum_features(flux, ivar).float().cpu().numpy())
    model.train(training)
    image, spectrum = (np.concatenate(parts[name]) for name in ("image", "spectrum"))
    cosines = image @ spectrum.T
    rank = (cosines >= np.diag(cosines)[:, None]).sum(axis=1)  # a tie counts against the query
    return float(np.mean(rank <= 10)), pool
