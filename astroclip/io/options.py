"""What a caller may state about a file that the file itself does not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ImageOptions", "SpectrumOptions"]


@dataclass(frozen=True)
class ImageOptions:
    """Overrides for images; None means "as the file says, else the default, with a flag".

    bands:              names of the planes in file order, e.g. ("g", "r", "z").
    pixel_scale_arcsec: side of a pixel, arcsec.
    """

    bands: tuple[str, ...] | None = None
    pixel_scale_arcsec: float | None = None


@dataclass(frozen=True)
class SpectrumOptions:
    """Overrides for spectra; None means "as the file says, else the default, with a flag".

    wave_unit: "Angstrom", "nm", "um", "m" or "log10(Angstrom)".
    flux_unit: e.g. "1e-17 erg/s/cm2/A", "erg/s/cm2/A", "W/m2/um", "mJy".
    medium:    what the wavelengths are measured in.
    target:    id, or index from 0, of the one object wanted from a file of several.
    keep_empty: of a file of several, return targets without any good sample too (all masked, flag
                `zero_ivar`) instead of leaving them out with a flag on the others; for jobs that must not
                lose a row.
    """

    wave_unit: str | None = None
    flux_unit: str | None = None
    medium: Literal["air", "vacuum"] | None = None
    target: str | int | None = None
    keep_empty: bool = False
