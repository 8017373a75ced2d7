"""Bad input: every kind is refused with its own class and code, and a message of three parts."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import survey_files as files
from astropy.io import fits

from astroclip.errors import AstroClipError, InputError, LimitError, MediaTypeError
from astroclip.io import ImageOptions, SpectrumOptions, read_images, read_spectra, sniff
from astroclip.limits import DEFAULT_LIMITS


def refuse(read, data, kind, code, **kwargs) -> AstroClipError:
    """Assert class, code and the three parts of the message."""
    with pytest.raises(AstroClipError) as caught:
        read(data, **kwargs)
    error = caught.value
    assert type(error) is kind and error.code == code, f"{type(error).__name__} {error.code}: {error}"
    assert error.message.startswith("Found ") and "; wanted " in error.message
    assert error.message.split("; wanted ", 1)[1].count(". ") >= 1  # a sentence on how to mend it follows
    assert (error.limit is not None) == (kind is LimitError)
    return error


def columns(**changes) -> bytes:
    """A good npy spectrum with some columns replaced."""
    rng = np.random.default_rng(3)
    wave, flux, ivar = files.spectrum_columns(rng, 500)
    parts = {"wave": wave, "flux": flux, "ivar": ivar} | changes
    return files.npy_bytes(np.column_stack(list(parts.values())))


def header_only(**cards) -> bytes:
    """A FITS header that announces more than follows."""
    header = fits.Header({"SIMPLE": True, "BITPIX": -32, "NAXIS": 2, "NAXIS1": 64, "NAXIS2": 64} | cards)
    return header.tostring().encode() + b"\0" * 2880


# --- the list of the project -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [100, 2900, 6000, 40_000])
def test_truncated_fits(rng, keep):
    refuse(read_images, files.cutout(rng)[:keep], InputError, "truncated_fits")
    refuse(read_spectra, files.sdss_spec(rng)[:keep], InputError, "truncated_fits")


def test_text_renamed_fits():
    error = refuse(read_images, b"wave,flux\n1,2\n", MediaTypeError, "media_type_mismatch", name="galaxy.fits")
    assert "plain text" in error.message and "SIMPLE" in error.message
    refuse(read_spectra, b"not a fits file", MediaTypeError, "media_type_mismatch", media_type="application/fits")


def test_one_pixel_image(rng):
    refuse(read_images, files.fits_bytes(fits.PrimaryHDU(np.ones((3, 1, 1), "f4"))), InputError, "image_too_small")
    refuse(read_images, files.npy_bytes(np.ones((3, 1, 1), "f4")), InputError, "image_too_small")
    refuse(read_images, files.picture(np.ones((1, 1, 3), "u1")), InputError, "image_too_small")


def test_very_long_thin_image():
    refuse(read_images, files.npy_bytes(np.ones((3, 300_000, 1), "f4")), InputError, "image_too_small")


def test_all_nan(rng):
    nan = np.full((3, 64, 64), np.nan, "f4")
    refuse(read_images, files.cutout(rng, nan), InputError, "no_finite_pixels")
    one_band = files.galaxy(rng)
    one_band[1] = np.nan
    error = refuse(read_images, files.cutout(rng, one_band), InputError, "no_finite_pixels")
    assert error.field == "r"
    refuse(read_spectra, columns(flux=np.full(500, np.nan)), InputError, "no_finite_flux")


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_image(rng, value):
    constant = np.full((3, 64, 64), value, "f4")
    refuse(read_images, files.cutout(rng, constant), InputError, "constant_image")
    refuse(read_images, files.npy_bytes(constant), InputError, "constant_image")


def test_one_band_missing(rng):
    two = files.galaxy(rng)[:2]
    header = files.cutout_header()
    refuse(read_images, files.cutout(rng, two), InputError, "band_mismatch")  # BANDS still says grz
    del header["BANDS"]
    refuse(read_images, files.fits_bytes(fits.PrimaryHDU(two, header)), InputError, "unknown_bands")
    (image,) = read_images(files.cutout(rng, two, BANDS="gr"))  # readable; the model refuses it by band
    preprocess = pytest.importorskip("astroclip.preprocess")
    with pytest.raises(InputError, match="z") as caught:
        preprocess.image_to_grid(image)
    assert caught.value.code == "missing_band"


def test_spectrum_of_twelve_pixels():
    data = files.npy_bytes(np.column_stack([np.linspace(4000, 5000, 12), np.ones(12)]))
    error = refuse(read_spectra, data, InputError, "spectrum_too_short")
    assert "12" in error.message


@pytest.mark.parametrize("bad", [np.nan, -4000.0, 0.0, np.inf])
def test_impossible_wavelengths(bad):
    wave = np.linspace(3600, 9600, 500)
    wave[17] = bad
    error = refuse(read_spectra, columns(wave=wave), InputError, "bad_wavelength")
    assert "row 17" in error.message and error.field == "wave"


def test_one_wavelength_repeated_throughout():
    refuse(read_spectra, columns(wave=np.full(500, 5000.0)), InputError, "spectrum_too_short")


def test_zero_ivar_throughout(rng):
    refuse(read_spectra, columns(ivar=np.zeros(500)), InputError, "zero_ivar")
    refuse(read_spectra, files.desi_coadd(rng, 1, dead=(0,)), InputError, "zero_ivar")
    refuse(read_spectra, files.desi_coadd(rng, 2, dead=(0, 1)), InputError, "zero_ivar")


def test_cube_whose_planes_do_not_fit_its_bands(rng):
    cube = np.concatenate([files.galaxy(rng)] * 3)
    refuse(read_images, files.cutout(rng, cube), InputError, "band_mismatch")
    refuse(read_images, files.fits_bytes(fits.PrimaryHDU(cube)), InputError, "unknown_bands")
    refuse(read_images, files.npy_bytes(cube), InputError, "not_an_image")
    options = ImageOptions(bands=("g", "r"))
    refuse(read_images, files.cutout(rng), InputError, "band_mismatch", options=options)
    refuse(read_images, files.cutout(rng, BANDS="grg"), InputError, "band_mismatch")


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 1, 16, 16)])
def test_too_many_axes(shape):
    refuse(read_images, files.fits_bytes(fits.PrimaryHDU(np.ones(shape, "f4"))), InputError, "bad_axes")


def test_object_arrays_are_never_unpickled(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    data = files.npy_bytes(np.array([Bomb(), 1], dtype=object), allow_pickle=True)
    refuse(read_images, data, InputError, "object_array")
    refuse(read_spectra, data, InputError, "object_array")
    assert not (tmp_path / "exploded").exists()


# --- types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"PK\x03\x04rest", "unknown_media_type"),
        (b"\x89HDF\r\n\x1a\n", "unknown_media_type"),
        (b"\x80\x04\x95abc", "unknown_media_type"),
        (b"<html><body>404</body></html>", "unknown_media_type"),
        (b"\x00\x01\x02\x03" * 20, "unknown_media_type"),
    ],
)
def test_foreign_bytes(data, code):
    refuse(read_images, data, MediaTypeError, code)


def test_declared_type_may_be_silent_but_not_wrong(rng):
    data = files.cutout(rng)
    assert sniff(data, None, None) == sniff(data, "application/octet-stream", "upload") == "fits"
    assert sniff(data, "application/fits", "cutout.png") == "fits"  # the type is stated; the name is not asked
    assert sniff(files.gz(data), "application/fits", "cutout.fits") == "fits.gz"
    refuse(sniff, data, MediaTypeError, "media_type_mismatch", media_type="image/png")
    refuse(sniff, data, MediaTypeError, "media_type_mismatch", name="cutout.png")
    refuse(sniff, data, MediaTypeError, "unknown_media_type", media_type="application/x-tar")


def test_gzip_of_something_else():
    refuse(read_images, gzip.compress(b"wave,flux\n1,2"), MediaTypeError, "media_type_mismatch")
    refuse(read_images, gzip.compress(b"x" * 5000)[:-20], InputError, "damaged_gzip")


def test_the_other_modality_is_named(rng):
    refuse(read_images, files.sdss_spec(rng), InputError, "not_an_image")
    refuse(read_images, b"wave,flux\n1,2\n", InputError, "not_an_image")
    refuse(read_spectra, files.cutout(rng), InputError, "not_a_spectrum")
    refuse(read_spectra, files.picture(np.zeros((64, 64, 3), "u1")), InputError, "not_a_spectrum")
    refuse(read_spectra, files.npy_bytes(np.zeros((3, 64, 64))), InputError, "not_a_spectrum")


# --- content -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "code"),
    [
        ({"BITPIX": 7}, "damaged_fits"),
        ({"NAXIS1": -64}, "damaged_fits"),
        ({"NAXIS1": "many"}, "damaged_fits"),
        ({"NAXIS1": 10**15}, "truncated_fits"),
        ({"NAXIS": 999}, "bad_axes"),
        ({"SIMPLE": False}, "damaged_fits"),
    ],
)
def test_lying_headers(cards, code):
    refuse(read_images, header_only(**cards), InputError, code)


def test_compressed_image_extension(rng):
    extension = fits.CompImageHDU(files.galaxy(rng)[0])
    refuse(read_images, files.fits_bytes(fits.PrimaryHDU(), extension), InputError, "compressed_fits")


def test_variable_length_columns():
    column = fits.Column("FLUX", "PD()", array=np.array([np.ones(50), np.ones(60)], dtype=object))
    hdu = fits.BinTableHDU.from_columns([fits.Column("WAVE", "D", array=np.ones(2)), column])
    refuse(read_spectra, files.fits_bytes(fits.PrimaryHDU(), hdu), InputError, "unsupported_column")


def test_variable_length_columns_anywhere_are_refused(rng):
    """Also in a table nobody asked for: their pointers lead anywhere in the file."""
    stray = fits.BinTableHDU.from_columns([fits.Column("X", "PJ()", array=np.array([[1], [1, 2]], dtype=object))])
    error = refuse(read_images, files.cutout(rng) + extension(stray), InputError, "unsupported_column")
    assert error.field == "x"


def extension(hdu: fits.BinTableHDU | fits.TableHDU) -> bytes:
    """The bytes of `hdu` behind an empty primary HDU, without that."""
    return files.fits_bytes(fits.PrimaryHDU(), hdu)[2880:]


def test_random_groups(rng):
    groups = fits.GroupsHDU(fits.GroupData(rng.normal(size=(1, 1, 1, 8)), bitpix=-32, parnames=["u"], pardata=[[1]]))
    refuse(read_images, files.fits_bytes(groups), InputError, "random_groups")


def test_an_ascii_table_is_listed_and_never_read(rng):
    ascii_table = fits.TableHDU.from_columns([fits.Column("flux", "E15.7", array=np.ones(50), ascii=True)], name="LOG")
    (image,) = read_images(files.cutout(rng) + extension(ascii_table))
    assert not image.quality.flags
    error = refuse(read_spectra, files.fits_bytes(fits.PrimaryHDU(), ascii_table), InputError, "not_a_spectrum")
    assert "LOG" in error.message


def test_columns_wider_than_their_rows():
    data = files.table({"WAVE": np.linspace(4000, 9000, 100), "FLUX": np.ones(100)})
    wide = data.replace(b"TFORM2  = 'D       '", b"TFORM2  = '2D      '")
    assert wide != data
    refuse(read_spectra, wide, InputError, "damaged_fits")


def test_an_unreadable_card_is_refused_only_where_it_is_needed(rng):
    data = files.cutout(rng)
    (image,) = read_images(data.replace(b"VERSION = 'DR9     '", b"VERSION = 'DR9      "))
    assert image.bands == ("g", "r", "z")
    refuse(read_images, data.replace(b"BANDS   = 'grz     '", b"BANDS   = 'grz      "), InputError, "damaged_fits")


def test_what_astropy_warns_of_becomes_a_flag(recwarn):
    """A null for a column of floats has no meaning (some IDL writers add one); the table is read all the same."""
    data = files.table({"WAVE": np.linspace(4000, 9000, 100), "FLUX": np.arange(100.0)}, TNULL2=-9)
    (spectrum,) = read_spectra(data)
    assert "nonstandard_fits" in {flag.code for flag in spectrum.quality.flags}
    assert not recwarn.list


def test_padding_and_filler_behind_the_last_hdu(rng):
    data = files.cutout(rng)
    used = len(data) - 2880 + (3 * 64 * 64 * 4) % 2880  # without the padding of the last block
    for variant in (data + b"\0" * 2880, data + b" " * 100, data[:used]):
        (image,) = read_images(variant)
        np.testing.assert_array_equal(image.pixels, read_images(data)[0].pixels)
        assert not image.quality.flags


def test_planes_of_different_sizes(rng):
    hdus = [fits.PrimaryHDU()] + [fits.ImageHDU(rng.normal(size=(n, n)), name=b) for n, b in ((32, "g"), (33, "r"))]
    refuse(read_images, files.fits_bytes(*hdus), InputError, "length_mismatch")


@pytest.mark.parametrize("unit", ["nmgy/arcsec2", "MJy/sr", "Jy/beam", "erg/s/cm2/A", "adu"])
def test_pixels_that_are_no_flux_per_pixel(rng, unit):
    refuse(read_images, files.cutout(rng, BUNIT=unit), InputError, "unknown_unit")


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e9])
def test_bad_pixel_scale(rng, scale):
    options = ImageOptions(pixel_scale_arcsec=scale)
    refuse(read_images, files.npy_bytes(files.galaxy(rng)), InputError, "bad_pixel_scale", options=options)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"# nothing but a comment\n", "not_a_spectrum"),
        (b"a,b\n1,2\n", "missing_column"),
        (b"1,2,3,4,5\n" * 50, "missing_column"),
        (b"wave,flux\n" + b"4000,one\n" * 50, "not_numeric"),
        (b"wave,flux\n" + b"4000,1\n" * 40 + b"4000,1,2\n", "length_mismatch"),
    ],
)
def test_bad_text(text, code):
    refuse(read_spectra, text, InputError, code)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (SpectrumOptions(wave_unit="parsec"), "unknown_unit"),
        (SpectrumOptions(wave_unit="km"), "unknown_unit"),
        (SpectrumOptions(flux_unit="furlong"), "unknown_unit"),
        (SpectrumOptions(flux_unit="erg/s/cm2"), "unknown_unit"),
        (SpectrumOptions(flux_unit="erg/s/cm/A"), "unknown_unit"),
        (SpectrumOptions(flux_unit="A" * 5000), "unknown_unit"),
        (SpectrumOptions(flux_unit="counts"), "uncalibrated_flux"),
    ],
)
def test_bad_units(options, code):
    refuse(read_spectra, columns(), InputError, code, options=options)


def test_mostly_negative_ivar():
    refuse(read_spectra, columns(ivar=np.full(500, -1.0)), InputError, "negative_ivar")


def test_no_such_target(rng):
    error = refuse(
        read_spectra, files.desi_coadd(rng, 2), InputError, "no_such_target", options=SpectrumOptions(target="77")
    )
    assert "39627000000000000" in error.message


def test_grey_picture_and_damaged_picture(rng):
    grey = files.picture(np.zeros((64, 64), "u1"))
    refuse(read_images, grey, InputError, "not_rgb")
    whole = files.picture(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    refuse(read_images, whole[:200], InputError, "damaged_picture")


# --- limits: each is met below and passed above --------------------------------------------------------------


def limits(**changes):
    return replace(DEFAULT_LIMITS, **changes)


def at(read, data, name, value, code, **kwargs):
    """`data` passes with the limit at `value` and is refused with it one below, naming the number."""
    read(data, limits=limits(**{name: value}), **kwargs)
    error = refuse(read, data, LimitError, code, limits=limits(**{name: value - 1}), **kwargs)
    assert error.limit == value - 1
    assert f"{value - 1:,}" in error.message


def test_file_and_image_limits(rng):
    data = files.cutout(rng)
    at(read_images, data, "max_file_bytes", len(data), "file_too_large")
    at(read_images, data, "max_image_pixels", 64 * 64, "image_too_large")
    at(read_images, data, "max_image_planes", 3, "too_many_planes")
    at(read_images, files.picture(np.eye(64, dtype="u1")[..., None] * np.ones(3, "u1")), "max_image_pixels", 4096,
       "image_too_large")  # fmt: skip
    stack = files.npy_bytes(np.stack([files.galaxy(rng)] * 2))
    at(read_images, stack, "max_targets", 2, "too_many_targets")


def test_minimum_sizes(rng):
    small = files.npy_bytes(files.galaxy(rng, 16))
    read_images(small, limits=limits(min_image_side=16))
    refuse(read_images, small, InputError, "image_too_small", limits=limits(min_image_side=17))
    read_spectra(columns(), limits=limits(min_spectrum_pixels=500))
    refuse(read_spectra, columns(), InputError, "spectrum_too_short", limits=limits(min_spectrum_pixels=501))


def test_fits_structure_limits(rng):
    data = files.desi_coadd(rng, 2)
    at(read_spectra, data, "max_hdus", 14, "too_many_hdus")
    at(read_spectra, data, "max_targets", 2, "too_many_targets")
    at(read_spectra, data, "max_table_columns", 3, "too_many_columns")
    cards = len(fits.Header(files.cutout_header())) + 7  # SIMPLE, BITPIX, NAXIS, NAXIS1-3 and END
    data = files.cutout(rng)
    used = next(n for n in range(cards - 3, cards + 4) if _passes(data, n))
    at(read_images, data, "max_header_cards", used, "header_too_long")
    refuse(read_images, data, InputError, "bad_axes", limits=limits(max_axes=2))
    read_images(data, limits=limits(max_axes=3))


def _passes(data: bytes, cards: int) -> bool:
    try:
        read_images(data, limits=limits(max_header_cards=cards))
    except LimitError:
        return False
    return True


def test_spectrum_and_text_limits():
    at(read_spectra, columns(), "max_spectrum_pixels", 500, "spectrum_too_long")
    text = b"wave,flux\n" + b"".join(b"%d,1.5\n" % w for w in range(4000, 4100))
    at(read_spectra, text, "max_text_line", 9, "line_too_long")
    read_spectra(text, limits=limits(max_spectrum_pixels=100))
    refuse(read_spectra, text, LimitError, "spectrum_too_long", limits=limits(max_spectrum_pixels=98))


def test_gzip_limits(rng):
    data = files.cutout(rng)
    packed = files.gz(data)
    at(read_images, packed, "max_decompressed_bytes", len(data), "decompressed_too_large")
    blank = files.gz(files.cutout(rng, np.zeros((3, 64, 64), "f4")))
    strict = limits(ratio_free_bytes=1000, max_decompression_ratio=2.0)
    error = refuse(read_images, blank, LimitError, "decompression_ratio", limits=strict)
    assert error.limit == 2.0
    read_images(packed, limits=strict)


def test_a_bomb_is_stopped_early():
    """1 GB of zeros in 1 MB of gzip: refused after a few megabytes, whatever it goes on to say."""
    import tracemalloc

    bomb = gzip.compress(bytes(64 * 1024 * 1024), 9) * 16
    tracemalloc.start()
    refuse(read_images, bomb, LimitError, "decompression_ratio", limits=limits(max_decompressed_bytes=2**40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 1024 * 1024
