"""What crosses the library's borders: images, spectra, their quality, and embeddings.

Conventions, everywhere in the project:

* ``mask``: True marks a *bad* pixel.
* Images: nanomaggies per pixel (AB magnitude = 22.5 - 2.5 log10 flux), axes (band, y, x).
* Spectra: vacuum wavelengths in Angstrom, observed frame; flux density in 1e-17 erg/s/cm2/A;
  ``ivar`` in the inverse square of that, 0 where nothing is known.
* Positions: degrees, ICRS.

All types are frozen; a step that changes one returns a new one (`dataclasses.replace`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = [
    "MODALITIES",
    "Embedding",
    "Flag",
    "Image",
    "Modality",
    "Quality",
    "Spectrum",
]

Modality = Literal["image", "spectrum"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Flag:
    """One remark about an input or an answer: a stable `code` and a sentence a person understands."""

    code: str
    message: str


@dataclass(frozen=True)
class Quality:
    """How good an input is, as found by the reader and the preprocessing.

    masked_fraction: bad pixels / all pixels, 0..1.
    snr:             spectrum: median flux * sqrt(ivar) over good pixels; image: total signal-to-noise of the
                     central source in the reference band; None where the noise is not known.
    coverage:        fraction of the model's wavelength range (spectrum) or field (image) that holds good data;
                     None until preprocessing has put the input on the model's grid.
    flags:           remarks, in the order they were found.
    statistics:      numbers of `astroclip.preprocess.statistics` that tell a galaxy from noise; empty until on the
                     grid.
    """

    masked_fraction: float = 0.0
    snr: float | None = None
    coverage: float | None = None
    flags: tuple[Flag, ...] = ()
    statistics: tuple[float, ...] = ()

    def with_flags(self, *flags: Flag) -> Quality:
        """The same quality with further flags; a code already present is not repeated."""
        known = {flag.code for flag in self.flags}
        return replace(self, flags=self.flags + tuple(flag for flag in flags if flag.code not in known))


@dataclass(frozen=True)
class Image:
    """A multi-band image.

    pixels:             (B, H, W) float32, nanomaggies per pixel; finite (bad pixels hold 0 and are masked).
    mask:               (B, H, W) bool, True = bad.
    bands:              B lower-case names, e.g. ("g", "r", "z"), in the order of `pixels`.
    pixel_scale_arcsec: side of a pixel, arcsec.
    calibrated:         False for display pictures (PNG, JPEG) whose fluxes are only estimated from colours.
    object_id, ra, dec: identity and ICRS position (deg) of the centre where the file gives them.
    """

    pixels: FloatArray
    mask: BoolArray
    bands: tuple[str, ...]
    pixel_scale_arcsec: float
    calibrated: bool = True
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    quality: Quality = field(default_factory=Quality)

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape != self.mask.shape:
            raise ValueError(f"pixels {self.pixels.shape} and mask {self.mask.shape} must both be (B, H, W)")
        if len(self.bands) != self.pixels.shape[0]:
            raise ValueError(f"{len(self.bands)} band names for {self.pixels.shape[0]} planes")

    def without_data(self) -> Image:
        """All but the pixels: an image of no size that holds no memory."""
        none = np.zeros((len(self.bands), 0, 0), np.float32)
        return replace(self, pixels=none, mask=none.astype(bool))


@dataclass(frozen=True)
class Spectrum:
    """A one-dimensional spectrum.

    wave:  (L,) float64, Angstrom, vacuum, observed frame, strictly increasing.
    flux:  (L,) float32, 1e-17 erg/s/cm2/A; finite (bad pixels hold 0 and are masked).
    ivar:  (L,) float32, inverse variance of `flux`; 0 where masked.
    mask:  (L,) bool, True = bad.
    object_id, ra, dec: identity and ICRS position (deg) where the file gives them.
    redshift: the catalogue's value where the file carries one; never shown to a model, used in evaluation only.
    """

    wave: npt.NDArray[np.float64]
    flux: FloatArray
    ivar: FloatArray
    mask: BoolArray
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    redshift: float | None = None
    quality: Quality = field(default_factory=Quality)

    def __post_init__(self) -> None:
        shape = self.wave.shape
        if len(shape) != 1 or any(a.shape != shape for a in (self.flux, self.ivar, self.mask)):
            raise ValueError("wave, flux, ivar and mask must be one-dimensional and of one length")

    def without_data(self) -> Spectrum:
        """All but the samples: a spectrum of no length that holds no memory."""
        none = np.zeros(0, np.float32)
        return replace(self, wave=np.zeros(0), flux=none, ivar=none, mask=none.astype(bool))


@dataclass(frozen=True)
class Embedding:
    """A point in the shared space: `vector` (D,) float32 of unit norm, and where it came from."""

    vector: FloatArray
    modality: Modality
    model_sha256: str
