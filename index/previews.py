"""Previews: a thumbnail and a small spectrum of each object, packed into three files.

* `previews/images.bin`: JPEGs of one size, quality and Huffman table share their first bytes; those are stored once,
  then the rest of each picture (about 0.5 KB at 64 px). `previews/images-offsets.npy` (N + 1,) int64 says where each
  begins; equal neighbours = no picture.
* `previews/spectra.npy` (N, BINS) uint8, on a log-wavelength grid: 0 = no data, 1..255 linear between the two numbers
  of `previews/spectra-range.npy` (N, 2) float32, flux in 1e-17 erg/s/cm2/A; all zero = no spectrum.

Built from Multimodal Universe HDF5 shards, matched by `object_id`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc

from astroclip.errors import IndexFileError, InputError
from index.vectors import load_npy

__all__ = ["Previews", "colour_jpeg", "legacy_rgb", "write_previews"]

SIZE = 64  # pixels a side of a thumbnail
FIELD = 96  # pixels of the cutout shown: the model's own field, 25" at 0.262"/px
QUALITY = 62  # keeps the pictures of 10,000 objects below 8 MB, noise included
BINS = 256
WAVE_RANGE = (3600.0, 9824.0)  # Angstrom, vacuum, observed frame
_IMAGES, _OFFSETS = "previews/images.bin", "previews/images-offsets.npy"
_SPECTRA, _RANGE = "previews/spectra.npy", "previews/spectra-range.npy"
_BATCH = 256

# Legacy Surveys display mapping (legacypipe `sdss_rgb`; ToRGB of AstroCLIP): scale a band, offset m, softening Q.
_PLANES = (("z", 2.2), ("r", 3.4), ("g", 6.0))
_M, _Q = 0.03, 20.0


class Previews:
    """Previews of an opened index; rows are catalogue rows."""

    def __init__(
        self,
        pictures: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.int64],
        header: int,
        spectra: npt.NDArray[np.uint8],
        ranges: npt.NDArray[np.float32],
    ) -> None:
        self._pictures, self._offsets, self._header = pictures, offsets, pictures[:header].tobytes()
        self._spectra, self._ranges = spectra, ranges
        self.wave = wave_grid()

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any], count: int) -> Previews:
        """The previews of an index folder. Raises IndexFileError."""
        offsets = load_npy(folder / _OFFSETS, _OFFSETS, shape=(count + 1,), dtype="int64")
        pictures = np.memmap(folder / _IMAGES, np.uint8, mode="r")
        if np.any(np.diff(offsets) < 0) or offsets[0] < record["header_bytes"] or offsets[-1] != len(pictures):
            raise IndexFileError(f"index file {_OFFSETS} does not fit {_IMAGES}; rebuild the index", field=_OFFSETS)
        return cls(
            pictures,
            offsets,
            record["header_bytes"],
            load_npy(folder / _SPECTRA, _SPECTRA, shape=(count, BINS), dtype="uint8"),
            load_npy(folder / _RANGE, _RANGE, shape=(count, 2), dtype="float32"),
        )

    def image_jpeg(self, row: int) -> bytes | None:
        """The thumbnail as a JPEG file (64 x 64, RGB = z, r, g), None where there is none."""
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        return self._header + self._pictures[start:stop].tobytes() if stop > start else None

    def spectrum(self, row: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]] | None:
        """(wave (BINS,) Angstrom vacuum, flux (BINS,) 1e-17 erg/s/cm2/A, NaN where unknown), None where there is none.

        The flux is quantised to 1/254 of its range.
        """
        levels = self._spectra[row]
        if not levels.any():
            return None
        low, high = self._ranges[row]
        flux = low + (levels.astype(np.float32) - 1.0) * (high - low) / 254.0
        return self.wave, np.where(levels > 0, flux, np.nan).astype(np.float32)


def wave_grid() -> npt.NDArray[np.float64]:
    """(BINS,) centres, Angstrom, equal steps in log wavelength."""
    edges = _edges()
    return np.sqrt(edges[1:] * edges[:-1])


def colour_jpeg(pixels: npt.NDArray[np.float32], bands: tuple[str, ...], size: int, quality: int) -> bytes:
    """(B, H, W) nanomaggies as a JPEG of size x size pixels in the colours of `legacy_rgb`."""
    stream = io.BytesIO()
    picture = PIL.Image.fromarray(legacy_rgb(pixels[None], bands)[0])
    picture.resize((size, size), PIL.Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def legacy_rgb(pixels: npt.NDArray[np.float32], bands: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """(n, B, H, W) nanomaggies a 0.262" pixel -> (n, H, W, 3) uint8 by the Legacy Surveys arcsinh mapping.

    I = mean_b max(0, s_b x_b + m), rgb_b = (s_b x_b + m) arcsinh(Q I) / (sqrt(Q) I), clipped to 0..1 (Lupton et al.
    2004, PASP 116, 133; constants of legacypipe).
    """
    planes = [pixels[:, bands.index(band)] * scale + _M for band, scale in _PLANES]
    intensity = sum(np.maximum(plane, 0.0) for plane in planes) / len(planes)
    gain = np.arcsinh(_Q * intensity) / (np.sqrt(_Q) * np.where(intensity > 0, intensity, 1e-6))
    rgb = np.stack([plane * gain for plane in planes], axis=-1)
    return np.asarray(np.clip(np.nan_to_num(rgb), 0.0, 1.0) * 255.0 + 0.5, np.uint8)


def write_previews(
    folder: Path,
    survey: Path | None,
    object_ids: pa.ChunkedArray,
    *,
    base: Previews | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Write the preview files of an index of N `object_ids` into `folder`.

    survey: directory of HDF5 shards (objects not found there have no preview). base: previews of the first rows, kept.
    Returns the manifest's record and which rows have a picture, a spectrum. Raises InputError.
    """
    (folder / "previews").mkdir()
    kept = 0 if base is None else len(base._spectra)
    count = len(object_ids)
    scans: list[bytes] = [b""] * count
    spectra = np.lib.format.open_memmap(folder / _SPECTRA, mode="w+", dtype=np.uint8, shape=(count, BINS))
    ranges = np.zeros((count, 2), np.float32)
    if base is not None:
        spectra[:kept], ranges[:kept] = base._spectra, base._ranges
    header = _jpeg_header()
    if survey is not None:
        fresh = object_ids.slice(kept)
        for rows, pictures, fluxes in _shards(survey, fresh):
            rows = rows + kept
            if pictures is not None:
                for row, picture in zip(rows, pictures, strict=True):
                    scans[row] = _scan(picture, header)
            if fluxes is not None:
                spectra[rows], ranges[rows] = _quantise(fluxes)
            if progress is not None:
                progress(len(rows))
    has_spectrum = np.asarray(spectra.any(axis=1), bool)
    spectra.flush()
    np.save(folder / _RANGE, ranges)
    offsets = _write_pictures(folder, header, scans, base, kept)
    return {"header_bytes": len(header), "bins": BINS, "size": SIZE}, np.diff(offsets) > 0, has_spectrum


def _write_pictures(
    folder: Path, header: bytes, scans: list[bytes], base: Previews | None, kept: int
) -> npt.NDArray[np.int64]:
    if base is not None and base._header != header:
        raise InputError(
            "the index's pictures were written by another JPEG encoder; wanted the same; rebuild the index",
            code="other_encoder",
        )
    lengths = np.array([len(scan) for scan in scans], np.int64)
    with (folder / _IMAGES).open("wb") as stream:
        stream.write(header)
        if base is not None:
            lengths[:kept] = np.diff(base._offsets)
            stream.write(base._pictures[len(header) :].tobytes())
        stream.write(b"".join(scans[kept:]))
    offsets = len(header) + np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / _OFFSETS, offsets.astype(np.int64))
    return offsets


def _shards(
    survey: Path, object_ids: pa.ChunkedArray
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8] | None, npt.NDArray[np.float32] | None]]:
    """Batches of (rows, thumbnails (n, SIZE, SIZE, 3) or None, binned fluxes (n, BINS) or None) found in the shards."""
    paths = sorted(survey.rglob("*.hdf5")) if survey.is_dir() else [survey]
    if not paths:
        raise InputError(f"{survey} holds no .hdf5 shard; wanted a Multimodal Universe directory", code="no_shards")
    for path in paths:
        with h5py.File(path, "r") as shard:
            ids = pa.array([_text(i) for i in shard["object_id"][:]])
            found = pc.index_in(object_ids.combine_chunks(), value_set=ids)
            rows = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
            places = found.drop_null().to_numpy().astype(np.int64)
            order = np.argsort(places, kind="stable")
            rows, places = rows[order], places[order]
            for start in range(0, len(rows), _BATCH):
                at = places[start : start + _BATCH]
                yield rows[start : start + _BATCH], _thumbnails(shard, at), _binned(shard, at)


def _thumbnails(shard: h5py.File, at: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8] | None:
    if "image_array" not in shard:
        return None
    bands = tuple(_text(band).lower().rsplit("-", 1)[-1] for band in shard["image_band"][int(at[0])])
    side = shard["image_array"].shape[-1]
    cut = slice(max(0, (side - FIELD) // 2), max(0, (side - FIELD) // 2) + min(side, FIELD))
    rgb = legacy_rgb(_rows(shard["image_array"], at)[..., cut, cut], bands)
    resized = [PIL.Image.fromarray(picture).resize((SIZE, SIZE), PIL.Image.Resampling.LANCZOS) for picture in rgb]
    return np.stack([np.asarray(picture) for picture in resized])


def _rows(data: h5py.Dataset, at: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Rows `at` (ascending) of a dataset, read in one contiguous stretch: HDF5 selections by list are slow."""
    first, last = int(at.min()), int(at.max())
    if last - first < 4 * len(at):
        return np.asarray(data[first : last + 1])[at - first]
    return np.stack([data[int(i)] for i in at])


def _binned(shard: h5py.File, at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
    """(n, BINS) ivar-weighted mean flux, NaN where there are no good pixels; the noisiest bins clipped."""
    if "spectrum_flux" not in shard:
        return None
    wave = np.asarray(shard["spectrum_lambda"][int(at[0])], np.float64)
    flux, ivar = _rows(shard["spectrum_flux"], at), _rows(shard["spectrum_ivar"], at)
    bad = ~(np.isfinite(flux) & np.isfinite(ivar))
    if "spectrum_mask" in shard:
        bad |= np.asarray(_rows(shard["spectrum_mask"], at), bool)
    weight = np.where(bad, 0.0, ivar)
    starts = np.clip(np.searchsorted(wave, _edges()[:-1]), 0, len(wave) - 1)
    filled = np.diff(np.append(starts, len(wave))) > 0
    total = np.add.reduceat(weight, starts, axis=1) * filled
    mean = np.add.reduceat(weight * np.where(bad, 0.0, flux), starts, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _tame(np.where(total > 0, mean / total, np.nan), total).astype(np.float32)


def _tame(flux: npt.NDArray[Any], ivar: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Clip bins of more than three times the median error to the range of the others: they would set the scale."""
    known = ivar > 0
    variance = np.where(known, 1.0 / np.where(known, ivar, 1.0), np.nan)
    variance[~known.any(axis=1)] = 1.0
    sound = known & (variance <= 9.0 * np.nanmedian(variance, axis=1, keepdims=True))
    low = np.where(sound, flux, np.inf).min(axis=1, keepdims=True)
    high = np.where(sound, flux, -np.inf).max(axis=1, keepdims=True)
    return np.clip(flux, low, np.maximum(low, high))


def _quantise(flux: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    known = np.isfinite(flux)
    low = np.where(known, flux, np.inf).min(axis=1)
    high = np.where(known, flux, -np.inf).max(axis=1)
    empty = ~known.any(axis=1)
    low, high = np.where(empty, 0.0, low), np.where(empty, 0.0, high)
    span = np.where(high > low, high - low, 1.0)[:, None]
    levels = 1.0 + 254.0 * (np.where(known, flux, 0.0) - low[:, None]) / span
    return np.where(known, np.clip(np.rint(levels), 1, 255), 0).astype(np.uint8), np.stack([low, high], axis=1)


def _edges() -> npt.NDArray[np.float64]:
    return np.geomspace(*WAVE_RANGE, BINS + 1)


def _encode(picture: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY, subsampling="4:2:0", optimize=False)
    return stream.getvalue()


def _jpeg_header() -> bytes:
    """What all our JPEGs begin with: everything up to and including the start-of-scan segment."""
    whole = _encode(np.zeros((SIZE, SIZE, 3), np.uint8))
    scan = whole.index(b"\xff\xda")
    return whole[: scan + 2 + int.from_bytes(whole[scan + 2 : scan + 4], "big")]


def _scan(picture: npt.NDArray[np.uint8], header: bytes) -> bytes:
    whole = _encode(picture)
    if not whole.startswith(header):
        raise InputError(
            "the JPEG encoder varies its tables between pictures; install a plain Pillow", code="other_encoder"
        )
    return whole[len(header) :]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
