"""Answers read: JSON into arrays and astropy tables, error answers into the exceptions of `astroclip.errors`.

Tables carry in ``meta`` what an answer says beside its rows: model, index, request_id, trust, search, query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import numpy.typing as npt

from astroclip.errors import (
    AccessError,
    AstroClipError,
    ForbiddenError,
    InputError,
    LimitError,
    MediaTypeError,
    NotFoundError,
    NotReadyError,
    OverloadError,
    ProvenanceError,
)

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = [
    "embedding_table",
    "embeddings",
    "estimates",
    "hits",
    "lists",
    "objects",
    "one_list",
    "one_object",
    "plain",
    "raise_for_error",
    "retry_after_s",
    "unreachable",
    "vector_hits",
]

_BY_STATUS: dict[int, type[AstroClipError]] = {
    400: InputError,
    401: AccessError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ProvenanceError,
    413: LimitError,
    415: MediaTypeError,
    422: InputError,
    503: NotReadyError,
}
_META = ("request_id", "model", "index", "trust", "search", "query", "method", "explanation")
_KNOWN_UNITS = {"ra": "deg", "dec": "deg", "separation_arcsec": "arcsec"}


# --- errors ----------------------------------------------------------------------------------------------------------


def raise_for_error(response: httpx2.Response) -> None:
    """Raise the exception an error answer stands for; return for an answer that is none."""
    if response.is_success:
        return
    try:
        said = response.json()["error"]
        message, code, field, limit = said["message"], said["code"], said.get("field"), said.get("limit")
        message = f"{message} (request {said.get('request_id')})"
    except (ValueError, KeyError, TypeError):
        message = (
            f"The server answered {response.status_code} in a form that is not ours; is {response.url.host} "
            "an astroclip service?"
        )
        code, field, limit = "foreign_answer", None, None
    if response.status_code == 429:
        raise OverloadError(message, retry_after_s=retry_after_s(response) or 1.0, code=code)
    kind = _BY_STATUS.get(response.status_code, AstroClipError)
    raise kind(message, code=code, field=field, limit=limit)


def retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds the server asks to wait, None where it does not say (dates are not used by this service)."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def unreachable(error: Exception, base_url: str) -> AstroClipError:
    return AstroClipError(
        f"{base_url} gave no answer ({type(error).__name__}: {error}). Check the address, and that the service runs "
        "(`astroclip demo` or `astroclip serve`).",
        code="unreachable",
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def plain(response: httpx2.Response) -> dict[str, Any]:
    """The answer as it is. Raises what an error answer stands for."""
    raise_for_error(response)
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        message = f"{response.url.host} answered something that is no JSON object; is it an astroclip service?"
        raise AstroClipError(message, code="foreign_answer")
    return answer


def embeddings(response: httpx2.Response) -> npt.NDArray[np.float32]:
    """(N, D) float32 in the order of the files. Raises InputError naming the items that failed."""
    items = plain(response)["items"]
    failed = [(i, item["error"]) for i, item in enumerate(items) if item.get("error")]
    if failed:
        i, first = failed[0]
        name = items[i].get("object_id") or items[i].get("name") or f"item {i}"
        others = f" ({len(failed)} of {len(items)} items failed)" if len(failed) > 1 else ""
        raise InputError(f"{name}: {first['message']}{others}", code=first["code"], field=first.get("field"))
    return np.array([item["embedding"] for item in items], np.float32)


def embedding_table(response: httpx2.Response) -> Table:
    """One row an item; NaN embedding and a message in `error` where it failed."""
    answer = plain(response)
    items = answer["items"]
    dim = max((len(item["embedding"]) for item in items if item["embedding"]), default=0)
    nothing = [float("nan")] * dim
    quality = [item.get("quality") or {} for item in items]
    trust = [item.get("trust") or {} for item in items]
    table = _table(
        {
            "name": [item.get("name") for item in items],
            "object_id": [item.get("object_id") for item in items],
            "masked_fraction": [q.get("masked_fraction") for q in quality],
            "snr": [q.get("snr") for q in quality],
            "ood_p": [t.get("ood_p") for t in trust],
            "flags": [" ".join(flag["code"] for flag in t.get("flags", ())) for t in trust],
            "error": [(item.get("error") or {}).get("message") for item in items],
        },
        answer,
    )
    table["embedding"] = np.array([item["embedding"] or nothing for item in items], np.float32)
    return table


def hits(response: httpx2.Response) -> Table:
    return _hits(plain(response))


def vector_hits(response: httpx2.Response) -> Table:
    """Columns query (place of its vector), object_id, score, percentile, modality: one row a hit."""
    answer = plain(response)
    columns = {
        name: [value for found in answer[name] for value in found]
        for name in ("object_id", "score", "percentile", "modality")
    }
    query = [i for i, found in enumerate(answer["object_id"]) for _ in found]
    return _table({"query": query, **columns}, answer)


def estimates(response: httpx2.Response) -> Table:
    """Columns name, unit, value, lo, hi, coverage, n_eff, k, calibrated; the hits in ``meta["hits"]``, densities asked
    for in ``meta["density"]``."""
    answer = plain(response)
    names = ("name", "unit", "value", "lo", "hi", "coverage", "n_eff", "k", "calibrated")
    table = _table({name: [item.get(name) for item in answer["estimates"]] for name in names}, answer)
    table.meta["hits"] = _hits(answer)
    densities = {item["name"]: item["density"] for item in answer["estimates"] if item.get("density")}
    if densities:
        table.meta["density"] = {name: (np.array(d["edges"]), np.array(d["pdf"])) for name, d in densities.items()}
    return table


def one_object(response: httpx2.Response) -> dict[str, Any]:
    """The object's record: object_id, ra, dec, properties, columns, previews."""
    found = plain(response)["object"]
    if not isinstance(found, dict):
        raise AstroClipError("The answer's object is no JSON object.", code="foreign_answer")
    return found


def objects(response: httpx2.Response) -> Table:
    answer = plain(response)
    rows = [
        {
            **{name: item[name] for name in ("object_id", "ra", "dec", "separation_arcsec")},
            **item["properties"],
            **{name: value for name, value in item["columns"].items() if not isinstance(value, list | dict)},
        }
        for item in answer["objects"]
    ]
    names = list(rows[0]) if rows else ["object_id", "ra", "dec", "separation_arcsec"]
    table = _table({name: [row[name] for row in rows] for name in names}, answer)
    table.meta["truncated"] = answer["truncated"]
    return table


def lists(response: httpx2.Response) -> dict[str, dict[str, Any]]:
    return {entry["kind"]: entry for entry in plain(response)["lists"]}


def one_list(response: httpx2.Response) -> Table:
    """The rows of a survey-wide list; ``meta`` holds kind, found, created, parameters, and total, its rows."""
    answer = plain(response)
    rows = answer["items"]
    table = _table({name: [row[name] for row in rows] for name in (rows[0] if rows else ())}, answer)
    table.meta |= {name: answer[name] for name in ("kind", "found", "created", "parameters", "total")}
    return table


def _hits(answer: Mapping[str, Any]) -> Table:
    found = answer["hits"]
    plain_names = ("object_id", "score", "percentile", "modality", "ra", "dec")
    columns = {name: [hit[name] for hit in found] for name in plain_names}
    for name in found[0]["properties"] if found else ():
        columns.setdefault(name, [hit["properties"][name] for hit in found])
    return _table(columns, answer)


def _table(columns: Mapping[str, Sequence[Any]], answer: Mapping[str, Any]) -> Table:
    from astropy.table import MaskedColumn, Table

    table = Table(meta={name: answer[name] for name in _META if name in answer})
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        text = any(isinstance(value, str) for value in known) or (not known and name in ("name", "object_id", "error"))
        filler: Any = "" if text else (known[0] if known else float("nan"))
        data = np.array([filler if value is None else value for value in values], dtype=None if values else float)
        if len(known) == len(values):
            table[name] = data
        else:
            table[name] = MaskedColumn(data, mask=[value is None for value in values])
        if name in _KNOWN_UNITS:
            table[name].unit = _KNOWN_UNITS[name]
    return table
