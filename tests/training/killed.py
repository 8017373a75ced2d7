"""A training run that can be killed: `python killed.py STAGE DATA OUT [STEP]` does it itself, amid that step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


class Killer(Callback):
    """Kills the process before step `after` is done: no handler runs, no file is closed."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def stage(name: str, data: str, out: str) -> Any:
    """The module of a stage, augmentations, dropout and all as in earnest; three epochs of four steps."""
    from training import align, image, published
    from training.recipes import PairSettings
    from training.settings import AlignSettings, ImageSettings, StreamSettings
    from training.stream import staged

    common: dict[str, Any] = {"data": data, "out": out, "batch_size": 8, "epochs": 3, "warmup_steps": 2}
    common |= {"precision": "32-true", "devices": 1, "checkpoint_steps": 2, "log_steps": 1}
    streamed = StreamSettings(enabled=True, workers=1, chunk=4, window=16)
    if name == "align":
        return staged(align.Alignment, AlignSettings(**common, preset="tiny"))
    if name == "bf16":
        return staged(align.Alignment, AlignSettings(**{**common, "precision": "bf16-mixed"}, preset="tiny"))
    if name == "image":
        return staged(image.MomentumContrast, ImageSettings(**common, preset="tiny", queue=24, stream=streamed))
    settings = PairSettings(**common, preset="astroclip-v1", tiny=True, flips=True, stream=streamed)
    return published.pair_stage(settings)


def main(name: str, data: str, out: str, after: int = -1) -> None:
    """Train, from the last checkpoint where there is one."""
    from training.run import run_stage

    torch.set_num_threads(1)
    run_stage(stage(name, data, out), [Killer(after)], progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
