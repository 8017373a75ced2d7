"""Running a stage: batches from memory, Lightning's trainer, checkpoints that resume, loss curves as a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from astroclip.errors import InputError
from astroclip.models import AstroCLIPConfig, AstroCLIPModel, AstroCLIPProcessor
from training.checkpoints import CurveLogger, SafeCheckpointIO, first_process, resume_point, steps_done
from training.data import SurveyArrays, find_shards, load_survey
from training.distributed import join_batchnorm
from training.settings import StageSettings
from training.split import split_shards
from training.timing import TrainingLog

__all__ = [
    "RowBatches",
    "Stage",
    "export_model",
    "load_split",
    "new_model",
    "run_stage",
    "save_tower",
    "warmup_cosine",
]

_ALL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RowBatches(IterableDataset):
    """Shuffled batches of row numbers, the same on every process but for the share each takes.

    batch_size is that of one process. Seeded by (seed, epoch); `position`, the steps done by now, says which epoch and
    where in it, so that a run killed in mid-epoch goes on with the rows it would have seen. The last incomplete batch
    is dropped (contrastive losses compare within a batch).
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world = rank, world
        self.position = position

    def __len__(self) -> int:
        return self.n // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not len(self):
            return
        epoch, first = divmod(self.position(), len(self))
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(self.n, generator=generator)
        for step in range(first, len(self)):
            start = (step * self.world + self.rank) * self.batch_size
            yield order[start : start + self.batch_size]


class Stage(L.LightningModule):
    """Common to the three stages: the survey in memory, the optimiser, the epoch's batches.

    The survey stays outside the checkpoint; a batch is row numbers, and the module gathers and augments them.
    """

    def __init__(self, settings: StageSettings, survey: SurveyArrays, validation: SurveyArrays) -> None:
        super().__init__()
        self.settings = settings
        self._surveys = (survey, validation)  # a tuple, so that Lightning does not look inside

    @property
    def survey(self) -> SurveyArrays:
        return self._surveys[0]

    @property
    def validation(self) -> SurveyArrays:
        return self._surveys[1]

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            join_batchnorm(self, cuda=self.trainer.strategy.root_device.type == "cuda")

    def process_batch(self) -> int:
        """Objects a step in this process."""
        size, world = self.settings.batch_size, self.trainer.world_size
        if size % world:
            raise InputError(
                f"found batch_size {size} for {world} processes; wanted a multiple of {world}: it is the size of the "
                "joined batch; change batch_size, devices or num_nodes",
                code="bad_batch",
                field="batch_size",
            )
        return size // world

    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data; the last incomplete batch is dropped."""
        return len(self.survey) // self.settings.batch_size

    def total_steps(self) -> int:
        """Steps of the whole run, as the settings have it."""
        settings = self.settings
        epoch = min(self.steps_per_epoch(), settings.epoch_steps or self.steps_per_epoch())
        return max(1, min(settings.epochs * epoch, settings.max_steps or settings.epochs * epoch))

    def train_dataloader(self) -> Any:
        batches = RowBatches(
            len(self.survey),
            self.process_batch(),
            self.settings.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            lambda: self.global_step,
        )
        return DataLoader(batches, batch_size=None, num_workers=0)

    def val_dataloader(self) -> Any:
        size = min(self.settings.batch_size, len(self.validation))
        return DataLoader(RowBatches(len(self.validation), size, 0), batch_size=None, num_workers=0)

    def step_generator(self) -> torch.Generator:
        """Augmentations drawn from (seed, step, rank): a resumed run repeats what an uninterrupted one would do."""
        seed = (self.settings.seed * 1_000_003 + self.global_step) * 64 + self.global_rank
        return torch.Generator().manual_seed(seed)

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, D) of this process -> (world N, D) of all, in rank order; gradients flow back to their process."""
        if self.trainer.world_size == 1:
            return rows
        every = self.all_gather(rows, sync_grads=rows.requires_grad)
        assert isinstance(every, torch.Tensor)
        return every.flatten(0, 1)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        decay = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": self.settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self.settings.learning_rate,
            betas=(0.9, 0.95),
        )
        total = self.total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, self.settings.warmup_steps, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, warmup: int, total: int, floor: float = 0.01) -> float:
    """Linear from 0 over `warmup` steps, then a cosine from 1 to `floor` at `total`; flat afterwards."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress))))


def load_split(settings: StageSettings) -> tuple[SurveyArrays, SurveyArrays]:
    """Training and validation arrays of the survey; test shards are never opened."""
    split = split_shards(find_shards(settings.data))
    train = split.train
    if settings.max_objects:
        per_shard = max(1, len(load_survey(train[:1])))
        train = train[: max(1, settings.max_objects // per_shard)]
    return load_survey(train), load_survey(split.val)


def run_stage(module: Stage, callbacks: list[Callback] | None = None, progress: bool = True) -> Path:
    """Fit `module`, resuming from `<out>/last.ckpt` where there is one; returns the run folder.

    Writes `metrics.csv` (loss curves), `last.ckpt`, and the settings as `settings.json`.
    """
    settings = module.settings
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    if first_process():
        (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    last = resume_point(out)
    L.seed_everything(settings.seed, verbose=False)
    saver = ModelCheckpoint(
        dirpath=out,
        filename="step-{step}",
        every_n_train_steps=settings.checkpoint_steps,
        save_last=True,
        save_top_k=1,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        max_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        limit_train_batches=settings.epoch_steps or None,
        max_time=timedelta(minutes=settings.max_minutes) if settings.max_minutes else None,
        precision=settings.precision,  # type: ignore[arg-type]
        accelerator="auto",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        gradient_clip_val=settings.clip,
        logger=CurveLogger(out, steps_done(last) if last else 0, flush_every=settings.log_steps),
        plugins=[SafeCheckpointIO()],
        callbacks=[saver, TrainingLog(out, settings), *(callbacks or [])],
        log_every_n_steps=settings.log_steps,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    # On a CPU the plain product beats the fused kernel at 65 tokens (1.2 to 1.5 times, forward and backward).
    kernels = [SDPBackend.MATH] if module.device.type == "cpu" and not torch.cuda.is_available() else _ALL_KERNELS
    with sdpa_kernel(kernels):
        trainer.fit(module, ckpt_path=last, weights_only=True if last else None)
    trainer.save_checkpoint(out / "last.ckpt")
    return out


def export_model(model: AstroCLIPModel, out: Path, half: bool = False) -> Path:
    """Write `<out>/model/`: config, safetensors weights (float16 where `half`) and the processor.

    Written aside and renamed, by the first process alone.
    """
    target = out / "model"
    if not first_process():
        return target
    aside, former = out / f".model.{os.getpid()}.tmp", out / f".model.{os.getpid()}.old"
    weights = {
        name: value.half() if half and value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(aside, state_dict=weights, max_shard_size="1TB")  # one file, as the embedder wants it
    config = model.config
    assert isinstance(config, AstroCLIPConfig)
    AstroCLIPProcessor.for_model(config).save_pretrained(aside)
    if target.exists():
        os.replace(target, former)
    os.replace(aside, target)
    shutil.rmtree(former, ignore_errors=True)
    return target


def save_tower(tower: torch.nn.Module, out: Path) -> Path:
    """Write `<out>/tower.safetensors`, aside and renamed, by the first process alone."""
    target = out / "tower.safetensors"
    if first_process():
        aside = out / f".tower.{os.getpid()}.tmp"
        save_file({key: value.contiguous() for key, value in tower.state_dict().items()}, aside)
        os.replace(aside, target)
    return target


def new_model(settings: StageSettings) -> AstroCLIPModel:
    """A model of the preset, from the stage's seed."""
    torch.manual_seed(settings.seed)
    return AstroCLIPModel(AstroCLIPConfig.preset(settings.preset))
