"""From a readable object to the model's grid: pure numpy, versioned, no torch.

Nothing is normalised here: the grid still holds nanomaggies and 1e-17 erg/s/cm2/A. The colour mapping and the
spectrum's scaling live in the model's forward pass (`astroclip.models`), so training, serving and a published
checkpoint share one definition of both.

`PREPROCESS_VERSION` changes whenever the numbers on the grid change; it is written beside every embedding and
every index, and a mismatch is refused.
"""

from astroclip.preprocess.image import GridImage, ImageGrid, image_to_grid
from astroclip.preprocess.spectrum import (
    GridSpectrum,
    LinearSpectrumGrid,
    SpectrumGrid,
    overlap_matrix,
    rebin,
    spectrum_to_grid,
)

PREPROCESS_VERSION = "1"

__all__ = [
    "PREPROCESS_VERSION",
    "GridImage",
    "GridSpectrum",
    "ImageGrid",
    "LinearSpectrumGrid",
    "SpectrumGrid",
    "image_to_grid",
    "overlap_matrix",
    "rebin",
    "spectrum_to_grid",
]
