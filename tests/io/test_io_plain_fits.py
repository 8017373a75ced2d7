"""Plain FITS is read without astropy, to the same values: headers, images, tables, positions; the odd is declined."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import survey_files as files
from astropy.io import fits
from astropy.wcs import WCS

from astroclip.io import read_images, read_spectra
from astroclip.io.fits import Header, parse_fits, scan_fits
from astroclip.io.fits_images import _plain_wcs
from astroclip.io.plain_fits import PlainHeader, plain_header

CARDS = (
    "TEXT    = 'a plain string'     / with a comment",
    "QUOTE   = 'O''Neill  '",
    "EMPTY   = ''",
    "BLANKS  = '    '",
    "NUMBER  =                  -42 / an integer",
    "PLUS    = +7",
    "BIG     = 123456789012345678",
    "FLOAT   =           -1.250E-03 / a float",
    "DOUBLE  = 1.5D+10",
    "POINT   = .5",
    "WHOLE   = 3.",
    "TRUE    =                    T",
    "FALSE   = F/right behind",
    "NOTHING =                      / undefined",
    "A-B_C9  = 1",
    "COMMENT of any text, with 'quotes' and / slashes",
    "HISTORY it was written",
    "        blank keyword",
    "TWICE   = 1",
    "TWICE   = 2",
)


def file_with(*cards: str) -> bytes:
    lines = [
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    0",
        *cards,
    ]
    return "".join(line.ljust(80) for line in [*lines, "END"]).ljust(2880 * 2)[: 2880 * 2].encode("latin-1")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_says_what_astropy_reads(card):
    data = file_with(card)
    (hdu,) = scan_fits(data)
    assert isinstance(hdu.header, PlainHeader)
    theirs = Header(fits.Header.fromstring(data), [])
    assert dict(hdu.header) == {key: theirs[key] for key in theirs if key not in ("COMMENT", "HISTORY", "")}
    assert [type(v) for v in hdu.header.values()] == [type(theirs[key]) for key in hdu.header]
    assert hdu.header.comments == theirs.comments


def test_all_cards_together():
    (hdu,) = scan_fits(file_with(*CARDS))
    assert isinstance(hdu.header, PlainHeader) and hdu.header["TWICE"] == 1


@pytest.mark.parametrize(
    "card",
    [
        "lower   = 'x'",
        "COMPLEX = (1.0, 2.0)",
        "OPEN    = 'no end",
        "TAIL    = 'x' rest",
        "HIERARCH ESO DET = 1",
        "CONTINUE  'more'",
        "DP1     = 'EXTVER: 2'",
        "NOVALUE 12",
        "SPACE IN= 1",
        "TOOBIG  = 12345678901234567890",
        "EXPONENT= 1E1234",
        "LATIN   = 'caf\xe9'",
        "TAB     = 'a\tb'",
        "INHERIT = T",
    ],
)
def test_odd_cards_are_left_to_astropy(card):
    data = file_with(card)
    assert plain_header(data, data.index(b"END ") // 80 + 1) is None


def test_damaged_cards_never_say_something_else(rng):
    """Bytes changed anywhere in a header: declined, or the very values of astropy."""
    whole, plain = bytearray(file_with(*CARDS)), 0
    end = whole.index(b"END ".ljust(80)) // 80
    for _ in range(600):
        data = bytearray(whole)
        for place in rng.integers(240, end * 80, rng.integers(1, 4)):
            data[place] = rng.choice(np.frombuffer(b"'/=.+-ETF 0129AZaz\x00\x7f\xe9", np.uint8))
        header = plain_header(bytes(data[: 2880 * 2]), end + 1)
        if header is None:
            continue
        plain += 1
        theirs = Header(fits.Header.fromstring(bytes(data[: (end + 1) * 80])), [])
        for key in header:
            assert header[key] == theirs[key] and type(header[key]) is type(theirs[key]), bytes(data)
    assert plain > 100


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "i8", "f4", "f8"])
def test_images(rng, kind):
    pixels = rng.integers(0, 200, (3, 8, 9)).astype(kind)
    data = files.fits_bytes(fits.PrimaryHDU(pixels), fits.ImageHDU(pixels[0], name="ONE"))
    for hdu, wanted in zip(parse_fits(data), (pixels, pixels[0]), strict=True):
        found = hdu.image()
        assert isinstance(hdu.header, PlainHeader) and found.dtype.isnative and found.flags.writeable
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype


def test_scaled_and_blank_images_are_astropys():
    hdu = fits.ImageHDU(np.arange(6, dtype="u2").reshape(2, 3))  # stored with BZERO
    blank = fits.ImageHDU(np.array([[1, 2, -9]], "i2"))
    blank.header["BLANK"] = -9
    _, unsigned, nulled = parse_fits(files.fits_bytes(fits.PrimaryHDU(), hdu, blank))
    np.testing.assert_array_equal(unsigned.image(), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(nulled.image(), [[1, 2, np.nan]])


def test_tables(rng):
    columns = [
        fits.Column("FLUX", "E", array=rng.normal(size=5)),
        fits.Column("wide", "3D", array=rng.normal(size=(5, 3))),
        fits.Column("ID", "K", array=np.arange(5) + 2**40),
        fits.Column("SHORT", "I", array=np.arange(5)),
        fits.Column("BYTE", "B", array=np.arange(5)),
        fits.Column("GOOD", "L", array=[True, False, True, True, False]),
        fits.Column("NAME", "6A", array=["a", "bc ", "", "six  x", "e"]),
        fits.Column("OFFSET", "J", bzero=2**31, array=np.arange(5, dtype="u4")),
    ]
    data = files.fits_bytes(fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns))
    table = parse_fits(data)[1]
    assert isinstance(table.header, PlainHeader)
    with fits.open(BytesIO(data)) as theirs:
        for name in ("FLUX", "wide", "ID", "SHORT", "BYTE", "GOOD", "OFFSET"):
            found, wanted = table.read(name.lower()), theirs[1].data[name]
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype.newbyteorder("="), name
    assert table.read("name").tolist() == ["a", "bc", "", "six  x", "e"]
    assert table.read("wide", row=2).shape == (3,)


@pytest.mark.parametrize("angle", [0.0, 0.7, 3.0])
def test_positions_are_those_of_the_header(angle):
    scale = 0.262 / 3600
    cards = {
        "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 359.99, "CRVAL2": -33.1, "CRPIX1": 70.0, "CRPIX2": 81.5,
        "CD1_1": -scale * np.cos(angle), "CD1_2": scale * np.sin(angle), "CD2_1": scale * np.sin(angle),
        "CD2_2": scale * np.cos(angle),
    }  # fmt: skip
    ours, theirs = _plain_wcs(cards), WCS(fits.Header(cards), naxis=2, fix=False)
    assert ours is not None
    np.testing.assert_allclose(ours.wcs_pix2world(3.0, 140.0, 0), theirs.wcs_pix2world(3.0, 140.0, 0), rtol=1e-12)
    np.testing.assert_allclose(ours.pixel_scale_matrix, theirs.pixel_scale_matrix, rtol=1e-12)
    assert _plain_wcs({**cards, "CUNIT1": "arcmin"}) is None


def test_astropy_is_not_asked_for_plain_files(rng, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("astropy opened a plain file")

    cutout, coadd, spec = files.cutout(rng), files.desi_coadd(rng), files.sdss_spec(rng)
    monkeypatch.setattr(fits, "open", refuse)
    monkeypatch.setattr(fits.Header, "fromstring", refuse)
    assert len(read_images(cutout)) == 1 and len(read_spectra(coadd)) == 2 and len(read_spectra(spec)) == 1
