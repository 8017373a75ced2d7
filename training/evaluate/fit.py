"""One training loop for the supervised baselines: bounded in time, resumable, best validation epoch kept.

The learning rate follows the clock: a warm-up, then half a cosine down to zero when the minutes (or the
epochs) are used up, so a baseline given ten minutes has finished its schedule after ten minutes on any
machine. A checkpoint is published by rename after every epoch; a killed run goes on from the last one with
the time it had left.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

__all__ = ["FitOptions", "Task", "choose_device", "fit", "predict"]

Rows = npt.NDArray[np.int64]
WARM_UP = 0.05  # of the schedule


@dataclass(frozen=True)
class FitOptions:
    """minutes: wall clock of training and validation together; `epochs` ends it earlier."""

    minutes: float = 20.0
    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    seed: int = 0
    device: str = "auto"


class Task(Protocol):
    """What is learned: a loss on training rows and a score (higher is better) on validation rows."""

    def loss(self, model: nn.Module, rows: Rows, rng: np.random.Generator, device: str) -> torch.Tensor: ...

    def score(self, model: nn.Module, rows: Rows, device: str) -> float: ...


def choose_device(name: str) -> str:
    """The device itself, or for "auto" cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def fit(
    model: nn.Module,
    task: Task,
    train_rows: Rows,
    val_rows: Rows,
    options: FitOptions,
    checkpoint: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Train `model` in place and leave it with the weights of its best validation epoch, in eval mode.

    Returns the history, one {"epoch", "loss", "score", "seconds"} an epoch (those before a resume included);
    `report` gets each as it is made. bfloat16 autocast on every device, float32 weights.
    """
    device = choose_device(options.device)
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    state = _resume(checkpoint, model, optimiser, device)
    history: list[dict[str, Any]] = state["history"]
    clock = _Clock(options, state["elapsed"])
    while clock.progress(len(history)) < 1:
        epoch = len(history)
        loss = _epoch(model, task, train_rows, options, optimiser, clock, epoch, device)
        score = task.score(model.eval(), val_rows, device)
        history.append({"epoch": epoch, "loss": loss, "score": score, "seconds": round(clock.elapsed(), 1)})
        if state["best"] is None or score > state["best_score"]:
            state["best_score"] = score
            state["best"] = {key: value.detach().clone() for key, value in model.state_dict().items()}
        state |= {
            "elapsed": clock.elapsed(),
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        _save(checkpoint, state)
        report(history[-1])
    if state["best"] is not None:
        model.load_state_dict(state["best"])
    model.eval()
    return history


def predict(
    model: nn.Module,
    inputs: Callable[[Rows], tuple[torch.Tensor, ...]],
    rows: Rows,
    device: str,
    batch: int = 512,
) -> npt.NDArray[np.float32]:
    """model(*inputs(rows)) in float32 and in order, batch by batch."""
    model.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            tensors = inputs(rows[start : start + batch])
            parts.append(model(*(tensor.to(device) for tensor in tensors)).float().cpu().numpy())
    return np.concatenate(parts)


class _Clock:
    """How far the schedule is, 0 to 1, by time or by epochs, whichever is further."""

    def __init__(self, options: FitOptions, elapsed: float) -> None:
        self.options = options
        self.started = time.perf_counter() - elapsed

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def progress(self, epochs: float) -> float:
        return max(self.elapsed() / (60 * self.options.minutes), epochs / self.options.epochs)

    def rate(self, epochs: float) -> float:
        """The learning rate now, as a share of its peak."""
        done = min(self.progress(epochs), 1.0)
        if done < WARM_UP:
            return (done + 0.01) / (WARM_UP + 0.01)
        return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _epoch(
    model: nn.Module,
    task: Task,
    rows: Rows,
    options: FitOptions,
    optimiser: torch.optim.Optimizer,
    clock: _Clock,
    epoch: int,
    device: str,
) -> float:
    """One pass in an order drawn from (seed, epoch), cut short when the time is up; the mean loss."""
    model.train()
    rng = np.random.default_rng((options.seed, epoch))
    order = rng.permutation(rows)
    size = min(options.batch_size, len(order))
    losses: list[float] = []
    for start in range(0, len(order) - size + 1, size):  # BatchNorm wants no batch of one at the end
        now = epoch + start / len(order)
        if losses and clock.progress(now) >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * clock.rate(now)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = task.loss(model, order[start : start + size], rng, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def _resume(checkpoint: Path | None, model: nn.Module, optimiser: torch.optim.Optimizer, device: str) -> dict[str, Any]:
    if checkpoint is None or not checkpoint.is_file():
        return {"history": [], "elapsed": 0.0, "best": None, "best_score": -math.inf}
    state: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return state


def _save(checkpoint: Path | None, state: dict[str, Any]) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = checkpoint.with_name(checkpoint.name + ".part")
    torch.save(state, aside)
    os.replace(aside, checkpoint)
