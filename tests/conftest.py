"""Fixtures shared by every suite."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real survey files; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("ASTROCLIP_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not root.is_dir():
        pytest.skip("real survey data not present (set ASTROCLIP_SHARED to the folder that holds data/)")
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with seeded random weights, 16-d: the real code paths at a hundredth of the cost."""
    import torch

    from astroclip.models import AstroCLIPConfig, AstroCLIPModel, AstroCLIPProcessor

    torch.manual_seed(7)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    AstroCLIPModel(AstroCLIPConfig.preset("tiny")).eval().save_pretrained(directory)
    AstroCLIPProcessor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_embedder(tiny_model_dir: Path):  # type: ignore[no-untyped-def]
    from astroclip.embed import Embedder

    return Embedder.from_pretrained(tiny_model_dir)
