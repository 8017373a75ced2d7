"""Synthetic checkpoints in the published layouts, of any width and depth: names as upstream's code gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from astroclip.models import AstroCLIPConfig, AstroCLIPModel
from astroclip.weights.kinds import KINDS

SPECFORMER = {"kind": "specformer", "embed_dim": 24, "n_layers": 3, "n_heads": 4, "max_tokens": 790, "head_width": 0}
VIT = {
    "kind": "vit",
    "image_size": 60,
    "patch": 10,
    "embed_dim": 32,
    "n_layers": 5,
    "n_heads": 4,
    "mlp_hidden": 96,
    "head_width": 0,
}
MOCO = {"kind": "moco", "layers": (1, 2, 1, 1), "bottleneck": False, "width": 16, "hidden": 40, "projection": 20}
HEAD = {"head_width": 20, "head_hidden": 52}
NONE = {"kind": "none"}

TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "astroclip-v2": (VIT | HEAD, SPECFORMER | HEAD, 20),
    "astroclip-v1": (MOCO | {"colours": "raw", "output": "projection"}, SPECFORMER | HEAD, 20),
    "specformer": (NONE, SPECFORMER, 24),
    "astrodino": (VIT, NONE, 32),
    "stein-moco": (MOCO, NONE, 128),
}


def model_of(kind: str) -> AstroCLIPModel:
    """A seeded random model whose sizes are none of the published ones."""
    torch.manual_seed(3)
    image, spectrum, dim = TOWERS[kind]
    model = AstroCLIPModel(AstroCLIPConfig(image=image, spectrum=spectrum, projection_dim=dim)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("ls1.gamma", "ls2.gamma")):
            parameter.data.fill_(1.0)  # at 1e-5, as initialised, blocks do nothing
    return model


def state_of(kind: str, model: AstroCLIPModel) -> dict[str, torch.Tensor]:
    """The model's weights under upstream's names; a vision transformer's blocks in chunks of two."""
    state = {}
    for ours, tensor in model.state_dict().items():
        for prefix, theirs in KINDS[kind].renames:
            if ours.startswith(prefix):
                name = theirs + ours.removeprefix(prefix)
                if "image_tower.backbone.blocks." in ours:
                    start, _, rest = name.partition("blocks.")
                    name = f"{start}blocks.{int(rest.split('.')[0]) // 2}.{rest}"
                state[name] = tensor.clone()
                break
    if kind in ("astrodino", "astroclip-v2"):
        prefix = "backbone." if kind == "astrodino" else "image_encoder.backbone."
        state[f"{prefix}mask_token"] = torch.zeros(1, 32)
    if kind == "stein-moco":
        state |= {"queue": torch.zeros(20, 8), "encoder_k.conv1.weight": torch.zeros(2, 2)}
    return state


def write(path: Path, kind: str, state: dict[str, torch.Tensor], **extra: Any) -> Path:
    entry = "teacher" if kind == "astrodino" else "state_dict"
    torch.save({entry: state, "optimizer_states": [{"m": torch.zeros(5)}], **extra}, path)
    return path


def checkpoint(folder: Path, kind: str, **extra: Any) -> Path:
    return write(folder / f"{kind}.ckpt", kind, state_of(kind, model_of(kind)), **extra)
