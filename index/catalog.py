"""The catalogue: one row an object, held as an Arrow table, with lookup by id and by position.

Columns: `object_id` (string, unique), `ra`, `dec` (deg ICRS, null where unknown), `has_image`, `has_spectrum`,
`preview_image`, `preview_spectrum` (bool), properties and whatever the survey's own catalogue held. Missing numbers
are nulls, never NaN, so a row is valid JSON as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from astroclip.errors import IndexFileError, NotFoundError
from index.sky import SkyIndex

__all__ = ["CATALOG", "STANDARD_PROPERTIES", "Catalog"]

CATALOG = "catalog.parquet"
STANDARD_PROPERTIES: dict[str, str] = {
    "redshift": "",
    "log_stellar_mass": "dex(solMass)",
    "log_metallicity": "dex(solar)",
    "age_gyr": "Gyr",
    "log_ssfr": "dex(1/yr)",
}
_ALIASES = {"z": "redshift"}  # accepted in requests where the catalogue has no column of that name
_REQUIRED = ("object_id", "ra", "dec", "has_image", "has_spectrum")


class Catalog:
    """An Arrow table of N objects; `properties` maps the names that may be estimated to their units."""

    def __init__(self, table: pa.Table, properties: Mapping[str, str]) -> None:
        missing = [name for name in _REQUIRED if name not in table.column_names]
        if missing:
            raise IndexFileError(
                f"index file {CATALOG} lacks the columns {missing}; wanted {list(_REQUIRED)}; rebuild the index",
                field=CATALOG,
            )
        self.table = table.combine_chunks()
        self.properties = dict(properties)
        self._names = frozenset(self.table.column_names)  # asking Arrow takes 30 us each time
        self._values: dict[str, npt.NDArray[np.float64]] = {}

    @classmethod
    def read(cls, folder: Path, properties: Mapping[str, str]) -> Catalog:
        """The catalogue of an index folder. Raises IndexFileError."""
        try:
            table = pq.read_table(folder / CATALOG)
        except (OSError, pa.ArrowException) as error:
            raise IndexFileError(
                f"index file {CATALOG} is not readable Parquet ({error}); rebuild the index", field=CATALOG
            ) from error
        return cls(table, properties)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def resolve(self, name: str) -> str:
        """The column a request means by `name`. Raises NotFoundError (code "unknown_column")."""
        if name not in self._names:
            alias = _ALIASES.get(name)
            if alias not in self._names:
                raise NotFoundError(
                    f"the catalogue has no column {name[:80]!r}; wanted one of {', '.join(self.columns)}; "
                    "mend the name",
                    code="unknown_column",
                    field=name[:80],
                )
            return str(alias)
        return name

    def values(self, name: str) -> npt.NDArray[np.float64]:
        """(N,) float64 of a numeric or boolean column, NaN where null; kept for the next call.

        Raises NotFoundError for an unknown column and for one that holds no numbers.
        """
        name = self.resolve(name)
        if name not in self._values:
            kind = self.table.schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                raise NotFoundError(
                    f"the column {name!r} holds {kind}; wanted numbers; choose a numeric column",
                    code="not_numeric",
                    field=name,
                )
            column = self.table.column(name)
            if pa.types.is_boolean(kind):
                column = column.cast(pa.uint8())
            self._values[name] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return self._values[name]

    def flag(self, name: str) -> npt.NDArray[np.bool_]:
        """(N,) bool of a boolean column, False where null or absent."""
        if name not in self.table.column_names:
            return np.zeros(len(self), bool)
        return np.asarray(pc.fill_null(self.table.column(name), False).to_numpy(zero_copy_only=False), bool)

    @property
    def object_ids(self) -> pa.ChunkedArray:
        return self.table.column("object_id")

    @cached_property
    def _id_order(self) -> npt.NDArray[np.int64]:
        """Rows sorted by id: 8 bytes an object, where a dict of strings would take above 100."""
        return np.asarray(pc.sort_indices(self.object_ids), np.int64)

    def rows_by_id(self, object_id: str) -> npt.NDArray[np.int64]:
        """Rows of this id: none or one; ids are unique in an index. Binary search, about 20 looks in a million."""
        ids, order = self.object_ids, self._id_order
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if ids[int(order[middle])].as_py() < object_id:  # code points and UTF-8 bytes sort alike
                low = middle + 1
            else:
                high = middle
        found = low < len(order) and ids[int(order[low])].as_py() == object_id
        return order[low : low + found]

    @cached_property
    def _sky(self) -> SkyIndex:
        return SkyIndex(self.values("ra"), self.values("dec"))

    def cone(self, ra: float, dec: float, radius_deg: float) -> npt.NDArray[np.int64]:
        """Rows within a great-circle radius (deg, inclusive), nearest first. Raises InputError."""
        return self._sky.cone(ra, dec, radius_deg)

    def row(self, i: int) -> dict[str, Any]:
        """One object as a dict of plain Python values (None where missing)."""
        return dict(self.table.slice(int(i), 1).to_pylist()[0])

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows given, in that order, as an Arrow table (`.to_pylist()` gives dicts). Raises NotFoundError."""
        table = self.table if columns is None else self.table.select([self.resolve(name) for name in columns])
        return table.take(pa.array(np.asarray(rows, np.int64)))

    def warm(self) -> None:
        """Build the lookup tables now, so that the first request does not pay for them."""
        _ = self._id_order, self._sky
