"""Multimodal Universe files in HDF5: one dataset a column, all of one length, rows are objects.

Layout (The Multimodal Universe Collaboration 2024, arXiv 2412.02527): `object_id`, `ra`, `dec`, scalars
such as `Z`; `image_array` (N, B, H, W) nanomaggies per pixel, `image_band` (N, B), `image_scale` (N, B)
arcsec, optional `image_ivar` and `image_mask`; `spectrum_lambda`, `spectrum_flux`, `spectrum_ivar`,
`spectrum_mask` (N, L), vacuum Angstrom and 1e-17 erg/s/cm2/A, padded with wavelengths <= 0. A file may hold
images, spectra, or both.

These are files an operator names, not uploads: h5py opens them from disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError, InputError
from astroclip.io.image import DEFAULT_BANDS, LEGACY_SCALE_ARCSEC, RawImage, assemble_image, band_name
from astroclip.io.refusal import refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.limits import LOCAL_LIMITS, ReaderLimits
from astroclip.types import Flag, Image, Spectrum

__all__ = ["MmuFile", "MmuRow", "iter_mmu"]

Block = dict[str, npt.NDArray[Any]]
BLOCK_ROWS = 64  # rows read at once: 64 cutouts of 152 px are 53 MB with their spectra
CHUNK_CACHE_BYTES = (
    64 * 1024 * 1024
)  # a chunk may span many rows; h5py's default of 1 MB would unpack it again and again


@dataclass(frozen=True)
class MmuRow:
    """One object: what could be read, and for what could not, the error that says why.

    columns: every scalar column of the file, as Python values.
    """

    row: int
    image: Image | None
    spectrum: Spectrum | None
    columns: dict[str, Any]
    errors: tuple[AstroClipError, ...] = ()


class MmuFile:
    """An open file; use as a context manager. `len(file)` is the number of rows.

    Raises InputError (`damaged_hdf5`, `missing_column`, `length_mismatch`) on opening.
    """

    def __init__(self, path: str | Path, limits: ReaderLimits = LOCAL_LIMITS) -> None:
        self.path, self.limits = Path(path), limits
        try:
            self._file = h5py.File(self.path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
        except OSError as error:
            raise refusal(
                "damaged_hdf5",
                found=f"{self.path.name}, which HDF5 cannot open ({str(error)[:100]})",
                wanted="a complete HDF5 file",
                mend="Copy or write it again.",
            ) from error
        self.datasets = {k: v for k, v in self._file.items() if isinstance(v, h5py.Dataset) and v.shape}
        try:
            self._check()
        except InputError:
            self.close()
            raise

    def _check(self) -> None:
        self.has_image = "image_array" in self.datasets
        self.has_spectrum = {"spectrum_lambda", "spectrum_flux"} <= set(self.datasets)
        if not (self.has_image or self.has_spectrum):
            raise refusal(
                "missing_column",
                found=f"{self.path.name} with datasets {', '.join(sorted(self.datasets)[:8]) or '(none)'}",
                wanted="image_array, or spectrum_lambda and spectrum_flux",
                mend="Write the Multimodal Universe layout: one dataset a column.",
            )
        lengths = {v.shape[0] for v in self.datasets.values()}
        if len(lengths) != 1:
            raise refusal(
                "length_mismatch",
                found=f"{self.path.name} with columns of {sorted(lengths)} rows",
                wanted="columns of one length",
                mend="Write the shard again.",
            )
        self._rows = int(lengths.pop())

    def __len__(self) -> int:
        return self._rows

    def __enter__(self) -> MmuFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def scalars(self) -> dict[str, np.dtype[Any]]:
        """Name and dtype of every scalar column (numbers, booleans, fixed-length bytes)."""
        return {k: v.dtype for k, v in self.datasets.items() if v.ndim == 1 and v.dtype.kind in "fiubS"}

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[MmuRow]:
        """The rows from `start` to before `stop`, in order; a bad row carries its errors and stops
        nothing."""
        stop = len(self) if stop is None else min(stop, len(self))
        wanted = set(self.scalars) | {
            name
            for name in self.datasets
            if name.split("_")[0] in ("image", "spectrum")
            and name.split("_", 1)[-1] in ("array", "band", "scale", "ivar", "mask", "lambda", "flux")
        }
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            try:
                block = {name: self.datasets[name][first:last] for name in sorted(wanted)}
            except OSError as error:  # a damaged chunk; HDF5 does not say which
                broken = refusal(
                    "damaged_hdf5",
                    found=f"rows {first}-{last - 1} of {self.path.name} unreadable ({str(error)[:80]})",
                    wanted="an undamaged file",
                    mend="Copy or write it again.",
                )
                yield from (MmuRow(row, None, None, {}, (broken,)) for row in range(first, last))
                continue
            for k in range(last - first):
                yield self._row(first + k, {name: values[k] for name, values in block.items()})

    def _row(self, row: int, cells: Block) -> MmuRow:
        columns = {name: _plain(cells[name]) for name in self.scalars}
        errors: list[AstroClipError] = []
        image = spectrum = None
        try:
            image = self._image(cells, columns) if self.has_image else None
        except AstroClipError as error:
            errors.append(error)
        try:
            spectrum = self._spectrum(cells, columns) if self.has_spectrum else None
        except AstroClipError as error:
            errors.append(error)
        return MmuRow(row, image, spectrum, columns, tuple(errors))

    def _image(self, cells: Block, columns: dict[str, Any]) -> Image:
        pixels = cells["image_array"]
        if pixels.ndim != 3:
            raise refusal(
                "bad_axes",
                found=f"an image of shape {pixels.shape}",
                wanted="(band, y, x)",
                mend="Write image_array as (N, B, H, W).",
            )
        flags: list[Flag] = []
        if "image_band" in cells:
            texts = [_text(b) for b in np.atleast_1d(cells["image_band"])]
            bands = tuple(band_name(t) or t.lower() for t in texts)
        else:
            bands = DEFAULT_BANDS
            flags.append(Flag("assumed_bands", "The file names no bands; g, r, z were assumed."))
        if len(bands) != len(pixels):
            raise refusal(
                "band_mismatch",
                found=f"{len(pixels)} planes and bands {bands}",
                wanted="one band a plane",
                mend="Correct image_band.",
            )
        if "image_scale" in cells:
            scale = float(np.ravel(cells["image_scale"])[0])
        else:
            scale = LEGACY_SCALE_ARCSEC
            flags.append(Flag("assumed_pixel_scale", f"The file gives no pixel scale; {scale} arcsec was assumed."))
        bad = np.zeros(pixels.shape, dtype=bool)
        if "image_mask" in cells and cells["image_mask"].shape == pixels.shape:
            bad |= cells["image_mask"] != 0
        if "image_ivar" in cells and cells["image_ivar"].shape == pixels.shape:
            bad |= ~(cells["image_ivar"] > 0)
        raw = RawImage(pixels, bands, scale, bad, flags=tuple(flags), **_identity(columns))
        return assemble_image(raw, self.limits)

    def _spectrum(self, cells: Block, columns: dict[str, Any]) -> Spectrum:
        wave = np.asarray(cells["spectrum_lambda"], dtype=np.float64)
        real = np.isfinite(wave) & (wave > 0)  # shorter spectra are padded
        optional: dict[str, Any] = {
            key: cells[name][real]
            for key, name in (("ivar", "spectrum_ivar"), ("bad", "spectrum_mask"))
            if name in cells and cells[name].shape == wave.shape
        }
        redshift = columns.get("redshift", columns.get("Z"))
        raw = RawSpectrum(
            wave=wave[real],
            flux=cells["spectrum_flux"][real],
            wave_unit="Angstrom",
            flux_unit="1e-17 erg/s/cm2/A",
            medium="vacuum",
            redshift=redshift if isinstance(redshift, float) and np.isfinite(redshift) else None,
            **optional,
            **_identity(columns),
        )
        return assemble_spectrum(raw, limits=self.limits)


def iter_mmu(
    path: str | Path, start: int = 0, stop: int | None = None, limits: ReaderLimits = LOCAL_LIMITS
) -> Iterator[MmuRow]:
    """Open `path` and yield its rows (see `MmuFile.rows`)."""
    with MmuFile(path, limits) as file:
        yield from file.rows(start, stop)


def _plain(value: Any) -> Any:
    """A numpy scalar as int, float, bool or str."""
    return _text(value) if isinstance(value, bytes) else value.item()


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.rstrip("\0").strip()


def _identity(columns: dict[str, Any]) -> dict[str, Any]:
    """object_id, ra, dec of a row."""
    name = columns.get("object_id")
    position = {key: columns.get(key) for key in ("ra", "dec")}
    known = all(isinstance(v, float) and np.isfinite(v) for v in position.values())
    return {"object_id": None if name is None else str(name), **(position if known else {})}
