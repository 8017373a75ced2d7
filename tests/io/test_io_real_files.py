"""Every file of the real survey data: it opens, or it is refused with a reason."""

from __future__ import annotations

from collections import Counter

import numpy as np
from astropy.io import fits

from astroclip.errors import AstroClipError
from astroclip.io import detect_modality, read_images, read_spectra
from astroclip.io.fits import parse_fits
from astroclip.io.formats import plain_bytes
from astroclip.limits import DEFAULT_LIMITS

# Not objects: catalogues, redshift tables, archives of arrays.
NO_OBJECTS = {".csv", ".npz"}


def test_every_file_opens_or_is_refused_with_a_reason(shared_data):
    opened: Counter[tuple[str, str]] = Counter()
    refused = {}
    for path in sorted(shared_data.glob("*/*")):
        data = path.read_bytes()
        try:
            kind = detect_modality(data, name=path.name)
            items = (read_images if kind == "image" else read_spectra)(data, name=path.name)
            opened[path.parent.name, kind] += len(items)
        except AstroClipError as error:
            assert "; wanted " in error.message
            refused[path.name] = error.code
    assert {name for name in refused if not name.startswith("redrock")} == {
        p.name for p in shared_data.glob("*/*") if p.suffix in NO_OBJECTS
    }
    assert opened["decals_rgb", "image"] == 235 and opened["sdss_rgb_metallicity", "image"] == 400
    assert opened["pairs", "image"] == opened["pairs", "spectrum"] == 5
    assert opened["legacy_fits", "image"] == 6
    assert opened["sdss", "spectrum"] == 19 and opened["qso", "spectrum"] == 10
    assert opened["desi", "spectrum"] == 2  # four of the five fibres of one coadd carry no data


def test_reading_agrees_with_astropy(shared_data):
    """Every array and numeric column of the real FITS files, ours against astropy's."""
    compared = 0
    for path in sorted(shared_data.glob("[dlps]*/*.fits*"))[::3]:
        _, data = plain_bytes(path.read_bytes(), None, path.name, DEFAULT_LIMITS)
        with fits.open(path) as hdus:
            ours = parse_fits(data)
            assert len(ours) == len(hdus)
            for hdu, mine in zip(hdus, ours, strict=True):
                if isinstance(hdu, fits.BinTableHDU):
                    for name, number in mine.columns.items():
                        if hdu.columns[number - 1].format in list("BIJKED"):
                            np.testing.assert_array_equal(mine.read(name), hdu.data[name])
                            compared += 1
                elif hdu.data is not None:
                    np.testing.assert_array_equal(mine.image(), hdu.data)
                    compared += 1
    assert compared > 200


def test_pairs_carry_the_catalogues_positions(shared_data):
    rows = np.genfromtxt(shared_data / "pairs" / "index.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    for row in rows:
        name = row["spectrum"].split("/")[-1]
        (spectrum,) = read_spectra((shared_data / "pairs" / name).read_bytes(), name=name)
        np.testing.assert_allclose([spectrum.ra, spectrum.dec], [row["ra"], row["dec"]], atol=1e-5)
        assert abs(spectrum.redshift - row["z"]) < 1e-6
