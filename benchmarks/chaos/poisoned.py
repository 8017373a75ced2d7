"""A server whose model fails on marked objects, as a device fault or a kernel bug would: for the campaign `poison`.

The mark is the first number of the grid, MARK; ASTROCLIP_FAULT says what it does:

    early   the forward pass raises before any work was done, as a shape or index error does
    late    it raises when all the work was done, as an asynchronous device error does
    nan     the object's vector comes out as NaN, and the others' are good
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from astroclip.embed import Embedder

__all__ = ["MARK", "main", "marked"]

MARK = 1234.5  # exact in float32, and no galaxy's


def marked(grid: Any) -> bool:
    values = grid.flux if hasattr(grid, "flux") else grid.pixels
    return bool(values.flat[0] == np.float32(MARK))


def main() -> None:
    """The `astroclip` command over a model that can fail."""
    fault, whole = os.environ["ASTROCLIP_FAULT"], Embedder._encode_batch

    def failing(self: Embedder, batch: Sequence[Any]) -> Any:
        bad = [i for i, grid in enumerate(batch) if marked(grid)]
        if bad and fault == "early":
            raise RuntimeError("injected fault")
        vectors = whole(self, batch)  # type: ignore[arg-type]
        if bad and fault == "late":
            raise RuntimeError("injected fault")
        if bad and fault == "nan":
            vectors[bad] = np.nan
        return vectors

    Embedder._encode_batch = failing  # type: ignore[method-assign, assignment]
    from astroclip.cli import main as command

    command()
