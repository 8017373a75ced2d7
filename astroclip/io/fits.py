"""FITS from strangers: a bounded scan of the headers, then astropy reads what the scan let through.

`scan_fits` walks the 2880-byte blocks once and checks every count against `ReaderLimits` before anything is
allocated, and the announced sizes against the bytes present. Plain headers, and arrays without scaling, are read by
`astroclip.io.plain_fits`; for all else the bytes are handed to `astropy.io.fits`, which must find the very HDUs that
were scanned. No pointer is followed: variable-length
columns, tile-compressed images and random groups are refused; other kinds of extension (ASCII tables) are
listed and never read. astropy is imported at the first file that needs it, not with this module.

FITS Standard 4.0 (Pence et al. 2010, A&A 524, A42; IAU FITS WG 2018): section numbers in comments.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError, InputError
from astroclip.io.plain_fits import PlainHeader, plain_array, plain_column, plain_header, plain_row
from astroclip.io.refusal import over_limit, refusal
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits

__all__ = ["Hdu", "Header", "parse_fits", "scan_fits"]

BLOCK = 2880
CARD = 80
END = b"END".ljust(CARD)
_BITPIX = (8, 16, 32, 64, -32, -64)
_TFORM = re.compile(r"\s*\d*([LXBIJKAEDCMPQ])")
MAX_TEXT = 1024  # characters of a value: CONTINUE cards can make it megabytes, which no name or unit is
# What sizes hang on: of two such cards astropy takes the last in one place and the first in another, and NAXIS = 10^18
# keeps it busy for ever.
_STRUCTURE = re.compile(rb"SIMPLE|XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|GROUPS|TFIELDS|TFORM\d+|THEAP|ZIMAGE")
_LOCK = threading.Lock()  # `warnings.catch_warnings` changes the state of the whole process


def damaged(what: str, mend: str = "Download or write the file again.", code: str = "damaged_fits") -> InputError:
    return refusal(code, found=f"a FITS file {what}", wanted="a complete, standard FITS file", mend=mend)


@contextmanager
def _astropy(notes: list[str]) -> Iterator[None]:
    """Run astropy on untrusted bytes: its warnings are added to `notes`, its exceptions become InputError."""
    with _LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (AstroClipError, MemoryError):
            raise
        except Exception as error:  # damaged bytes make astropy raise whatever they touch first
            reason = " ".join(str(error).split())[:120]
            raise damaged(f"that astropy does not read ({type(error).__name__}: {reason})") from error
        finally:
            ours = [w for w in caught if w.category.__module__.startswith("astropy")]
            notes.extend(" ".join(str(w.message).split())[:200] for w in ours)


class Header(Mapping[str, Any]):
    """Values by keyword, each parsed when asked for (the first of repeated cards; None where a card is blank)."""

    def __init__(self, cards: Any, notes: list[str]) -> None:
        self._cards, self._notes = cards, notes
        self._parsed: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        from astropy.io.fits.card import Undefined

        if key not in self._parsed:
            if key not in self._cards:
                raise KeyError(key)
            with _astropy(self._notes):
                value = self._cards[key]
            if isinstance(value, str):
                value = value[:MAX_TEXT]
            self._parsed[key] = None if isinstance(value, Undefined) else value
        return self._parsed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._cards))

    def __len__(self) -> int:
        return len(dict.fromkeys(self._cards))

    @property
    def comments(self) -> str:
        """The text of all COMMENT, HISTORY and blank cards."""
        with _astropy(self._notes):
            return "\n".join(str(line) for key in ("COMMENT", "HISTORY", "") for line in self._cards.get(key, ()))


@dataclass(frozen=True)
class Hdu:
    """One header-data unit. `shape` in numpy order; `kind` is "image", "table" or "other".

    start, data_start, span: bytes of the header, of the data, and of the data with padding.
    notes:                   what astropy warned of while reading this file (one list for all its HDUs).
    """

    index: int
    kind: str
    header: Header | PlainHeader
    shape: tuple[int, ...]
    start: int
    data_start: int
    span: int
    notes: list[str]
    content: Content | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return str(self.header.get("EXTNAME") or "").strip().upper()

    def image(self) -> npt.NDArray[Any]:
        """The array, native byte order, BSCALE/BZERO applied, BLANK as NaN (4.4.2.5, 5.3)."""
        if self.kind != "image" or not self.shape:
            raise damaged(f"whose HDU {self.index} ({self.name or 'PRIMARY'}) holds no image")
        content = self._content()
        array = plain_array(self.header, content.data, self.data_start, self.shape)
        if array is None:
            with content.opened(self.index) as hdu:
                array = np.asarray(hdu.data).reshape(self.shape)
        return _native(array)

    def _content(self) -> Content:
        if self.content is None:
            raise ValueError("an HDU that was only scanned holds no data")
        return self.content

    @cached_property
    def columns(self) -> dict[str, int]:
        """Numbers (from 1) of the columns by lower-case name; the first of a repeated name."""
        found: dict[str, int] = {}
        for i in range(1, int(self.header.get("TFIELDS") or 0) + 1):
            found.setdefault(str(self.header.get(f"TTYPE{i}", f"col{i}")).strip().lower(), i)
        return found

    def read(self, name: str, row: int | None = None) -> npt.NDArray[Any]:
        """Column `name`: (rows,) or (rows, repeat), or without the first axis for one `row`; strings as `str`
        arrays, nulls (TNULL) of integers as NaN, TSCAL/TZERO applied."""
        number = self.columns[name]
        form = str(self.header.get(f"TFORM{number}"))
        match = _TFORM.match(form)
        if match is None or match[1] in "XCM" or (match[1] == "A" and f"TDIM{number}" in self.header):
            # Bits would grow eightfold in memory, text cut by TDIM fifty times; nothing we read is complex.
            raise _unsupported_column(name, form)
        values, raw = self._column(number)
        if values.dtype.kind == "S":
            # NUL ends a string (7.3.3.1); bytes beyond ASCII are no reason to refuse the table.
            text = [bytes(v).split(b"\0")[0].decode("ascii", "replace").strip() for v in values.ravel()]
            values = np.array(text, dtype=str).reshape(values.shape)
        values = _native(values)
        null = self.header.get(f"TNULL{number}")
        if raw.dtype.kind in "iu" and isinstance(null, int) and (raw == null).any():
            values = np.where(raw == null, np.nan, values)
        rows = len(values)
        values = values.reshape(rows, -1) if values.ndim > 1 and rows else values
        out = values[:, 0] if values.ndim > 1 and values.shape[1] == 1 else values
        return out if row is None else out[row]

    def _column(self, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Values of column `number`, and as they are stored."""
        content, row = self._content(), self._row
        needed = row.itemsize if row is not None else None
        values = None
        if row is not None and needed == self.shape[1]:
            values = plain_column(self.header, row, content.data, self.data_start, self.shape[0], number)
        if values is not None:
            return values, values
        with content.opened(self.index) as hdu:
            needed = hdu.columns.dtype.itemsize
            if needed != self.shape[1]:
                raise damaged(f"whose table columns need {needed} bytes a row, but NAXIS1 is {self.shape[1]}")
            table = hdu.data
            return np.asarray(table.field(number - 1)), np.asarray(table)[table.dtype.names[number - 1]]

    @cached_property
    def _row(self) -> np.dtype[Any] | None:
        return plain_row(self.header)


class Content:
    """The bytes of a file; astropy opens them at the first array that needs it."""

    def __init__(self, data: bytes, scanned: list[Hdu]) -> None:
        self.data, self._scanned = data, scanned
        self._opened: list[Any] = []

    @contextmanager
    def opened(self, index: int) -> Iterator[Any]:
        """astropy's HDU `index`, under `_astropy`."""
        with _astropy(self._scanned[0].notes):
            self._opened = self._opened or self._open()
            yield self._opened[index]

    def _open(self) -> list[Any]:
        from astropy.io import fits

        end = self._scanned[-1].data_start + self._scanned[-1].span
        whole = self.data[:end].ljust(end, b"\0")  # without filler behind; with padding some writers leave out
        found = fits.open(
            BytesIO(whole),
            memmap=False,
            lazy_load_hdus=False,
            disable_image_compression=True,
            ignore_missing_simple=False,
            ignore_missing_end=False,
            character_as_bytes=True,  # decoding is ours: bytes beyond ASCII must not fail the file
        )
        opened = []
        for mine, theirs in zip(self._scanned, found, strict=True):
            place = theirs.fileinfo()
            if (place["hdrLoc"], place["datLoc"], place["datSpan"]) != (mine.start, mine.data_start, mine.span):
                raise damaged(f"whose HDU {mine.index} can be read in two ways")
            opened.append(theirs)
        return opened


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array` in this machine's order, a copy where it was a view of the file's bytes."""
    return array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)


def parse_fits(data: bytes, limits: ReaderLimits = DEFAULT_LIMITS) -> list[Hdu]:
    """All HDUs of a file, primary first; arrays are read when asked for.

    Raises InputError (`truncated_fits`, `damaged_fits`, `bad_axes`, `compressed_fits`, `unsupported_column`,
    `random_groups`) and LimitError.
    """
    hdus = scan_fits(data, limits)
    content = Content(data, hdus)
    if not all(isinstance(hdu.header, PlainHeader) for hdu in hdus):
        with content.opened(0):  # now, so that what astropy refuses or warns of is known
            pass
    return [replace(hdu, content=content) for hdu in hdus]


def scan_fits(data: bytes, limits: ReaderLimits = DEFAULT_LIMITS) -> list[Hdu]:
    """The HDUs by their headers alone, every count checked; nothing of the data is touched. Errors of
    `parse_fits`."""
    hdus: list[Hdu] = []
    notes: list[str] = []
    offset, cards = 0, 0
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
        header, start, used = _scan_header(data, offset, cards, notes, limits)
        cards += used
        kind, shape, size = _layout(header, len(hdus), limits)
        if start + size > len(data):
            missing = start + size - len(data)
            raise damaged(
                f"that ends {missing:,} bytes early (HDU {len(hdus)} announces {size:,} bytes of data)",
                code="truncated_fits",
            )
        span = -(-size // BLOCK) * BLOCK
        hdus.append(Hdu(len(hdus), kind, header, shape, offset, start, span, notes))
        offset = start + span
    if not hdus:
        raise damaged("of no bytes", code="truncated_fits")
    return hdus


def _is_padding(data: bytes, offset: int) -> bool:
    """True when what follows the last HDU is filler, not another header (some writers pad with zeros or
    blanks)."""
    return not data[offset : offset + BLOCK].strip(b"\0 ")


def _scan_header(
    data: bytes, offset: int, cards: int, notes: list[str], limits: ReaderLimits
) -> tuple[Header | PlainHeader, int, int]:
    """(keywords, offset of the data, cards read) of the header at `offset`, after `cards` cards so far."""
    first = data[offset : offset + 9]
    wanted = b"XTENSION=" if offset else b"SIMPLE  ="
    if len(first) == len(wanted) and first != wanted:
        raise damaged(f"with a header at byte {offset:,} that does not start with {wanted[:8].decode().strip()}")
    used = continued = 0
    seen: set[bytes] = set()
    while True:
        card = data[offset + used * CARD : offset + (used + 1) * CARD]
        if len(card) < CARD:
            raise damaged("whose header has no END card", code="truncated_fits")
        used += 1
        if cards + used > limits.max_header_cards:
            raise over_limit(
                "header_too_long",
                what="FITS headers",
                found=cards + used,
                limit=limits.max_header_cards,
                unit="cards",
                mend="Remove history or unused extensions.",
            )
        continued = continued + 1 if card.startswith(b"CONTINUE") else 0
        if continued > limits.max_continued_cards:
            raise over_limit(
                "header_value_too_long",
                what="a FITS header value",
                found=continued,
                limit=limits.max_continued_cards,
                unit="CONTINUE cards",
                mend="Shorten it, or write it as HISTORY.",
            )
        if card == END:
            break
        keyword = _keyword(card)
        if _STRUCTURE.fullmatch(keyword):
            if keyword in seen:
                raise damaged(f"with two cards {keyword.decode()} in one header")
            seen.add(keyword)
    end = offset + -(-used * CARD // BLOCK) * BLOCK
    plain = plain_header(data[offset:end], used)
    if plain is not None:
        return plain, end, used
    from astropy.io import fits

    with _astropy(notes):
        return Header(fits.Header.fromstring(data[offset : offset + used * CARD]), notes), end, used


def _keyword(card: bytes) -> bytes:
    """As astropy reads it: in upper case, and what a HIERARCH card names."""
    name = card[:8].strip().upper()
    return card[8:].partition(b"=")[0].strip().upper() if name == b"HIERARCH" else name


def _layout(header: Header | PlainHeader, index: int, limits: ReaderLimits) -> tuple[str, tuple[int, ...], int]:
    """(kind, shape, bytes of data) from the mandatory keywords (4.4.1), all checked."""
    if index == 0 and header.get("SIMPLE") is not True:
        raise damaged("whose first card is not SIMPLE = T")
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
    if header.get("GROUPS") is True and axes[:1] == [0]:
        raise refusal(
            "random_groups",
            found="a file of random groups (radio visibilities)",
            wanted="an image or a table",
            mend="Image the visibilities first.",
        )
    parameters, groups = header.get("PCOUNT", 0), header.get("GCOUNT", 1)
    if type(parameters) is not int or parameters < 0 or type(groups) is not int or groups != 1:
        raise damaged(f"with PCOUNT {parameters!r} and GCOUNT {groups!r}")
    count = math.prod(axes)  # Python integers: no overflow, whatever the header claims
    size = (abs(bitpix) // 8) * (count + parameters) if axes else 0
    shape = tuple(reversed(axes)) if axes and count else ()
    extension = str(header.get("XTENSION", "IMAGE")).strip()
    if extension == "BINTABLE":
        _check_table(header, index, axes, bitpix, limits)
        return "table", tuple(reversed(axes)), size
    return ("image" if extension == "IMAGE" else "other"), shape, size


def _check_table(header: Header | PlainHeader, index: int, axes: list[Any], bitpix: int, limits: ReaderLimits) -> None:
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
    for i in range(1, fields + 1):
        form = header.get(f"TFORM{i}")
        match = _TFORM.match(form) if isinstance(form, str) else None
        if match is None:
            raise damaged(f"whose table column {i} has no valid TFORM")
        if match[1] in "PQ":
            raise _unsupported_column(str(header.get(f"TTYPE{i}", f"col{i}")), str(form))


def _unsupported_column(name: str, form: str) -> InputError:
    return refusal(
        "unsupported_column",
        found=f"column {name.strip().upper()} of TFORM {form.strip()}",
        wanted="fixed-width numeric or text columns",
        mend="Write the table with fixed-length columns.",
        field=name.strip().lower(),
    )
