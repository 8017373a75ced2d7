"""The pieces of PNG and JPEG files, counted before Pillow sees them.

Pillow walks chunks and segments in Python, and libjpeg decodes the whole picture once a scan: a file of a million empty
chunks, or of thousands of scans, is small and takes minutes. Here only lengths are looked at.

PNG (W3C 2003, 5.3): length (4), type (4), data, CRC (4). JPEG (ITU-T T.81, B.1): 0xFF, marker, then for segments a
length (2) and the rest; any number of 0xFF may fill the space before a marker; in coded data 0xFF is followed by 0.
"""

from __future__ import annotations

from astroclip.io.refusal import over_limit
from astroclip.limits import ReaderLimits

__all__ = ["check_pieces"]

_ALONE = frozenset((0x01, 0xD8, *range(0xD0, 0xD8)))  # markers without a length
_SCAN, _END = 0xDA, 0xD9


def check_pieces(data: bytes, limits: ReaderLimits) -> None:
    """Refuse a picture of too many pieces. Raises LimitError; says nothing of one that is damaged."""
    if data.startswith(b"\x89PNG"):
        _check(_png_chunks(data, limits.max_picture_parts), limits.max_picture_parts, "chunks")
        return
    _check(_jpeg_segments(data, limits.max_picture_parts), limits.max_picture_parts, "segments")
    _check(data.count(b"\xff\xda"), limits.max_picture_scans, "scans")


def _check(found: int, limit: int, unit: str) -> None:
    if found > limit:
        raise over_limit(
            "picture_too_complex",
            what="a picture",
            found=found,
            limit=limit,
            unit=unit,
            mend="Save it again with an ordinary program, without metadata.",
        )


def _png_chunks(data: bytes, most: int) -> int:
    """Chunks up to the end of the file, counted to `most` + 1."""
    place, count = 8, 0
    while place + 12 <= len(data) and count <= most:
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        count += 1
    return count


def _jpeg_segments(data: bytes, most: int) -> int:
    """Markers, segments and bytes of filling before the first scan, counted to `most` + 1: each costs Pillow a turn."""
    place, count = 2, 0
    while place + 4 <= len(data) and count <= most:
        count += 1
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):  # Pillow looks for the next marker byte by byte
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker in (_SCAN, _END):
            break
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count
