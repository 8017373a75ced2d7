"""The processor: library types in, tensors on the model's grids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from astroclip.models.configuration import AstroCLIPConfig
from astroclip.preprocess import (
    PREPROCESS_VERSION,
    ImageGrid,
    LinearSpectrumGrid,
    SpectrumGrid,
    image_to_grid,
    spectrum_to_grid,
)
from astroclip.types import Image, Spectrum

__all__ = ["AstroCLIPProcessor"]


class AstroCLIPProcessor(FeatureExtractionMixin):
    """Holds the two grids and the preprocessing version; saved as `preprocessor_config.json`."""

    model_input_names = ["pixel_values", "flux", "ivar"]

    def __init__(
        self,
        image_grid: dict[str, Any] | None = None,
        spectrum_grid: dict[str, Any] | None = None,
        preprocess_version: str = PREPROCESS_VERSION,
        **kwargs: Any,
    ) -> None:
        self.image_grid = asdict(ImageGrid(**(image_grid or {})))
        self.spectrum_grid = asdict(_spectrum_grid(spectrum_grid or {}))
        self.preprocess_version = preprocess_version
        super().__init__(**kwargs)

    @property
    def images(self) -> ImageGrid:
        return ImageGrid(**{**self.image_grid, "bands": tuple(self.image_grid["bands"])})

    @property
    def spectra(self) -> SpectrumGrid:
        return _spectrum_grid(self.spectrum_grid)

    @classmethod
    def for_model(cls, config: AstroCLIPConfig) -> AstroCLIPProcessor:
        """The processor with the grids that a model's towers take; a missing tower's grid stays the default."""
        image, spectrum = config.image_tower, config.spectrum_tower
        return cls(asdict(image.grid) if image else None, asdict(spectrum.grid) if spectrum else None)

    def __call__(self, images: Sequence[Image] = (), spectra: Sequence[Spectrum] = ()) -> BatchFeature:
        """`pixel_values` (N, B, S, S), `flux` and `ivar` (N, L) as float32 tensors, for what was given."""
        data: dict[str, torch.Tensor] = {}
        if images:
            grid = self.images
            data["pixel_values"] = torch.from_numpy(np.stack([image_to_grid(i, grid).pixels for i in images]))
        if spectra:
            placed = [spectrum_to_grid(s, self.spectra) for s in spectra]
            data["flux"] = torch.from_numpy(np.stack([p.flux for p in placed]))
            data["ivar"] = torch.from_numpy(np.stack([p.ivar for p in placed]))
        return BatchFeature(data)


def _spectrum_grid(values: dict[str, Any]) -> SpectrumGrid:
    return LinearSpectrumGrid(**values) if values.get("spacing") == "linear" else SpectrumGrid(**values)
