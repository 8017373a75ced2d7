"""Doubts about an input: flags for what a model can take but was not trained on, or that says little.

Every threshold is a constant with its reason. The flags of what a file itself states (units, bands, saturation of a
picture) are made by the readers; those of the grid (`resampled`, `wavelength_coverage`) where it is filled.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from astroclip.medians import chosen_pixels, level_and_noise
from astroclip.types import Flag, Image

__all__ = ["image_doubts", "spectrum_doubts"]

Pixels = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]

# A 5 sigma detection. On the held-out simulated images fainter than it (16 %), neighbours miss the redshift of two in
# three by more than 0.05 (1 + z); of one in five above 20 sigma.
MIN_IMAGE_SNR = 5.0
# A pixel of the grid. On the held-out simulated spectra below it (5 %), neighbours miss the redshift of one in ten by
# more than 0.05 (1 + z); of one in forty above.
MIN_SPECTRUM_SNR = 0.5
# Among 6,000 simulated objects, with the masks of a survey, 2 images and no spectrum exceed it.
MAX_MASKED = 0.1
# Coarser than half the seeing of 1.1" the pixels undersample what ground-based training images resolve; finer than
# 0.1" is sharper than they are (space), or empty magnification.
MIN_TRAINED_SCALE, MAX_TRAINED_SCALE = 0.09, 0.55
# Training moves galaxies by up to 7 pixels of the grid. A significant source elsewhere and none within that of the
# centre: the cutout shows something else than it is about. 3 of 6,000 held-out simulated images do.
CENTRE_PIXELS = 7.0
NOTHING, SOMETHING = 5.0, 20.0  # sigma of 5 x 5 pixels, all bands
# Pixels of one band that share its largest value exactly: noise never does that, a full well or a clipped
# converter does.
PLATEAU_PIXELS = 4


def image_doubts(image: Image, pixels: Pixels, valid: Valid, snr: float | None) -> list[Flag]:
    """Flags of an image: `image` as read, `pixels` and `valid` (B, S, S) on the grid, `snr` of its source."""
    flags = _masked(image.quality.masked_fraction, "image")
    if snr is not None and snr < MIN_IMAGE_SNR:
        flags.append(
            Flag(
                "low_snr",
                f"The source at the centre has a signal-to-noise of {snr:.1f}; below {MIN_IMAGE_SNR:g} its embedding "
                "is mostly noise.",
            )
        )
    scale = image.pixel_scale_arcsec
    if not MIN_TRAINED_SCALE <= scale <= MAX_TRAINED_SCALE:
        flags.append(
            Flag(
                "pixel_scale",
                f'Pixels of {scale:.3g}" lie outside the {MIN_TRAINED_SCALE:g}" to {MAX_TRAINED_SCALE:g}" of images '
                "like those the model was trained on; sharpness and sizes may mislead it.",
            )
        )
    plateau = [band for band, plane in zip(image.bands, image.pixels, strict=True) if image.calibrated and _flat(plane)]
    if plateau:
        message = f"The brightest pixels of {', '.join(plateau)} share one value: they look saturated or clipped."
        flags.append(Flag("saturated", message))
    away = _elsewhere(pixels, valid)
    if away is not None:
        flags.append(
            Flag(
                "off_centre",
                f"Nothing stands out at the centre, but a bright source {away:.0f} grid pixels from it; the model "
                "describes what is at the centre.",
            )
        )
    return flags


def spectrum_doubts(masked_fraction: float, snr: float) -> list[Flag]:
    """Flags of a spectrum: `masked_fraction` as read, `snr` its median signal-to-noise a grid pixel."""
    flags = _masked(masked_fraction, "spectrum")
    if snr < MIN_SPECTRUM_SNR:
        flags.append(
            Flag(
                "low_snr",
                f"The median signal-to-noise is {snr:.2f} a grid pixel; below {MIN_SPECTRUM_SNR:g} redshifts fail "
                "several times as often.",
            )
        )
    return flags


def _masked(fraction: float, what: str) -> list[Flag]:
    if fraction <= MAX_MASKED:
        return []
    return [
        Flag(
            "masked_fraction",
            f"{fraction:.0%} of the {what} is masked; hardly an object of the training had more than {MAX_MASKED:.0%}.",
        )
    ]


def _flat(plane: Pixels) -> bool:
    """Do the brightest pixels share one value, above what else there is?"""
    top = plane.max()
    return bool(top > 0 and np.count_nonzero(plane == top) >= PLATEAU_PIXELS)


@lru_cache(maxsize=4)
def _radius(size: int) -> npt.NDArray[np.float64]:
    """(S, S) distance from the centre, pixels."""
    axis = np.arange(size) - (size - 1) / 2
    return np.asarray(np.hypot(axis, axis[:, None]))


def _elsewhere(pixels: Pixels, valid: Valid) -> float | None:
    """Distance from the centre, grid pixels, of the brightest source where the centre itself is empty; else None."""
    radius = _radius(pixels.shape[-1])
    levels: list[float] = []
    noises: list[float] = []
    for known in chosen_pixels(pixels, valid):
        if not known.size:
            return None
        level, noise = level_and_noise(known)
        levels.extend(level)
        noises.extend(noise)
    if min(noises) <= 0:
        return None
    with np.errstate(over="ignore"):  # of values that no survey has; the model's answer is looked at for them
        above = (pixels - _column(levels)) / _column(noises)
    stacked = (above if valid.all() else np.where(valid, above, 0)).sum(axis=0, dtype=np.float64)
    # The centre alone first: with most images that settles it. The margin is what the window of 5 pixels reaches.
    middle = slice(edge := max(int(len(stacked) / 2 - CENTRE_PIXELS) - 2, 0), len(stacked) - edge)
    centre = _smoothed(stacked[middle, middle], len(pixels))[radius[middle, middle] <= CENTRE_PIXELS]
    if centre.max() >= NOTHING:
        return None
    smoothed = _smoothed(stacked, len(pixels))
    brightest = np.unravel_index(np.argmax(smoothed), smoothed.shape)
    return float(radius[brightest]) if smoothed[brightest] >= SOMETHING else None


def _column(of_bands: list[float]) -> Pixels:
    """(B, 1, 1) numbers of the bands of an image."""
    return np.array(of_bands, dtype=np.float32).reshape(-1, 1, 1)


def _smoothed(stacked: npt.NDArray[np.float64], n_bands: int) -> npt.NDArray[np.float64]:
    """Sigma of 5 x 5 pixels of the sum of `n_bands` planes in units of their own sigma."""
    return np.asarray(ndimage.uniform_filter(stacked, 5) * 5 / np.sqrt(n_bands))
