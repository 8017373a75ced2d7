"""Image readers: bands, scale, units, masks, display pictures."""

from __future__ import annotations

import numpy as np
import pytest
import survey_files as files
from astropy.io import fits
from astropy.wcs import WCS

from astroclip.io import ImageOptions, read_images
from astroclip.io.image import band_name
from astroclip.io.pictures import colours_to_nanomaggies, nanomaggies_to_colours
from astroclip.types import Image


def codes(image: Image) -> set[str]:
    return {flag.code for flag in image.quality.flags}


def one(data: bytes, **kwargs) -> Image:
    """The only image of `data`, with what the type promises checked."""
    (image,) = read_images(data, **kwargs)
    assert image.pixels.dtype == np.float32 and image.mask.dtype == bool
    assert np.isfinite(image.pixels).all() and (image.pixels[image.mask] == 0).all()
    return image


def test_legacy_cutout(rng):
    pixels = files.galaxy(rng)
    image = one(files.cutout(rng, pixels))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.bands == ("g", "r", "z") and image.calibrated and codes(image) == set()
    assert np.isclose(image.pixel_scale_arcsec, 0.262)
    assert np.isclose(image.ra, 150.1) and np.isclose(image.dec, 2.2)


@pytest.mark.parametrize("bands", ["grz", "zrg", "g,r,z", "griz"])
def test_band_order_is_read_from_the_header(rng, bands):
    names = bands.replace(",", "")
    pixels = np.concatenate([files.galaxy(rng), files.galaxy(rng)])[: len(names)]
    image = one(files.cutout(rng, pixels, BANDS=bands))
    assert image.bands == tuple(names)
    np.testing.assert_array_equal(image.pixels, pixels)


def test_numbered_band_cards(rng):
    header = files.cutout_header()
    del header["BANDS"]
    header.update(BAND0="z", BAND1="DES-R", BAND2="g DECam SDSS c0001 4720.0 1520.0")
    image = one(files.fits_bytes(fits.PrimaryHDU(files.galaxy(rng), header)))
    assert image.bands == ("z", "r", "g")


def test_cube_in_an_extension(rng):
    pixels = files.galaxy(rng)
    image = one(files.fits_bytes(fits.PrimaryHDU(), fits.ImageHDU(pixels, files.cutout_header())))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.bands == ("g", "r", "z")


def test_one_extension_a_band_with_invvar_and_mask(rng):
    pixels = files.galaxy(rng)
    ivar, mask = np.ones((64, 64), "f4"), np.zeros((64, 64), "i2")
    ivar[:3], mask[10, 10] = 0, 2
    header = files.cutout_header()
    del header["BANDS"]
    hdus = [fits.PrimaryHDU()]
    for plane, band in zip(pixels, "grz", strict=True):
        hdus.append(fits.ImageHDU(plane, header, name=f"image-{band}"))
    hdus.append(fits.ImageHDU(ivar, header, name="invvar_r"))
    hdus.append(fits.ImageHDU(mask, header, name="MASKBITS"))
    image = one(files.fits_bytes(*hdus))
    assert image.bands == ("g", "r", "z")
    wanted = np.zeros(pixels.shape, bool)
    wanted[1, :3] = True
    wanted[:, 10, 10] = True
    np.testing.assert_array_equal(image.mask, wanted)


def test_invvar_cube_masks(rng):
    ivar = np.ones((3, 64, 64), "f4")
    ivar[2, 5, 6] = 0
    extension = fits.ImageHDU(ivar, files.cutout_header(IMAGETYP="invvar"))
    image = one(files.fits_bytes(fits.PrimaryHDU(files.galaxy(rng), files.cutout_header()), extension))
    assert np.argwhere(image.mask).tolist() == [[2, 5, 6]]


def test_gzip_and_plain_agree(rng):
    data = files.cutout(rng)
    np.testing.assert_array_equal(one(files.gz(data)).pixels, one(data).pixels)


def test_nan_and_exact_zero_pixels_are_masked(rng):
    pixels = files.galaxy(rng)
    pixels[0, 1, 2], pixels[1, :, :4] = np.nan, 0.0
    image = one(files.cutout(rng, pixels))
    assert image.mask[0, 1, 2] and image.mask[1, :, :4].all()
    assert image.mask.sum() == 1 + 64 * 4
    assert np.isclose(image.quality.masked_fraction, image.mask.mean())


@pytest.mark.parametrize("rotation", [0.0, 30.0])
@pytest.mark.parametrize("spelling", ["CD", "PC"])
def test_scale_and_centre_agree_with_astropy(rng, rotation, spelling):
    c, s = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    matrix = np.array([[-c, s], [s, c]])
    header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 359.99, "CRVAL2": 60.0})
    header.update(CRPIX1=10.0, CRPIX2=500.0, BANDS="grz", BUNIT="nanomaggy")
    step = 0.4 / 3600
    if spelling == "CD":
        header.update({f"CD{i + 1}_{j + 1}": matrix[i, j] * step for i in (0, 1) for j in (0, 1)})
    else:
        header.update(CDELT1=step, CDELT2=step)
        header.update({f"PC{i + 1}_{j + 1}": matrix[i, j] for i in (0, 1) for j in (0, 1)})
    image = one(files.fits_bytes(fits.PrimaryHDU(files.galaxy(rng), header)))
    assert np.isclose(image.pixel_scale_arcsec, 0.4)
    centre = WCS(header, naxis=2).pixel_to_world(31.5, 31.5)
    np.testing.assert_allclose([image.ra, image.dec], [centre.ra.deg, centre.dec.deg], atol=1e-9)


@pytest.mark.parametrize(
    ("cards", "scale", "flagged"),
    [
        ({"CDELT1": -0.3, "CDELT2": 0.3, "CUNIT1": "arcsec"}, 0.3, False),
        ({"CD1_1": -0.3 / 3600, "CD2_2": 0.3 / 3600, "CTYPE1": "GLON-CAR", "CTYPE2": "GLAT-CAR"}, 0.3, False),
        ({"CD1_1": -0.3 / 3600, "CD2_2": 0.3 / 3600, "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP"}, 0.3, False),
        ({"PIXSCALE": 0.3}, 0.3, False),
        ({"CD1_1": 0.0, "CD2_2": 0.3 / 3600}, 0.262, True),
        ({"CD1_1": 1e300, "CD2_2": 1e300}, 0.262, True),
        ({"CD1_1": 0.3 / 3600, "CD2_2": 0.3 / 3600, "CTYPE1": "RA---TAB", "CTYPE2": "DEC--TAB"}, 0.262, True),
        ({"CDELT1": 0.3}, 0.262, True),
    ],
)  # fmt: skip
def test_pixel_scales_of_other_headers(rng, cards, scale, flagged):
    """What no WCS comes of is no refusal: the scale is assumed, and flagged."""
    header = fits.Header({"BANDS": "grz"} | cards)
    image = one(files.fits_bytes(fits.PrimaryHDU(files.galaxy(rng), header)))
    assert np.isclose(image.pixel_scale_arcsec, scale)
    assert ("assumed_pixel_scale" in codes(image)) == flagged


def test_resampled_viewer_cutouts_are_brought_to_flux_per_pixel(rng):
    pixels = files.galaxy(rng)
    header = files.cutout_header(scale_arcsec=0.131)
    image = one(files.fits_bytes(fits.PrimaryHDU(pixels, header)))
    np.testing.assert_allclose(image.pixels, pixels / 4, rtol=1e-6)
    assert codes(image) == {"resampled_cutout"}


def test_the_same_galaxy_at_two_scales_has_one_flux(shared_data):
    """Two real cutouts of one position (DR3 at 0.1 arcsec, DR5 at 0.262): the flux within 5 arcsec agrees."""
    fluxes = []
    for name in ("ba79bb8_example_a", "d331021_temp_small"):
        image = one((shared_data / "legacy_fits" / f"{name}.fits.gz").read_bytes())
        y, x = np.mgrid[: image.pixels.shape[1], : image.pixels.shape[2]] - (image.pixels.shape[1] - 1) / 2
        inside = np.hypot(y, x) * image.pixel_scale_arcsec < 5
        fluxes.append(image.pixels[:, inside].sum(axis=1))
    np.testing.assert_allclose(fluxes[0], fluxes[1], rtol=0.02)


def test_units_become_nanomaggies(rng):
    pixels = files.galaxy(rng)
    plain = {"SURVEY": "elsewhere"}
    microjansky = one(files.cutout(rng, pixels * 3.631, BUNIT="uJy", **plain))
    np.testing.assert_allclose(microjansky.pixels, pixels, rtol=1e-5)
    counts = one(files.cutout(rng, pixels * 10, BUNIT="adu", MAGZERO=25.0, **plain))
    np.testing.assert_allclose(counts.pixels, pixels, rtol=1e-5)
    assert codes(one(files.cutout(rng, pixels, **plain))) == {"assumed_flux_unit"}


def test_options_override_the_file(rng):
    options = ImageOptions(bands=("z", "r", "g"), pixel_scale_arcsec=0.5)
    image = one(files.cutout(rng, SURVEY="elsewhere", BUNIT="nanomaggy"), options=options)
    assert image.bands == ("z", "r", "g") and image.pixel_scale_arcsec == 0.5


def test_headers_without_scale_or_bands_are_flagged(rng):
    image = one(files.fits_bytes(fits.PrimaryHDU(files.galaxy(rng))))
    assert codes(image) == {"assumed_bands", "assumed_pixel_scale", "assumed_flux_unit"}


@pytest.mark.parametrize("layout", ["first", "last", "fortran", "big-endian", "f2"])
def test_npy_layouts(rng, layout):
    pixels = files.galaxy(rng)
    array = {
        "first": pixels,
        "last": np.moveaxis(pixels, 0, -1),
        "fortran": np.asfortranarray(pixels),
        "big-endian": pixels.astype(">f8"),
        "f2": pixels.astype("f2"),
    }[layout]
    image = one(files.npy_bytes(array))
    np.testing.assert_allclose(image.pixels, pixels, atol=1e-3 if layout == "f2" else 0)
    assert codes(image) == {"assumed_flux_unit", "assumed_bands", "assumed_pixel_scale"}


def test_npy_stack_gives_several_images(rng):
    stack = np.stack([files.galaxy(rng) for _ in range(3)])
    images = read_images(files.npy_bytes(stack))
    assert len(images) == 3
    np.testing.assert_array_equal(images[2].pixels, stack[2])


# --- display pictures ---------------------------------------------------------------------------------------


def test_the_stretch_is_undone_exactly_where_nothing_is_clipped(rng):
    pixels = rng.uniform(0.0, 0.04, (50, 50, 3))
    colours = nanomaggies_to_colours(pixels)
    assert colours.max() < 1
    np.testing.assert_allclose(colours_to_nanomaggies(colours), pixels, rtol=1e-9, atol=1e-12)


def test_png_gives_back_the_fluxes_of_a_galaxy(rng):
    pixels = np.abs(files.galaxy(rng)) * 0.3
    colours = np.round(255 * nanomaggies_to_colours(np.moveaxis(pixels[::-1], 0, -1))).astype("u1")
    image = one(files.picture(colours))
    assert image.bands == ("g", "r", "z") and not image.calibrated
    assert {"uncalibrated", "assumed_pixel_scale"} <= codes(image)
    np.testing.assert_allclose(image.pixels, pixels, atol=0.004)  # an 8-bit step at the galaxy's centre
    np.testing.assert_array_equal(one(files.npy_bytes(colours)).pixels, image.pixels)


def test_picture_scale_keeps_surface_brightness(rng):
    colours = rng.integers(0, 200, (64, 64, 3), dtype=np.uint8)
    native = one(files.picture(colours))
    fine = one(files.picture(colours), options=ImageOptions(pixel_scale_arcsec=0.131))
    np.testing.assert_allclose(fine.pixels, native.pixels / 4, rtol=1e-6)
    assert "assumed_pixel_scale" not in codes(fine)


def test_saturated_pixels_are_flagged_not_masked(rng):
    colours = rng.integers(0, 200, (64, 64, 3), dtype=np.uint8)
    colours[30:34, 30:34] = 255
    image = one(files.picture(colours, "JPEG", quality=95))
    assert "saturated" in codes(image) and not image.mask.any()


@pytest.mark.parametrize(
    ("text", "band"),
    [("DES-G", "g"), ("g", "g"), ("Z", "z"), ("g DECam SDSS c0001", "g"), ("image-r", "r"), ("decam_z", "z"),
     ("w1", None), ("Halpha", None), ("green", None), ("", None)],
)  # fmt: skip
def test_band_names(text, band):
    assert band_name(text) == band
