"""Damaged files: whatever the bytes, the readers return objects or raise one of their own errors.

Seeded by hypothesis; a few hundred examples here, the long run is a matter of `max_examples`.
"""

from __future__ import annotations

import numpy as np
import pytest
import survey_files as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astroclip.errors import AstroClipError
from astroclip.io import detect_modality, read_images, read_spectra

RNG = np.random.default_rng(11)


def _corpus() -> dict[str, bytes]:
    wave, flux, ivar = files.spectrum_columns(RNG, 60)
    small = files.galaxy(RNG, 16)
    colours = RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return {
        "cutout": files.cutout(RNG, small),
        "cutout.gz": files.gz(files.cutout(RNG, small)),
        "sdss": files.sdss_spec(RNG, n=100),
        "table": files.table({"WAVE": wave, "FLUX": flux, "IVAR": ivar}, {"WAVE": "Angstrom"}),
        "npy image": files.npy_bytes(small),
        "npy spectrum": files.npy_bytes(np.column_stack([wave, flux, ivar])),
        "png": files.picture(colours),
        "jpeg": files.picture(colours, "JPEG"),
        "csv": files.csv_text({"wave [nm]": wave / 10, "flux": flux, "ivar": ivar}, ("flux unit: erg/s/cm2/A",)),
    }


CORPUS = _corpus()
FITS_HEADER_BYTES = 3 * 2880  # where a flipped byte does most harm


def survive(data: bytes) -> None:
    """Run every reader; only the project's own errors may come out, and what is returned is finite."""
    for read in (read_images, read_spectra, detect_modality):
        try:
            result = read(data)
        except AstroClipError:
            continue
        for item in result if isinstance(result, list) else ():
            values = item.pixels if hasattr(item, "pixels") else item.flux
            assert np.isfinite(values).all()


quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("name", CORPUS)
@quick
@given(cut=st.floats(0, 1))
def test_truncation(name, cut):
    survive(CORPUS[name][: int(cut * len(CORPUS[name]))])


@pytest.mark.parametrize("name", CORPUS)
@quick
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
    head=st.booleans(),
)
def test_flipped_bytes(name, places, head):
    data = bytearray(CORPUS[name])
    reach = min(len(data), FITS_HEADER_BYTES) if head else len(data)
    for place, value in places:
        data[int(place * reach)] = value
    survive(bytes(data))


MAGIC = [b"", b"SIMPLE  =", b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"\x1f\x8b"]
KEYWORDS = (
    "NAXIS NAXIS1 NAXIS2 NAXIS3 BITPIX PCOUNT GCOUNT TFIELDS TFORM1 TTYPE1 TSCAL1 TZERO1 TNULL1 BSCALE BZERO BLANK "
    "CD1_1 CDELT1 CRVAL1 CRPIX1 BANDS BUNIT SURVEY EXTNAME"
)
CARDS = st.sampled_from(KEYWORDS.split())
VALUES = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.sampled_from(["T", "F", "'grz'", "''", "", "1D400", "'3D'"]),
)


@pytest.mark.parametrize("name", ["cutout", "sdss", "table"])
@quick
@given(cards=st.lists(st.tuples(CARDS, VALUES), min_size=1, max_size=4))
def test_changed_header_cards(name, cards):
    data = CORPUS[name]
    for key, value in cards:
        card = f"{key:8s}= {value[:70]:70s}".encode("ascii", "replace")
        place = data.find(f"{key:8s}=".encode())
        if place < 0:  # not there yet: put it in the place of a card that matters little
            place = data.find(b"EXTEND  =")
        if place >= 0:
            data = data[:place] + card + data[place + 80 :]
    survive(data)


@quick
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"SIMPLE  =", b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"\x1f\x8b"]),
)
def test_random_bytes(data, start):
    survive(start + data)


@quick
@given(text=st.text(max_size=300), names=st.sampled_from(["", "wave,flux\n", "wave,flux,ivar\n# flux unit: mJy\n"]))
def test_random_text(text, names):
    survive((names + text).encode())


@quick
@given(
    rows=st.lists(st.tuples(st.floats(), st.floats(), st.floats()), min_size=32, max_size=60),
    scale=st.sampled_from([1.0, 1e-300, 1e300]),
)
def test_any_numbers_in_a_spectrum(rows, scale):
    array = np.array(rows)
    array[:, 0] = np.linspace(3600, 9800, len(rows))
    with np.errstate(over="ignore", invalid="ignore"):
        survive(files.npy_bytes(array * np.array([1.0, scale, 1.0])))
