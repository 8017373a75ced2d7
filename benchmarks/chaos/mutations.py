"""Bodies to begin with, and what is done to them: a seeded stream of requests that no honest client sends.

    for case in cases(seed, count): case.path, case.query, case.content_type, case.body

A case is a file (or a JSON request, or a form) made here, changed once to four times by what its format understands:
cards of a FITS header, fields of a .npy header, chunks of a PNG with their CRC made right, cells of a table, nodes of a
JSON tree; or by what none does: cuts, flips, splices, tokens.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Case", "cases", "largest", "seeds"]

IDS = ("sim-00000042", "sim-00000043", "sim-00000001", "sim-00000002")  # objects of the index, unless told otherwise
BOUNDARY = "----campaign"
TYPES = {
    "fits": "application/fits",
    "gz": "application/fits",
    "npy": "application/x-npy",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "csv": "text/csv",
    "json": "application/json",
}
NUMBERS = (
    "0", "1", "-1", "2", "3", "32", "64", "255", "256", "-32", "-64", "16", "999", "1000", "65536", "2147483647",
    "-2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1e308", "1e400", "-1e-320", "1D99",
    "NaN",
    "inf", "-0.0", "0.1", "3.5", "T", "F", "''", "'grz'", "'  '", "'x&'", "''''", "", "1 2", "(1,2)", "'1E'", "'0E'",
    "'3D'", "'10A'", "'PE(3)'", "'1PB'", "'QD'", "'L'", "'8X'", "'C'", "'nm'", "'10**999'", "'log10(A)'", "'Jy'",
)  # fmt: skip
KEYWORDS = (
    "SIMPLE BITPIX NAXIS NAXIS1 NAXIS2 NAXIS3 NAXIS4 EXTEND BSCALE BZERO BLANK BUNIT BANDS BAND0 BAND1 FILTER EXTNAME "
    "EXTVER XTENSION PCOUNT GCOUNT GROUPS TFIELDS THEAP TTYPE1 TTYPE2 TFORM1 TFORM2 TFORM3 TUNIT1 TUNIT2 TSCAL1 TZERO1 "
    "TNULL1 TNULL2 TDIM1 TDIM2 TDISP1 ZIMAGE ZCMPTYPE CTYPE1 CTYPE2 CTYPE3 CUNIT1 CRVAL1 CRVAL2 CRPIX1 CDELT1 CDELT2 "
    "CD1_1 CD1_2 CD2_1 CD2_2 PC1_1 CROTA2 LONPOLE EQUINOX RADESYS PIXSCALE MAGZERO SURVEY OBJECT RA DEC Z VACUUM "
    "DC-FLAG "
    "AIRORVAC IMAGETYP CONTINUE HISTORY COMMENT HIERARCH END CHECKSUM DATASUM INHERIT LONGSTRN"
).split()
TOKENS = tuple(
    map(str.encode, (
        "SIMPLE  =", "END", "XTENSION", "NaN", "inf", "-1", "1e999", "9" * 40, "\0" * 16, "\r\n", "--" + BOUNDARY,
        "{", "[", "]",
        '"', "\\ud800", "\\u0000", "wave,flux,ivar\n", "# wave unit: nm, air\n", "True", "'|O'", "'>f8'", "(-1,)",
        "IHDR",
        "IDAT", "iCCP", "zTXt", "acTL", "\ufeff", "\u2028", "é", ";", "\t", ",,,,",
    ))
) + (b"\xff", b"\xff\xd8\xff", b"\xff\xda", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08",
b"\xff\xff\xff\xff", b"\x80")  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 1001, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, 1e-320, "", "x", "image",
    "spectrum",
    "either", "both", "sim-00000042", "\0", "é" * 100, "12:34:56", "-00:12:34", "a" * 5000, [], {}, [[]], [1, 2],
    [None],
    {"column": "redshift", "range": [0.1, 0.3]}, {"cone": {"ra": 0, "dec": 90, "radius_deg": 180}}, {"moc": "29/0-9"},
    {"polygon": [[0, 0], [1, 0], [1, 1]]}, {"box": {"ra": [350, 10], "dec": [-5, 5]}}, {"object_id": "sim-00000007"},
)  # fmt: skip
TEXTS = (
    '{"k": 1, "k": 2}',
    "NaN",
    "-Infinity",
    '"\\ud800"',
    "[" * 500,
    '{"query":' * 300,
    "1e999",
    "1" * 5000,
    "nul",
    "'",
)


@dataclass(frozen=True)
class Case:
    """One request; origin: the seed it grew from."""

    path: str
    query: str
    content_type: str
    body: bytes
    origin: str


@dataclass(frozen=True)
class Seed:
    kind: str
    path: str
    body: bytes


# --- what to begin with ---


@lru_cache
def seeds(ids: tuple[str, ...] = IDS, dim: int = 128) -> dict[str, Seed]:
    """Small files of every kind the service reads, and requests, all of them good for an index of `dim` dimensions that
    has the objects `ids` (four)."""
    rng = np.random.default_rng(1)
    images, spectra = "/v1/embed/image", "/v1/embed/spectrum"
    wave = np.linspace(3600, 9800, 400)
    flux = 5 + (wave - 6600) / 3000 + rng.normal(0, 0.5, 400)
    pixels = _galaxy(rng, 40)
    colours = np.clip(20 + 200 * np.moveaxis(pixels, 0, -1), 0, 255).astype(np.uint8)
    cutout = _cutout(pixels)
    table = _table(wave, flux)
    found = {
        "cutout": Seed("fits", images, cutout),
        "extensions": Seed("fits", images, _extensions(pixels)),
        "cutout.gz": Seed("gz", images, gzip.compress(cutout, mtime=0)),
        "table": Seed("fits", spectra, table),
        "table.gz": Seed("gz", spectra, gzip.compress(table, mtime=0)),
        "vectors": Seed("fits", spectra, _vectors(wave, rng)),
        "line": Seed("fits", spectra, _line(flux)),
        "sdss": Seed("fits", spectra, _sdss(rng)),
        "desi": Seed("fits", spectra, _desi(rng)),
        "npy image": Seed("npy", images, _npy(pixels)),
        "npy colours": Seed("npy", images, _npy(np.stack([colours, colours[::-1]]))),
        "npy spectrum": Seed("npy", spectra, _npy(np.column_stack([wave, flux, np.full(400, 4.0)]))),
        "png": Seed("png", images, _picture(colours, "PNG")),
        "palette": Seed("png", images, _palette(colours)),
        "jpeg": Seed("jpeg", images, _picture(colours, "JPEG", quality=85)),
        "progressive": Seed("jpeg", images, _picture(colours, "JPEG", quality=85, progressive=True)),
        "csv": Seed("csv", spectra, _csv(wave, flux)),
        "ecsv": Seed("csv", spectra, _ecsv(wave, flux)),
    }
    for i, (path, request) in enumerate(_requests(ids, dim)):
        found[f"json {i}"] = Seed("json", path, json.dumps(request).encode())
    return found


def largest(ids: tuple[str, ...], dim: int) -> list[Case]:
    """Good files of the size a service has to bear, many objects and many pixels, and the seeds as they are."""
    rng = np.random.default_rng(2)
    wave = np.linspace(3600, 9800, 5000)
    images = np.stack([_galaxy(rng, 128) for _ in range(128)])
    picture = rng.integers(0, 255, (3000, 3000, 3), dtype=np.uint8)
    found = {
        "many images": (TYPES["npy"], "/v1/embed/image", _npy(images)),
        "many spectra": (TYPES["fits"], "/v1/embed/spectrum", _vectors(wave, rng, 128)),
        "a large picture": (TYPES["jpeg"], "/v1/embed/image", _picture(picture, "JPEG")),
        "a large image": (TYPES["fits"], "/v1/embed/image", _cutout(_galaxy(rng, 1500))),
    }
    files = [Case(path, "", kind, body, name) for name, (kind, path, body) in found.items()]
    return [*files, *(Case(seed.path, "", TYPES[seed.kind], seed.body, name) for name, seed in seeds(ids, dim).items())]


def _requests(ids: tuple[str, ...], dim: int) -> list[tuple[str, dict[str, Any]]]:
    here = {"object_id": ids[0]}
    vector = {"vector": [0.1] * dim, "modality": "image"}
    return [
        ("/v1/search", {"query": here, "k": 5, "target": "either", "columns": ["ra", "redshift"],
        "score_threshold": 0.1}),
        ("/v1/search", {"query": vector, "k": 3, "filter": {"and": [{"column": "redshift", "range": [0.1, None]},
            {"not": {"cone": {"ra": 180, "dec": 0, "radius_deg": 1}}}, {"or": [{"box": {"ra": [350, 200], "dec": [-5,
            5]}},
            {"polygon": [[170, -5], [190, -5], [180, 8]]}, {"moc": "5/8-10 6/44"}, {"moc": {"3": [1, 2]}},
            {"column": "object_id", "in": [*ids[2:]]}]}]}}),
        ("/v1/search", {"query": {"object_id": ids[3], "modality": "both"}, "k": 2}),
        ("/v1/search", {"query": {"combine": {"positive": [here, {"combine": {"positive": [vector]}}],
            "negative": [{"object_id": ids[1]}], "weights": [1, 2], "strategy": "average"}},
            "exclude_arcsec": 10, "fuse": {"image": 1, "spectrum": 2}, "order": "least_similar"}),
        ("/v1/estimate", {"query": here, "properties": ["redshift"], "coverage": 0.9, "method": "knn", "density": 20}),
        ("/v1/estimate", {"query": here, "k": 8, "method": "head", "density": True, "preview": True}),
    ]  # fmt: skip


def _galaxy(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    sky = rng.normal(0, 0.01, (3, size, size))
    return (np.array([0.3, 0.6, 1.0])[:, None, None] * np.exp(-np.hypot(x, y) / 4) + sky).astype(np.float32)


def _fits(*hdus: Any) -> bytes:
    from astropy.io import fits

    stream = io.BytesIO()
    fits.HDUList(list(hdus)).writeto(stream)
    return stream.getvalue()


def _cutout(pixels: np.ndarray) -> bytes:
    from astropy.io import fits

    header = fits.Header()
    header.update(SURVEY="LegacySurvey", BANDS="grz", CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=150.1, CRVAL2=2.2)
    header.update(CRPIX1=20.5, CRPIX2=20.5, CD1_1=-0.262 / 3600, CD1_2=0.0, CD2_1=0.0, CD2_2=0.262 / 3600)
    return _fits(fits.PrimaryHDU(pixels, header))


def _extensions(pixels: np.ndarray) -> bytes:
    from astropy.io import fits

    planes = [fits.ImageHDU((1000 * p).astype(np.int16), name=f"IMAGE-{b}") for p, b in zip(pixels, "GRZ", strict=True)]
    for hdu in planes:
        hdu.header.update(BZERO=0.5, BSCALE=0.001, BLANK=-99, BUNIT="nanomaggy", CDELT1=7.3e-5, CDELT2=7.3e-5)
    return _fits(fits.PrimaryHDU(), *planes, fits.ImageHDU(np.ones(pixels.shape[1:], np.float32), name="INVVAR-R"))


def _table(wave: np.ndarray, flux: np.ndarray) -> bytes:
    from astropy.io import fits

    columns = [
        fits.Column("WAVE", "D", unit="nm", array=wave / 10),
        fits.Column("FLUX", "E", unit="1e-17 erg/s/cm2/A", array=flux),
        fits.Column("ERROR", "E", array=np.full(wave.size, 0.5)),
        fits.Column("MASK", "J", array=np.zeros(wave.size), null=-1),
    ]
    return _fits(fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns))


def _vectors(wave: np.ndarray, rng: np.random.Generator, rows: int = 3) -> bytes:
    from astropy.io import fits

    many = np.tile(wave, (rows, 1))
    columns = [
        fits.Column("WAVELENGTH", f"{wave.size}E", unit="Angstrom", array=many),
        fits.Column("FLUX", f"{wave.size}E", array=5 + rng.normal(0, 1, many.shape)),
        fits.Column("IVAR", f"{wave.size}E", array=np.ones(many.shape)),
        fits.Column("TARGETID", "K", array=np.arange(rows)),
        fits.Column("RA", "D", array=np.arange(float(rows))),
    ]
    return _fits(fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns))


def _line(flux: np.ndarray) -> bytes:
    from astropy.io import fits

    header = fits.Header()
    header.update(CRVAL1=3600.0, CDELT1=15.5, CRPIX1=1.0, CTYPE1="AWAV", CUNIT1="Angstrom", BUNIT="erg/s/cm2/A")
    return _fits(fits.PrimaryHDU(flux.astype(np.float32) * 1e-17, header))


def _sdss(rng: np.random.Generator, n: int = 400) -> bytes:
    from astropy.io import fits

    columns = [
        fits.Column("flux", "E", array=10 + rng.normal(0, 1, n)),
        fits.Column("loglam", "E", array=np.linspace(3.56, 3.99, n)),
        fits.Column("ivar", "E", array=np.ones(n)),
        fits.Column("and_mask", "J", array=np.zeros(n)),
    ]
    row = [fits.Column("PLATE", "J", array=[266]), fits.Column("MJD", "J", array=[51602]),
           fits.Column("FIBERID", "J", array=[1]), fits.Column("Z", "E", array=[0.02])]  # fmt: skip
    coadd, one = (fits.BinTableHDU.from_columns(c) for c in (columns, row))
    return _fits(fits.PrimaryHDU(), coadd, one)


def _desi(rng: np.random.Generator, targets: int = 2) -> bytes:
    from astropy.io import fits

    names = [fits.Column("TARGETID", "K", array=np.arange(targets)), fits.Column("OBJTYPE", "3A", array=["TGT", "SKY"]),
             fits.Column("TARGET_RA", "D", array=np.arange(2.0))]  # fmt: skip
    hdus: list[Any] = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns(names, name="FIBERMAP")]
    for arm, start, stop in (("B", 3600, 5800), ("R", 5760, 7620), ("Z", 7520, 9824)):
        wave = np.linspace(start, stop, 120)
        hdus += [fits.ImageHDU(wave, name=f"{arm}_WAVELENGTH")]
        hdus += [fits.ImageHDU((5 + rng.normal(0, 1, (targets, 120))).astype("f4"), name=f"{arm}_FLUX")]
        hdus += [fits.ImageHDU(np.ones((targets, 120), "f4"), name=f"{arm}_IVAR")]
    return _fits(*hdus)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _picture(colours: np.ndarray, kind: str, **options: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, kind, **options)
    return stream.getvalue()


def _palette(colours: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(colours).quantize(64).save(stream, "PNG", transparency=3)
    return stream.getvalue()


def _csv(wave: np.ndarray, flux: np.ndarray) -> bytes:
    rows = "\n".join(f"{w:.2f},{f:.4g},4.0" for w, f in zip(wave, flux, strict=True))
    return f"# wave unit: Angstrom, air\nwave,flux,ivar\n{rows}\n".encode()


def _ecsv(wave: np.ndarray, flux: np.ndarray) -> bytes:
    rows = "\n".join(f"{w / 10:.2f} {f:.4g}" for w, f in zip(wave, flux, strict=True))
    head = (
        "# %ECSV 1.0\n# ---\n# datatype:\n# - {name: wave, unit: nm, datatype: float64}\n# - {name: flux, unit: mJy}\n"
    )
    return f"{head}wave flux\n{rows}\n".encode()


# --- what is done to them ---


def cases(seed: int, count: int, ids: tuple[str, ...] = IDS, dim: int = 128) -> Iterator[Case]:
    """`count` cases; the same for the same seed."""
    rng = random.Random(seed)
    grounds = seeds(ids, dim)
    names = sorted(grounds)
    for _ in range(count):
        name = rng.choice(names)
        start = grounds[name]
        body = start.body
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            change = rng.choice(_CHANGES[start.kind]) if rng.random() < 0.7 else rng.choice(_BYTES)
            body = change(rng, body)[:200_000]
        yield _request(rng, name, start, body)


def _request(rng: random.Random, name: str, start: Seed, body: bytes) -> Case:
    """A changed body as a request: raw, in a form, or to another call."""
    path, kind = start.path, TYPES[start.kind]
    if rng.random() < 0.1:
        path = rng.choice(("/v1/embed/image", "/v1/embed/spectrum", "/v1/search", "/v1/estimate"))
    if rng.random() < 0.1:
        kind = rng.choice((*TYPES.values(), "application/octet-stream", "text/html", "multipart/mixed", "", "é"))
    query = ""
    if start.kind != "json" and path in ("/v1/search", "/v1/estimate"):
        query = rng.choice(("", "modality=image", "modality=spectrum&k=3", "k=x", "k=1e999", "filter={", "query=[[["))
    elif start.kind != "json" and rng.random() < 0.1:
        query = rng.choice((
            "bands=g,r,z", "bands=", "bands=" + "g," * 40, "pixel_scale_arcsec=0.1", "pixel_scale_arcsec=nan",
            "object=1",
            "pixel_scale_arcsec=-1e309", "wave_unit=nm", "wave_unit=10**999", "flux_unit=Jy", "flux_unit=%00",
            "medium=air",
            "object=%ff%fe", "object=" + "9" * 5000, "format=npy", "nothing=1",
        ))  # fmt: skip
    if rng.random() < 0.15:
        body = _form(rng, start, path, body)
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        if rng.random() < 0.5:
            body = rng.choice(_BYTES)(rng, body)
    return Case(path, query, kind, body, name)


def _form(rng: random.Random, start: Seed, path: str, body: bytes) -> bytes:
    field = "file" if "embed" in path else "request" if start.kind == "json" else path.rpartition("/")[2]
    field = rng.choice((field, field, field, "file", "image", "spectrum", "request", "x" * 300))
    parts: list[bytes] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 70))):
        name = rng.choice(("a.fits", "b.csv", "", "../../etc/passwd", "é\ud83d\ude00", "x" * 5000, 'q"q'))
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        if rng.random() < 0.3:
            head += (
                f"Content-Type: {rng.choice(('text/html', 'application/fits', 'multipart/mixed; boundary=y', ''))}\r\n"
            )
        if rng.random() < 0.05:
            head += "X-Long: " + "y" * 20_000 + "\r\n"
        parts.append(head.encode("utf-8", "replace") + b"\r\n" + body[: 200_000 // (len(parts) + 1)] + b"\r\n")
    end = rng.choice((f"--{BOUNDARY}--\r\n", f"--{BOUNDARY}--\r\n", f"--{BOUNDARY}", ""))
    return b"".join(parts)[:400_000] + end.encode()


Change = Callable[[random.Random, bytes], bytes]


def _cut(rng: random.Random, body: bytes) -> bytes:
    return body[: rng.randrange(len(body) + 1)]


def _flip(rng: random.Random, body: bytes) -> bytes:
    out = bytearray(body or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = int(len(out) * (rng.random() ** rng.choice((1, 3))))  # headers more often
        out[place] = rng.choice((out[place] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 255))
    return bytes(out)


def _drop(rng: random.Random, body: bytes) -> bytes:
    a, length = rng.randrange(len(body) + 1), rng.choice((1, 2, 8, 80, 2880, 10_000))
    return body[:a] + body[a + length :]


def _repeat(rng: random.Random, body: bytes) -> bytes:
    a, length = rng.randrange(len(body) + 1), rng.choice((1, 8, 80, 2880))
    return body[:a] + body[a : a + length] * rng.choice((1, 2, 10, 100)) + body[a:]


def _token(rng: random.Random, body: bytes) -> bytes:
    a, token = rng.randrange(len(body) + 1), rng.choice(TOKENS) * rng.choice((1, 1, 1, 3, 50))
    return body[:a] + token + body[a + rng.choice((0, len(token))) :]


def _splice(rng: random.Random, body: bytes) -> bytes:
    other = rng.choice(list(seeds().values())).body
    a, b = rng.randrange(len(body) + 1), rng.randrange(len(other) + 1)
    return body[:a] + other[b:]


def _integer(rng: random.Random, body: bytes) -> bytes:
    a, form = rng.randrange(len(body) + 1), rng.choice((">I", "<I", ">H", "<Q", ">Q", ">f", ">d"))
    value = rng.choice((0, 1, 2**31 - 1, 2**16 - 1, 255))
    word = struct.pack(form, min(value, 2**16 - 1) if form == ">H" else value)
    return body[:a] + word + body[a + len(word) :]


def _garbage(rng: random.Random, body: bytes) -> bytes:
    return body + rng.choice((b"\0" * 3000, b" " * 100, rng.randbytes(50), body[:500]))


_BYTES: tuple[Change, ...] = (_cut, _flip, _flip, _drop, _repeat, _token, _splice, _integer, _garbage)


def _card(rng: random.Random, body: bytes) -> bytes:
    """Write, double, take out or exchange cards of one of the headers."""
    starts = [m.start() for m in re.finditer(rb"SIMPLE  =|XTENSION=", body)] or [0]
    start = rng.choice(starts)
    end = body.find(b"END".ljust(80), start)
    count = max(1, (end - start) // 80) if end > 0 else 36
    at = start + 80 * rng.randrange(count)
    keyword = body[at : at + 8].decode("latin-1").strip() if rng.random() < 0.5 else rng.choice(KEYWORDS)
    text = rng.choice(NUMBERS)
    card = f"{keyword[:8]:8s}= {text:>20s}" if rng.random() < 0.9 else f"{keyword:8s}  {text * 5}"
    new = card.encode("latin-1", "replace")[:80].ljust(80)
    how = rng.random()
    if how < 0.6:
        return body[:at] + new + body[at + 80 :]
    if how < 0.75:  # in place of the padding, so that the header keeps its length
        padded = end > 0 and body[end + 80 : end + 160].strip() == b""
        return body[:end] + new + b"END".ljust(80) + body[end + 160 :] if padded else body[:at] + new + body[at:]
    if how < 0.85:
        return body[:at] + body[at + 80 :]
    if how < 0.95:
        other = start + 80 * rng.randrange(count)
        cards = bytearray(body)
        cards[at : at + 80], cards[other : other + 80] = body[other : other + 80], body[at : at + 80]
        return bytes(cards)
    run = b"".join(rng.choice((b"CONTINUE  '" + b" " * 60 + b"&'", new)).ljust(80) for _ in range(36))
    return body[:at] + run + body[at:]


_ZEROS = (b"", *(gzip.compress(b"\0" * n, mtime=0) for n in (10**6, 2 * 10**7)))


def _gz(rng: random.Random, body: bytes) -> bytes:
    try:
        plain = gzip.decompress(body)
    except (OSError, EOFError, zlib.error):
        return _flip(rng, body)
    how = rng.randrange(4)
    if how == 0:
        return gzip.compress(plain + b"\0" * 10**4, 1, mtime=0) + rng.choice(_ZEROS)
    if how == 1:
        half = len(plain) // 2
        return (
            gzip.compress(plain[:half], 1, mtime=0)
            + gzip.compress(plain[half:], 1, mtime=0)
            + rng.choice((b"", b"\0" * 9, b"x"))
        )
    return gzip.compress(rng.choice((_card, *_BYTES))(rng, plain), 1, mtime=0)


def _npy_header(rng: random.Random, body: bytes) -> bytes:
    length = int.from_bytes(body[8:10], "little") if len(body) > 10 else 0
    text = body[10 : 10 + length].decode("latin-1").rstrip()
    how = rng.randrange(4)
    if how == 0:
        shape = rng.choice(("()", "(0,)", "(-1,3)", "(3,40,40)", "(40,40,3)", "(9223372036854775807,4)", "(1,)*9",
        "(2,2,2,2,2)",
                            "(3,-40,-40)", "(1e3,)", "(4800,)", "(400,3)", "(3,400)", "(300,4)", "None",
                            "(True,3)"))  # fmt: skip
        text = re.sub(r"'shape': \([^)]*\)", f"'shape': {shape}", text)
    elif how == 1:
        kind = rng.choice(("'<f4'", "'>f8'", "'|O'", "'<U9'", "[('a','<f4')]", "'<f2'", "'|b1'", "'<c16'",
        "'<m8[s]'", "'V4'",
                           "'<f16'", "'|u1'", "'<i8'", "'<u8'", "''", "'S3'", "{}", "'f4,f4'",
                           "('<f4',(2,))"))  # fmt: skip
        text = re.sub(r"'descr': ('[^']*'|\[.*?\])", f"'descr': {kind}", text)
    elif how == 2:
        text = text.replace("False", rng.choice(("True", "None", "1", "[]")))
    else:
        text = rng.choice(
            ("{}", "[" * 100, "{'descr': '<f4'}", "__import__('os')", text + "L", text * 2, text + " " * 9000)
        )
    head = text.encode("latin-1") + b"\n"
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = struct.pack("<H" if version[0] == 1 else "<I", min(len(head), 65535) if rng.random() < 0.9 else 65535)
    return b"\x93NUMPY" + version + size + head + body[10 + length :]


_MILLION = zlib.compress(b"a" * 10**6)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(rng: random.Random, body: bytes) -> bytes:
    """Change the header or add chunks, CRCs made right."""
    if len(body) < 33:
        return _flip(rng, body)
    how = rng.randrange(3)
    if how == 0:
        side = rng.choice((0, 1, 8, 40, 41, 4096, 65535, 2**31 - 1, 2**32 - 1))
        fields = [*struct.unpack(">IIBBBBB", body[16:29])]
        fields[rng.randrange(2)] = side
        if rng.random() < 0.5:
            fields[2:] = [rng.choice((1, 2, 4, 8, 16, 0)), rng.choice((0, 2, 3, 4, 6, 5)), 0, 0, rng.choice((0, 1))]
        return body[:8] + _chunk(b"IHDR", struct.pack(">IIBBBBB", *fields)) + body[33:]
    kind = rng.choice(
        (b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"PLTE", b"tRNS", b"gAMA", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IEND")
    )
    data = rng.choice((
        b"", b"k\0\0" + _MILLION, b"k\0\1\0\0\0" + _MILLION, rng.randbytes(30), b"\0" * 26,
        b"\0\0\0\2\0\0\0\0", b"k\0" + b"t" * 1000, b"Exif\0\0II*\0" + rng.randbytes(20),
    ))  # fmt: skip
    return body[:33] + _chunk(kind, data) * rng.choice((1, 1, 2, 200)) + body[33:]


def _jpeg(rng: random.Random, body: bytes) -> bytes:
    marker = bytes(
        (0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xFF, 0x01, 0xD9)))
    )
    data = rng.choice(
        (
            b"",
            b"Exif\0\0MM\0*",
            b"ICC_PROFILE\0\1\1",
            b"MPF\0II*\0",
            b"Adobe\0d\0\0\0\0\2",
            rng.randbytes(17),
            b"\0" * 64,
        )
    )
    length = rng.choice((len(data) + 2, len(data) + 2, 0, 1, 65535))
    segment = marker + struct.pack(">H", length) + data
    if rng.random() < 0.3 and (at := max(body.find(b"\xff\xc0"), body.find(b"\xff\xc2"))) > 0:
        side = struct.pack(">H", rng.choice((0, 1, 8, 41, 3072, 65535)))
        return body[: at + 5 + 2 * rng.randrange(2)] + side + body[at + 7 :]
    return body[:2] + segment * rng.choice((1, 1, 5, 300)) + body[2:]


def _cells(rng: random.Random, body: bytes) -> bytes:
    lines = body.split(b"\n")
    for _ in range(rng.choice((1, 3, 30))):
        i = rng.randrange(len(lines))
        cells = lines[i].split(b",")
        cells[rng.randrange(len(cells))] = rng.choice((
            b"nan", b"inf", b"-1e308", b"1e-320", b"0", b"", b"--", b"True", b"1_000", b"0x10", "١٢".encode(),
            b"9" * 400, b"wave [nm]",
            b"flux (mJy)", b"loglam", b"\0", b"\xff", b'"1"', b"# wave: 10**999", b"wave [" + b"(" * 90 + b"]",
            b"mask", b"variance",
        ))  # fmt: skip
        lines[i] = b",".join(cells)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    return rng.choice((b"\n", b"\n", b"\r\n", b"\r", b"\x0b", b"\n\n")).join(lines)


def _tree(rng: random.Random, body: bytes) -> bytes:
    """Replace, remove, wrap or double nodes of the JSON tree."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return _flip(rng, body)
    holders = [h for h in _holders(tree) if h]
    if not holders or rng.random() < 0.05:
        return json.dumps(rng.choice(VALUES)).encode()
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    how = rng.random()
    if how < 0.5:
        holder[key] = rng.choice(VALUES)
    elif how < 0.6:
        del holder[key]
    elif how < 0.7:
        holder[key] = rng.choice(([holder[key]], {"and": [holder[key]] * 3}, {"not": holder[key]}, [holder[key]] * 70))
    elif how < 0.8 and isinstance(holder, dict):
        holder[rng.choice(("k", "filter", "query", "x", "", "explain", "columns", "fuse", "modality", "vector"))] = (
            holder[key]
        )
    else:
        holder[key] = "@@"
    text = json.dumps(tree)
    if "@@" in text:
        text = text.replace('"@@"', rng.choice(TEXTS))
    return text.encode("utf-8", "surrogatepass")


def _holders(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(child)


_CHANGES: dict[str, tuple[Change, ...]] = {
    "fits": (_card,),
    "gz": (_gz,),
    "npy": (_npy_header,),
    "png": (_png,),
    "jpeg": (_jpeg,),
    "csv": (_cells,),
    "json": (_tree,),
}
