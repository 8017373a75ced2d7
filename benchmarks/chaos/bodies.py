"""Request bodies of made-up galaxies, encoded once: ready for the model's grid, and as FITS files.

    grid:  .npy on the model's own grid; an image (3, 96, 96), a spectrum (4096, 3) of wave, flux and ivar, float32
    fits:  a cutout of 152 x 152 pixels in three planes (Legacy Survey), a table of wave, flux and ivar (7,781 rows)
    bad:   a truncated file: what `astroclip.io` refuses

Every body is another galaxy, so that no cache on the way helps.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from astroclip.preprocess import SpectrumGrid
from astroclip.types import MODALITIES, Image, Modality, Spectrum
from benchmarks.chaos.traffic import Ask

__all__ = ["NPY", "Format", "asks", "body", "galaxies", "joined", "truncated"]

Format = Literal["grid", "fits"]
NPY = "application/x-npy"
TYPES = {"grid": NPY, "fits": "application/fits"}
SKY_SIGMA = (0.004, 0.011, 0.023)  # nanomaggies per pixel in g, r, z: a Legacy Survey coadd
LINES = ((3728.5, 8.0), (4862.7, 4.0), (5008.2, 10.0), (6564.6, 15.0))
BOUNDARY = "astroclip-campaign"


def galaxies(modality: Modality, count: int, *, seed: int = 0, native: bool = True) -> list[Image] | list[Spectrum]:
    """Objects as a survey has them (`native`) or with the model's own sampling."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality)])
    return [_image(rng, 152 if native else 96) for _ in range(count)] if modality == "image" else [
        _spectrum(rng, _desi_wave() if native else SpectrumGrid().wave) for _ in range(count)
    ]  # fmt: skip


def _image(rng: np.random.Generator, size: int) -> Image:
    """A round exponential galaxy of random size, colour and brightness on noise."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    profile = np.exp(-np.hypot(x, y) / rng.uniform(3.0, 9.0))
    profile *= rng.uniform(10.0, 60.0) / profile.sum()
    colours = (rng.uniform(0.2, 0.8), 1.0, rng.uniform(1.2, 2.0))
    planes = [profile * c + rng.normal(0, s, (size, size)) for c, s in zip(colours, SKY_SIGMA, strict=True)]
    pixels = np.stack(planes).astype(np.float32)
    return Image(pixels, np.zeros(pixels.shape, bool), ("g", "r", "z"), 0.262)


def _spectrum(rng: np.random.Generator, wave: npt.NDArray[np.float64]) -> Spectrum:
    """A continuum with a break and four emission lines at a random redshift, noise 0.5."""
    rest = wave / (1.0 + rng.uniform(0.02, 0.4))
    flux = 4 * (rest / 5000) ** rng.uniform(-1, 1) * np.where(rest < 4000, 0.6, 1.0)
    for line, height in LINES:
        flux = flux + height * rng.uniform(0, 1) * np.exp(-0.5 * ((rest - line) / 2.5) ** 2)
    noisy = (flux + rng.normal(0, 0.5, wave.size)).astype(np.float32)
    return Spectrum(wave, noisy, np.full(wave.size, 4.0, np.float32), np.zeros(wave.size, bool))


def _desi_wave() -> npt.NDArray[np.float64]:
    return np.asarray(3600.0 + 0.8 * np.arange(7781), np.float64)


def body(item: Image | Spectrum, form: Format) -> bytes:
    """One object as a file."""
    if form == "grid":
        return _npy(item.pixels if isinstance(item, Image) else _columns(item))
    return _image_fits(item) if isinstance(item, Image) else _spectrum_fits(item)


def joined(files: Sequence[bytes], media_type: str) -> tuple[bytes, str]:
    """Several files as one multipart body, and its type."""
    parts = [
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{i}"\r\n'
        f"content-type: {media_type}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for i, data in enumerate(files)
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


def truncated(modality: Modality, seed: int = 0) -> bytes:
    """A FITS file that ends in the middle of its data."""
    whole = body(galaxies(modality, 1, seed=seed)[0], "fits")
    return whole[: len(whole) // 2]


def asks(modality: Modality, form: Format, *, items: int = 1, count: int = 32, seed: int = 0) -> list[Ask]:
    """`count` different embedding requests of `items` objects each, answered with arrays."""
    encoded = [body(g, form) for g in galaxies(modality, count * items, seed=seed, native=form == "fits")]
    return [_ask(modality, form, encoded[i : i + items]) for i in range(0, len(encoded), items)]


def _ask(modality: Modality, form: Format, files: Sequence[bytes]) -> Ask:
    data, media_type = (files[0], TYPES[form]) if len(files) == 1 else joined(files, TYPES[form])
    return Ask("POST", f"/v1/embed/{modality}", data, {"content-type": media_type, "accept": NPY})


def _npy(array: npt.NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _columns(spectrum: Spectrum) -> npt.NDArray[np.float32]:
    return np.stack([spectrum.wave, spectrum.flux, spectrum.ivar], axis=1).astype(np.float32)


def _image_fits(image: Image) -> bytes:
    header = fits.Header({"BANDS": "".join(image.bands), "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"})
    step = image.pixel_scale_arcsec / 3600
    header.update({"CD1_1": -step, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": step, "CRVAL1": 180.0, "CRVAL2": 0.0})
    return _fits([fits.PrimaryHDU(image.pixels, header)])


def _spectrum_fits(spectrum: Spectrum) -> bytes:
    columns = [
        fits.Column("wave", "D", "Angstrom", array=spectrum.wave),
        fits.Column("flux", "E", "1e-17 erg/(s cm2 Angstrom)", array=spectrum.flux),
        fits.Column("ivar", "E", array=spectrum.ivar),
    ]
    return _fits([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)])


def _fits(hdus: list[fits.PrimaryHDU | fits.BinTableHDU]) -> bytes:
    stream = io.BytesIO()
    fits.HDUList(hdus).writeto(stream)
    return stream.getvalue()
