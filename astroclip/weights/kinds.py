"""The published files: how each kind is recognised, which configuration its tensors imply, what its keys are called.

Names and layouts: AstroCLIP (PolymathicAI; Parker+2024) and its tag neurips23, ssl-legacysurvey (Stein+2021, 2022),
DINOv2 (Oquab+2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from astroclip.models.configuration import (
    IMAGE_TOWERS,
    NONE,
    SPECTRUM_TOWERS,
    MocoTowerConfig,
    SpecFormerTowerConfig,
    VitTowerConfig,
)
from astroclip.weights.source import Source

__all__ = ["KINDS", "Heads", "Kind", "recognise", "switches"]

Renames = tuple[tuple[str, str], ...]

_SPECFORMER: Renames = (("decoder.", "head."), ("", ""))


@dataclass(frozen=True)
class Heads:
    """Numbers of attention heads given by hand: of the image backbone, the spectrum backbone, the projection heads."""

    image: int | None = None
    spectrum: int | None = None
    projection: int | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of published file.

    marks:    the names of this kind match it, and no other's.
    towers:   the towers' dictionaries (`AstroCLIPConfig`) from the tensors.
    renames:  (our prefix, upstream's), the first that fits counts.
    ignored:  names of the file that the model has no use for.
    """

    name: str
    title: str
    citation: str
    marks: str
    towers: Callable[[Source, Heads], dict[str, Any]]
    renames: Renames
    ignored: str = r"$^"

    def upstream(self, ours: str, source: Source) -> str:
        """What the file calls the entry `ours` of a model's state dict."""
        for prefix, theirs in self.renames:
            if ours.startswith(prefix):
                return _in_chunks(theirs + ours.removeprefix(prefix), source)
        return ours


def recognise(source: Source) -> Kind | None:
    """The kind that most names of the file belong to, if any."""
    votes = {kind: sum(bool(re.match(kind.marks, name)) for name in source.tensors) for kind in KINDS.values()}
    best = max(votes, key=lambda kind: votes[kind])
    return best if votes[best] else None


# --- towers from tensors ----------------------------------------------------------------------------------------------


def _specformer(source: Source, heads: Heads, prefix: str, within: str | None = None) -> dict[str, Any]:
    """SpecFormer's part below `prefix` of the file, without a head."""
    dim = source.size(
        (f"{prefix}data_embed.weight", 0), (f"{prefix}final_layernorm.weight", 0), (f"{prefix}data_embed.bias", 0)
    )
    section = source.size((f"{prefix}data_embed.weight", 1), (f"{prefix}head.bias", 0), (f"{prefix}head.weight", 0)) - 2
    hidden = source.size(
        *((f"{prefix}blocks.{i}.mlp.encoder.bias", 0) for i in range(2)), (f"{prefix}blocks.0.mlp.encoder.weight", 0)
    )
    layers = source.count(re.escape(prefix) + r"blocks\.(\d+)\.")
    found = source.setting("num_heads", "SelfAttention" if within else "", within)
    step = source.setting("slice_overlap", within=within)
    if dim:
        source.notes.append(f"SpecFormer: {layers} layers of width {dim}, slices of {section} pixels")
    return {
        "kind": SpecFormerTowerConfig.KIND,
        "section": section,
        "overlap": step or section // 2,
        "max_tokens": source.size((f"{prefix}position_embed.weight", 0)),
        "embed_dim": dim,
        "n_layers": max(layers, source.setting("num_layers", within=within) or 0),
        "n_heads": source.heads("spectrum backbone", dim, _heads_of(128, dim), found, heads.spectrum) if dim else 0,
        "mlp_ratio": hidden // dim if dim else 0,
        "head_width": 0,
    }


def _vit(source: Source, heads: Heads, prefix: str, within: str | None = None) -> dict[str, Any]:
    """The vision transformer below `prefix`, without a head."""
    patches = f"{prefix}patch_embed.proj"
    dim = source.size((f"{prefix}norm.weight", 0), (f"{patches}.bias", 0), (f"{patches}.weight", 0))
    patch = source.size((f"{patches}.weight", 2))
    side = math.isqrt(max(0, source.size((f"{prefix}pos_embed", 1)) - 1))
    layers = source.count(re.escape(prefix) + r"blocks\.(?:\d+\.)?(\d+)\.")
    hidden = source.size(*((_in_chunks(f"{prefix}blocks.{i}.mlp.fc1.bias", source), 0) for i in range(2)))
    found = source.setting("num_heads", "VisionTransformer", within) if within else None
    if dim:
        source.notes.append(f"vision transformer: {layers} layers of width {dim}, {side}^2 patches of {patch}^2 pixels")
    return {
        "kind": VitTowerConfig.KIND,
        "image_size": side * patch,
        "patch": patch,
        "embed_dim": dim,
        "n_layers": layers,
        "n_heads": source.heads("image backbone", dim, _heads_of(64, dim), found, heads.image) if dim else 0,
        "mlp_hidden": hidden,
        "head_width": 0,
    }


def _resnet(source: Source, prefix: str) -> dict[str, Any]:
    """The ResNet below `prefix` and its projection."""
    stages = [source.count(re.escape(f"{prefix}layer{stage}.") + r"(\d+)\.") for stage in (1, 2, 3, 4)]
    width = source.size((f"{prefix}conv1.weight", 0), (f"{prefix}bn1.weight", 0), (f"{prefix}bn1.bias", 0))
    bottleneck = any(name.startswith(f"{prefix}layer") and ".conv3." in name for name in source.tensors)
    if width:
        source.notes.append(f"ResNet: stages of {stages} blocks, first width {width}")
    return {
        "kind": MocoTowerConfig.KIND,
        "layers": tuple(max(1, blocks) for blocks in stages),
        "bottleneck": bottleneck,
        "width": width,
        "hidden": source.size((f"{prefix}fc.0.weight", 0), (f"{prefix}fc.0.bias", 0)),
        "projection": source.size((f"{prefix}fc.2.weight", 0), (f"{prefix}fc.2.bias", 0)),
    }


def _heads_of(size: int, width: int) -> int:
    """Heads of `size` numbers in `width`; 0 where they do not fit."""
    return 0 if width % size else width // size


def _head(source: Source, heads: Heads, query: str, mlp: str, within: str | None = None) -> dict[str, Any]:
    """A learned-query head: `query` its query, `mlp` the first layer of its MLP."""
    width = source.size((f"{query}query", 2), (f"{query}multihead_attn.out_proj.bias", 0), (f"{mlp}.weight", 1))
    found = source.setting("num_heads", "MultiheadAttention", within) if within else None
    return {
        "head_width": width,
        "head_heads": source.heads("projection head", width, 4, found, heads.projection) if width else 0,
        "head_hidden": source.size((f"{mlp}.bias", 0), (f"{mlp}.weight", 0)),
    }


def _v2(source: Source, heads: Heads) -> dict[str, Any]:
    image, spectrum = "image_encoder.", "spectrum_encoder."
    return {
        "image": _vit(source, heads, f"{image}backbone.", "image_encoder")
        | _head(source, heads, f"{image}cross_attention.", f"{image}mlp.encoder", "image_encoder"),
        "spectrum": _specformer(source, heads, f"{spectrum}backbone.", "spectrum_encoder")
        | _head(source, heads, f"{spectrum}cross_attention.", f"{spectrum}mlp.encoder", "spectrum_encoder"),
    }


def _v1(source: Source, heads: Heads) -> dict[str, Any]:
    return {
        "image": _resnet(source, "image_encoder.backbone.") | {"colours": "raw", "output": "projection"},
        "spectrum": _specformer(source, heads, "spectrum_encoder.model.")
        | _head(source, heads, "spectrum_encoder.", "spectrum_encoder.linear1"),
    }


def _dino_prefix(source: Source) -> str:
    return "backbone." if any(name.startswith("backbone.") for name in source.tensors) else ""


def _in_chunks(name: str, source: Source) -> str:
    """DINOv2 groups blocks in chunks: `blocks.7.` is `blocks.1.7.` where the file has it so."""
    match = re.match(r"((?:image_encoder\.)?(?:backbone\.)?blocks\.)(\d+)(\..+)", name)
    if match is None:
        return name
    for chunk in range(int(match[2]) + 1):
        start = f"{match[1]}{chunk}.{match[2]}."
        if any(found.startswith(start) for found in source.tensors):
            return f"{match[1]}{chunk}.{match[2]}{match[3]}"
    return name


def _below(prefix: str, theirs: str, renames: Renames) -> Renames:
    return tuple((prefix + a, theirs + b) for a, b in renames)


_SPECTRUM_HEAD_V2: Renames = (
    ("query", "cross_attention.query"),
    ("attention.", "cross_attention.multihead_attn."),
    ("layernorm.", "cross_attention.layernorm."),
    ("mlp.", "mlp."),
)
_SPECTRUM_HEAD_V1: Renames = (
    ("query", "query"),
    ("attention.", "multihead_attn."),
    ("layernorm.", "norm."),
    ("mlp.encoder.", "linear1."),
    ("mlp.decoder.", "linear2."),
)

_PARKER = "Parker et al. 2024, MNRAS 531, 4990 (arXiv:2310.03024)"
_ALL = (
    Kind(
        name="astroclip-v2",
        title="AstroCLIP: vision transformer for images, SpecFormer for spectra",
        citation=_PARKER,
        marks=r"(image_encoder\.(cross_attention|mlp|backbone\.(patch_embed|blocks|pos_embed))"
        r"|spectrum_encoder\.(cross_attention|mlp|backbone))\b",
        towers=_v2,
        renames=(
            *_below("image_tower.head.", "image_encoder.", _SPECTRUM_HEAD_V2),
            ("image_tower.backbone.", "image_encoder.backbone."),
            *_below("spectrum_tower.head.", "spectrum_encoder.", _SPECTRUM_HEAD_V2),
            *_below("spectrum_tower.", "spectrum_encoder.backbone.", _SPECFORMER),
        ),
        ignored=r"image_encoder\.backbone\.mask_token$",
    ),
    Kind(
        name="astroclip-v1",
        title="AstroCLIP of the NeurIPS 2023 workshop: ResNet for images, SpecFormer for spectra",
        citation="Lanusse et al. 2023, NeurIPS workshop ML and the Physical Sciences (arXiv:2310.03024v1)",
        marks=r"(image_encoder\.backbone\.(conv1|bn1|layer\d|fc)"
        r"|spectrum_encoder\.(model|multihead_attn|linear\d|norm))\b",
        towers=_v1,
        renames=(
            ("image_tower.head.", "image_encoder.backbone.fc."),
            ("image_tower.backbone.", "image_encoder.backbone."),
            *_below("spectrum_tower.head.", "spectrum_encoder.", _SPECTRUM_HEAD_V1),
            *_below("spectrum_tower.", "spectrum_encoder.model.", _SPECFORMER),
        ),
    ),
    Kind(
        name="specformer",
        title="SpecFormer: spectra by masked modelling, before alignment",
        citation=_PARKER,
        marks=r"(data_embed|position_embed|final_layernorm|blocks\.\d+\.attention\.attention)\.",
        towers=lambda source, heads: {"image": NONE, "spectrum": _specformer(source, heads, "")},
        renames=_below("spectrum_tower.", "", _SPECFORMER),
    ),
    Kind(
        name="astrodino",
        title="AstroDINO: images by self-distillation (DINOv2), before alignment",
        citation=f"{_PARKER}; Oquab et al. 2023 (arXiv:2304.07193)",
        marks=r"(backbone\.)?(patch_embed\.|cls_token|pos_embed|blocks\.(\d+\.)+(attn|ls1|norm1)\.)",
        towers=lambda source, heads: {"image": _vit(source, heads, _dino_prefix(source)), "spectrum": NONE},
        renames=(("image_tower.backbone.", "backbone."),),
        ignored=r"(backbone\.)?mask_token$|(dino|ibot)_head\.",
    ),
    Kind(
        name="stein-moco",
        title="Stein et al.: ResNet for images by MoCo v2",
        citation="Stein et al. 2021 (arXiv:2110.13151); Stein et al. 2022, ApJ 932, 107 (arXiv:2110.00023)",
        marks=r"encoder_q\.",
        towers=lambda source, heads: {"image": _resnet(source, "encoder_q."), "spectrum": NONE},
        renames=(("image_tower.head.", "encoder_q.fc."), ("image_tower.backbone.", "encoder_q.")),
        ignored=r"encoder_k\.|(val_)?queue(_ptr)?$",
    ),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}


def switches(towers: Mapping[str, Any]) -> dict[str, Any]:
    """`tower.name` -> value of every switch of the towers as configured."""
    kinds: dict[str, Any] = {**IMAGE_TOWERS, **SPECTRUM_TOWERS}
    out = {}
    for modality, tower in towers.items():
        if config := kinds.get(tower["kind"]):
            defaults = {field.name: field.default for field in fields(config)}
            out.update({f"{modality}.{name}": tower.get(name, defaults[name]) for name in config.SWITCHES})
    return out
