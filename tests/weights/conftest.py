"""Published-layout checkpoints: the parity files where they are, and synthetic ones of any size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from astroclip.types import Image, Spectrum

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of upstream's outputs; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ASTROCLIP_SHARED", REPOSITORY.parent / "shared")) / "parity"
    if not folder.is_dir():
        pytest.skip("parity files not present (set ASTROCLIP_SHARED to the folder that holds parity/)")
    return folder


@pytest.fixture(scope="session")
def sky(parity: Path) -> SimpleNamespace:
    """`images` and `spectra`: the inputs of the parity files as the library's types; `flux`, `grz`: as arrays."""
    arrays = np.load(parity / "inputs.npz", allow_pickle=False)
    flux, grz = arrays["spectrum"][:, :, 0], arrays["image_grz"]
    wave = np.linspace(3600, 9824, 7781)
    good, known = np.zeros(7781, bool), np.ones(7781, np.float32)
    return SimpleNamespace(
        images=[Image(p, np.zeros(p.shape, bool), ("g", "r", "z"), 0.262) for p in grz],
        spectra=[Spectrum(wave, f, known, good) for f in flux],
        flux=flux,
        grz=grz,
    )


@pytest.fixture(scope="session")
def load(parity: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """load(file, **switches) -> Embedder, by the public path: import, from_pretrained."""
    from astroclip.embed import Embedder
    from astroclip.weights import import_weights

    def loaded(file: str, **switches: Any) -> Embedder:
        settings = {name.replace("__", "."): value for name, value in switches.items()}
        made = import_weights(parity / file, tmp_path_factory.mktemp("import") / "model", settings=settings)
        return Embedder.from_pretrained(made.path, device="cpu")

    return loaded


@pytest.fixture(scope="session")
def outputs(parity: Path) -> Callable[[str], Any]:
    return lambda name: np.load(parity / f"{name}.npz", allow_pickle=False)
