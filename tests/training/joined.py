"""One optimiser step of every stage in one of several processes, as torchrun starts them; its gradients to a file.

What is random is held still, because each process draws its own: augmentations, masks, dropout, MoCo's shuffle. What a
mask or a mean depends on differs from row to row, so that the shares of the processes differ.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

BATCH = 16
CASES = ("spectrum", "image", "align", "streamed", "masked", "v1", "v2", "v2-own-negatives")


def start(rank: int, world: int, data: str, out: str, port: int, broken: str = "") -> None:
    """Run every case as process `rank` of `world`; process 0 writes <out>/<case>.pt."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    if world > 1:
        os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    from training.run import run_stage

    _hold_still()
    if broken:
        _break(broken)
    for case in CASES:
        module = _stage(case, data, Path(out) / case, world)
        run_stage(module, [_Gradients(Path(out) / f"{case}.pt")], progress=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Gradients(Callback):
    """Saves the gradients as the optimiser would get them, and the buffers after the step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_rank == 0:
            buffers = {name: b.clone() for name, b in pl_module.named_buffers() if b.is_floating_point()}
            torch.save({"gradients": self.gradients, "buffers": buffers}, self.path)


def _stage(case: str, data: str, out: Path, world: int) -> Any:
    from training import align, image, published, spectrum
    from training.augment import ImageAugmentation, SpectrumAugmentation
    from training.recipes import MaskedSettings, PairSettings
    from training.settings import AlignSettings, ImageSettings, SpectrumSettings, StreamSettings
    from training.stream import staged

    views = SpectrumAugmentation(max_noise=1, throughput_sigma=0, tilt=0, smooth=0, ragged=0, cut=0, gap=0)
    pictures = ImageAugmentation(
        jitter_pixels=0, rotate=0, zoom=0, max_blur_pixels=0, max_noise=0, extinction_sigma=0, brightness_sigma=0
    )
    common: dict[str, Any] = {
        "data": data,
        "out": str(out),
        "batch_size": BATCH,
        "epochs": 1,
        "epoch_steps": 1,
        "precision": "32-true",
        "devices": world,
        "warmup_steps": 1,
        "stream": StreamSettings(workers=0),
    }
    own = {**common, "preset": "tiny"}
    aligned = {"moved_fraction": 1.0, "image_augmentation": pictures, "spectrum_augmentation": views}
    aligned |= {"pair_augmentation": views}
    if case == "spectrum":
        return staged(spectrum.MaskedSpectrum, SpectrumSettings(**own, augmentation=views))
    if case == "image":
        return staged(image.MomentumContrast, ImageSettings(**own, augmentation=pictures, queue=32))
    if case in ("align", "streamed"):
        settings = AlignSettings(**own, **aligned)
        if case == "streamed":
            settings = replace(settings, stream=StreamSettings(enabled=True, workers=1))
        return staged(align.Alignment, settings)
    if case == "masked":
        return published.masked_stage(MaskedSettings(**common, tiny=True))
    preset = "astroclip-v1" if case == "v1" else "astroclip-v2"
    module = published.pair_stage(PairSettings(**common, preset=preset, tiny=True, gather="own" not in case))
    for tower in (module.model.image_tower, module.model.spectrum_tower):
        if hasattr(tower.head, "dropout"):
            tower.head.dropout = 0.0
    return module


def _hold_still() -> None:
    import training.align
    import training.augment
    import training.image
    import training.published
    import training.spectrum
    from astroclip.models import ImageTower

    def features(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        # Not channels-last: there, torch's own BatchNorm has gradients 0.4 % off those in float64 on a CPU (2e-6
        # otherwise, and for JoinedBatchNorm either way), and it is the reference here.
        return self.backbone(self.mapping(pixels))

    def cropped(images: torch.Tensor, size: int, *rest: Any) -> torch.Tensor:
        first = (images.shape[-1] - size) // 2
        return images[:, :, first : first + size, first : first + size].float()

    def shifts(n: int, *rest: Any) -> torch.Tensor:
        return torch.full((n,), 5)

    def mask(n: int, tokens: int, *rest: Any) -> torch.Tensor:
        return (torch.arange(tokens) % 3 == 0).expand(n, tokens)

    def chunks(tokens: torch.Tensor, generator: Any = None) -> torch.Tensor:
        hidden = 50 + (tokens[:, 1].abs().sum(1) * 97 % 300).long()  # so many of each row's own tokens
        return tokens.masked_fill((torch.arange(tokens.shape[1])[None] < hidden[:, None])[..., None], 0)

    def in_order(self: Any, n: int, generator: Any) -> torch.Tensor:
        return torch.arange(n)

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (training.augment, "crop_dihedral", cropped),
        (training.align, "draw_shifts", shifts),
        (training.spectrum, "draw_mask", mask),
        (training.published, "mask_chunks", chunks),
        (training.image.MomentumContrast, "_shuffle", in_order),
        (ImageTower, "features", features),
    ]
    for place, name, still in patches:
        setattr(place, name, still)


def _break(what: str) -> None:
    """Take one of the parts away that make several processes one, to see that the comparison notices."""
    import training.published
    import training.run
    import training.spectrum
    from training.run import Stage

    if what == "gather":
        Stage.gathered = lambda self, rows: self.all_gather(rows).flatten(0, 1)  # type: ignore[method-assign]
    elif what == "batchnorm":
        training.run.join_batchnorm = lambda module, cuda: None
    elif what == "mean":
        plain = lambda total, weight: total / weight  # noqa: E731
        training.published.joined_mean = training.spectrum.joined_mean = plain
