"""The card of an imported model: what it is, where it came from, what was read off it, how it has to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from astroclip.models import AstroCLIPConfig
from astroclip.preprocess import PREPROCESS_VERSION
from astroclip.weights.checkpoint import Checkpoint
from astroclip.weights.kinds import Kind
from astroclip.weights.source import Source

__all__ = ["card"]


def card(
    kind: Kind, checkpoint: Checkpoint, source: Source, config: AstroCLIPConfig, switches: Mapping[str, Any]
) -> str:
    """The text of README.md."""
    image, spectrum = config.image_tower, config.spectrum_tower
    takes = []
    if image is not None:
        grid = image.grid
        takes.append(
            f"images of {grid.size} x {grid.size} pixels of {grid.pixel_scale_arcsec} arcsec, bands "
            f"{', '.join(grid.bands)}, nanomaggies; colour mapping `{image.colours}` inside the model"
        )
    if spectrum is not None:
        grid = spectrum.grid
        takes.append(
            f"spectra of {grid.n_pixels} pixels, {grid.wave_min:g} to {grid.wave_max:g} Angstrom (vacuum, observed "
            "frame) in equal steps, 1e-17 erg/s/cm2/A"
        )
    foreign = f"{len(checkpoint.foreign)} classes named in it, none loaded" if checkpoint.foreign else "tensors alone"
    return "\n".join(
        [
            "---",
            "library_name: astroclip",
            f"tags: [astronomy, galaxies, embedding, {kind.name}]",
            "---",
            "",
            f"# {kind.name}",
            "",
            f"{kind.title}. Imported from a published checkpoint by `astroclip weights import`; the weights are those "
            "of the file, in float32.",
            "",
            "## Origin",
            "",
            f"* File: `{checkpoint.name}`, {checkpoint.size} bytes, SHA-256 `{checkpoint.sha256}`",
            f"* Read without executing anything in it: {foreign}",
            f"* Cite: {kind.citation}",
            "* Licence: the publisher's; see where the file came from.",
            "",
            "## Read off the tensors",
            "",
            *(f"* {note}" for note in source.notes),
            f"* embeddings of {config.projection_dim} numbers, unit norm as the library gives them",
            "",
            "## Input",
            "",
            *(f"* {line}" for line in takes),
            f"* preprocessing version {PREPROCESS_VERSION}; the grids are in `preprocessor_config.json`",
            "",
            "## Switches",
            "",
            "As set here; `docs/weights.md` says what each changes.",
            "",
            *(f"* `{name}`: {value}" for name, value in switches.items()),
            "",
        ]
    )
