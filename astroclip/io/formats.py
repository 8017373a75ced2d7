"""Which format some bytes are in, and unpacking gzip without trusting it.

Magic bytes decide. A declared media type or a file name may confirm them or be silent; when it contradicts
them the file is refused (415), because then at least one of sender and file is not what it seems.
"""

from __future__ import annotations

import zlib
from pathlib import PurePath

from astroclip.errors import MediaTypeError
from astroclip.io.refusal import over_limit, refusal
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits

__all__ = ["FORMATS", "MEDIA_TYPES", "decode_text", "gunzip", "plain_bytes", "sniff"]

FORMATS = ("fits", "fits.gz", "png", "jpeg", "npy", "csv")
READABLE = "FITS (.fits, .fits.gz), PNG, JPEG, NumPy .npy or CSV text"

# Formats of one family are interchangeable for a declared type: a .fits.gz sent as application/fits is no
# lie.
_FAMILY = {
    "fits": "fits",
    "fits.gz": "fits",
    "png": "picture",
    "jpeg": "picture",
    "npy": "npy",
    "csv": "text",
}

MEDIA_TYPES: dict[str, str] = {
    "application/fits": "fits",
    "image/fits": "fits",
    "application/gzip": "fits",
    "application/x-gzip": "fits",
    "image/png": "picture",
    "image/jpeg": "picture",
    "image/jpg": "picture",
    "application/x-npy": "npy",
    "text/csv": "text",
    "text/plain": "text",
    "text/tab-separated-values": "text",
}
_SILENT = {"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"}

_SUFFIX_FAMILY = {
    ".fits": "fits",
    ".fit": "fits",
    ".fts": "fits",
    ".gz": "fits",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".npy": "npy",
    ".csv": "text",
    ".tsv": "text",
    ".txt": "text",
    ".dat": "text",
    ".ecsv": "text",
}

_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Use `astroclip embed FILE` for Multimodal Universe HDF5."),
    (b"PK\x03\x04", "a zip archive (.npz, .zip)", "Save one array with numpy.save as .npy."),
    (b"PAR1", "a Parquet file", "Use `astroclip embed FILE` for Parquet catalogues."),
    (b"\x80\x04", "a pickle", "Pickles are never read; save arrays with numpy.save as .npy."),
    (b"\x80\x05", "a pickle", "Pickles are never read; save arrays with numpy.save as .npy."),
    (b"BZh", "bzip2 data", "Unpack it, or compress it with gzip."),
    (b"\xfd7zXZ", "xz data", "Unpack it, or compress it with gzip."),
    (b"II*\x00", "a TIFF image", "Save it as FITS, or as PNG for a display image."),
    (b"MM\x00*", "a TIFF image", "Save it as FITS, or as PNG for a display image."),
    (b"GIF8", "a GIF image", "Save it as PNG."),
    (b"RIFF", "a RIFF/WebP file", "Save it as PNG."),
    (b"%PDF", "a PDF document", "Send the data file itself."),
    (b"<", "XML or HTML", "A download that failed often leaves an HTML page: open the file in an editor."),
    (b"{", "JSON", "Send the data file itself."),
)


def sniff(data: bytes, media_type: str | None = None, name: str | None = None) -> str:
    """Format of `data`, one of `FORMATS`.

    Raises MediaTypeError: empty or foreign bytes, or a `media_type` / file name that contradicts the bytes.
    """
    found = _by_magic(data)
    declared = _declared_family(media_type, name)
    if declared is not None and declared != _FAMILY[found]:
        said = f"type {media_type}" if _family_of_type(media_type) else f"name {PurePath(name or '').name!r}"
        raise refusal(
            "media_type_mismatch",
            found=f"{_describe(found)} under the {said}",
            wanted=f"content of the declared kind, starting with {_signature(declared)}",
            mend="Send the file under its true type, or check that the download or export succeeded.",
            kind=MediaTypeError,
        )
    return found


def _by_magic(data: bytes) -> str:
    if not data:
        raise refusal(
            "empty_file",
            found="an empty body",
            wanted=READABLE,
            mend="Check that the file was written and sent whole.",
            kind=MediaTypeError,
        )
    if data.startswith(b"SIMPLE  ="):
        return "fits"
    if data.startswith(b"\x1f\x8b"):
        return "fits.gz"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x93NUMPY"):
        return "npy"
    for magic, what, mend in _FOREIGN:
        if data.startswith(magic):
            raise refusal("unknown_media_type", found=what, wanted=READABLE, mend=mend, kind=MediaTypeError)
    if _is_text(data[:4096]):
        return "csv"
    raise refusal(
        "unknown_media_type",
        found=f"bytes starting with {data[:8]!r}, no format known here",
        wanted=READABLE,
        mend="Convert the file to one of these.",
        kind=MediaTypeError,
    )


def decode_text(data: bytes) -> str:
    """UTF-8 (a byte-order mark is dropped), else Latin-1, which every byte string is."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _is_text(head: bytes) -> bool:
    """True when the start of a file is printable text; a multi-byte character cut at the end is forgiven."""
    head = head[: len(head) - 4] if len(head) == 4096 and head[-1] >= 0x80 else head
    return all(c.isprintable() or c in "\t\r\n\f" for c in decode_text(head))


def _family_of_type(media_type: str | None) -> str | None:
    bare = (media_type or "").split(";")[0].strip().lower()
    if bare in _SILENT or bare.startswith("multipart/"):
        return None
    family = MEDIA_TYPES.get(bare)
    if family is None:
        raise refusal(
            "unknown_media_type",
            found=f"the media type {bare!r}",
            wanted=", ".join(sorted(MEDIA_TYPES)) + " or application/octet-stream",
            mend="Set the Content-Type header to one of these.",
            kind=MediaTypeError,
        )
    return family


def _declared_family(media_type: str | None, name: str | None) -> str | None:
    family = _family_of_type(media_type)
    if family is None and name:
        family = _SUFFIX_FAMILY.get(PurePath(name).suffix.lower())
    return family


def _describe(fmt: str) -> str:
    return {
        "fits": "a FITS file",
        "fits.gz": "gzip data",
        "png": "a PNG image",
        "jpeg": "a JPEG image",
        "npy": "a NumPy array",
        "csv": "plain text",
    }[fmt]


def _signature(family: str) -> str:
    return {
        "fits": "'SIMPLE  =' (FITS) or gzip's magic bytes",
        "picture": "the PNG or JPEG magic bytes",
        "npy": "'\\x93NUMPY'",
        "text": "readable text",
    }[family]


def gunzip(data: bytes, limits: ReaderLimits = DEFAULT_LIMITS) -> bytes:
    """Unpack gzip members, stopping as soon as a limit is passed; never holds more than the limit plus one
    piece.

    Raises LimitError (`decompressed_too_large`, `decompression_ratio`, `too_many_gzip_members`),
    InputError (`damaged_gzip`).
    """
    pieces: list[bytes] = []
    total, members, rest = 0, 0, data
    piece = 256 * 1024
    try:
        while rest:
            members += 1
            if members > limits.max_gzip_members:
                raise over_limit(
                    "too_many_gzip_members",
                    what="gzip data",
                    found=members,
                    limit=limits.max_gzip_members,
                    unit="members",
                    mend="Compress the file in one piece.",
                )
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                out = member.decompress(rest, piece)
                rest = member.unconsumed_tail
                total += len(out)
                pieces.append(out)
                _check_unpacked(total, len(data), limits)
                if not out and not rest and not member.eof:
                    raise zlib.error("the stream ends early")
            rest = member.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise refusal(
            "damaged_gzip",
            found=f"a gzip stream that does not unpack ({error})",
            wanted="a complete .fits.gz file",
            mend="Compress or download it again.",
        ) from error
    return b"".join(pieces)


def _check_unpacked(total: int, packed: int, limits: ReaderLimits) -> None:
    mend = "Send the file uncompressed or cut it down."
    if total > limits.max_decompressed_bytes:
        raise over_limit(
            "decompressed_too_large",
            what="gzip content",
            found=total,
            limit=limits.max_decompressed_bytes,
            unit="bytes",
            mend=mend,
        )
    if total > limits.ratio_free_bytes and total > limits.max_decompression_ratio * packed:
        raise over_limit(
            "decompression_ratio",
            what="a gzip compression ratio",
            found=total / packed,
            limit=limits.max_decompression_ratio,
            unit="to 1",
            mend=mend,
        )


def plain_bytes(data: bytes, media_type: str | None, name: str | None, limits: ReaderLimits) -> tuple[str, bytes]:
    """(format, bytes) with the size checked and gzip undone; the format is never "fits.gz"."""
    if len(data) > limits.max_file_bytes:
        raise over_limit(
            "file_too_large",
            what="a file",
            found=len(data),
            limit=limits.max_file_bytes,
            unit="bytes",
            mend="Cut the image or split the table; whole catalogues go through `astroclip embed`.",
        )
    fmt = sniff(data, media_type, name)
    if fmt != "fits.gz":
        return fmt, data
    content = gunzip(data, limits)
    if not content.startswith(b"SIMPLE  ="):
        raise refusal(
            "media_type_mismatch",
            found=f"gzip data holding {content[:8]!r}",
            wanted="a gzip-compressed FITS file",
            mend="Only FITS is read compressed; send other formats plain.",
            kind=MediaTypeError,
        )
    return "fits", content
