"""A small, bounded FITS reader: headers, image arrays, fixed-width binary tables, over bytes in memory.

Written for uploads from strangers. It walks the 2880-byte blocks once, checks every count against
`ReaderLimits` before anything is allocated, never seeks outside the bytes it was given, follows no pointer
(no variable-length columns, no tile-compressed images) and evaluates nothing. Arrays are views of the input
until a caller converts them. astropy is the reference it is tested against, and is not needed to run it.

FITS Standard 4.0 (Pence et al. 2010, A&A 524, A42; IAU FITS WG 2018): section numbers in comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError
from astroclip.io.refusal import over_limit, refusal
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits

__all__ = ["Hdu", "Header", "parse_fits"]

BLOCK = 2880
CARD = 80
Header = Mapping[str, Any]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([EeDd][+-]?\d+)?$")
_TFORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])")
_DTYPES = {"L": "i1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}
_WIDTHS = {"L": 1, "B": 1, "I": 2, "J": 4, "K": 8, "E": 4, "D": 8, "A": 1, "C": 8, "M": 16, "P": 8, "Q": 16}
_BITPIX = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}


def damaged(what: str, mend: str = "Download or write the file again.", code: str = "damaged_fits") -> InputError:
    return refusal(code, found=f"a FITS file {what}", wanted="a complete, standard FITS file", mend=mend)


@dataclass(frozen=True)
class Column:
    """One column of a binary table: `offset` and `repeat` in its row, `code` a TFORM letter."""

    name: str
    code: str
    repeat: int
    offset: int
    number: int


@dataclass(frozen=True)
class Hdu:
    """One header-data unit. `shape` in numpy order; `kind` is "image", "table" or "other"."""

    index: int
    kind: str
    header: Header
    shape: tuple[int, ...]
    data: memoryview
    comments: str = ""

    @property
    def name(self) -> str:
        return str(self.header.get("EXTNAME", "")).strip().upper()

    def image(self) -> npt.NDArray[Any]:
        """The array, native byte order, BSCALE/BZERO applied, BLANK as NaN (4.4.2.5, 5.3)."""
        if self.kind != "image" or not self.shape:
            raise damaged(f"whose HDU {self.index} ({self.name or 'PRIMARY'}) holds no image")
        raw = np.frombuffer(self.data, dtype=_BITPIX[self.header["BITPIX"]]).reshape(self.shape)
        scale, zero = self.header.get("BSCALE", 1), self.header.get("BZERO", 0)
        return _scaled(raw, scale, zero, self.header.get("BLANK"), f"HDU {self.index}")

    def columns(self) -> dict[str, Column]:
        """Columns by lower-case name; variable-length and complex ones are present but refuse to be read."""
        found: dict[str, Column] = {}
        offset = 0
        for i in range(1, int(self.header.get("TFIELDS", 0)) + 1):
            match = _TFORM.match(str(self.header.get(f"TFORM{i}", "")).strip())
            if match is None:
                raise damaged(f"whose table column {i} has no valid TFORM")
            repeat, code = int(match[1] or 1), match[2]
            name = str(self.header.get(f"TTYPE{i}", f"col{i}")).strip().lower()
            found.setdefault(name, Column(name, code, repeat, offset, i))
            offset += (repeat + 7) // 8 if code == "X" else repeat * _WIDTHS[code]
        if self.kind == "table" and offset > self.shape[1]:
            raise damaged(f"whose table columns need {offset} bytes a row, but NAXIS1 is {self.shape[1]}")
        return found

    def read(self, name: str, row: int | None = None) -> npt.NDArray[Any]:
        """Column `name`: (rows,) or (rows, repeat), or without the first axis for one `row`; strings as
        `str` arrays."""
        column = self.columns()[name]
        if column.code in "PQXCM":
            raise refusal(
                "unsupported_column",
                found=f"column {name.upper()} of TFORM type {column.code}",
                wanted="fixed-width numeric or text columns",
                mend="Write the table with fixed-length columns.",
                field=name,
            )
        rows, width = self.shape
        table = np.frombuffer(self.data, dtype="u1", count=rows * width).reshape(rows, width)
        size = column.repeat * _WIDTHS[column.code]
        cells = table[slice(row, None if row is None else row + 1), column.offset : column.offset + size]
        cells = np.ascontiguousarray(cells)
        if column.code == "A":
            text = [bytes(c).split(b"\0")[0].decode("ascii", "replace").strip() for c in cells]
            out: npt.NDArray[Any] = np.array(text, dtype=str)
        else:
            i = column.number
            raw = cells.view(_DTYPES[column.code]).reshape(len(cells), column.repeat)
            if column.code != "L":
                scale, zero = self.header.get(f"TSCAL{i}", 1), self.header.get(f"TZERO{i}", 0)
                raw = _scaled(raw, scale, zero, self.header.get(f"TNULL{i}"), f"column {name}")
            else:
                raw = raw == ord("T")
            out = raw[:, 0] if column.repeat == 1 else raw
        return out if row is None else out[0]


def _scaled(raw: npt.NDArray[Any], scale: Any, zero: Any, blank: Any, where: str) -> npt.NDArray[Any]:
    native = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    if not all(isinstance(v, (int, float)) and np.isfinite(v) for v in (scale, zero)):
        raise damaged(f"whose scaling of {where} is not numeric")
    if native.dtype.kind == "f":
        return native if (scale, zero) == (1, 0) else native * scale + zero
    blanks = native == blank if isinstance(blank, int) else None
    if (scale, zero) != (1, 0):
        as_integer = scale == 1 and isinstance(zero, int) or float(zero).is_integer() and scale == 1
        native = native.astype("i8") + int(zero) if as_integer and abs(zero) < 2**31 else native * float(scale) + zero
    if blanks is not None and blanks.any():
        native = np.where(blanks, np.nan, native)
    return native


def parse_fits(data: bytes, limits: ReaderLimits = DEFAULT_LIMITS) -> list[Hdu]:
    """All HDUs of a file, primary first; data stay where they are until asked for.

    Raises InputError (`truncated_fits`, `damaged_fits`, `bad_axes`, `compressed_fits`) and LimitError.
    """
    hdus: list[Hdu] = []
    offset, cards = 0, 0
    view = memoryview(data)
    while offset < len(data) and not (hdus and _is_padding(data, offset)):
        if len(hdus) >= limits.max_hdus:
            raise over_limit(
                "too_many_hdus",
                what="a FITS file",
                found=len(hdus) + 1,
                limit=limits.max_hdus,
                unit="HDUs",
                mend="Keep only the extensions that hold the object.",
            )
        header, comments, start, used = _parse_header(data, offset, limits.max_header_cards - cards, limits)
        cards += used
        kind, shape, size = _layout(header, len(hdus), limits)
        if start + size > len(data):
            missing = start + size - len(data)
            raise damaged(
                f"that ends {missing:,} bytes early (HDU {len(hdus)} announces {size:,} bytes of data)",
                code="truncated_fits",
            )
        hdus.append(Hdu(len(hdus), kind, header, shape, view[start : start + size], comments))
        offset = start + -(-size // BLOCK) * BLOCK
    return hdus


def _is_padding(data: bytes, offset: int) -> bool:
    """True when what follows the last HDU is filler, not another header (some writers pad with zeros or
    blanks)."""
    return not data[offset : offset + BLOCK].strip(b"\0 ")


def _parse_header(data: bytes, offset: int, budget: int, limits: ReaderLimits) -> tuple[dict[str, Any], str, int, int]:
    """(keywords, COMMENT/HISTORY text, offset of the data, cards read); first of repeated keywords wins."""
    header: dict[str, Any] = {}
    comments: list[str] = []
    key = ""
    used = 0
    while True:
        card = data[offset + used * CARD : offset + (used + 1) * CARD]
        if len(card) < CARD:
            raise damaged("whose header has no END card", code="truncated_fits")
        used += 1
        if used > budget:
            raise over_limit(
                "header_too_long",
                what="FITS headers",
                found=limits.max_header_cards - budget + used,
                limit=limits.max_header_cards,
                unit="cards",
                mend="Remove history or unused extensions.",
            )
        text = card.decode("latin-1")
        word = text[:8].rstrip()
        if word == "END" and not text[3:].strip():
            break
        if word in ("COMMENT", "HISTORY", ""):
            comments.append(text[8:].strip())
        elif word == "CONTINUE" and isinstance(header.get(key), str) and header[key].endswith("&"):
            header[key] = header[key][:-1] + str(_value(text[8:]) or "")  # 4.2.1.2, long strings
        elif text[8:10] == "= " and word not in header:
            key = word
            header[key] = _value(text[10:])
    end = offset + -(-used * CARD // BLOCK) * BLOCK
    return header, "\n".join(comments), end, used


def _value(text: str) -> Any:
    """Value of a card (4.2): str, bool, int, float or None."""
    text = text.strip()
    if text.startswith("'"):
        match = re.match(r"'((?:[^']|'')*)'", text)
        return match[1].replace("''", "'").rstrip() if match else text[1:].rstrip()
    text = text.split("/")[0].strip()
    if text in ("T", "F"):
        return text == "T"
    if not _NUMBER.match(text):
        return text or None
    if text.lstrip("+-").isdigit():
        return int(text)
    return float(text.upper().replace("D", "E"))


def _layout(header: Header, index: int, limits: ReaderLimits) -> tuple[str, tuple[int, ...], int]:
    """(kind, shape, bytes of data) from the mandatory keywords (4.4.1), all checked."""
    if index == 0 and header.get("SIMPLE") is not True:
        raise damaged("whose first card is not SIMPLE = T")
    if index > 0 and not isinstance(header.get("XTENSION"), str):
        raise damaged(f"whose HDU {index} does not start with XTENSION")
    bitpix, naxis = header.get("BITPIX"), header.get("NAXIS")
    if type(bitpix) is not int or bitpix not in _BITPIX:
        raise damaged(f"with BITPIX {bitpix!r}")
    if type(naxis) is not int or naxis < 0:
        raise damaged(f"with NAXIS {naxis!r}")
    if naxis > limits.max_axes:
        raise refusal(
            "bad_axes",
            found=f"HDU {index} with {naxis} axes",
            wanted=f"at most {limits.max_axes}: x, y and band",
            mend="Cut out one image and write its planes as (band, y, x).",
        )
    axes: list[Any] = [header.get(f"NAXIS{i + 1}") for i in range(naxis)]
    if any(type(n) is not int or n < 0 for n in axes):
        raise damaged(f"with axis lengths {axes}")
    parameters, groups = header.get("PCOUNT", 0), header.get("GCOUNT", 1)
    if type(parameters) is not int or parameters < 0 or groups != 1:
        raise damaged(f"with PCOUNT {parameters!r} and GCOUNT {groups!r}")
    count = 1
    for n in axes:
        count *= n  # Python integers: no overflow, whatever the header claims
    size = (abs(bitpix) // 8) * (count + parameters) if axes else 0
    shape = tuple(reversed(axes)) if axes and count else ()
    extension = str(header.get("XTENSION", "IMAGE")).strip()
    if extension in ("IMAGE", "IUEIMAGE"):
        return "image", shape, size
    if extension == "BINTABLE":
        _check_table(header, index, axes, bitpix, limits)
        return "table", tuple(reversed(axes)), size
    return "other", shape, size


def _check_table(header: Header, index: int, axes: list[Any], bitpix: int, limits: ReaderLimits) -> None:
    fields = header.get("TFIELDS")
    if len(axes) != 2 or bitpix != 8 or type(fields) is not int or fields < 0:
        raise damaged(f"whose table in HDU {index} has no valid BITPIX, NAXIS and TFIELDS")
    if fields > limits.max_table_columns:
        raise over_limit(
            "too_many_columns",
            what="a FITS table",
            found=fields,
            limit=limits.max_table_columns,
            unit="columns",
            mend="Keep the wavelength, flux, ivar and mask columns.",
        )
    if header.get("ZIMAGE") is True:
        raise refusal(
            "compressed_fits",
            found=f"a tile-compressed image in HDU {index} (.fits.fz)",
            wanted="plain FITS or .fits.gz",
            mend="Unpack it with funpack.",
        )
