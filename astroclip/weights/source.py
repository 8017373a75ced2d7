"""The tensors of a checkpoint and what can be told from them: widths, depths, numbers of heads."""

from __future__ import annotations

import re
from collections import deque

from astroclip.errors import InputError
from astroclip.weights.checkpoint import Checkpoint, Foreign, StoredTensor

__all__ = ["Source"]


class Source:
    """`tensors`: state dict of the file, by upstream's names; `settings`: its hyper-parameters, if it has any.

    missing: names that were asked for and are not there. notes: what was inferred and what had to be assumed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.name = checkpoint.name
        self.tensors = _state_dict(checkpoint)
        data = checkpoint.data
        self.settings = data.get("hyper_parameters") if isinstance(data, dict) else None
        self.missing: list[str] = []
        self.notes: list[str] = []

    def size(self, *places: tuple[str, int]) -> int:
        """Length of an axis, from the first of several (name, axis) that is there; where none is, 0 and a miss."""
        for name, axis in places:
            tensor = self.tensors.get(name)
            if tensor is not None and axis < len(tensor.shape):
                return tensor.shape[axis]
        self.missing += [name for name, _ in places]
        return 0

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's only group finds among the names."""
        found = [int(match[1]) for name in self.tensors if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1

    def setting(self, key: str, owner: str = "", within: str | None = None) -> int | None:
        """A positive whole number called `key` in the hyper-parameters, in an object whose class ends in `owner`.

        within: look at this entry of the hyper-parameters alone.
        """
        start = self.settings
        if within is not None:
            entries = start.items if isinstance(start, Foreign) else start
            start = entries.get(within) if isinstance(entries, dict) else None
        todo, seen = deque([start]), set()
        while todo:
            item = todo.popleft()
            if id(item) in seen:
                continue
            seen.add(id(item))
            values = [item.items, item.state] if isinstance(item, Foreign) else [item]
            if not owner or (isinstance(item, Foreign) and item.name.endswith(owner)):
                for value in values:
                    if isinstance(value, dict) and type(value.get(key)) is int and value[key] > 0:
                        return int(value[key])
            for value in values:
                if isinstance(value, dict):
                    todo.extend(v for v in value.values() if isinstance(v, dict | list | tuple | Foreign))
                elif isinstance(value, list | tuple):
                    todo.extend(v for v in value if isinstance(v, dict | list | tuple | Foreign))
        return None

    def heads(self, what: str, width: int, published: int, found: int | None, given: int | None) -> int:
        """Attention heads, which no tensor shows: as given, as the file says, or as published (4 if that is none)."""
        if given:
            heads, how = given, "as given"
        elif found:
            heads, how = found, "from the hyper-parameters in the file"
        else:
            heads, how = published or 4, "ASSUMED as published: the file does not say"
        if width % heads:
            raise InputError(
                f"{what}: {heads} heads ({how}) do not divide the width {width}. Give their number with "
                f"`--{what.split()[0]}-heads`.",
                code="bad_heads",
            )
        self.notes.append(f"{what}: {heads} heads, {how}")
        return heads


def _state_dict(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """A Lightning file's `state_dict`, a DINOv2 file's `teacher`, or the file itself; wrappers' prefixes taken off."""
    data = checkpoint.data
    if isinstance(data, dict):
        for entry in ("state_dict", "teacher", "model"):
            if isinstance(data.get(entry), dict):
                data = data[entry]
                break
    tensors = data if isinstance(data, dict) else {}
    found = {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, StoredTensor)
    }
    if not found:
        what = ", ".join(map(str, list(tensors)[:8])) or type(data).__name__
        raise InputError(
            f"{checkpoint.name} holds no weights: found {what}; wanted a `state_dict`, or a DINOv2 `teacher`. Give the "
            "checkpoint itself, not an optimizer's or a scheduler's file.",
            code="no_weights",
        )
    return found
