"""Spectra as text: CSV, TSV or white space, with comment lines that may state units and medium.

    # wavelength unit: nm, air                     comment lines before or between the rows
    # flux unit: 1e-17 erg/s/cm2/A
    wave,flux,ivar                                 names as in `astroclip.io.columns`; "wave [nm]" states a
    unit 3600.0,1.23,4.5

Without a line of names, two to four columns are taken as wave, flux, ivar, mask (flag `assumed_columns`).
ECSV headers (astropy) are comment lines and their units are read.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import numpy.typing as npt

from astroclip.io.columns import implied_unit, medium_of, role_of, split_unit
from astroclip.io.formats import decode_text
from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import over_limit, refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.io.units import is_wave_unit
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Spectrum

__all__ = ["header_names", "spectrum_from_text"]

_MISSING = {"", "nan", "null", "none", "--", "na", "n/a", "inf", "-inf", "+inf"}
_TRUE = {"true": "1", "false": "0", "t": "1", "f": "0"}
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines
_COMMENT_CHARS = 512  # of a comment that are searched for units; white space is one blank in them
_STATEMENTS, _WORDS = 16, 8  # comments that seem to state one unit, and words of one, that are tried as units
_ORDER = ("wave", "flux", "ivar", "mask")
_ECSV = re.compile(r"\{\s*name:\s*([^,}]+?)\s*,\s*(?:unit:\s*([^,}]+?)\s*,)?")


def header_names(data: bytes) -> list[str]:
    """Lower-case column names of the first line that is no comment; [] where it holds numbers."""
    for line in decode_text(data[:65536]).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            cells = _split(line, _delimiter(line))
            return [] if _number(cells[0]) is not None else [split_unit(c)[0] for c in cells]
    return []


def spectrum_from_text(data: bytes, options: SpectrumOptions, limits: ReaderLimits) -> Spectrum:
    """Raises InputError (`not_a_spectrum`, `missing_column`, `not_numeric`, ... as `assemble_spectrum`),
    LimitError."""
    comments, rows = _lines(decode_text(data), limits)
    if not rows:
        raise refusal(
            "not_a_spectrum",
            found="text without a single row of data",
            wanted="columns wave, flux and, optionally, ivar",
            mend="Check that the export wrote its rows.",
        )
    delimiter = _delimiter(rows[0][1])
    names, own_units, flags = _names(rows, delimiter)
    wave, flux = (_column(names, role) for role in ("wave", "flux"))
    roles = {"wave": wave, "flux": flux}
    roles |= {role: name for role in ("ivar", "error", "variance", "mask") if (name := role_of(names, role))}
    pick = _numbers(rows, delimiter, names, roles)
    error = pick.get("error")
    if error is None and "variance" in pick:
        with np.errstate(invalid="ignore"):
            error = np.sqrt(pick["variance"])
    units = _comment_units(comments) | _ecsv_units(comments) | {k: v for k, v in own_units.items() if v}
    medium: Literal["air", "vacuum"] | None = medium_of(wave, units.get(wave)) or medium_of("\n".join(comments))
    raw = RawSpectrum(
        wave=pick["wave"],
        flux=pick["flux"],
        ivar=pick.get("ivar"),
        error=error,
        bad=pick.get("mask"),
        wave_unit=units.get(wave) or implied_unit(wave) or units.get("wave"),
        flux_unit=units.get(flux) or units.get("flux"),
        medium=medium,
        flags=flags,
    )
    return assemble_spectrum(raw, options, limits)


def _lines(text: str, limits: ReaderLimits) -> tuple[list[str], list[tuple[int, str]]]:
    """(comment lines without their mark, [(line number, data line)]), sizes checked."""
    found = 1 + sum(text.count(mark) for mark in _LINE_ENDS)
    if found > limits.max_text_lines:
        raise over_limit(
            "too_many_lines",
            what="a table",
            found=found,
            limit=limits.max_text_lines,
            unit="lines",
            mend="Leave out blank lines and comments, or rebin the spectrum; the models resolve about 2 A.",
        )
    comments: list[str] = []
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if len(line) > limits.max_text_line:
            raise over_limit(
                "line_too_long",
                what=f"line {number}",
                found=len(line),
                limit=limits.max_text_line,
                unit="characters",
                mend="Write one wavelength a line.",
            )
        stripped = line.strip()
        if stripped.startswith(("#", "%", "//")):
            comments.append(" ".join(stripped[:_COMMENT_CHARS].lstrip("#%/ ").split()))
            if len(comments) > limits.max_text_comments:
                raise over_limit(
                    "too_many_comments",
                    what="a table",
                    found=len(comments),
                    limit=limits.max_text_comments,
                    unit="comment lines",
                    mend="Keep those that state units.",
                )
        elif stripped:
            rows.append((number, stripped))
            if len(rows) > limits.max_spectrum_pixels + 1:
                raise over_limit(
                    "spectrum_too_long",
                    what="a table",
                    found=len(rows),
                    limit=limits.max_spectrum_pixels,
                    unit="rows",
                    mend="Rebin the spectrum; the models resolve about 2 A.",
                )
    return comments, rows


def _delimiter(line: str) -> str | None:
    """Comma, semicolon or tab when the line has one, else white space (None)."""
    return next((d for d in (",", ";", "\t") if d in line), None)


def _split(line: str, delimiter: str | None) -> list[str]:
    return [cell.strip().strip('"').strip("'") for cell in line.split(delimiter)]


def _number(cell: str) -> float | None:
    key = cell.lower()
    if key in _MISSING:
        return float("nan") if "inf" not in key else float("inf")
    try:
        return float(_TRUE.get(key, cell))
    except ValueError:
        return None


def _names(
    rows: list[tuple[int, str]], delimiter: str | None
) -> tuple[list[str], dict[str, str | None], tuple[Flag, ...]]:
    """(names, units, flags) of the columns; takes the line of names off `rows`."""
    cells = _split(rows[0][1], delimiter)
    if _number(cells[0]) is None:
        rows.pop(0)
        parsed = [split_unit(c) for c in cells]
        return [n for n, _ in parsed], {n: u for n, u in parsed if n}, ()
    if not 2 <= len(cells) <= 4:
        raise refusal(
            "missing_column",
            found=f"{len(cells)} columns without names",
            wanted="a first line such as wave,flux,ivar",
            mend="Add the line of names.",
            field="wave",
        )
    names = list(_ORDER[: len(cells)])
    return names, {}, (Flag("assumed_columns", f"The table has no names; {', '.join(names)} were assumed."),)


def _numbers(
    rows: list[tuple[int, str]], delimiter: str | None, names: list[str], roles: dict[str, str]
) -> dict[str, npt.NDArray[np.float64]]:
    """The columns that play a role, as numbers; missing cells are NaN, other columns are not looked at."""
    places = {role: names.index(name) for role, name in roles.items()}
    columns = {role: np.full(len(rows), np.nan) for role in places}
    for i, (number, line) in enumerate(rows):
        cells = _split(line, delimiter)
        if len(cells) != len(names):
            raise refusal(
                "length_mismatch",
                found=f"{len(cells)} cells in line {number}",
                wanted=f"{len(names)}, as in the first line",
                mend="Check for a cut line or a stray separator.",
            )
        for role, place in places.items():
            value = _number(cells[place])
            if value is None:
                raise refusal(
                    "not_numeric",
                    found=f"{cells[place][:40]!r} in line {number}, column {names[place]}",
                    wanted="a number",
                    mend="Leave missing values empty or NaN.",
                    field=role,
                )
            columns[role][i] = value
    return columns


def _column(names: list[str], role: str) -> str:
    name = role_of(names, role)
    if name is None:
        shown = ", ".join(names[:8])
        raise refusal(
            "missing_column",
            found=f"columns {shown[:200]}",
            wanted=f"a column for {role}",
            mend="Name the columns wave (or wavelength, loglam), flux and ivar (or error).",
            field=role,
        )
    return name


def _ecsv_units(comments: list[str]) -> dict[str, str]:
    return {m[1].lower(): m[2] for c in comments if (m := _ECSV.search(c)) and m[2]}


_STATED = re.compile(r"^(wave\w*|lambda|flux\w*)\s*[-_ ]?\s*(?:units?)?\s*(?:[:=]|\bin\b)\s*(.+)$", re.IGNORECASE)


def _comment_units(comments: list[str]) -> dict[str, str]:
    """{"wave": unit, "flux": unit} from comments such as "wavelength unit: nm, air" or "flux in
    erg/s/cm2/A"."""
    found: dict[str, str] = {}
    tried = dict.fromkeys(("wave", "flux"), 0)
    for comment in comments:
        match = _STATED.match(comment)
        if not match:
            continue
        role = "flux" if match[1].lower().startswith("flux") else "wave"
        tried[role] += 1
        if role in found or tried[role] > _STATEMENTS:
            continue
        value = match[2].strip()
        if role == "wave":
            value = next((w for w in re.split(r"[\s,;()]+", value)[:_WORDS] if is_wave_unit(w)), "")
        if value:
            found.setdefault(role, value)
    return found
