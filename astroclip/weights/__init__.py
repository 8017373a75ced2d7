"""Published checkpoints to model directories: read without executing them, checked key by key, then safetensors."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from astroclip.errors import InputError
from astroclip.models import AstroCLIPConfig, AstroCLIPModel, AstroCLIPProcessor
from astroclip.weights.card import card
from astroclip.weights.checkpoint import read_checkpoint
from astroclip.weights.kinds import KINDS, Heads, Kind, recognise, switches
from astroclip.weights.source import Source

__all__ = ["KINDS", "Heads", "Imported", "import_weights"]

SHOWN = 40  # names a message lists before it counts the rest
LOGIT_SCALE = "logit_scale"  # of AstroCLIP v1 alone; elsewhere the configuration's


@dataclass(frozen=True)
class Imported:
    """A model directory `path`, the `kind` of file it came from, and `notes` of what was inferred or assumed."""

    path: Path
    kind: str
    notes: tuple[str, ...]


def import_weights(
    file: str | Path,
    out: str | Path,
    *,
    kind: str = "auto",
    heads: Heads | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Imported:
    """Write the checkpoint `file` as a model directory `out`.

    kind:     a name of `KINDS`, or "auto": told from the names of the tensors.
    heads:    numbers of attention heads, where the file does not say and the published ones are wrong.
    settings: switches to set otherwise than published, e.g. {"spectrum.last_slice": True}; words as in a command line
              do as well.

    Raises InputError where the file is damaged, of another kind, lacks keys, has keys or shapes that the kind does not
    have, or where `out` is there already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; wanted a new folder. Choose another one.", code="out_exists")
    checkpoint = read_checkpoint(file)
    source = Source(checkpoint)
    found = _choose(source, kind)
    towers = found.towers(source, heads or Heads())
    if source.missing:
        _refuse_missing(source, found, _names(source, found, _config(found, _outline(towers, source))).values())
    towers = _switched(towers, settings or {})
    config = _config(found, towers)
    model = _filled(source, found, config)
    _publish(model, config, card(found, checkpoint, source, config, switches(towers)), out)
    return Imported(out, found.name, tuple(source.notes))


def _choose(source: Source, wanted: str) -> Kind:
    found = recognise(source)
    if wanted != "auto" and wanted not in KINDS:
        raise InputError(f"kind {wanted!r} is unknown; wanted auto or one of {', '.join(KINDS)}.", code="bad_kind")
    if found is None or wanted not in ("auto", found.name):
        what = f"a checkpoint of kind {found.name}" if found else f"tensors called {_some(list(source.tensors), 4)}"
        raise InputError(
            f"{source.name}: found {what}; wanted {wanted if wanted != 'auto' else ' or '.join(KINDS)}. "
            + ("Leave out --kind, or give the other file." if found else "Give a published checkpoint."),
            code="wrong_kind",
            field="kind",
        )
    return found


def _switched(towers: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    known = switches(towers)
    for name, value in settings.items():
        if name not in known:
            raise InputError(
                f"switch {name!r} is unknown for this kind; wanted one of {', '.join(known)}.", code="bad_switch"
            )
        modality, _, field = name.partition(".")
        towers = {**towers, modality: {**towers[modality], field: _value(name, value, known[name])}}
    return towers


def _value(name: str, value: Any, published: Any) -> Any:
    """`value` in the type of the published one."""
    try:
        if isinstance(published, bool):
            return {"true": True, "false": False}[str(value).lower()]
        return type(published)(value)
    except (KeyError, ValueError) as error:
        wanted = "true or false" if isinstance(published, bool) else f"something like {published}"
        raise InputError(f"switch {name} is {value!r}; wanted {wanted}.", code="bad_switch") from error


def _config(kind: Kind, towers: dict[str, Any]) -> AstroCLIPConfig:
    try:
        config = AstroCLIPConfig(**towers, model_name=kind.name)
    except ValueError as error:
        raise InputError(f"{kind.name}: {error}.", code="bad_switch") from error
    dims = {tower.dim for tower in (config.image_tower, config.spectrum_tower) if tower is not None}
    if len(dims) > 1:
        raise InputError(
            f"The image head gives {config.image_tower.dim} numbers, the spectrum head {config.spectrum_tower.dim}; "
            "wanted the same. The file mixes two models.",
            code="mixed_checkpoint",
        )
    config.projection_dim = dims.pop()
    return config


def _filled(source: Source, kind: Kind, config: AstroCLIPConfig) -> AstroCLIPModel:
    """The model with the file's tensors; every name and shape accounted for."""
    try:
        with torch.device("meta"):
            model = AstroCLIPModel(config)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{source.name}: its tensors make no {kind.name}: {error}.", code="bad_shapes") from error
    wanted = model.state_dict()
    names = _names(source, kind, config)
    _refuse_missing(source, kind, names.values())
    unknown = [n for n in source.tensors if n not in set(names.values()) and not re.match(kind.ignored, n)]
    if unknown:
        raise InputError(
            f"{source.name} has tensors that {kind.name} has no place for: {_some(unknown)}. Without them the numbers "
            "would differ from its own; wanted the published layout.",
            code="unknown_keys",
        )
    wrong = [
        f"{name} {source.tensors[name].shape}, wanted {tuple(wanted[ours].shape)}"
        for ours, name in names.items()
        if source.tensors[name].shape != tuple(wanted[ours].shape)
    ]
    if wrong:
        raise InputError(
            f"{source.name}: {len(wrong)} tensors have shapes that do not fit the others: {_some(wrong)}. "
            "Give the published file.",
            code="bad_shapes",
        )
    state = {ours: source.tensors[name].read().to(wanted[ours].dtype) for ours, name in names.items()}
    state.setdefault(LOGIT_SCALE, torch.tensor(config.logit_scale_init).log())
    model.load_state_dict(state, assign=True)
    return model.eval()


def _names(source: Source, kind: Kind, config: AstroCLIPConfig) -> dict[str, str]:
    """Our name of every entry of the model -> the file's."""
    with torch.device("meta"):
        wanted = AstroCLIPModel(config).state_dict()
    names = {ours: kind.upstream(ours, source) for ours in wanted}
    if LOGIT_SCALE not in source.tensors:
        del names[LOGIT_SCALE]
    return names


def _outline(towers: dict[str, Any], source: Source) -> dict[str, Any]:
    """Towers of the same depth and any widths: they have the names of the entries, where a width cannot be read."""
    any_width = {"embed_dim": 8, "n_heads": 4, "head_heads": 4, "mlp_hidden": 8, "mlp_ratio": 1, "head_hidden": 8}
    any_width |= {"section": 20, "max_tokens": 800, "image_size": 24, "patch": 12, "width": 16, "hidden": 8}
    any_width |= {"projection": 16, "head_width": 16}
    out = {}
    for modality, tower in towers.items():
        out[modality] = {name: any_width.get(name, value) for name, value in tower.items()}
        if "head_hidden" not in tower and "head_width" in tower:
            out[modality]["head_width"] = 0
        fused = [name for name in source.tensors if name.startswith(modality) and name.endswith("attn.in_proj_weight")]
        if fused:  # where the head is as wide as the tokens, its attention has one projection and not three
            out[modality]["embed_dim"] = 16
    return out


def _refuse_missing(source: Source, kind: Kind, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise InputError(
            f"{source.name} lacks {len(missing)} of the tensors of {kind.name}: {_some(missing)}. Wanted all of them; "
            "download the file again, or give the whole checkpoint.",
            code="missing_keys",
        )


def _some(names: list[str], shown: int = SHOWN) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _publish(model: AstroCLIPModel, config: AstroCLIPConfig, text: str, out: Path) -> None:
    """Written aside, synced and renamed: `out` is there whole or not at all."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(aside, max_shard_size="1TB")  # one file, as the embedder wants it
        AstroCLIPProcessor.for_model(config).save_pretrained(aside)
        (aside / "README.md").write_text(text, encoding="utf-8")
        for path in aside.iterdir():
            path.chmod(0o644)  # `save_pretrained` leaves the weights to their owner; who serves may be another
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
