"""Questions with known answers: to the model, inputs made of arithmetic, which need no file and never change; to an
index, its own objects, which must find themselves."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from astroclip.errors import IndexFileError
from astroclip.types import MODALITIES, Image, Modality, Spectrum

if TYPE_CHECKING:
    from index import SurveyIndex

__all__ = ["canary", "canary_image", "canary_spectrum", "find_themselves"]

_ASKED = 16  # objects of each modality: a broken table fails the first, a file of backends mixed up most of them


def canary(modality: Modality) -> Image | Spectrum:
    """The known input of a modality."""
    return canary_spectrum() if modality == "spectrum" else canary_image()


@cache
def canary_image() -> Image:
    """A round galaxy of 2 arcsec: 152 x 152 pixels of 0.262 arcsec in g, r, z, nanomaggies, no noise."""
    y, x = np.mgrid[:152, :152] - 75.5
    profile = np.exp(-np.hypot(x, y) * 0.262 / 2.0)
    pixels = np.stack([total * profile for total in (0.05, 0.1, 0.15)]).astype(np.float32)
    return Image(pixels, np.zeros(pixels.shape, bool), ("g", "r", "z"), 0.262)


@cache
def canary_spectrum() -> Spectrum:
    """A galaxy-like spectrum at z = 0.1: 3600-9824 A in steps of 0.8 A, 1e-17 erg/s/cm2/A, S/N about 10, no noise."""
    wave = np.linspace(3600.0, 9824.0, 7781)
    rest = wave / 1.1
    flux = 5.0 * np.where(rest < 4000.0, 0.6, 1.0) * (rest / 5000.0) ** -0.3
    for line, height in ((3728.5, 8.0), (4862.7, 5.0), (5008.2, 9.0), (6564.6, 15.0)):
        flux = flux + height * np.exp(-0.5 * ((rest - line) / 2.0) ** 2)
    ivar = np.full(wave.size, 4.0, np.float32)
    return Spectrum(wave, flux.astype(np.float32), ivar, np.zeros(wave.size, bool))


def find_themselves(index: SurveyIndex) -> None:
    """Some objects of each modality are looked up by their own vectors. Raises IndexFileError (`canary_failed`).

    Exact search must find every one; what the planner chooses, which may be a graph, at least half. One that shares its
    vector with others need not come first: its score counts.
    """
    for modality in MODALITIES:
        table = index.tables[modality]
        slots = np.unique(np.linspace(0, len(table) - 1, min(_ASKED, len(table))).astype(np.int64))
        if not len(slots):
            continue
        queries = table.take(slots)
        for mode, least in (("exact", len(slots)), (None, (len(slots) + 1) // 2)):
            hits, _ = index.search(queries, target=modality, k=1, query_modality=modality, mode=mode)
            found = sum(bool(len(hit)) and float(hit.scores[0]) > 1.0 - 1e-3 for hit in hits)
            rows = sum(
                bool(len(hit)) and int(hit.rows[0]) == int(table.rows[s]) for hit, s in zip(hits, slots, strict=True)
            )
            if found < least or not rows:
                raise IndexFileError(
                    f"index {index.index_id!r}: {found} of {len(slots)} of its own objects were found by their "
                    f"{modality} vectors ({mode or 'as planned'}); wanted {least} or more; rebuild the index",
                    code="canary_failed",
                    field=f"vectors-{modality}.npy",
                )
