"""Calls: what each method sends, and how its answer is read. Shared by the sync and the async client.

A `Call` holds everything of one request but the sending of it, so the two clients differ in one line: the wait.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import httpx2
import numpy as np
import numpy.typing as npt

from astroclip.client import results
from astroclip.errors import InputError

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = [
    "Call",
    "Source",
    "cone",
    "embed_array",
    "embed_table",
    "estimate",
    "info",
    "lists",
    "one_list",
    "one_object",
    "random_objects",
    "search",
    "search_vectors",
]

T = TypeVar("T")

# A file by path, its bytes, or arrays: an image (3, H, W) in nanomaggies; a spectrum (L, 2..4) or a sequence of
# wave, flux[, ivar[, mask]].
Source = str | Path | bytes | npt.NDArray[Any] | Sequence[npt.ArrayLike]
_Part = tuple[str, tuple[str | None, bytes, str]]

READ_OPTIONS = ("pixel_scale_arcsec", "bands", "wave_unit", "flux_unit", "medium", "object")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the reading of its answer. `files` are multipart parts, `body` is JSON, `array` a .npy body; at
    most one is set."""

    method: str
    path: str
    read: Callable[[httpx2.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    files: Sequence[_Part] = ()
    array: bytes = b""
    paths: Mapping[str, str] = field(default_factory=dict)  # part -> the file it was read from, for `curl`

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of httpx2's `request`."""
        out: dict[str, Any] = {"method": self.method, "url": self.path, "params": dict(self.params)}
        if self.files:
            out["files"] = list(self.files)
        elif self.body is not None:
            out["json"] = dict(self.body)
        elif self.array:
            out |= {"content": self.array, "headers": {"content-type": "application/x-npy"}}
        return out

    def curl(self, base_url: str) -> str:
        """The same request as a shell command; uploaded arrays and bytes appear as FILE."""
        url = f"{base_url.rstrip('/')}{self.path}" + (f"?{urlencode(self.params)}" if self.params else "")
        words = ["curl", *(["-X", self.method] if self.method != "GET" else []), url]
        for name, (_, content, media_type) in self.files:
            is_json = media_type == "application/json"
            value = content.decode() if is_json else "@" + self.paths.get(name, "FILE")
            words += ["-F", f"{name}={value}" + (f";type={media_type}" if is_json else "")]
        if self.body is not None and not self.files:
            words += ["-H", "content-type: application/json", "-d", json.dumps(self.body)]
        if self.array:
            words += ["-H", "content-type: application/x-npy", "--data-binary", "@FILE"]
        return shlex.join(words)


# --- embed -----------------------------------------------------------------------------------------------------------


def embed_array(modality: str, sources: Sequence[Source], options: Mapping[str, Any]) -> Call[npt.NDArray[np.float32]]:
    """(N, D) float32; raises if any item failed."""
    return _embed(modality, sources, options, results.embeddings)


def embed_table(modality: str, sources: Sequence[Source], options: Mapping[str, Any]) -> Call[Table]:
    """A row an item, failed ones included: name, object_id, embedding, masked_fraction, snr, ood_p, flags, error."""
    return _embed(modality, sources, options, results.embedding_table)


def _embed(
    modality: str,
    sources: Sequence[Source],
    options: Mapping[str, Any],
    read: Callable[[httpx2.Response], T],
) -> Call[T]:
    if not sources:
        raise InputError("No source was given; wanted at least one path, bytes or array.", code="no_source")
    files = [_part("file", source, modality) for source in sources]
    return Call(
        "POST", f"/v1/embed/{modality}", read, _read_options(options), files=files, paths=_path("file", sources)
    )


# --- search and estimate ---------------------------------------------------------------------------------------------


def search(**asked: Any) -> Call[Table]:
    """The hits as a table; `asked` as in `Client.search`, None = the service's default."""
    return _ask("/v1/search", results.hits, **asked)


def estimate(**asked: Any) -> Call[Table]:
    """The estimates as a table, the hits in ``meta["hits"]``; `asked` as in `Client.estimate`."""
    return _ask("/v1/estimate", results.estimates, **asked)


def search_vectors(vectors: npt.ArrayLike, modality: str, **asked: Any) -> Call[Table]:
    """The hits of many vectors (Q, D) as one table; `asked` as in `Client.search_vectors`."""
    params = {"modality": modality, **{name: value for name, value in asked.items() if value is not None}}
    if "filter" in params:
        params["filter"] = json.dumps(params["filter"])
    array = np.ascontiguousarray(vectors, np.float32)
    return Call("POST", "/v1/search/vectors", results.vector_hits, params, array=_npy(array, "vectors"))


def _ask(
    path: str,
    read: Callable[[httpx2.Response], T],
    *,
    object_id: str | None = None,
    position: Any = None,
    radius_arcsec: float | None = None,
    vector: npt.ArrayLike | None = None,
    modality: str | None = None,
    image: Source | None = None,
    spectrum: Source | None = None,
    query: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **request: Any,
) -> Call[T]:
    query = _query(query, object_id, position, radius_arcsec, vector, modality)
    body = {name: value for name, value in {"query": query, **request}.items() if value is not None}
    uploads = {name: source for name, source in (("image", image), ("spectrum", spectrum)) if source is not None}
    if not uploads:
        if query is None:
            raise InputError(
                "Nothing to ask with; give one of object_id, position, vector, query, image, spectrum.", code="no_query"
            )
        return Call("POST", path, read, body=body)
    files = [_part(name, source, name) for name, source in uploads.items()]
    paths = {name: str(source) for name, source in uploads.items() if isinstance(source, str | Path)}
    if body:
        files.append(("request", (None, json.dumps(body).encode(), "application/json")))
    return Call("POST", path, read, _read_options(options or {}), files=files, paths=paths)


def _query(
    query: Mapping[str, Any] | None,
    object_id: str | None,
    position: Any,
    radius_arcsec: float | None,
    vector: npt.ArrayLike | None,
    modality: str | None,
) -> Mapping[str, Any] | None:
    queries = {"object_id": object_id, "position": position, "vector": vector, "query": query}
    given = [name for name, value in queries.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"Both {given[0]} and {given[1]} were given; wanted one query.", code="several_queries")
    which = {} if modality is None else {"modality": modality}
    if object_id is not None:
        return {"object_id": object_id, **which}
    if position is not None:
        ra, dec = _ra_dec(position)
        radius = {} if radius_arcsec is None else {"radius_arcsec": radius_arcsec}
        return {"position": {"ra": ra, "dec": dec, **radius}, **which}
    if vector is not None:
        if modality is None:
            raise InputError('A vector needs its modality: modality="image" or "spectrum".', code="no_modality")
        return {"vector": np.asarray(vector, np.float64).tolist(), "modality": modality}
    return query


def _ra_dec(position: Any) -> tuple[Any, Any]:
    """(ra, dec) of a pair (degrees or sexagesimal strings), of one string, or of an astropy SkyCoord."""
    if hasattr(position, "icrs"):
        return float(position.icrs.ra.deg), float(position.icrs.dec.deg)
    if isinstance(position, str):
        words = position.replace(",", " ").split()
        if len(words) % 2 or not words:
            raise InputError(
                f"{position!r} is not a position; wanted right ascension and declination, such as "
                "'188.7 -0.2' or '12:34:56 -00:12:34'.",
                code="bad_position",
            )
        half = len(words) // 2
        return " ".join(words[:half]), " ".join(words[half:])
    ra, dec = position
    return ra, dec


# --- objects and info ------------------------------------------------------------------------------------------------


def one_object(object_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/v1/objects/{quote(object_id, safe='')}", results.one_object)


def cone(position: Any, radius_arcsec: float, limit: int | None) -> Call[Table]:
    ra, dec = _ra_dec(position)
    params = {"ra": ra, "dec": dec, "radius_arcsec": radius_arcsec}
    return Call("GET", "/v1/objects", results.objects, params if limit is None else {**params, "limit": limit})


def random_objects(count: int, seed: int | None) -> Call[Table]:
    params = {"random": count}
    return Call("GET", "/v1/objects", results.objects, params if seed is None else {**params, "seed": seed})


def lists() -> Call[dict[str, dict[str, Any]]]:
    """What survey-wide lists there are, by kind: rows, found, created, parameters."""
    return Call("GET", "/v1/lists", results.lists)


def one_list(kind: str, modality: str | None, offset: int, limit: int | None) -> Call[Table]:
    params = {"modality": modality, "offset": offset or None, "limit": limit}
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", f"/v1/lists/{quote(kind, safe='')}", results.one_list, given)


def info() -> Call[dict[str, Any]]:
    return Call("GET", "/v1/info", results.plain)


# --- uploads ---------------------------------------------------------------------------------------------------------


def _part(name: str, source: Source, modality: str) -> _Part:
    """One multipart file part."""
    if isinstance(source, bytes):
        return name, ("upload", source, "application/octet-stream")
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            return name, (path.name, path.read_bytes(), "application/octet-stream")
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); wanted a file.", code="unreadable_file", field=name
            ) from error
    return name, ("array.npy", _npy(source, modality), "application/x-npy")


def _npy(source: Any, modality: str) -> bytes:
    if modality == "spectrum" and not isinstance(source, np.ndarray):
        array = np.column_stack([np.asarray(column, np.float64) for column in source])
    else:
        array = np.asarray(source)
    if array.dtype.kind not in "fiu":
        raise InputError(
            f"The array holds {array.dtype}; wanted numbers: an image (3, H, W) in nanomaggies, or a spectrum's "
            "columns wave, flux[, ivar[, mask]].",
            code="bad_array",
            field=modality,
        )
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _path(name: str, sources: Sequence[Source]) -> dict[str, str]:
    first = sources[0]
    return {name: str(first)} if len(sources) == 1 and isinstance(first, str | Path) else {}


def _read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - set(READ_OPTIONS))
    if unknown:
        raise InputError(f"There is no option {unknown[0]!r}; known: {', '.join(READ_OPTIONS)}.", code="unknown_option")
    out = {name: value for name, value in options.items() if value is not None}
    if "bands" in out and not isinstance(out["bands"], str):
        out["bands"] = ",".join(out["bands"])
    return out
