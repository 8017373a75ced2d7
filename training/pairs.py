"""Pairs of image and spectrum read from disk when they are needed: AstroCLIP's file, Multimodal Universe shards.

A `PairSource` is one part (train, val or test) of a data set, numbered 0 to n - 1, in the order of the files. It holds
no pixels: `read` opens the files it needs, in the process that asks, and reads rows that lie next to each other at
once. What comes out is in physical units on the grids of the model that is trained; normalisation is the model's.

Two layouts:

* `AstroclipFile`: the one HDF5 file of AstroCLIP (Parker et al. 2024). Groups "0" to "9", each with `images`
  (N, W, H, 3), which is transposed, nanomaggies in g, r, z; `spectra` (N, 7781) or (N, 7781, 1) on DESI's grid;
  `redshifts`, `targetids`. In every group the first int(0.8 N) rows train and the rest test, as upstream has it.
* `MmuShards`: a folder of HDF5 shards in Multimodal Universe layout (`astroclip.io.mmu`), images and spectra in one
  file, split by whole shards (`training.split`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
from scipy import sparse

from astroclip.errors import InputError
from astroclip.preprocess import LinearSpectrumGrid, SpectrumGrid, overlap_matrix, rebin
from training.data import find_shards
from training.split import split_shards

__all__ = ["AstroclipFile", "MmuShards", "PairSource", "Pairs", "open_pairs"]

PARTS = ("train", "val", "test")
TRAIN_FRACTION = 0.8  # of each group of AstroCLIP's file
BANDS = ("g", "r", "z")
PIXEL_SCALE_ARCSEC, SCALE_TOLERANCE = 0.262, 0.05  # nothing is resampled here; see astroclip.preprocess.image
OPEN_FILES = 8  # a process keeps so many files open; a survey may have thousands of shards
MAX_GRIDS = 64  # rebinning matrices kept; a survey has one wavelength grid, a mixed one a few
CHUNK_CACHE_BYTES = 64 * 1024 * 1024  # rows of a batch share compressed chunks; h5py's 1 MB would unpack them each time

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Rows of a source, in the order asked for.

    images:    (n, 3, S, S) float32 nanomaggies in g, r, z; S = 0 where the source reads no images.
    flux, ivar: (n, L) float32, 1e-17 erg/s/cm2/A on the source's grid and its inverse square, ivar 0 where there is no
               data; L = 0 where the source reads no spectra. A file without ivar gives 1 for every finite pixel.
    flux_true: (n, L) without noise, from simulations that keep it, else None.
    redshift:  (n,) float32, NaN where unknown. object_id: (n,) str (AstroCLIP's file: DESI's TARGETID).
    """

    images: Array
    flux: Array
    ivar: Array
    flux_true: Array | None
    redshift: Array
    object_id: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.object_id)


class PairSource(Protocol):
    """One part of a data set; safe to hand to worker processes before or after its first read."""

    def __len__(self) -> int: ...

    def read(self, rows: npt.ArrayLike) -> Pairs:
        """The rows, in the order given; raises IndexError outside 0..n-1 and InputError for damaged files."""
        ...


@dataclass(frozen=True)
class _Segment:
    """Rows `start` to before `stop` of a file's group ("" = the file itself)."""

    path: Path
    group: str
    start: int
    stop: int


class _Segments:
    """What both layouts share: numbering, runs of neighbouring rows, open files of this process."""

    def __init__(
        self, segments: list[_Segment], image_size: int | None, grid: SpectrumGrid | None, columns: tuple[str, ...]
    ) -> None:
        self.image_size, self.columns = image_size, columns
        self.grid = grid or LinearSpectrumGrid()
        self._segments = [s for s in segments if s.stop > s.start]
        self._first = np.concatenate([[0], np.cumsum([s.stop - s.start for s in self._segments])]).astype(np.int64)
        self._open: OrderedDict[Path, h5py.File] = OrderedDict()
        self._process = os.getpid()
        self._overlaps: dict[bytes, sparse.csr_array] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds rows of this part, once."""
        return tuple(dict.fromkeys(s.path for s in self._segments))

    def read(self, rows: npt.ArrayLike) -> Pairs:
        """See `PairSource`."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a source with rows 0 to {len(self) - 1}")
        # A row asked for twice is read once: `back` is the place of each row asked for among the rows read.
        distinct, back = np.unique(wanted, return_inverse=True)
        parts = [self._read_run(segment, start, stop) for segment, start, stop in self._runs(distinct)]
        if not parts:
            return self._empty()
        true = [part.flux_true for part in parts]

        def joined(name: str) -> Any:
            return np.concatenate([getattr(part, name) for part in parts])[back]

        return Pairs(
            images=joined("images"),
            flux=joined("flux"),
            ivar=joined("ivar"),
            flux_true=None if any(t is None for t in true) else joined("flux_true"),
            redshift=joined("redshift"),
            object_id=joined("object_id"),
        )

    def _runs(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[_Segment, int, int]]:
        """(segment, start, stop) in the segment's own rows, for sorted distinct rows; neighbours make one run."""
        owner = np.searchsorted(self._first, rows, side="right") - 1
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1
        for run in np.split(np.arange(len(rows)), cuts):
            if len(run):
                segment = self._segments[owner[run[0]]]
                shift = segment.start - self._first[owner[run[0]]]
                yield segment, int(rows[run[0]] + shift), int(rows[run[-1]] + shift) + 1

    def _read_run(self, segment: _Segment, start: int, stop: int) -> Pairs:
        try:
            node = self._file(segment.path)
            return self._rows(node[segment.group] if segment.group else node, start, stop)
        except (OSError, KeyError) as error:
            where = f"{segment.path} group {segment.group!r}" if segment.group else str(segment.path)
            raise InputError(
                f"found rows {start} to {stop - 1} of {where} unreadable ({str(error)[:120]}); wanted an undamaged "
                "HDF5 file that stays in place while it is read; copy it again",
                code="damaged_hdf5",
                field="data",
            ) from error

    def _file(self, path: Path) -> h5py.File:
        """The open file; never one that another process opened (h5py handles do not survive a fork)."""
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = _opened(path)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def _rows(self, node: Any, start: int, stop: int) -> Pairs:
        raise NotImplementedError

    def _on_grid(
        self, wave: npt.NDArray[np.float64], flux: npt.NDArray[Any], ivar: npt.NDArray[Any]
    ) -> tuple[Array, Array]:
        """(n, L) flux and ivar on the grid, ivar 0 where there is no data; a spectrum on the grid passes as it is."""
        good = np.isfinite(flux) & np.isfinite(ivar) & (ivar > 0)
        flux, ivar = np.where(good, flux, 0).astype(np.float32), np.where(good, ivar, 0).astype(np.float32)
        key = wave.tobytes()
        if key not in self._overlaps:
            if len(self._overlaps) >= MAX_GRIDS:
                self._overlaps.clear()
            self._overlaps[key] = overlap_matrix(wave, self.grid)
        overlap = self._overlaps[key]
        if overlap.shape[0] == overlap.shape[1] == overlap.nnz:  # the identity
            return flux, ivar
        return rebin(flux, ivar, overlap)

    def _empty(self) -> Pairs:
        side = (self.image_size or 0) if "image" in self.columns else 0
        length = self.grid.n_pixels if "spectrum" in self.columns else 0
        flux = np.zeros((0, length), np.float32)
        images, redshift = np.zeros((0, 3, side, side), np.float32), np.zeros(0, np.float32)
        return Pairs(images, flux, flux, None, redshift, np.zeros(0, np.str_))

    def _no_images(self, n: int) -> Array:
        return np.zeros((n, len(BANDS), 0, 0), np.float32)

    def _no_spectra(self, n: int) -> tuple[Array, Array, None]:
        nothing = np.zeros((n, 0), np.float32)
        return nothing, nothing, None


class AstroclipFile(_Segments):
    """A part of AstroCLIP's HDF5 file.

    part:         "train", "val" or "test". Test is upstream's (the last fifth of each group).
    val_fraction: so much of the end of each group's training rows is "val" and not "train". At 0, "train" is all of
                  upstream's training rows, and "val" is the test part, which is what upstream validates on.
    image_size:   central crop in pixels, None for all; grid: the spectrum's grid, None for DESI's own.
    columns:      what to read, of "image" and "spectrum".
    """

    def __init__(
        self,
        path: str | Path,
        part: str = "train",
        *,
        image_size: int | None = None,
        grid: SpectrumGrid | None = None,
        val_fraction: float = 0.0,
        columns: tuple[str, ...] = ("image", "spectrum"),
    ) -> None:
        _check_part(part)
        if not 0 <= val_fraction < 1:
            raise InputError(
                f"found val_fraction {val_fraction}; wanted at least 0 and below 1", code="bad_setting", field="data"
            )
        path = Path(path)
        with _opened(path) as file:
            segments = [
                _Segment(
                    path, name, *_group_rows(_checked_group(path, name, file[name], image_size), part, val_fraction)
                )
                for name in _groups(path, file)
            ]
        super().__init__(segments, image_size, grid, columns)
        self._wave = LinearSpectrumGrid().wave

    def _rows(self, node: Any, start: int, stop: int) -> Pairs:
        n = stop - start
        images = self._no_images(n)
        if "image" in self.columns:
            window = _window(node["images"].shape[1], self.image_size)
            # (N, W, H, 3) -> (N, 3, H, W): the file holds each image transposed.
            images = _finite(node["images"][start:stop, window, window].transpose(0, 3, 2, 1))
        flux, ivar, true = self._no_spectra(n)
        if "spectrum" in self.columns:
            stored = node["spectra"][start:stop].reshape(n, -1)
            flux, ivar = self._on_grid(self._wave, stored, np.ones_like(stored, np.float32))
        return Pairs(
            images=images,
            flux=flux,
            ivar=ivar,
            flux_true=true,
            redshift=node["redshifts"][start:stop].reshape(n).astype(np.float32),
            object_id=node["targetids"][start:stop].reshape(n).astype(np.int64).astype(np.str_),
        )


class MmuShards(_Segments):
    """A part of a folder of Multimodal Universe shards that hold images and spectra; parameters as `AstroclipFile`.

    Whole shards train, validate and test; a survey's own `val_fraction` is that of `training.split`.
    """

    def __init__(
        self,
        root: str | Path,
        part: str = "train",
        *,
        image_size: int | None = None,
        grid: SpectrumGrid | None = None,
        columns: tuple[str, ...] = ("image", "spectrum"),
    ) -> None:
        _check_part(part)
        try:
            shards = getattr(split_shards(find_shards(root)), part)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{root}: {error}", code="bad_data", field="data") from error
        segments = [_Segment(path, "", 0, _checked_shard(path, image_size, columns)) for path in shards]
        super().__init__(segments, image_size, grid, columns)

    def _rows(self, node: Any, start: int, stop: int) -> Pairs:
        n = stop - start
        flux, ivar, true = self._spectra(node, start, stop) if "spectrum" in self.columns else self._no_spectra(n)
        name = "redshift" if "redshift" in node else "Z"
        known = name in node
        return Pairs(
            images=self._images(node, start, stop) if "image" in self.columns else self._no_images(n),
            flux=flux,
            ivar=ivar,
            flux_true=true,
            redshift=node[name][start:stop].astype(np.float32) if known else np.full(n, np.nan, np.float32),
            object_id=np.char.strip(node["object_id"][start:stop].astype(np.str_)),
        )

    def _images(self, node: Any, start: int, stop: int) -> Array:
        window = _window(node["image_array"].shape[-1], self.image_size)
        order = _band_order(node)
        pixels = node["image_array"][start:stop, :, window, window][:, order]
        if "image_mask" in node:
            mask = node["image_mask"][start:stop, ..., window, window] != 0
            pixels = np.where(mask[:, order] if mask.ndim == 4 else mask[:, None], 0, pixels)
        return _finite(pixels)

    def _spectra(self, node: Any, start: int, stop: int) -> tuple[Array, Array, Array | None]:
        wave = node["spectrum_lambda"][start:stop].astype(np.float64)
        stored = {"flux": node["spectrum_flux"][start:stop]}
        ivar = node["spectrum_ivar"][start:stop] if "spectrum_ivar" in node else np.ones_like(stored["flux"])
        if "spectrum_mask" in node:
            ivar = np.where(node["spectrum_mask"][start:stop] != 0, 0, ivar)
        if "spectrum_flux_true" in node:
            stored["true"] = node["spectrum_flux_true"][start:stop]
        length = self.grid.n_pixels
        out = {name: np.zeros((len(wave), length), np.float32) for name in (*stored, "ivar")}
        # Rows of one wavelength grid are rebinned together; a shard has one, a mixed survey a few.
        kinds, member = np.unique(wave, axis=0, return_inverse=True)
        for kind, row in enumerate(kinds):
            chosen = np.flatnonzero(member.reshape(-1) == kind)
            real = np.isfinite(row) & (row > 0)  # shorter spectra are padded
            for name, values in stored.items():
                out[name][chosen], weight = self._on_grid(row[real], values[chosen][:, real], ivar[chosen][:, real])
                if name == "flux":
                    out["ivar"][chosen] = weight
        return out["flux"], out["ivar"], out.get("true")


def open_pairs(
    data: str | Path,
    part: str = "train",
    *,
    image_size: int | None = None,
    grid: SpectrumGrid | None = None,
    val_fraction: float = 0.0,
    columns: tuple[str, ...] = ("image", "spectrum"),
) -> AstroclipFile | MmuShards:
    """The source of a file (AstroCLIP's layout) or of a folder (shards); raises InputError where it is neither."""
    path = Path(data)
    if path.is_file():
        return AstroclipFile(path, part, image_size=image_size, grid=grid, val_fraction=val_fraction, columns=columns)
    if path.is_dir():
        return MmuShards(path, part, image_size=image_size, grid=grid, columns=columns)
    raise InputError(
        f"found nothing at {path}; wanted AstroCLIP's HDF5 file or a folder of Multimodal Universe shards; set `data`, "
        "or make a survey with `astroclip simulate`",
        code="no_data",
        field="data",
    )


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise InputError(f"found part {part!r}; wanted one of {', '.join(PARTS)}", code="bad_part", field="part")


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        raise InputError(
            f"found {path}, which HDF5 cannot open ({str(error)[:120]}); wanted a complete HDF5 file; copy or download "
            "it again",
            code="damaged_hdf5",
            field="data",
        ) from error


def _groups(path: Path, file: h5py.File) -> list[str]:
    names = sorted((n for n in file if n.isdigit() and isinstance(file[n], h5py.Group)), key=int)
    if not names:
        found = ", ".join(sorted(file)[:6]) or "nothing"
        raise InputError(
            f"found {path} with {found} at its top; wanted AstroCLIP's groups 0 to 9 with images, spectra, redshifts "
            "and targetids; for Multimodal Universe shards give their folder",
            code="missing_dataset",
            field="data",
        )
    return names


def _checked_group(path: Path, name: str, group: h5py.Group, image_size: int | None) -> int:
    """Number of rows; InputError where a dataset is missing or of another shape."""
    missing = [key for key in ("images", "spectra", "redshifts", "targetids") if key not in group]
    if missing:
        raise _bad(path, f"group {name!r} without {', '.join(missing)}", "images, spectra, redshifts, targetids")
    images, spectra = group["images"].shape, group["spectra"].shape
    if len(images) != 4 or images[3] != len(BANDS) or images[1] != images[2]:
        raise _bad(path, f"{name}/images of shape {images}", "(N, size, size, 3)")
    _window(images[1], image_size, path)
    if spectra[1:] not in ((LinearSpectrumGrid().n_pixels,), (LinearSpectrumGrid().n_pixels, 1)):
        raise _bad(path, f"{name}/spectra of shape {spectra}", "(N, 7781) or (N, 7781, 1), 3600 to 9824 Angstrom")
    lengths = {key: group[key].shape[0] for key in ("images", "spectra", "redshifts", "targetids")}
    if len(set(lengths.values())) != 1:
        raise _bad(path, f"group {name!r} with columns of lengths {lengths}", "columns of one length")
    return int(images[0])


def _group_rows(n: int, part: str, val_fraction: float) -> tuple[int, int]:
    """The rows of a part in a group of n."""
    train = int(TRAIN_FRACTION * n)
    held = round(val_fraction * train)
    if part == "train":
        return 0, train - held
    return (train - held, train) if part == "val" and held else (train, n)


def _checked_shard(path: Path, image_size: int | None, columns: tuple[str, ...]) -> int:
    """Number of rows; InputError where a column is missing or of another shape."""
    wants = ["object_id"]
    wants += ["image_array"] if "image" in columns else []
    wants += ["spectrum_lambda", "spectrum_flux"] if "spectrum" in columns else []
    with _opened(path) as file:
        missing = [name for name in wants if name not in file]
        if missing:
            raise _bad(path, f"no dataset {', '.join(missing)}", f"{', '.join(wants)} in one file")
        if "image" in columns:
            shape = file["image_array"].shape
            if len(shape) != 4 or shape[2] != shape[3]:
                raise _bad(path, f"image_array of shape {shape}", "(N, band, size, size)")
            _window(shape[-1], image_size, path)
            _band_order(file, path)
            _check_scale(file, path)
        lengths = {name: file[name].shape[0] for name in wants}
        if len(set(lengths.values())) != 1:
            raise _bad(path, f"columns of lengths {lengths}", "columns of one length")
        return int(lengths["object_id"])


def _band_order(file: Any, path: Path | None = None) -> list[int]:
    """Places of g, r, z among the planes of a shard; without `image_band` they are g, r, z."""
    count = file["image_array"].shape[1]
    named = "image_band" in file
    bands = [name.decode().strip().lower()[-1:] for name in file["image_band"][0]] if named else list(BANDS)
    if len(bands) != count or not set(BANDS) <= set(bands):
        raise _bad(path or Path(file.filename), f"{count} planes, bands {', '.join(bands)}", "bands g, r, z")
    return [bands.index(band) for band in BANDS]


def _check_scale(file: Any, path: Path) -> None:
    if "image_scale" not in file or not len(file["image_scale"]):
        return
    scale = float(np.ravel(file["image_scale"][0])[0])
    if abs(scale / PIXEL_SCALE_ARCSEC - 1) > SCALE_TOLERANCE:
        raise _bad(path, f"pixels of {scale:g} arcsec", f"{PIXEL_SCALE_ARCSEC} arcsec within 5 % (not resampled here)")


def _window(size: int, wanted: int | None, path: Path | None = None) -> slice:
    """The central `wanted` of `size` pixels."""
    if wanted is None:
        return slice(0, size)
    if wanted > size:
        raise _bad(path or Path("the file"), f"images of {size} pixels", f"at least {wanted}, which the model takes")
    start = (size - wanted) // 2
    return slice(start, start + wanted)


def _bad(path: Path, found: str, wanted: str) -> InputError:
    return InputError(
        f"found {path} with {found}; wanted {wanted}; write or download the file again",
        code="missing_dataset" if "without" in found or "no dataset" in found else "bad_shape",
        field="data",
    )


def _finite(pixels: npt.NDArray[Any]) -> Array:
    return np.nan_to_num(np.ascontiguousarray(pixels, dtype=np.float32), nan=0, posinf=0, neginf=0)
