"""Every limit of the readers, just below and just above; and the files that once kept a reader busy."""

from __future__ import annotations

import gzip
import struct
import time
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest
import survey_files as files
from astropy.io import fits

from astroclip.errors import InputError, LimitError
from astroclip.io import SpectrumOptions, detect_modality, read_images, read_spectra
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits

RNG = np.random.default_rng(4)
COLOURS = RNG.integers(0, 255, (40, 40, 3), dtype=np.uint8)


def limited(name: str, value: float) -> ReaderLimits:
    return replace(DEFAULT_LIMITS, **{name: value})


def csv(comments: int, blank: int = 0) -> bytes:
    rows = b"".join(b"%d,%d\n" % (3600 + 10 * i, i % 7) for i in range(100))
    return b"# a remark\n" * comments + b"\n" * blank + b"wave,flux\n" + rows


def png(chunks: int) -> bytes:
    plain = files.picture(COLOURS)
    empty = struct.pack(">I", 0) + b"quXt" + struct.pack(">I", zlib.crc32(b"quXt"))
    return plain[:33] + empty * chunks + plain[33:]


def jpeg(segments: int) -> bytes:
    plain = files.picture(COLOURS, "JPEG")
    return plain[:2] + b"\xff\xfe\x00\x02" * segments + plain[2:]


def scans(count: int) -> bytes:
    plain = files.picture(COLOURS, "JPEG", progressive=True)
    last = plain[plain.rfind(b"\xff\xda") : -2]
    return plain[:-2] + last * (count - plain.count(b"\xff\xda")) + plain[-2:]


def vectors(rows: int) -> bytes:
    wave = np.tile(np.linspace(3600, 9800, 100), (rows, 1))
    return files.table({"WAVE": wave, "FLUX": RNG.normal(5, 1, wave.shape)})


def continued(cards: int) -> bytes:
    header = fits.Header()
    header["OBJECT"] = "x"
    plain = files.fits_bytes(fits.PrimaryHDU(files.galaxy(RNG), files.cutout_header()))
    end = plain.index(b"END".ljust(80))
    head = plain[:end] + b"OBJECT  = 'a&'".ljust(80) + b"CONTINUE  'b&'".ljust(80) * cards + b"END".ljust(80)
    return head.ljust(-(-len(head) // 2880) * 2880) + plain[-(-(end + 80) // 2880) * 2880 :]


# limit: value, what is read with it, what is one more, code
CASES = {
    "max_text_comments": (5, csv(5), csv(6), "too_many_comments"),
    "max_text_lines": (120, csv(0, 18), csv(0, 19), "too_many_lines"),
    "max_picture_parts": (60, png(57), png(58), "picture_too_complex"),
    "max_picture_scans": (12, scans(12), scans(13), "picture_too_complex"),
    "max_picture_pixels": (1600, files.picture(COLOURS), files.picture(RNG.integers(0, 9, (40, 41, 3), np.uint8)),
                           "image_too_large"),
    "max_image_samples": (3 * 64 * 64, files.cutout(RNG), files.npy_bytes(np.stack([files.galaxy(RNG)] * 2)),
                          "too_many_samples"),
    "max_file_samples": (300, vectors(3), vectors(4), "too_many_samples"),
    "max_continued_cards": (3, continued(3), continued(4), "header_value_too_long"),
    "max_gzip_members": (2, files.gz(files.cutout(RNG)[:2880]) + files.gz(files.cutout(RNG)[2880:]),
                         files.gz(files.cutout(RNG)[:2880]) + files.gz(b"") + files.gz(files.cutout(RNG)[2880:]),
                         "too_many_gzip_members"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_below_and_above(name: str) -> None:
    value, below, above, code = CASES[name]
    read = read_spectra if detect_modality(below) == "spectrum" else read_images
    assert read(below, limits=limited(name, value))
    with pytest.raises(LimitError) as refused:
        read(above, limits=limited(name, value))
    assert refused.value.code == code and refused.value.limit == value
    assert read(above)  # the default is far away


def test_jpeg_segments() -> None:
    plain = 1 + next(n for n in range(100) if not _reads(jpeg(0), n) and _reads(jpeg(0), n + 1))
    assert _reads(jpeg(10), plain + 10) and not _reads(jpeg(11), plain + 10)


def _reads(data: bytes, parts: int) -> bool:
    try:
        return bool(read_images(data, limits=limited("max_picture_parts", max(parts, 1))))
    except LimitError as error:
        assert error.code == "picture_too_complex"
        return False


def test_npy_header() -> None:
    plain = files.npy_bytes(files.galaxy(RNG))
    head = plain[10:128].rstrip()
    long = b"\x93NUMPY\x01\x00" + struct.pack("<H", 301) + head + b" " * (300 - len(head)) + b"\n" + plain[128:]
    assert read_images(long, limits=limited("max_npy_header", 301))
    with pytest.raises(InputError, match="header"):
        read_images(long, limits=limited("max_npy_header", 300))


@pytest.mark.parametrize("field", fields(ReaderLimits), ids=lambda field: field.name)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_numbers_above_zero(field, value) -> None:
    with pytest.raises(ValueError, match=field.name):
        limited(field.name, value)


# --- what was once slow ----------------------------------------------------------------------------------------------


def repeated(keyword: str, value: str) -> bytes:
    plain = files.cutout(RNG)
    end = plain.index(b"END".ljust(80))
    card = f"{keyword:8s}= {value:>20s}".encode().ljust(80)
    return plain[:end] + card + b"END".ljust(80) + plain[end + 160 :]


ROWS = b"".join(b"%d,1\n" % (3600 + i) for i in range(100))
SLOW = {
    "NAXIS twice": repeated("NAXIS", str(10**18)),
    "naxis twice": repeated("naxis", str(10**18)),
    "HIERARCH NAXIS": repeated("HIERARCH", "0").replace(b"HIERARCH= ", b"HIERARCH NAXIS = 1000000000000000000 /"),
    "unit of a power": b"wave [10**99999999999999 nm],flux\n" + ROWS,
    "unit of a power, FITS way": b"wave [m99999999],flux\n" + ROWS,
    "blanks before a unit": b"#wave" + b" " * 4000 + b"x\n" + b"wave,flux\n" + ROWS,
    "many names": b"# " + b"{name:a " * 500 + b"\nwave,flux\n" + ROWS,
    "many units": b"\n".join(b"#wave: " + b" ".join(b"q%dx%d" % (i, j) for j in range(60)) for i in range(900))
    + b"\nwave,flux\n" + ROWS,
    "fill bytes": files.picture(COLOURS, "JPEG")[:2] + b"\xff" * 10_000_000 + files.picture(COLOURS, "JPEG")[2:],
    "empty chunks": png(300_000),
    "scans": scans(3000),
    "npy header of blanks": b"\x93NUMPY\x01\x00" + struct.pack("<H", 4000)
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (), }".ljust(500) + b"\n" + bytes(range(256)) * 40,
    "blank lines": b"\n" * 20_000_000,
    "empty members": gzip.compress(b"") * 100_000,
    "continued blanks": continued(400).replace(b"CONTINUE  'b&'" + b" " * 50, b"CONTINUE  '" + b" " * 51 + b"&'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_no_file_takes_long(name: str) -> None:
    start = time.process_time()
    for read in (read_images, read_spectra, detect_modality):
        try:
            read(SLOW[name])
        except (InputError, LimitError):
            continue
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("unit", ["10**999", "m**(99**99)", "10**(9**9**9)", "sqrt(" * 19, "(1e-17 " * 12, "9" * 100])
def test_units_of_strangers(unit: str) -> None:
    start = time.process_time()
    for options in (SpectrumOptions(wave_unit=unit), SpectrumOptions(flux_unit=unit)):
        with pytest.raises(InputError):
            read_spectra(b"wave,flux\n" + ROWS, options=options)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("unit", ["3631 Jy", "1e-17 erg/s/cm2/A", "10**(-17)erg/cm2/s/Angstrom", "1.000000 Jy"])
def test_units_of_friends(unit: str) -> None:
    wave = np.linspace(3600, 9800, 200)
    text = files.csv_text({"wave": wave, "flux": RNG.normal(5, 1, 200)})
    assert read_spectra(text, options=SpectrumOptions(flux_unit=unit))


def test_text_cut_by_tdim_is_not_read() -> None:
    """Thirty million strings out of a column of 30 MB of text."""
    wave = np.tile(np.linspace(3600, 9800, 100), (2, 1))
    names = fits.Column("TARGETID", "3000A", dim="(1,3000)", array=np.full((2, 3000), "a"))
    columns = [fits.Column("WAVE", "100D", array=wave), fits.Column("FLUX", "100D", array=wave), names]
    data = files.fits_bytes(fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns))
    with pytest.raises(InputError) as refused:
        read_spectra(data)
    assert refused.value.code == "unsupported_column"


def test_a_long_axis_is_refused_before_it_is_laid_out() -> None:
    header = fits.Header()
    header.update(CRVAL1=3600.0, CDELT1=1e-3)
    data = files.fits_bytes(fits.PrimaryHDU(np.zeros(DEFAULT_LIMITS.max_spectrum_pixels + 1, np.uint8), header))
    with pytest.raises(LimitError) as refused:
        read_spectra(data)
    assert refused.value.code == "spectrum_too_long"
