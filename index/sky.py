"""Positions on the sky: parsing what people type, distances, and finding catalogue rows in a cone.

All angles in degrees, ICRS; RA in [0, 360). Distances are chords of unit vectors in float64, exact to about 1e-10
arcsec near zero and right at the poles and across RA 0 (arccos of a dot product would lose 1e-8 rad).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError

__all__ = ["SkyIndex", "check_position", "parse_position", "separation_deg", "unit_vectors"]

Degrees = npt.NDArray[np.float64]

_NSIDE = 64  # pixels of 0.9 deg: a cone of arc-minutes meets about four of them
_PIXEL_DEG = 1.9  # no point of such a pixel lies further than this from another of it (measured 1.6)
_WIDE_DEG = 10.0  # cones wider than this look at every row: cheaper than listing pixels
_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_SEXAGESIMAL = re.compile(rf"([+-]?)(\d+)(?:[hd°:\s]\s*)(\d+)(?:(?:[m′':\s]\s*)({_NUMBER})?)?[s″\"]?", re.IGNORECASE)


def parse_position(text: str) -> tuple[float, float]:
    """(ra, dec) in degrees of "188.7 -0.2", "188.7, -0.2", "12:34:56 -00:12:34" or "12h34m56s -0d12m34s".

    A sexagesimal right ascension is in hours, a decimal one in degrees. The sign of "-00:12:34" is kept.
    Raises InputError (code "bad_position").
    """
    parts = _halves(text.strip().replace("\u2212", "-"))
    if parts is None:
        raise _bad(text)
    ra_text, dec_text = parts
    sexagesimal = _SEXAGESIMAL.fullmatch(ra_text) is not None
    ra, dec = _angle(ra_text, text) * (15.0 if sexagesimal else 1.0), _angle(dec_text, text)
    return check_position(ra, dec)


def check_position(ra: float, dec: float) -> tuple[float, float]:
    """The position with RA brought into [0, 360). Raises InputError for what is not on the sky."""
    if not (math.isfinite(ra) and math.isfinite(dec) and -360.0 <= ra <= 360.0 and -90.0 <= dec <= 90.0):
        raise InputError(
            f"position ra={ra}, dec={dec} is not on the sky; wanted ra in 0..360 and dec in -90..90 degrees (ICRS); "
            "check the order and the units",
            code="bad_position",
            field="position",
        )
    return ra % 360.0 % 360.0, dec  # twice: -1e-20 % 360 is 360.0


def unit_vectors(ra: npt.ArrayLike, dec: npt.ArrayLike) -> Degrees:
    """(..., 3) float64 unit vectors of positions in degrees."""
    lon, lat = np.radians(np.asarray(ra, np.float64)), np.radians(np.asarray(dec, np.float64))
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def separation_deg(ra: npt.ArrayLike, dec: npt.ArrayLike, ra0: float, dec0: float) -> Degrees:
    """Great-circle distance (deg) of positions from (ra0, dec0)."""
    chord = np.linalg.norm(unit_vectors(ra, dec) - unit_vectors(ra0, dec0), axis=-1)
    return np.degrees(2.0 * np.arcsin(np.minimum(chord / 2.0, 1.0)))


class SkyIndex:
    """Catalogue rows ordered by HEALPix pixel, so that a cone looks only at the pixels it meets.

    ra, dec: (N,) float64 degrees; NaN = no position, never found.
    """

    def __init__(self, ra: Degrees, dec: Degrees) -> None:
        self._ra, self._dec = ra, dec
        known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
        pixels = healpix(ra[known], dec[known], _NSIDE)
        order = np.argsort(pixels, kind="stable")
        self._pixels, self._rows = pixels[order], known[order]

    def cone(self, ra: float, dec: float, radius_deg: float) -> npt.NDArray[np.int64]:
        """Rows within `radius_deg` (inclusive) of a position, nearest first. Raises InputError."""
        ra, dec = check_position(ra, dec)
        if not 0.0 <= radius_deg <= 180.0:
            raise InputError(
                f"radius {radius_deg} deg; wanted 0..180 degrees; mend the radius",
                code="bad_radius",
                field="radius_deg",
            )
        rows = self._candidates(ra, dec, radius_deg)
        distance = separation_deg(self._ra[rows], self._dec[rows], ra, dec)
        inside = distance <= radius_deg
        rows, distance = rows[inside], distance[inside]
        return rows[np.lexsort((rows, distance))]

    def _candidates(self, ra: float, dec: float, radius_deg: float) -> npt.NDArray[np.int64]:
        if radius_deg > _WIDE_DEG or not len(self._rows):
            return self._rows
        from astropy import units
        from astropy_healpix import HEALPix

        reach = (radius_deg + _PIXEL_DEG) * units.deg
        grid = HEALPix(_NSIDE, order="nested")
        pixels = np.sort(grid.cone_search_lonlat(ra * units.deg, dec * units.deg, reach))
        starts = np.searchsorted(self._pixels, pixels, side="left")
        stops = np.searchsorted(self._pixels, pixels, side="right")
        filled = stops > starts
        pieces = [self._rows[a:b] for a, b in zip(starts[filled], stops[filled], strict=True)]
        return np.concatenate(pieces) if pieces else self._rows[:0]


def healpix(ra: Degrees, dec: Degrees, nside: int) -> npt.NDArray[np.int64]:
    """Nested HEALPix pixel of positions in degrees."""
    from astropy import units
    from astropy_healpix import lonlat_to_healpix

    pixels: Any = lonlat_to_healpix(ra * units.deg, dec * units.deg, nside, order="nested")
    return np.asarray(pixels, np.int64)


def _halves(text: str) -> tuple[str, str] | None:
    """Split into right ascension and declination: at a comma, at a sign, or in the middle of the words."""
    if "," in text:
        parts = [part.strip() for part in text.split(",")]
        return (parts[0], parts[1]) if len(parts) == 2 else None
    signed = re.fullmatch(r"(\S.*?)\s*(?<![eE])([+-].*)", text)
    if signed:
        return signed[1].strip(), signed[2].strip()
    words = text.split()
    if len(words) < 2 or len(words) % 2:
        return None
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def _angle(part: str, whole: str) -> float:
    found = _SEXAGESIMAL.fullmatch(part)
    if found is None:
        try:
            return float(part.rstrip("°"))
        except ValueError:
            raise _bad(whole) from None
    minutes, seconds = float(found[3]), float(found[4] or 0.0)
    if minutes >= 60.0 or seconds >= 60.0:
        raise _bad(whole)
    value = float(found[2]) + minutes / 60.0 + seconds / 3600.0
    return -value if found[1] == "-" else value


def _bad(text: str) -> InputError:
    return InputError(
        f"{text[:80]!r} is not a position; wanted degrees (188.7 -0.2) or hours and degrees (12:34:48 -00:12:00), "
        "ICRS; give right ascension, then declination",
        code="bad_position",
        field="position",
    )
