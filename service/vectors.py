"""Many vectors asked at once: arrays in, columns out, nothing made object by object.

For catalogues that were embedded elsewhere with the same model (`astroclip embed`, another service): one request
carries what would be a thousand, and takes as long as the index does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from astroclip.errors import InputError, LimitError, MediaTypeError
from astroclip.io import load_npy, sniff
from astroclip.types import MODALITIES
from index import HitTable, SearchReport
from service.answer import filter_mask
from service.engine import Engine
from service.schemas import SearchReportModel, VectorsRequest
from service.uploads import Upload

__all__ = ["VectorHits", "read_vectors", "search_vectors"]


@dataclass(frozen=True)
class VectorHits:
    """What was found: `table` as of `SurveyIndex.search_table`, `ids` of its rows (those that are there) in order."""

    table: HitTable
    ids: pa.Array
    report: SearchReport

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        return np.asarray(np.count_nonzero(self.table.rows >= 0, axis=1), np.int64)

    def arrow(self) -> pa.Table:
        """One row a hit: query (place of its vector), object_id, score, percentile, modality."""
        there, hits = self.table.rows >= 0, self.table
        kinds = pa.DictionaryArray.from_arrays(pa.array(hits.kinds[there], pa.int8()), pa.array(MODALITIES))
        percentile = pa.nulls(len(self.ids), pa.float32())
        if hits.percentiles is not None:
            percentile = pa.array(hits.percentiles[there])
        return pa.table(
            {
                "query": pa.array(np.repeat(np.arange(len(there), dtype=np.int32), self.counts)),
                "object_id": self.ids,
                "score": pa.array(hits.scores[there]),
                "percentile": percentile,
                "modality": kinds.cast(pa.string()),
            }
        )

    def json(self, request_id: str, provenance: dict[str, Any]) -> bytes:
        """A `VectorsAnswer`."""
        ends = np.cumsum(self.counts).tolist()
        starts = [0, *ends[:-1]]
        columns = self.arrow().drop_columns(["query"]).to_pydict()
        search = SearchReportModel(
            mode=self.report.mode, candidates=self.report.candidates, expected_recall=self.report.expected_recall
        )
        answer = {
            "request_id": request_id,
            **provenance,
            **{name: [values[a:b] for a, b in zip(starts, ends, strict=True)] for name, values in columns.items()},
            "search": search.model_dump(),
        }
        return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()


def read_vectors(upload: Upload, dim: int, most: int) -> npt.NDArray[np.float32]:
    """(Q, D) float32 of a .npy body. Raises MediaTypeError, LimitError, InputError."""
    found = sniff(upload.data, upload.media_type)
    if found != "npy":
        raise MediaTypeError(
            f"The body is {found}; wanted a .npy array of vectors (Q, {dim}), as numpy.save writes it."
        )
    array = load_npy(upload.data)
    if array.ndim != 2 or array.shape[1] != dim or not len(array) or array.dtype.kind != "f":
        raise InputError(
            f"The array is {array.dtype} {array.shape}; wanted floats of shape (Q, {dim}), one vector a row. Embed "
            "with /v1/embed of this service.",
            code="wrong_dimension",
            field="vectors",
            limit=dim,
        )
    if len(array) > most:
        raise LimitError(
            f"The array holds {len(array)} vectors; at most {most} are taken. Send them in parts.",
            code="too_many_vectors",
            field="vectors",
            limit=most,
        )
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def search_vectors(engine: Engine, asked: VectorsRequest, vectors: npt.NDArray[np.float32]) -> VectorHits:
    """The nearest objects of each vector. Raises InputError naming the first vector that is none."""
    most, k = engine.settings.max_k, asked.k or engine.settings.default_k
    if k > most:
        raise InputError(f"k is {k}; wanted 1 to {most}. Ask for fewer.", code="invalid_value", field="k", limit=most)
    most = engine.settings.max_hits
    if k * len(vectors) > most:
        raise LimitError(
            f"{len(vectors)} vectors with k = {k} are {k * len(vectors):,} hits; at most {most:,} are answered by one "
            "request. Send the vectors in parts, or ask for fewer neighbours.",
            code="too_many_hits",
            field="k",
            limit=most,
        )
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths < 1e-9))
    if len(wrong):
        raise InputError(
            f"Vector {wrong[0]} (from 0) holds NaN or infinity, or is zero or too long; wanted finite numbers of usual "
            f"size. Leave it out ({len(wrong)} of {len(vectors)} are so).",
            code="no_direction",
            field="vectors",
        )
    table, report = engine.index.search_table(
        vectors,
        target=asked.target,
        k=k,
        query_modality=asked.modality,
        mask=filter_mask(engine, asked.filter),
        order=asked.order,
        score_threshold=asked.score_threshold,
    )
    ids = engine.index.catalog.take(table.rows[table.rows >= 0], ["object_id"]).column(0).combine_chunks()
    return VectorHits(table, ids, report)
