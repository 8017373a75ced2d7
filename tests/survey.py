"""A small survey for the service's tests: 60 synthetic galaxies embedded by the tiny model, built into an index."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from sky import make_image, make_spectrum

from astroclip.embed import Embedder
from astroclip.types import Image, Spectrum
from index import BuildOptions, build_index

COUNT = 60
CENTRE = (180.0, -0.2)  # of the field, deg


def build_survey(folder: Path, embedder: Embedder) -> Path:
    """Embed, write parts and shard, build; returns the index directory. Object i is sim-%08d at CENTRE + i/100 deg."""
    rng = np.random.default_rng(5)
    redshift = np.linspace(0.05, 0.9, COUNT)
    images = [make_image(rng, flux=60 / (1 + 5 * z), radius=8 / (1 + 3 * z), noise=0.3) for z in redshift]
    spectra = [make_spectrum(rng, redshift=z, noise=0.2) for z in redshift]
    ids = [f"sim-{i:08d}" for i in range(COUNT)]
    _write_parts(folder / "parts", embedder, ids, redshift, images, spectra)
    _write_shard(folder / "shards" / "healpix=0001", ids, images, spectra)
    return build_index(
        folder / "parts",
        folder / "index",
        survey="test survey",
        index_id="test",
        previews=folder / "shards",
        options=BuildOptions(licence="CC0", citations=("A survey made for tests",)),
        plain=True,
    )


def _write_parts(
    folder: Path,
    embedder: Embedder,
    ids: Sequence[str],
    redshift: np.ndarray,
    images: Sequence[Image],
    spectra: Sequence[Spectrum],
) -> None:
    folder.mkdir(parents=True)
    has_image, has_spectrum = np.arange(COUNT) != 3, np.arange(COUNT) != 7  # object 3 has no image, 7 no spectrum
    columns = {
        "object_id": pa.array(ids),
        "ra": pa.array(CENTRE[0] + np.arange(COUNT) / 100),
        "dec": pa.array(np.full(COUNT, CENTRE[1])),
        "source": pa.array([f"shard#{i}" for i in range(COUNT)]),
        "error": pa.array([None] * COUNT, pa.string()),
        "image_embedding": _vectors(_spread(embedder.embed(images)), has_image),
        "spectrum_embedding": _vectors(embedder.embed(spectra), has_spectrum),
        "redshift": pa.array(redshift.astype(np.float32)),
        "log_stellar_mass": pa.array([None if i == 11 else 9.0 + 2 * z for i, z in enumerate(redshift)]),
        "target_class": pa.array([("BGS", "LRG", "ELG")[i % 3] for i in range(COUNT)]),
    }
    part = folder / "part-00000.parquet"
    pq.write_table(pa.table(columns), part)
    marker = {"rows": COUNT, "failed": 0, "parquet_sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    part.with_suffix(".done.json").write_text(json.dumps(marker))
    record = {
        "format_version": 1,
        "model_id": embedder.model_id,
        "model_sha256": embedder.model_sha256,
        "preprocess_version": embedder.preprocess_version,
        "dim": embedder.dim,
    }
    (folder / "embedding.json").write_text(json.dumps(record))


def _spread(vectors: np.ndarray) -> np.ndarray:
    """A random image tower maps all images to nearly one point; distinct neighbours need them apart."""
    apart = (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)
    return (apart / np.linalg.norm(apart, axis=1, keepdims=True)).astype(np.float32)


def _vectors(values: np.ndarray, has: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1], mask=pa.array(~has))


def _write_shard(folder: Path, ids: Sequence[str], images: Sequence[Image], spectra: Sequence[Spectrum]) -> None:
    folder.mkdir(parents=True)
    with h5py.File(folder / "001-of-001.hdf5", "w") as shard:
        shard["object_id"] = np.array(ids, "S")
        shard["image_array"] = np.stack([image.pixels for image in images])
        shard["image_band"] = np.tile(np.array([b"DES-G", b"DES-R", b"DES-Z"]), (len(ids), 1))
        shard["spectrum_lambda"] = np.stack([s.wave for s in spectra]).astype(np.float32)
        shard["spectrum_flux"] = np.stack([s.flux for s in spectra])
        shard["spectrum_ivar"] = np.stack([s.ivar for s in spectra])


# --- files as an astronomer would send them --------------------------------------------------------------------------


def image_fits(image: Image, bands: str = "grz") -> bytes:
    """A Legacy Surveys cutout: one cube, bands named in the header, pixel scale in CD."""
    header = fits.Header()
    header["BANDS"] = bands
    for i, band in enumerate(bands):
        header[f"BAND{i}"] = band
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CRVAL1"], header["CRVAL2"] = 180.0, -0.2
    header["CRPIX1"] = header["CRPIX2"] = image.pixels.shape[-1] / 2
    scale = image.pixel_scale_arcsec / 3600
    header["CD1_1"], header["CD1_2"], header["CD2_1"], header["CD2_2"] = -scale, 0.0, 0.0, scale
    return _bytes(fits.HDUList([fits.PrimaryHDU(image.pixels, header)]))


def sdss_fits(spectrum: Spectrum) -> bytes:
    """A table spectrum with loglam, flux, ivar, and_mask, as SDSS writes it (without the second table)."""
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("flux", "E", array=spectrum.flux),
            fits.Column("loglam", "E", array=np.log10(spectrum.wave)),
            fits.Column("ivar", "E", array=spectrum.ivar),
            fits.Column("and_mask", "J", array=spectrum.mask.astype(np.int32)),
        ],
        name="COADD",
    )
    return _bytes(fits.HDUList([fits.PrimaryHDU(), table]))


def desi_fits(spectra: Sequence[Spectrum], dead: Sequence[int] = ()) -> bytes:
    """A DESI coadd of one arm covering the whole range; targets in `dead` hold noise at a few wavelengths only."""
    ivar = np.stack([s.ivar for s in spectra])
    for i in dead:
        ivar[i, 100:] = 0
    target = np.arange(len(spectra)) + 39627000000000000
    fibermap = fits.BinTableHDU.from_columns(
        [
            fits.Column("TARGETID", "K", array=target),
            fits.Column("TARGET_RA", "D", array=180.0 + np.arange(len(spectra)) / 100),
            fits.Column("TARGET_DEC", "D", array=np.full(len(spectra), -0.2)),
        ],
        name="FIBERMAP",
    )
    hdus = [fits.PrimaryHDU(), fibermap]
    for arm, part in (("B", slice(0, 2700)), ("R", slice(2700, 5200)), ("Z", slice(5200, 7781))):
        hdus.append(fits.ImageHDU(spectra[0].wave[part], name=f"{arm}_WAVELENGTH"))
        hdus.append(fits.ImageHDU(np.stack([s.flux[part] for s in spectra]), name=f"{arm}_FLUX"))
        hdus.append(fits.ImageHDU(ivar[:, part], name=f"{arm}_IVAR"))
        hdus.append(fits.ImageHDU((ivar[:, part] == 0).astype(np.int32), name=f"{arm}_MASK"))
    return _bytes(fits.HDUList(hdus))


def spectrum_csv(spectrum: Spectrum) -> bytes:
    lines = ["# wavelengths in Angstrom, vacuum", "wave,flux,ivar"]
    lines += [f"{w:.2f},{f:.5g},{v:.5g}" for w, f, v in zip(spectrum.wave, spectrum.flux, spectrum.ivar, strict=True)]
    return "\n".join(lines).encode()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def png(side: int = 128) -> bytes:
    import PIL.Image

    y, x = np.mgrid[:side, :side] - side / 2
    glow = 200 * np.exp(-np.hypot(x, y) / 12)
    rng = np.random.default_rng(1)
    rgb = np.clip(glow[..., None] * [1.0, 0.8, 0.6] + rng.uniform(5, 15, (side, side, 3)), 0, 255)
    stream = io.BytesIO()
    PIL.Image.fromarray(rgb.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _bytes(hdus: fits.HDUList) -> bytes:
    stream = io.BytesIO()
    hdus.writeto(stream)
    return stream.getvalue()
