"""From a query to a vector: Q of the contract resolved against the index and the uploads of the request.

A query ends as one unit vector. Averages are of unit vectors, renormalised: image and spectrum of one object are
fused as their weighted mean; `combine` follows the average strategy, mean(+) + (mean(+) - mean(-)), with weights, or
the best-score strategy of `index.examples`, which keeps the vectors apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from astroclip.errors import InputError, NotFoundError, ProvenanceError
from astroclip.types import MODALITIES, Flag, Modality
from index import SurveyIndex
from index.examples import Examples
from index.sky import check_position, parse_position, separation_deg
from service.engine import Embedded, Engine
from service.errors import MalformedRequest
from service.schemas import (
    Combine,
    CombineQuery,
    FuseWeights,
    ObjectQuery,
    Position,
    PositionQuery,
    Query,
    UploadQuery,
    VectorQuery,
)
from service.settings import Settings

__all__ = ["Resolved", "named_uploads", "object_row", "position_of", "resolve"]

Vector = npt.NDArray[np.float32]
Target = Literal["image", "spectrum", "either"]


@dataclass(frozen=True)
class Resolved:
    """A query as it is searched.

    vector: (D,) float32 unit norm. vectors: the unit vectors it was made of, per modality, where it stands for one
    object (what trust is asked about). own_rows: rows of the objects it names, left out of the hits. places: (ra, dec)
    in degrees of what is known to be where. object_id: of the object, where it is one. examples: what is searched by
    instead of `vector`, with the best-score strategy.
    """

    vector: Vector
    vectors: Mapping[Modality, Vector]
    own_rows: tuple[int, ...] = ()
    places: tuple[tuple[float, float], ...] = ()
    object_id: str | None = None
    flags: tuple[Flag, ...] = ()
    modalities: tuple[Modality, ...] = field(default=())
    examples: Examples | None = None

    @property
    def modality(self) -> Modality | None:
        """The one modality that entered, None when both did."""
        return self.modalities[0] if len(self.modalities) == 1 else None


def named_uploads(query: Query | None, sent: Sequence[Modality], settings: Settings) -> tuple[Modality, ...]:
    """Which uploads the query speaks of; all those sent when there is no query. Also checks the query's size.

    Raises MalformedRequest when a part is named but was not sent, or there is nothing to ask with.
    """
    if query is None:
        if not sent:
            raise MalformedRequest(
                'The request has no query; give one, such as {"query": {"object_id": "..."}}, or upload a file.',
                field="query",
            )
        return tuple(sent)
    terms = list(_walk(query, 1, settings.max_query_depth))
    if len(terms) > settings.max_query_terms:
        raise InputError(
            f"The query has {len(terms)} parts; at most {settings.max_query_terms} are taken. Combine fewer.",
            code="query_too_large",
            field="query",
            limit=settings.max_query_terms,
        )
    named = {term.upload for term in terms if isinstance(term, UploadQuery)}
    for modality in named - set(sent):
        raise MalformedRequest(
            f"The query names the upload {modality!r}, but the request has no such file part. Send multipart/form-data "
            f"with a file part {modality!r} and this JSON as the part 'request'.",
            field=modality,
        )
    return tuple(m for m in MODALITIES if m in named)


def _walk(query: Query, depth: int, limit: int) -> Iterator[Query]:
    yield query
    if isinstance(query, CombineQuery):
        if depth >= limit:
            raise InputError(
                f"The query nests combine more than {limit - 1} deep. Write it flatter.",
                code="query_too_deep",
                field="query",
                limit=limit - 1,
            )
        for term in (*query.combine.positive, *query.combine.negative):
            yield from _walk(term, depth + 1, limit)


def resolve(
    engine: Engine,
    query: Query | None,
    uploads: Mapping[Modality, Embedded],
    target: Target,
    fuse: FuseWeights | None = None,
) -> Resolved:
    """The query as a vector; fuse: weights of image and spectrum where both are asked with as one object.

    Raises NotFoundError (no such object), InputError, ProvenanceError.
    """
    if query is None:
        return _fuse([_upload(engine, uploads[modality]) for modality in MODALITIES if modality in uploads], fuse)
    if isinstance(query, UploadQuery):
        return _upload(engine, uploads[query.upload])
    if isinstance(query, ObjectQuery):
        return _object(engine.index, object_row(engine.index, query.object_id), query.modality, target, fuse)
    if isinstance(query, PositionQuery):
        row, flag = _nearest(engine.index, query.position)
        found = _object(engine.index, row, query.modality, target, fuse)
        return replace(found, flags=(*found.flags, flag))
    if isinstance(query, VectorQuery):
        return _vector(engine, query)
    return _combine(engine, query.combine, uploads, target, fuse)


def object_row(index: SurveyIndex, object_id: str) -> int:
    rows = index.catalog.rows_by_id(object_id)
    if not len(rows):
        raise NotFoundError(
            f"The index {index.index_id!r} has no object {object_id[:80]!r}. Look its id up with "
            "/v1/objects?ra=&dec=&radius_arcsec=.",
            code="no_such_object",
            field="object_id",
        )
    return int(rows[0])


def position_of(ra: float | str, dec: float | str) -> tuple[float, float]:
    """(ra, dec) in degrees of numbers or strings; sexagesimal right ascension is in hours. Raises InputError."""
    try:
        return check_position(float(ra), float(dec))
    except ValueError:
        text = (
            str(dec).strip().replace("\u2212", "-")
        )  # an explicit sign keeps the two halves apart whatever their form
        return parse_position(f"{ra} {text if text.startswith(('+', '-')) else '+' + text}")


def _upload(engine: Engine, embedded: Embedded) -> Resolved:
    if embedded.vector is None:
        raise embedded.error or InputError("The upload could not be embedded.")
    item, grid, modality = embedded.prepared.item, embedded.prepared.grid, embedded.prepared.modality
    assert item is not None and grid is not None
    flags = grid.quality.flags
    own: tuple[int, ...] = ()
    if item.object_id:
        own = tuple(int(row) for row in engine.index.catalog.rows_by_id(item.object_id))
    if own:
        flags = (*flags, Flag("own_object_left_out", f"The file is {item.object_id} of the index itself: left out."))
    places = ((item.ra, item.dec),) if item.ra is not None and item.dec is not None else ()
    return Resolved(embedded.vector, {modality: embedded.vector}, own, places, item.object_id, flags, (modality,))


def _object(
    index: SurveyIndex, row: int, asked: Modality | Literal["both"] | None, target: Target, fuse: FuseWeights | None
) -> Resolved:
    """An object asks with the modality named, else the target's, else its spectrum (it says more), else its image."""
    if asked == "both":
        return _fuse([_object(index, row, modality, target, None) for modality in MODALITIES], fuse)
    first: tuple[Modality, ...] = (target,) if target != "either" else ()
    wishes: tuple[Modality, ...] = (asked,) if asked else (*first, "spectrum", "image")
    record = index.catalog.take([row], ["object_id", "ra", "dec"]).to_pylist()[0]
    for modality in wishes:
        vector = index.vector(row, modality)
        if vector is None:
            continue
        vector = _unit(vector)
        known = record["ra"] is not None and record["dec"] is not None
        places = ((record["ra"], record["dec"]),) if known else ()
        return Resolved(vector, {modality: vector}, (row,), places, record["object_id"], (), (modality,))
    raise InputError(
        f"The object {record['object_id']} has no {' or '.join(wishes)} in the index. Ask with its other modality.",
        code="no_such_modality",
        field="modality",
    )


def _nearest(index: SurveyIndex, position: Position) -> tuple[int, Flag]:
    ra, dec = position_of(position.ra, position.dec)
    rows = index.catalog.cone(ra, dec, position.radius_arcsec / 3600.0)
    if not len(rows):
        raise NotFoundError(
            f'The index {index.index_id!r} has no object within {position.radius_arcsec:g}" of ra={ra:.6f}, '
            f"dec={dec:.6f}. Widen radius_arcsec, or check that the place lies in the survey.",
            code="no_object_here",
            field="position",
        )
    row = int(rows[0])
    record = index.catalog.row(row)
    away = 3600.0 * float(separation_deg(record["ra"], record["dec"], ra, dec))
    return row, Flag("nearest_object", f'The nearest object is {record["object_id"]}, {away:.2f}" away.')


def _vector(engine: Engine, query: VectorQuery) -> Resolved:
    ours = engine.embedder.model_sha256
    if query.model_sha256 is not None and query.model_sha256 != ours:
        raise ProvenanceError(
            f"The vector comes from the model {query.model_sha256[:12]}...; this index answers {ours[:12]}... only. "
            "Embed the object again with /v1/embed.",
        )
    vector = np.asarray(query.vector, np.float64)
    if vector.shape != (engine.index.dim,):
        raise InputError(
            f"The vector has {vector.size} numbers; this index has {engine.index.dim} dimensions. Embed with "
            "/v1/embed of this service.",
            code="wrong_dimension",
            field="query.vector",
            limit=engine.index.dim,
        )
    unit = _unit(vector, "query.vector")
    return Resolved(unit, {query.modality: unit}, modalities=(query.modality,))


def _fuse(parts: Sequence[Resolved], weights: FuseWeights | None) -> Resolved:
    """Image and spectrum of one object: the weighted mean of their unit vectors. A weight of 0 leaves one out."""
    share = weights or FuseWeights()
    if len(parts) > 1:
        parts = [part for part in parts if getattr(share, part.modalities[0])]
    if len(parts) == 1:
        return parts[0]
    by = [getattr(share, part.modalities[0]) for part in parts]
    return Resolved(
        _unit(_mean(np.stack([part.vector for part in parts]), np.asarray(by, np.float64)), "query"),
        {modality: vector for part in parts for modality, vector in part.vectors.items()},
        tuple(dict.fromkeys(row for part in parts for row in part.own_rows)),
        tuple(dict.fromkeys(place for part in parts for place in part.places)),
        next((part.object_id for part in parts if part.object_id), None),
        tuple(flag for part in parts for flag in part.flags),
        tuple(modality for part in parts for modality in part.modalities),
    )


def _combine(
    engine: Engine,
    combine: Combine,
    uploads: Mapping[Modality, Embedded],
    target: Target,
    fuse: FuseWeights | None,
) -> Resolved:
    given = np.asarray(combine.weights or [], np.float64)
    queries = (*combine.positive, *combine.negative)
    weights = np.concatenate([given, np.ones(len(queries) - len(given))])
    split = int(np.count_nonzero(weights[: len(combine.positive)]))  # a weight of 0 leaves a query out
    queries, weights = tuple(q for q, w in zip(queries, weights, strict=True) if w), weights[weights > 0]
    terms = [resolve(engine, query, uploads, target, fuse) for query in queries]
    if any(term.examples for term in terms):
        raise InputError(
            "A combine with the strategy best_score stands inside another one; it has no vector to average. Put its "
            "queries into the outer one.",
            code="no_direction",
            field="query.combine",
        )
    vectors = np.stack([term.vector for term in terms])
    total, examples = _mean(vectors[:split], weights[:split]), None
    if combine.strategy == "best_score":
        examples = Examples(vectors[:split], vectors[split:], weights[:split], weights[split:])
    elif len(terms) > split:
        total = 2.0 * total - _mean(vectors[split:], weights[split:])
    if examples is not None and np.linalg.norm(total) < 1e-6:  # positives that cancel are no fault there
        total = vectors[0].astype(np.float64)
    vector = _unit(total, "query.combine")
    entered = {modality for term in terms for modality in term.modalities}
    modalities = tuple(m for m in MODALITIES if m in entered)
    return Resolved(
        vector,
        {modalities[0]: vector} if len(terms) == 1 and len(modalities) == 1 and examples is None else {},
        tuple(row for term in terms for row in term.own_rows),
        tuple(place for term in terms[:split] for place in term.places),
        None,
        tuple(flag for term in terms for flag in term.flags),
        modalities,
        examples,
    )


def _mean(vectors: Vector, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weighted mean (D,) of unit vectors; scaled weights, since a client's may be as large as a double holds."""
    return np.asarray(np.average(vectors.astype(np.float64), axis=0, weights=weights / weights.max()))


def _unit(vector: npt.NDArray[np.floating], field: str = "query") -> Vector:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm < 1e-9:
        raise InputError(
            f"The query's vector has length {norm:.3g}, so it points nowhere. Give a vector that is not zero, or "
            "positives and negatives that do not cancel.",
            code="no_direction",
            field=field,
        )
    return (vector / norm).astype(np.float32)
