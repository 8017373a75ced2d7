"""Before a long run: a rehearsal of two steps of it, and a description of what it would cost.

`rehearse` builds everything from the configuration, trains two steps, validates, writes checkpoint and model, and says
what it saw; with `tiny`, at test widths and on any machine. `describe` trains nothing.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from astroclip.models import AstroCLIPConfig, AstroCLIPModel
from training.checkpoints import read_curves
from training.pairs import open_pairs
from training.recipes import MaskedSettings, PairSettings, RecipeSettings, Train
from training.settings import AlignSettings, ImageSettings, StageSettings

__all__ = ["describe", "rehearse", "shrunk"]

STEPS = 2
TINY_BATCH = 4
# Dense bfloat16 peak of an A100 by its data sheet, and the share of it that training transformers of this size usually
# reaches; published runs say the rest (docs/training.md).
A100_FLOPS, UTILISATION = 312e12, 0.35
BACKWARD = 2  # a backward pass costs two forward passes
PAIR_BYTES = {"image": 152 * 152 * 3 * 4, "spectrum": 7781 * 4}


def shrunk(settings: StageSettings) -> StageSettings:
    """The same configuration at test widths: batches of 4, one process, float32, no encoder files."""
    small: dict[str, Any] = {"batch_size": TINY_BATCH, "devices": 1, "num_nodes": 1, "precision": "32-true"}
    if isinstance(settings, RecipeSettings):
        small["tiny"] = True
    else:
        small["preset"] = "tiny"
    if isinstance(settings, (PairSettings, AlignSettings)):
        small |= {"image_init": "", "spectrum_init": ""}
    if isinstance(settings, AlignSettings):
        small |= {
            "model_init": "",
            "locked_views": 0,
            "locked_backbone": False,
            "keep_start": 0.0,
        }  # they go on from a trained model
    if isinstance(settings, ImageSettings):
        small["queue"] = 16
    return replace(settings, **small)


def rehearse(settings: StageSettings, train: Train, tiny: bool = False, progress: bool = False) -> dict[str, Any]:
    """Two steps, one validation batch, checkpoint and export below `<out>/rehearsal`; returns what was seen.

    seconds counts everything; peak_gib is GPU memory where there is a GPU, else the process's own.
    """
    settings = shrunk(settings) if tiny else settings
    workers = 0 if tiny else settings.stream.workers
    stream = replace(settings.stream, val_objects=settings.batch_size, workers=workers)
    folder = Path(settings.out) / "rehearsal"
    short = replace(
        settings,
        out=str(folder),
        epochs=1,
        epoch_steps=STEPS,
        max_steps=0,
        warmup_steps=min(settings.warmup_steps, 1),
        checkpoint_steps=1,
        log_steps=1,
        max_minutes=0.0,
        stream=stream,
    )
    for stale in folder.glob("*.ckpt"):
        stale.unlink()
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    made = train(short, progress)
    losses = [row["train_loss"] for row in read_curves(folder) if "train_loss" in row]
    return {
        "steps": len(losses),
        "losses": losses,
        "made": str(made),
        "seconds": round(time.monotonic() - started, 1),
        "peak_gib": round(_peak_bytes() / 2**30, 2),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "batch_size": settings.batch_size,
        "precision": settings.precision,
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(settings: StageSettings) -> dict[str, Any]:
    """Parameters, tokens, steps, reading and estimated cost of a run, without training it.

    The cost: floating-point operations of the towers (counted by running one object through them), times objects, over
    the A100's peak at an assumed utilisation. Reading or small batches may make a run longer.
    """
    model, parts, columns = _outline(settings)
    objects = _objects(settings)
    steps_an_epoch = None if objects is None else objects // settings.batch_size
    steps = _steps(settings, steps_an_epoch)
    per_object = sum(part["forward_flops"] * part["passes"] for part in parts)
    seen = None if steps is None else steps * settings.batch_size
    flops = None if seen is None else seen * per_object
    read = sum(PAIR_BYTES[column] for column in columns)
    return {
        "preset": settings.preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(part["trainable"] for part in parts),
        "parts": parts,
        "training_objects": objects,
        "batch_size": settings.batch_size,
        "steps_per_epoch": steps_an_epoch,
        "steps": steps,
        "objects_seen": seen,
        "flops_per_object": per_object,
        "a100_hours_estimated": None if flops is None else round(flops / (A100_FLOPS * UTILISATION) / 3600, 2),
        "assumed": f"{A100_FLOPS:.3g} FLOP/s peak, {UTILISATION:.0%} of it reached; reading not counted",
        "gib_read_per_epoch": None if objects is None else round(objects * read / 2**30, 1),
    }


def _objects(settings: StageSettings) -> int | None:
    """Objects that train; None where the data are not there."""
    if not Path(settings.data).exists():
        return None
    found = len(open_pairs(settings.data, "train", val_fraction=settings.stream.val_fraction))
    return min(found, settings.max_objects) if settings.max_objects else found


def _steps(settings: StageSettings, epoch: int | None) -> int | None:
    if epoch is None:
        return settings.max_steps or None
    epoch = min(epoch, settings.epoch_steps or epoch)
    return min(settings.epochs * epoch, settings.max_steps or settings.epochs * epoch)


def _outline(settings: StageSettings) -> tuple[AstroCLIPModel, list[dict[str, Any]], tuple[str, ...]]:
    """The model without weights, and what of it runs how often for one object: forward passes, a backward being two."""
    trained = 1 + BACKWARD
    config = AstroCLIPConfig.preset(settings.preset)
    if isinstance(settings, RecipeSettings):
        with torch.device("meta"):
            model = AstroCLIPModel(config).eval()
        if isinstance(settings, MaskedSettings):
            tower = model.spectrum_tower
            tokens = _spectrum(config, "meta")
            work = [_part("SpecFormer", tower, lambda: tower.reconstruct(tower.tokens(*tokens)), trained)]
            return model, work, ("spectrum",)
        return model, _frozen_parts(model, config, trained), ("image", "spectrum")
    model = AstroCLIPModel(config).eval()
    pixels, spectrum = _pixels(config, "cpu"), _spectrum(config, "cpu")
    image_tower, spectrum_tower = model.image_tower, model.spectrum_tower
    image = ("image tower", image_tower, lambda: image_tower(pixels))
    spectra = ("spectrum tower", spectrum_tower, lambda: spectrum_tower(*spectrum))
    if isinstance(settings, ImageSettings):
        return model, [_part(*image, trained + 1)], ("image",)  # and the key encoder, forward
    if isinstance(settings, AlignSettings):
        views = 1 + (1 + settings.moved_fraction if settings.spectrum_pair_weight else 0)
        return model, [_part(*image, trained), _part(*spectra, trained * views)], ("image", "spectrum")
    return model, [_part(*spectra, trained)], ("spectrum",)


def _frozen_parts(model: AstroCLIPModel, config: AstroCLIPConfig, trained: int) -> list[dict[str, Any]]:
    """Encoders forward only, heads forward and backward."""
    parts = []
    pixels, spectrum = _pixels(config, "meta"), _spectrum(config, "meta")
    for name, tower, inputs in (("image", model.image_tower, (pixels,)), ("spectrum", model.spectrum_tower, spectrum)):
        whole = _part(f"{name} encoder", tower, lambda tower=tower, inputs=inputs: tower(*inputs), 1)  # type: ignore[misc]
        head = sum(p.numel() for p in tower.head.parameters())
        in_head = int(whole.pop("head_flops"))
        whole |= {"parameters": whole["parameters"] - head, "trainable": 0}
        whole["forward_flops"] -= in_head
        parts.append(whole)
        parts.append(
            {"name": f"{name} head", "parameters": head, "trainable": head, "forward_flops": in_head, "passes": trained}
        )
    return parts


def _part(name: str, tower: Any, run: Callable[[], Any], passes: float) -> dict[str, Any]:
    tower.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()
    head = next((sum(ops.values()) for module, ops in counts.items() if module.endswith("Tower.head")), 0)
    size = sum(p.numel() for p in tower.parameters())
    part = {
        "name": name,
        "parameters": size,
        "trainable": size,
        "forward_flops": counter.get_total_flops(),
        "passes": passes,
    }
    return part | ({"head_flops": head} if passes == 1 else {})


def _pixels(config: AstroCLIPConfig, device: str) -> torch.Tensor:
    size = config.image_tower.grid.size
    return torch.zeros(1, 3, size, size, device=device)


def _spectrum(config: AstroCLIPConfig, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones(1, config.spectrum_tower.grid.n_pixels, device=device)
    return ones, ones


def as_text(report: dict[str, Any]) -> str:
    """A report for the terminal."""
    return json.dumps(report, indent=1)
