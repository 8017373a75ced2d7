"""What the batch command reads: files, folders, catalogues of files and survey shards, as units of known rows.

A job's inputs are listed once, in an order that depends only on their names, and cut into `Unit`s; a unit is read on
its own, by any worker, and gives its rows in order. Nothing that goes wrong inside a unit stops the job: the row keeps
the error.

    .fits .fits.gz .png .jpg .npy .csv     one unit a file (a DESI coadd gives several rows)
    .hdf5 .h5                              Multimodal Universe shards, cut into blocks of rows
    .csv .fits .parquet .vot .xml          a catalogue, when it has a column `image` or `spectrum` of file names
    .parquet                               Multimodal Universe in HATS, when `image` or `spectrum` is a struct
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from astroclip.errors import AstroClipError, InputError
from astroclip.io import ImageOptions, SpectrumOptions, detect_modality, read_images, read_spectra
from astroclip.io.catalogs import Catalog, CatalogRow, path_columns
from astroclip.io.columns import role_of
from astroclip.io.formats import decode_text
from astroclip.io.mmu import MmuFile, iter_mmu
from astroclip.io.outputs import add_columns, renamed, type_name
from astroclip.io.refusal import refusal
from astroclip.io.text import header_names
from astroclip.limits import LOCAL_LIMITS, ReaderLimits
from astroclip.types import MODALITIES, Image, Modality, Spectrum

__all__ = ["Entry", "Inputs", "Unit", "list_inputs", "read_unit"]

BLOCK_ROWS = 64  # rows of a shard or catalogue read as one piece of work
KEEP_ALL = SpectrumOptions(keep_empty=True)
_LOOSE = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".png", ".jpg", ".jpeg", ".npy")
_TEXT = (".csv", ".tsv", ".txt", ".dat", ".ecsv")
_SHARD = (".hdf5", ".h5")
_TABLE = (".parquet", ".vot", ".votable", ".xml")
Kind = Literal["file", "mmu", "catalog"]


@dataclass(frozen=True)
class Unit:
    """A piece of the inputs: one file (`stop` None), or rows `start` to before `stop` of a shard or catalogue.

    label: the path as shown in `source`, relative to what the caller named.
    """

    kind: Kind
    path: Path
    label: str
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> int:
        """Rows expected; a loose file counts as one."""
        return 1 if self.stop is None else self.stop - self.start


@dataclass(frozen=True)
class Entry:
    """One row: what could be read of an object, its catalogue values, and what could not be read."""

    source: str
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    image: Image | None = None
    spectrum: Spectrum | None = None
    columns: dict[str, Any] | None = None
    errors: tuple[AstroClipError, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """All units in order.

    columns: output column -> "float32", "float64", "int64", "bool" or "string", over all inputs.
    skipped: files of a folder that hold no objects (tables of other things).
    """

    units: tuple[Unit, ...]
    columns: dict[str, str]
    skipped: tuple[str, ...] = ()


def list_inputs(paths: Sequence[str | Path], limit: int | None = None) -> Inputs:
    """The units of `paths`, at most `limit` rows of them.

    Raises InputError: `no_such_file`, `no_inputs`, or what is wrong with a catalogue or shard as a whole.
    """
    units: list[Unit] = []
    columns: dict[str, str] = {}
    skipped: list[str] = []
    for given in map(Path, paths):
        if not given.exists():
            raise refusal(
                "no_such_file", found=f"no file or folder {given}", wanted="an existing INPUT", mend="Check the path."
            )
        for path in _walk(given):
            label = path.relative_to(given.parent).as_posix() if given.is_dir() else path.name
            found = _units(path, label, inside_folder=given.is_dir(), columns=columns)
            if found:
                units += found
            else:
                skipped.append(label)
    if not units:
        raise refusal(
            "no_inputs",
            found=f"no image, spectrum, shard or catalogue under {', '.join(map(str, paths))}",
            wanted="files of the kinds " + " ".join(_LOOSE + _TEXT + _SHARD + _TABLE),
            mend="Name the files or the folder that holds them.",
        )
    return Inputs(tuple(_cut(units, limit)), columns, tuple(skipped))


def _walk(given: Path) -> Iterator[Path]:
    """The file itself, or every readable file below a folder by name; hidden and underscored files are bookkeeping."""
    if not given.is_dir():
        yield given
        return
    for path in sorted(given.rglob("*")):
        if (
            path.is_file()
            and not path.name.startswith((".", "_"))
            and _has_suffix(path, _LOOSE + _TEXT + _SHARD + _TABLE)
        ):
            yield path


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _units(path: Path, label: str, inside_folder: bool, columns: dict[str, str]) -> list[Unit]:
    """Units of one file; [] for a file that a folder happens to hold and that has no objects."""
    if _has_suffix(path, _SHARD):
        try:
            with MmuFile(path) as shard:
                add_columns(columns, {k: type_name(d.kind, d.itemsize) for k, d in shard.scalars.items()})
                return _blocks("mmu", path, label, len(shard))
        except InputError:
            return [Unit("mmu", path, label, 0, 1)]  # reading it gives one row that says what is wrong
    is_table = _has_suffix(path, _TABLE) or (not inside_folder and _is_catalog(path))
    if is_table:
        try:
            catalog = Catalog.open(path)
        except InputError:
            if not inside_folder:
                raise
            return [Unit("catalog", path, label, 0, 1)]
        add_columns(columns, catalog.types)
        return _blocks("catalog", path, label, len(catalog))
    if _has_suffix(path, _TEXT) and inside_folder and not _is_text_spectrum(path):
        return []
    add_columns(columns, {"redshift": "float64"})
    return [Unit("file", path, label)]


def _is_catalog(path: Path) -> bool:
    """True for a text or FITS table with a column of file names."""
    if _has_suffix(path, _TEXT):
        with path.open("rb") as file:
            return bool(path_columns(header_names(file.read(65536))))
    if _has_suffix(path, (".fits", ".fit", ".fits.gz")):
        try:
            return bool(Catalog.open(path).paths)
        except InputError:
            return False
    return False


def _is_text_spectrum(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(65536)
    names = header_names(head)
    return bool(role_of(names, "wave") and role_of(names, "flux")) if names else bool(decode_text(head).strip())


def _blocks(kind: Kind, path: Path, label: str, rows: int) -> list[Unit]:
    return [Unit(kind, path, label, i, min(i + BLOCK_ROWS, rows)) for i in range(0, rows, BLOCK_ROWS)]


def _cut(units: list[Unit], limit: int | None) -> Iterator[Unit]:
    left = sum(u.rows for u in units) if limit is None else limit
    for unit in units:
        if left <= 0:
            return
        stop = unit.stop if unit.stop is None else min(unit.stop, unit.start + left)
        yield replace(unit, stop=stop)
        left -= unit.rows


# --- reading ----------------------------------------------------------------------------------------------------------


def read_unit(unit: Unit, limits: ReaderLimits = LOCAL_LIMITS) -> list[Entry]:
    """Every row of `unit`; at least one, whatever is wrong with it."""
    try:
        if unit.kind == "mmu":
            return [_from_mmu(unit, row) for row in iter_mmu(unit.path, unit.start, unit.stop, limits)]
        if unit.kind == "catalog":
            return _from_catalog(unit, limits)
        return _from_file(unit, limits)
    except AstroClipError as error:
        failure = error
    except Exception as error:  # a file on a failing disk, a library's own bug: the job goes on
        failure = refusal(
            "reader_failed",
            found=f"{unit.path.name}, on which reading failed ({type(error).__name__}: {str(error)[:100]})",
            wanted="a readable file",
            mend="Check the file; if it opens elsewhere, report it.",
        )
    stop = unit.start + 1 if unit.stop is None else unit.stop
    return [Entry(f"{unit.label}#{row}", errors=(failure,)) for row in range(unit.start, stop)]


def _from_mmu(unit: Unit, row: Any) -> Entry:
    cells = row.columns
    name, ra, dec = (cells.get(k) for k in ("object_id", "ra", "dec"))
    return Entry(
        source=f"{unit.label}#{row.row}",
        object_id=None if name is None else str(name),
        ra=ra,
        dec=dec,
        image=row.image,
        spectrum=row.spectrum,
        columns=renamed(cells),
        errors=row.errors,
    )


def _from_file(unit: Unit, limits: ReaderLimits) -> list[Entry]:
    data = _bytes(unit.path, limits)
    modality = detect_modality(data, name=unit.path.name, limits=limits)
    entries = []
    for row, item in enumerate(_items(modality, data, unit.path.name, limits)):
        entry = _entry(f"{unit.label}#{row}", item)
        entries.append(replace(entry, object_id=entry.object_id or _stem(unit.path)))
    return entries


def _items(
    modality: Modality, data: bytes, name: str, limits: ReaderLimits, options: ImageOptions | None = None
) -> Sequence[Image | Spectrum]:
    if modality == "image":
        return read_images(data, name=name, limits=limits, options=options)
    return read_spectra(data, name=name, limits=limits, options=KEEP_ALL)


def _entry(source: str, item: Image | Spectrum) -> Entry:
    entry = Entry(source, item.object_id, item.ra, item.dec)
    if isinstance(item, Image):
        return replace(entry, image=item)
    known = {} if item.redshift is None else {"redshift": item.redshift}
    return replace(entry, spectrum=item, columns=known)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name[: -len(Path(name).suffix)] if Path(name).suffix else name


def _bytes(path: Path, limits: ReaderLimits) -> bytes:
    """A file's bytes, its size checked before it is read."""
    try:
        if path.stat().st_size <= limits.max_file_bytes:
            return path.read_bytes()
        with path.open("rb") as file:
            return file.read(limits.max_file_bytes + 1)  # enough for the reader to refuse it
    except OSError as error:
        raise refusal(
            "no_such_file",
            found=f"{path.name}, which cannot be read ({error.strerror})",
            wanted="a readable file",
            mend="Check the path, relative to the catalogue's folder, and its permissions.",
        ) from error


def _from_catalog(unit: Unit, limits: ReaderLimits) -> list[Entry]:
    assert unit.stop is not None
    catalog = Catalog.open(unit.path)
    entries = []
    for row, cells in enumerate(catalog.rows(unit.start, unit.stop), start=unit.start):
        entry = Entry(f"{unit.label}#{row}", columns=renamed(cells.scalars))
        errors: list[AstroClipError] = []
        for modality in MODALITIES:
            try:
                item = cells.item(modality, limits) or _referenced(cells, modality, unit.path, limits)
            except AstroClipError as error:
                errors.append(error)
                continue
            entry = replace(entry, image=item) if isinstance(item, Image) else entry
            entry = replace(entry, spectrum=item) if isinstance(item, Spectrum) else entry
        held = [i for i in (entry.spectrum, entry.image) if i is not None]
        entries.append(
            replace(
                entry,
                object_id=cells.object_id or next((i.object_id for i in held if i.object_id), None),
                ra=next((v for v in (cells.ra, *(i.ra for i in held)) if v is not None), None),
                dec=next((v for v in (cells.dec, *(i.dec for i in held)) if v is not None), None),
                errors=tuple(errors),
            )
        )
    return entries


def _referenced(cells: CatalogRow, modality: Modality, catalog: Path, limits: ReaderLimits) -> Image | Spectrum | None:
    """The one object of the file a catalogue row names, relative to the catalogue's folder.

    A column `pixel_scale_arcsec` states the scale of pictures that carry none.
    """
    name = cells.paths.get(modality)
    if not name:
        return None
    path = catalog.parent / name
    scale = cells.scalars.get("pixel_scale_arcsec")
    options = ImageOptions(pixel_scale_arcsec=float(scale)) if isinstance(scale, (int, float)) else None
    items = _items(modality, _bytes(path, limits), path.name, limits, options)
    if len(items) != 1:
        raise refusal(
            "too_many_targets",
            found=f"{len(items)} objects in {path.name}",
            wanted="one object a catalogue row",
            mend="Give the file itself as INPUT; its rows then carry their own ids.",
        )
    return items[0]
