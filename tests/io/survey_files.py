"""Files as bytes, written by astropy, numpy and Pillow: what the readers are tested on."""

from __future__ import annotations

import gzip
from io import BytesIO

import numpy as np
from astropy.io import fits
from PIL import Image as Pillow

BANDS = ("g", "r", "z")


def fits_bytes(*hdus: fits.PrimaryHDU) -> bytes:
    stream = BytesIO()
    fits.HDUList(list(hdus)).writeto(stream)
    return stream.getvalue()


def npy_bytes(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def galaxy(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """(3, size, size) float32: a round galaxy with sky noise."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    profile = np.exp(-np.hypot(x, y) / 4)
    sky = rng.normal(0, 0.01, (3, size, size))
    return (np.array([0.3, 0.6, 1.0])[:, None, None] * profile + sky).astype(np.float32)


def cutout_header(scale_arcsec: float = 0.262, size: int = 64, **cards: object) -> fits.Header:
    """The header of a Legacy Surveys viewer cutout centred on (150.1, 2.2)."""
    header = fits.Header()
    header.update(
        SURVEY="LegacySurvey", VERSION="DR9", IMAGETYP="image", BANDS="grz", CTYPE1="RA---TAN", CTYPE2="DEC--TAN",
        CRVAL1=150.1, CRVAL2=2.2, CRPIX1=(size + 1) / 2, CRPIX2=(size + 1) / 2, CD1_1=-scale_arcsec / 3600, CD1_2=0.0,
        CD2_1=0.0, CD2_2=scale_arcsec / 3600,
    )  # fmt: skip
    header.update(**cards)
    return header


def cutout(rng: np.random.Generator, pixels: np.ndarray | None = None, **cards: object) -> bytes:
    pixels = galaxy(rng) if pixels is None else pixels
    return fits_bytes(fits.PrimaryHDU(pixels, cutout_header(size=pixels.shape[-1], **cards)))


def spectrum_columns(rng: np.random.Generator, n: int = 3000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(wave, flux, ivar): 3600-9600 A, a slope, one line, noise 0.5."""
    wave = np.linspace(3600, 9600, n)
    flux = 5 + (wave - 6600) / 3000 + 20 * np.exp(-0.5 * ((wave - 6000) / 5) ** 2) + rng.normal(0, 0.5, n)
    return wave, flux, np.full(n, 4.0)


def table(columns: dict[str, np.ndarray], units: dict[str, str] | None = None, **cards: object) -> bytes:
    """A binary table in the first extension."""
    made = []
    for name, values in columns.items():
        letter = {"f": "D", "i": "K"}[values.dtype.kind]
        repeat = str(values.shape[1]) if values.ndim > 1 else ""
        made.append(fits.Column(name, repeat + letter, array=values, unit=(units or {}).get(name)))
    hdu = fits.BinTableHDU.from_columns(made)
    hdu.header.update(**cards)
    return fits_bytes(fits.PrimaryHDU(), hdu)


def csv_text(columns: dict[str, np.ndarray], comments: tuple[str, ...] = (), sep: str = ",") -> bytes:
    lines = [f"# {c}" for c in comments] + [sep.join(columns)]
    lines += [sep.join(f"{v:.10g}" for v in row) for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines).encode()


def picture(colours: np.ndarray, fmt: str = "PNG", **options: object) -> bytes:
    """(H, W, 3) uint8 as PNG or JPEG."""
    stream = BytesIO()
    Pillow.fromarray(colours).save(stream, fmt, **options)
    return stream.getvalue()


def desi_coadd(rng: np.random.Generator, targets: int = 2, dead: tuple[int, ...] = ()) -> bytes:
    """Arms B, R, Z on DESI's own 0.8 A grids, which overlap; flux 10 with noise 1, one target a row."""
    fibermap = fits.BinTableHDU.from_columns(
        [
            fits.Column("TARGETID", "K", array=39_627_000_000_000_000 + np.arange(targets)),
            fits.Column("TARGET_RA", "D", array=150.0 + np.arange(targets)),
            fits.Column("TARGET_DEC", "D", array=2.0 + np.arange(targets)),
        ],
        name="FIBERMAP",
    )
    hdus: list[object] = [fits.PrimaryHDU(), fibermap]
    for arm, start, count in (("B", 3600.0, 2751), ("R", 5760.0, 2326), ("Z", 7520.0, 2881)):
        wave = start + 0.8 * np.arange(count)
        flux = (10 + rng.normal(0, 1, (targets, count))).astype("f4")
        ivar = np.ones((targets, count), "f4")
        ivar[list(dead)] = 0
        mask = np.zeros((targets, count), "i4")
        mask[:, 100] = 4
        for suffix, data in (("WAVELENGTH", wave), ("FLUX", flux), ("IVAR", ivar), ("MASK", mask)):
            hdus.append(fits.ImageHDU(data, name=f"{arm}_{suffix}"))
    return fits_bytes(*hdus)  # type: ignore[arg-type]


def sdss_spec(rng: np.random.Generator, n: int = 3800, full: bool = False) -> bytes:
    """spec-0266-51602-0001: HDU 1 the coadd, HDU 2 the catalogue row."""
    loglam = 3.58 + 1e-4 * np.arange(n)
    coadd = fits.BinTableHDU.from_columns(
        [
            fits.Column("flux", "E", array=10 + rng.normal(0, 1, n)),
            fits.Column("loglam", "E", array=loglam),
            fits.Column("ivar", "E", array=np.ones(n)),
            fits.Column("and_mask", "J", array=np.where(np.arange(n) < 5, 1 << 24, 0)),
        ],
        name="COADD",
    )
    row = fits.BinTableHDU.from_columns(
        [
            fits.Column("PLATE", "J", array=[266]),
            fits.Column("MJD", "J", array=[51602]),
            fits.Column("FIBERID", "J", array=[1]),
            fits.Column("PLUG_RA", "D", array=[146.714]),
            fits.Column("PLUG_DEC", "D", array=[-1.041]),
            fits.Column("Z", "E", array=[0.0213]),
        ],
        name="SPECOBJ",
    )
    exposures = [fits.BinTableHDU(coadd.data[:2000], name=f"B1-{i}") for i in range(4)] if full else []
    return fits_bytes(fits.PrimaryHDU(), coadd, row, *exposures)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
