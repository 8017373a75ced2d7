"""FITS headers and arrays that need no astropy: cards of one keyword and one plain value, unscaled numbers.

Nearly every file in use is written so, and astropy spends milliseconds on what this reads in a tenth of them. Whatever
looks the least unusual is declined (None) and left to astropy, so both ways give the same values:
`tests/io/test_io_plain_fits.py` compares them, on damaged headers too. FITS Standard 4.0: section numbers in comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PlainHeader", "plain_array", "plain_column", "plain_header", "plain_row"]

CARD = 80
_COMMENTARY = {"COMMENT", "HISTORY", ""}
_FIRST = re.compile(rb"SIMPLE  = {20}T|XTENSION= '(?:IMAGE   |BINTABLE)'")
# What goes on elsewhere, or means more than it says (4.1.2.3, 4.2.1.2, 7.3.5): long strings, other forms of keywords,
# variable-length and compressed data.
_ELSEWHERE = re.compile(rb"CONTINUE|HIERARCH|LONGSTRN|THEAP|ZIMAGE|GROUPS|INHERIT")
# A keyword, its indicator and one value: string, logical, integer, float or nothing, then a comment (4.1, 4.2).
_VALUE = re.compile(
    rb"[A-Z0-9_-]+ *= (?: *(?:'((?:[^']|'')*)'|([TF])|([+-]?\d{1,18})"
    rb"|([+-]?(?:(?:\d+\.\d*|\.\d+)(?:[ED][+-]?\d{1,3})?|\d+[ED][+-]?\d{1,3}))))? *(?:/[ -~]*)?"
)
_PRINTABLE = re.compile(rb"[ -~]*")
_IMAGES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}  # BITPIX (4.4.1)
_COLUMNS = {"L": "S1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8", "A": "S"}  # 7.3.2
_FORM = re.compile(r"(\d*)([LBIJKEDA]) *")
_NAME = re.compile(r"\w+")


class PlainHeader(Mapping[str, Any]):
    """Values by keyword: the first of repeated cards, None where a card is blank."""

    def __init__(self, values: dict[str, Any], comments: dict[str, list[str]]) -> None:
        self._values, self._comments = values, comments

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def comments(self) -> str:
        """The text of all COMMENT, HISTORY and blank cards."""
        return "\n".join(line for key in ("COMMENT", "HISTORY", "") for line in self._comments.get(key, ()))


def plain_header(block: bytes, cards: int) -> PlainHeader | None:
    """The header in `block`, whose last of `cards` cards is END, or None where astropy should read it."""
    if not _FIRST.match(block) or block[cards * CARD :].strip(b" "):
        return None
    values: dict[str, Any] = {}
    comments: dict[str, list[str]] = {}
    for start in range(0, (cards - 1) * CARD, CARD):
        card = block[start : start + CARD]
        keyword = card[:8].rstrip().decode("ascii", "replace")
        if keyword in _COMMENTARY:
            if not _PRINTABLE.fullmatch(card):
                return None
            comments.setdefault(keyword, []).append(card[8:].rstrip().decode())
            continue
        found = _VALUE.fullmatch(card)
        if found is None or card[8:10] != b"= " or _ELSEWHERE.match(card):
            return None
        text, logical, integer, number = found.group(1, 2, 3, 4)
        value: Any = None
        if text is not None:
            if b": " in text or not _PRINTABLE.fullmatch(text):  # a record of values (WCS Paper IV), to astropy
                return None
            value = text.replace(b"''", b"'").decode().rstrip()
        elif logical is not None:
            value = logical == b"T"
        elif integer is not None:
            value = int(integer)
        elif number is not None:
            value = float(number.replace(b"D", b"E"))
        values.setdefault(keyword, value)
    return PlainHeader(values, comments)


def plain_array(header: Mapping[str, Any], data: bytes, start: int, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """The image at byte `start` as astropy gives it, in big-endian order; None where values are scaled or blank."""
    if not isinstance(header, PlainHeader) or header.keys() & {"BSCALE", "BZERO", "BLANK"}:
        return None
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data, _IMAGES[header["BITPIX"]], count, start).reshape(shape)


def plain_row(header: Mapping[str, Any]) -> np.dtype[Any] | None:
    """A row of a table; None where a column is of another kind, has a null or a display format (which astropy checks),
    or names are odd or repeated."""
    if not isinstance(header, PlainHeader) or any(key.startswith(("TNULL", "TDISP", "TBCOL")) for key in header):
        return None
    fields, names = [], set()
    for i in range(1, header["TFIELDS"] + 1):
        form, name = _FORM.fullmatch(str(header.get(f"TFORM{i}"))), header.get(f"TTYPE{i}")
        if form is None or not isinstance(name, str) or not _NAME.fullmatch(name) or form[1].startswith("0"):
            return None
        names.add(name.lower())
        repeat = int(form[1] or 1)
        kind = f"S{repeat}" if form[2] == "A" else _COLUMNS[form[2]]
        fields.append((f"f{i}", kind) if repeat == 1 or form[2] == "A" else (f"f{i}", kind, (repeat,)))
    return np.dtype(fields) if len(names) == len(fields) else None


def plain_column(
    header: Mapping[str, Any], row: np.dtype[Any], data: bytes, start: int, rows: int, number: int
) -> npt.NDArray[Any] | None:
    """Column `number` (from 1) of the table at byte `start` as astropy gives it; None where scaled or with a shape."""
    if header.keys() & {f"TSCAL{number}", f"TZERO{number}", f"TDIM{number}"}:
        return None
    values = np.frombuffer(data, row, rows, start)[f"f{number}"]
    return values == b"T" if str(header[f"TFORM{number}"]).strip().endswith("L") else values
