"""The small survey and model of the campaigns that need no more: built and served in seconds, all real code.

Vectors come from `tests/parts_fixture.py`; the model is the preset `tiny` with seeded weights, and the parts name its
checksum, so a server may serve both together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from astroclip.preprocess import PREPROCESS_VERSION

__all__ = ["DIM", "parts", "previews", "tiny_model"]

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # fixtures of the tests are this survey, too

DIM = 16  # of the tiny preset


def parts(folder: Path, count: int, *, prefix: str, seed: int, sha256: str, per_part: int = 250) -> None:
    """Embedding parts of `count` objects named `prefix`-000000 and so on, of the model with `sha256`."""
    from parts_fixture import write_parts

    assert PREPROCESS_VERSION == "1", "parts_fixture writes version 1"
    write_parts(folder, count, seed=seed, dim=DIM, sha=sha256, prefix=prefix, per_part=per_part)


def tiny_model(folder: Path) -> str:
    """Write the model directory; the SHA-256 of its weights."""
    import torch

    from astroclip.models import AstroCLIPConfig, AstroCLIPModel, AstroCLIPProcessor
    from index.manifest import sha256_file

    torch.manual_seed(7)
    config: Any = AstroCLIPConfig.preset("tiny")
    AstroCLIPModel(config).eval().save_pretrained(folder)
    AstroCLIPProcessor.for_model(config).save_pretrained(folder)
    return sha256_file(folder / "model.safetensors")


def previews(folder: Path, ids: list[str]) -> None:
    """Survey shards with pictures and spectra of the objects `ids`, to take previews from."""
    from parts_fixture import write_shard

    write_shard(folder, ids)
