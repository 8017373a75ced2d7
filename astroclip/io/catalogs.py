"""Catalogues of files, and Multimodal Universe rows in Parquet (HATS): tables whose rows are objects.

A catalogue has a column `image` and / or `spectrum` (or `image_path`, `spectrum_file`, ...) of file names relative to
its own folder, and any scalar columns beside it. A HATS row holds the arrays itself, as structs (Multimodal Universe
v1.5): image {array or flux, filter or band, pixel_size or scale, ...}, spectrum {lambda, flux, ivar, mask, ...}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from astroclip.errors import AstroClipError
from astroclip.io.columns import role_of
from astroclip.io.image import DEFAULT_BANDS, LEGACY_SCALE_ARCSEC, RawImage, assemble_image, band_name
from astroclip.io.refusal import refusal
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Image, Spectrum

__all__ = ["Catalog", "CatalogRow", "path_columns"]

_ENDINGS = ("", "_path", "_file", "_filename")


def path_columns(names: Iterable[str]) -> dict[str, str]:
    """{"image": column, "spectrum": column} of those `names` (any case) that are called like file columns."""
    by_lower = {n.lower(): n for n in names}
    found = {}
    for modality, stems in (("image", ("image", "cutout", "img")), ("spectrum", ("spectrum", "spec"))):
        for candidate in (s + e for s in stems for e in _ENDINGS):
            if candidate in by_lower:
                found[modality] = by_lower[candidate]
                break
    return found


@dataclass(frozen=True)
class CatalogRow:
    """One row: identity, scalar cells, file names, and (HATS) the arrays themselves."""

    object_id: str | None
    ra: float | None
    dec: float | None
    scalars: dict[str, Any]
    paths: dict[str, str]
    structs: dict[str, dict[str, Any]]

    def item(self, modality: str, limits: ReaderLimits) -> Image | Spectrum | None:
        """The object a struct column holds, or None."""
        struct = self.structs.get(modality)
        if struct is None:
            return None
        try:
            return self._image(struct, limits) if modality == "image" else self._spectrum(struct, limits)
        except (ValueError, TypeError, KeyError) as error:
            raise refusal(
                "damaged_file",
                found=f"a struct {modality} that does not parse ({type(error).__name__}: {str(error)[:80]})",
                wanted="the Multimodal Universe fields",
                mend="See the columns of the survey's own Parquet files.",
            ) from error

    def _image(self, struct: dict[str, Any], limits: ReaderLimits) -> Image:
        values = struct.get("array") if struct.get("array") is not None else struct["flux"]
        pixels = np.array(values, dtype=np.float32)
        names = struct.get("filter") or struct.get("band")
        names = [names] * len(pixels) if isinstance(names, str) else names
        flags: list[Flag] = []
        if names:
            bands = tuple(band_name(str(n)) or str(n).lower() for n in names)
        else:
            bands = DEFAULT_BANDS
            flags.append(Flag("assumed_bands", "The row names no bands; g, r, z were assumed."))
        sizes = np.ravel(struct.get("pixel_size") or struct.get("scale") or [])
        if not sizes.size:
            flags.append(
                Flag("assumed_pixel_scale", f"The row gives no scale; {LEGACY_SCALE_ARCSEC} arcsec was assumed.")
            )
        scale = float(sizes[0]) if sizes.size else LEGACY_SCALE_ARCSEC
        if pixels.ndim != 3 or len(bands) != len(pixels):
            raise ValueError(f"image of shape {pixels.shape} with bands {bands}")
        bad = np.zeros(pixels.shape, bool)
        if struct.get("ivar") is not None:
            bad |= ~(np.array(struct["ivar"], dtype=np.float32).reshape(pixels.shape) > 0)
        raw = RawImage(
            pixels, bands, scale, bad, object_id=self.object_id, ra=self.ra, dec=self.dec, flags=tuple(flags)
        )
        return assemble_image(raw, limits)

    def _spectrum(self, struct: dict[str, Any], limits: ReaderLimits) -> Spectrum:
        wave = np.array(struct["lambda"], dtype=np.float64)
        real = np.isfinite(wave) & (wave > 0)
        given = {k: np.array(struct[k])[real] for k in ("flux", "ivar", "mask") if struct.get(k) is not None}
        redshift = self.scalars.get("redshift", self.scalars.get("Z"))
        raw = RawSpectrum(
            wave=wave[real],
            flux=given["flux"],
            ivar=given.get("ivar"),
            bad=given.get("mask"),
            wave_unit="Angstrom",
            flux_unit="1e-17 erg/s/cm2/A",
            medium="vacuum",
            object_id=self.object_id,
            ra=self.ra,
            dec=self.dec,
            redshift=redshift if isinstance(redshift, float) else None,
        )
        return assemble_spectrum(raw, limits=limits)


class Catalog:
    """An open table; `Catalog.open(path)` keeps the last few in memory (Parquet stays on disk)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parquet = pq.ParquetFile(path) if path.suffix.lower() == ".parquet" else None
        self._table = None if self._parquet else _load(path)
        schema = self._parquet.schema_arrow if self._parquet else self._table.schema  # type: ignore[union-attr]
        by_modality = path_columns(schema.names)
        self.paths = {m: n for m, n in by_modality.items() if _is_text(schema.field(n).type)}
        self.structs = {m: n for m, n in by_modality.items() if pa.types.is_struct(schema.field(n).type)}
        if not (self.paths or self.structs):
            raise refusal(
                "missing_column",
                found=f"{path.name} with columns {', '.join(schema.names[:8])}",
                wanted="a column `image` or `spectrum` of file names (or a Multimodal Universe struct)",
                mend="Add the column; names are relative to the catalogue's folder.",
            )
        taken = {*self.paths.values(), *self.structs.values()}
        self.types = {f.name: kind for f in schema if f.name not in taken and (kind := _type_name(f.type))}
        lower = {n.lower(): n for n in self.types}
        self._identity = {key: lower[name] for key in ("id", "ra", "dec") if (name := role_of(lower, key))}

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Raises InputError: `damaged_file`, `missing_column`."""
        return _open(path, path.stat().st_mtime_ns)

    def __len__(self) -> int:
        return int(self._parquet.metadata.num_rows if self._parquet else self._table.num_rows)  # type: ignore[union-attr]

    def rows(self, start: int, stop: int) -> Iterator[CatalogRow]:
        for cells in self._slice(start, stop).to_pylist():
            scalars = {name: _clean(cells[name]) for name in self.types}
            name, ra, dec = (scalars.get(self._identity.get(key, "")) for key in ("id", "ra", "dec"))
            yield CatalogRow(
                object_id=None if name is None else str(name),
                ra=_number(ra),
                dec=_number(dec),
                scalars=scalars,
                paths={m: text for m, n in self.paths.items() if (text := _clean(cells[n]))},
                structs={m: cells[n] for m, n in self.structs.items() if cells[n] is not None},
            )

    def _slice(self, start: int, stop: int) -> pa.Table:
        columns = [*self.types, *self.paths.values(), *self.structs.values()]
        if self._table is not None:
            return self._table.select(columns).slice(start, stop - start)
        assert self._parquet is not None
        pieces, first = [], 0
        for group in range(self._parquet.metadata.num_row_groups):
            count = self._parquet.metadata.row_group(group).num_rows
            if first < stop and first + count > start:
                piece = self._parquet.read_row_group(group, columns=columns)
                low = max(start - first, 0)
                pieces.append(piece.slice(low, min(stop - first, count) - low))
            first += count
        return pa.concat_tables(pieces)


@lru_cache(maxsize=4)
def _open(path: Path, mtime_ns: int) -> Catalog:
    try:
        return Catalog(path)
    except AstroClipError:
        raise
    except Exception as error:  # astropy and arrow raise many kinds for damaged tables
        raise refusal(
            "damaged_file",
            found=f"{path.name}, which does not open as a table ({str(error)[:100]})",
            wanted="a catalogue as CSV, FITS, Parquet or VOTable",
            mend="Write it again, for instance with astropy.table.",
        ) from error


def _load(path: Path) -> pa.Table:
    """CSV by arrow, FITS and VOTable by astropy, as an arrow table of scalar columns."""
    if path.suffix.lower() in (".csv", ".tsv", ".txt", ".dat", ".ecsv"):
        text = b"\n".join(line for line in path.read_bytes().splitlines() if not line.startswith(b"#"))
        head = text.split(b"\n", 1)[0]
        delimiter = next((d for d in (",", ";", "\t") if d.encode() in head), " ")
        return pyarrow.csv.read_csv(pa.BufferReader(text), parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter))
    from astropy.table import Table

    kind = "votable" if path.suffix.lower() in (".vot", ".votable", ".xml") else "fits"
    table = Table.read(path, format=kind)
    columns = {}
    for name in table.colnames:
        column = table[name]
        if column.ndim == 1:
            values = np.ma.filled(column.astype(object), None) if np.ma.isMaskedArray(column) else column
            columns[name] = pa.array([_native(v) for v in values])
    return pa.table(columns)


def _native(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else value


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _type_name(kind: pa.DataType) -> str | None:
    """Output type of a scalar column; None for lists, structs and other nested types."""
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return "float32"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "float64"
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_boolean(kind):
        return "bool"
    return None if pa.types.is_nested(kind) or pa.types.is_null(kind) else "string"


def _clean(value: Any) -> Any:
    """NaN and blank text as None; bytes as text."""
    value = _native(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value.strip() or None if isinstance(value, str) else value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
