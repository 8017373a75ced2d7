"""Tables as the caller wants them: JSON, CSV, VOTable, Parquet or Arrow, by `Accept` or ``?format=``.

A table is a list of flat rows (dicts of plain values, None where missing) of one set of columns, and `meta`, the
provenance: CSV has no place for it (it goes into headers), the others carry it inside.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.requests import Request
from starlette.responses import Response

from astroclip.errors import InputError

__all__ = ["FORMATS", "arrow_response", "chosen_format", "table_response", "votable"]

FORMATS = {
    "json": "application/json",
    "csv": "text/csv",
    "votable": "application/x-votable+xml",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.stream",
}
_ACCEPTED = {
    **{media_type: name for name, media_type in FORMATS.items()},
    "text/xml": "votable",
    "application/xml": "votable",
    "application/parquet": "parquet",
}
# UCDs (IVOA UCD1+ 1.5) and units that VOUnits knows; others are said in the description.
_UCD = {
    "object_id": "meta.id;meta.main",
    "ra": "pos.eq.ra;meta.main",
    "dec": "pos.eq.dec;meta.main",
    "score": "stat.correlation",
    "percentile": "stat.rank",
    "separation_arcsec": "pos.angDistance",
    "redshift": "src.redshift",
    "log_stellar_mass": "phys.mass",
    "log_metallicity": "phys.abund.Z",
    "age_gyr": "time.age",
}
_UNITS = {"ra": "deg", "dec": "deg", "separation_arcsec": "arcsec"}
_VOUNITS = ("deg", "arcsec", "Gyr", "mag", "km/s")

Rows = Sequence[Mapping[str, Any]]


def chosen_format(request: Request) -> str:
    """``?format=`` if given, else the first format we know in `Accept`, else JSON. Raises InputError."""
    asked = request.query_params.get("format")
    if asked is not None:
        if asked not in FORMATS:
            raise InputError(
                f"format is {asked[:40]!r}; wanted one of {', '.join(FORMATS)}.", code="invalid_value", field="format"
            )
        return asked
    for part in request.headers.get("accept", "").split(","):
        name = _ACCEPTED.get(part.partition(";")[0].strip().lower())
        if name and not (name == "votable" and "text/html" in request.headers["accept"]):  # a browser's Accept
            return name
    return "json"


def table_response(
    rows: Rows, columns: Sequence[str], fmt: str, meta: Mapping[str, str], units: Mapping[str, str]
) -> Response:
    """`rows` in the format `fmt` (not json, whose answers are richer than a table)."""
    if fmt == "csv":
        content: bytes = _csv(rows, columns)
    elif fmt == "votable":
        content = votable(rows, columns, meta, units)
    else:
        content = _arrow(rows, columns, meta, fmt)
    return _response(content, fmt, meta)


def arrow_response(table: pa.Table, fmt: str, meta: Mapping[str, str]) -> Response:
    """An Arrow table in the format `fmt` (not json), without rows made of it where the format has none."""
    if fmt in ("csv", "votable"):
        return table_response(table.to_pylist(), table.column_names, fmt, meta, {})
    return _response(_written(table, meta, fmt), fmt, meta)


def _response(content: bytes, fmt: str, meta: Mapping[str, str]) -> Response:
    headers = {f"x-{name.replace('_', '-')}": value for name, value in meta.items() if value.isascii()}
    return Response(content, media_type=FORMATS[fmt], headers=headers)


def _csv(rows: Rows, columns: Sequence[str]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([["" if row[name] is None else row[name] for name in columns] for row in rows])
    return stream.getvalue().encode()


def _arrow(rows: Rows, columns: Sequence[str], meta: Mapping[str, str], fmt: str) -> bytes:
    return _written(pa.table({name: pa.array([row[name] for row in rows]) for name in columns}), meta, fmt)


def _written(table: pa.Table, meta: Mapping[str, str], fmt: str) -> bytes:
    table = table.replace_schema_metadata(dict(meta))
    stream = io.BytesIO()
    if fmt == "parquet":
        pq.write_table(table, stream)
    else:
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    return stream.getvalue()


def votable(
    rows: Rows,
    columns: Sequence[str],
    meta: Mapping[str, str],
    units: Mapping[str, str],
    *,
    name: str = "results",
    description: str = "",
) -> bytes:
    """A VOTable 1.4 document (TABLEDATA); `meta` as INFO elements, missing numbers as empty cells."""
    from astropy.io.votable import from_table
    from astropy.io.votable.tree import Info
    from astropy.table import MaskedColumn, Table

    table = Table()
    for column in columns:
        table[column] = MaskedColumn(**_typed([row[column] for row in rows]), name=column)
    document = from_table(table, table_id=name)
    document.version = "1.4"
    resource = document.resources[0]
    resource.type = "results"
    resource.description = description or None
    resource.infos.append(Info(name="QUERY_STATUS", value="OK"))
    resource.infos.extend(Info(name=key, value=value) for key, value in meta.items())
    for spec in resource.tables[0].fields:
        unit = _UNITS.get(spec.name) or units.get(spec.name) or ""
        spec.ucd = _UCD.get(spec.name)
        if unit in _VOUNITS:
            spec.unit = unit
        elif unit:
            spec.description = f"unit: {unit}"
    stream = io.BytesIO()
    document.to_xml(stream)
    return stream.getvalue()


def _typed(values: Sequence[Any]) -> dict[str, Any]:
    """Column data and mask with the narrowest of bool, int, float, text that holds every value."""
    known = [value for value in values if value is not None]
    mask = [value is None for value in values]
    if known and all(isinstance(value, bool) for value in known):
        kind: Any = bool
    elif known and all(isinstance(value, int) and abs(value) < 2**63 for value in known):
        kind = np.int64
    elif all(isinstance(value, int | float) for value in known):
        kind = np.float64
    else:
        kind = str
    empty: Any = "" if kind is str else kind(0)
    data = np.array([empty if value is None else kind(value) for value in values], dtype=kind)
    return {"data": data, "mask": mask}
