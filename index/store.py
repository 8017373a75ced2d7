"""The survey index as it is searched: verified files, catalogue, vectors, backends, calibration, previews.

An opened index never changes and is safe to use from many threads. A directory holding `manifest.json` is an index; a
root whose `CURRENT` link points to one of `versions/` is resolved once, at opening, so an index opened before a new
version is published goes on reading its own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from astroclip.errors import IndexFileError, InputError, LimitError
from astroclip.types import MODALITIES, Modality
from index.backends.exact import ExactBackend
from index.backends.hnsw import HnswBackend
from index.calibrate import KTH, ScoreTable
from index.catalog import CATALOG, STANDARD_PROPERTIES, Catalog
from index.head_build import BOTH
from index.head_files import read_head
from index.heads import DensityHead
from index.manifest import MANIFEST, Manifest, check_files
from index.planner import Mode, Plan, plan
from index.previews import Previews
from index.trust_tables import read_trust_tables
from index.vectors import VectorTable, load_npy

__all__ = ["MAX_K", "MAX_QUERIES", "Hits", "SearchReport", "SurveyIndex", "Target", "resolve"]

Target = Literal["image", "spectrum", "either"]
Rows = npt.NDArray[np.int64]

MAX_K = 10_000  # hits of one query: what a client can use, and what keeps an answer below some MB
MAX_QUERIES = 100_000  # queries of one call: evaluation sends a whole test set
_EXCLUDE_BY_RANK = 1000  # up to so many excluded rows are searched past; more become part of the mask


@dataclass(frozen=True)
class Hits:
    """The nearest objects of one query, best first; at most one hit an object.

    rows (k,) int64 rows of the catalogue; object_ids; scores (k,) float32 cosines; percentiles (k,) float32 or None
    where the query's modality is not known: per cent of unrelated pairs of these modalities that score lower;
    modalities: the modality each was found in.
    """

    rows: Rows
    object_ids: list[str]
    scores: npt.NDArray[np.float32]
    percentiles: npt.NDArray[np.float32] | None
    modalities: list[Modality]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SearchReport:
    """How the search was made. candidates: vectors compared with the query (exact) or the search breadth (hnsw)."""

    mode: Mode
    candidates: int
    expected_recall: float
    index_id: str


@dataclass(frozen=True)
class _Found:
    """Slots (Q, k) of one table, best first, -1 where there are no more; scores likewise, and how they were found."""

    modality: Modality
    rows: Rows
    scores: npt.NDArray[np.float32]
    report: SearchReport


def resolve(path: str | Path) -> Path:
    """The directory with the manifest: `path` itself, or where its CURRENT points. Raises IndexFileError."""
    path = Path(path)
    current = path / "CURRENT"
    folder = current.resolve() if current.is_symlink() else path
    if not (folder / MANIFEST).is_file():
        raise IndexFileError(
            f"{path} holds no {MANIFEST}; wanted an index directory; build one with `astroclip index build`",
            code="not_an_index",
            field=MANIFEST,
        )
    return folder


class SurveyIndex:
    """See `open`."""

    def __init__(self, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.folder, self.manifest, self.manifest_sha256 = folder, manifest, manifest_sha256
        self.catalog = Catalog.read(folder, manifest.properties)
        if len(self.catalog) != manifest.counts["objects"]:
            raise IndexFileError(
                f"index file {CATALOG} has {len(self.catalog)} rows; wanted {manifest.counts['objects']} as in the "
                "manifest; rebuild the index",
                field=CATALOG,
            )
        self.tables = {modality: self._table(modality) for modality in MODALITIES}
        self._exact = {modality: ExactBackend(table) for modality, table in self.tables.items()}
        self._hnsw: dict[str, HnswBackend] = {
            modality: self._graph(modality) for modality in MODALITIES if modality in manifest.backends
        }
        self._percentiles = {
            (entry["query"], entry["target"]): ScoreTable.from_array(
                load_npy(folder / entry["file"], entry["file"], shape=(3, None), dtype="float64", mmap=False)
            )
            for entry in manifest.calibration.get("scores", [])
        }
        self.trust = read_trust_tables(folder, manifest.calibration, self.tables)
        self.heads: dict[str, DensityHead] = {  # by what they read: image, spectrum or both
            key: read_head(folder / entry["file"], entry["file"], dim=manifest.dim * (2 if key == BOTH else 1))
            for key, entry in manifest.heads.items()
        }
        self.previews = Previews.read(folder, manifest.previews, len(self)) if manifest.previews else None

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> SurveyIndex:
        """Open an index directory or root; every file is checked against the manifest before it is used.

        verify: False compares sizes only (FAISS files, which could crash the process, are hashed all the same).
        Raises IndexFileError naming the file that is missing, damaged or not ours.
        """
        folder = resolve(path)
        manifest, sha256 = Manifest.read(folder)
        check_files(folder, manifest, hash=verify)
        if not verify:
            check_files(folder, manifest, [name for name in manifest.files if name.endswith(".faiss")])
        try:
            return cls(folder, manifest, sha256)
        except (KeyError, TypeError) as error:
            raise IndexFileError(
                f"index file {MANIFEST} lacks an entry ({error!r}); wanted a manifest as written; rebuild the index",
                field=MANIFEST,
            ) from error

    # -- what it is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.catalog)

    @property
    def index_id(self) -> str:
        return self.manifest.index_id

    @property
    def model_sha256(self) -> str:
        return self.manifest.model["sha256"]

    @property
    def preprocess_version(self) -> str:
        return self.manifest.preprocess_version

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def kth(self) -> int:
        """Which neighbour's similarity `index.trust` compares."""
        return int(self.manifest.calibration.get("kth", {}).get("k", KTH))

    @cached_property
    def default_properties(self) -> list[str]:
        """What is estimated unless the caller names properties: the standard ones, else all the index has."""
        return [name for name in STANDARD_PROPERTIES if name in self.catalog.properties] or list(
            self.catalog.properties
        )

    def kth_table(self, modality: Modality) -> npt.NDArray[np.float32]:
        """Sorted leave-one-out similarities of `index.trust`; empty where the modality has too few objects."""
        return self._kth[modality]

    @cached_property
    def _kth(self) -> dict[str, npt.NDArray[np.float32]]:
        files = self.manifest.calibration.get("kth", {}).get("files", {})
        empty = np.empty(0, np.float32)
        return {
            m: load_npy(self.folder / files[m], files[m], shape=(None,), dtype="float32", mmap=False)
            if m in files
            else empty
            for m in MODALITIES
        }

    def graph(self, modality: str) -> HnswBackend | None:
        """The HNSW graph of a table, None where there is none."""
        return self._hnsw.get(modality)

    def vector(self, row: int, modality: Modality) -> npt.NDArray[np.float32] | None:
        """(D,) float32 embedding of an object, None where it lacks this modality."""
        slot = self.tables[modality].slot(row)
        return None if slot is None else self.tables[modality].block(slot, slot + 1)[0].copy()

    # -- searching -----------------------------------------------------------------------------------------------

    def search(
        self,
        queries: npt.NDArray[np.float32],
        *,
        target: Target,
        k: int,
        query_modality: Modality | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        exclude_rows: Sequence[int] | Rows = (),
        mode: Mode | None = None,
    ) -> tuple[list[Hits], SearchReport]:
        """The k nearest objects of each query, fewer where fewer pass.

        queries: (Q, D) or (D,), scaled to unit norm here. target "either": each object once, at the modality in which
        it ranks better - by percentile where `query_modality` is known, else by cosine (which favours the query's own
        modality). mask: (N,) bool over catalogue rows, True = allowed. exclude_rows: never returned, to any query.
        mode: overrides the planner. Raises InputError, LimitError.
        """
        queries = self._check_queries(queries)
        self._check_request(target, k, query_modality, mask)
        modalities = MODALITIES if target == "either" else (target,)
        excluded = np.unique(np.asarray(exclude_rows, np.int64))
        if len(excluded) > _EXCLUDE_BY_RANK:
            mask = np.ones(len(self), bool) if mask is None else mask.copy()
            mask[excluded] = False
            excluded = excluded[:0]
        found = [self._search_table(m, queries, k, query_modality, mask, excluded, mode) for m in modalities]
        hits = [self._hits(found, q, k, query_modality) for q in range(len(queries))]
        return hits, _combined([part.report for part in found])

    def _search_table(
        self,
        modality: Modality,
        queries: npt.NDArray[np.float32],
        k: int,
        query_modality: Modality | None,
        mask: npt.NDArray[np.bool_] | None,
        excluded: Rows,
        force: Mode | None,
    ) -> _Found:
        table = self.tables[modality]
        allowed = None if mask is None else mask[table.rows]
        survivors = len(table) if allowed is None else int(np.count_nonzero(allowed))
        wide = min(k + len(excluded), len(table))  # the excluded may stand in front
        chosen = plan(
            self.manifest.backends.get(modality, {}).get("hnsw", {}).get("recall"),
            k=wide,
            survivors=survivors,
            filtered=mask is not None,
            query_modality=query_modality,
            force=force,
        )
        slots = self._propose(modality, queries, wide, allowed, chosen)
        if (
            chosen.mode == "hnsw"
            and force is None
            and np.any(np.count_nonzero(slots >= 0, axis=1) < min(wide, survivors))
        ):
            chosen = Plan("exact")  # the graph ran dry behind a filter
            slots = self._propose(modality, queries, wide, allowed, chosen)
        rows = np.where(slots >= 0, table.rows[slots], -1)
        good = (rows >= 0) & ~np.isin(rows, excluded)
        if mask is not None:
            good &= mask[rows]
        scores = table.scores(queries, np.where(good, slots, -1))
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows = np.take_along_axis(np.where(good, rows, -1), order, axis=1)
        scores = np.minimum(np.take_along_axis(scores, order, axis=1), 1.0)  # rounding goes 1e-7 beyond
        candidates = survivors if chosen.mode == "exact" else chosen.ef
        return _Found(
            modality, rows, scores, SearchReport(chosen.mode, candidates, chosen.expected_recall, self.index_id)
        )

    def _propose(
        self,
        modality: Modality,
        queries: npt.NDArray[np.float32],
        k: int,
        allowed: npt.NDArray[np.bool_] | None,
        chosen: Plan,
    ) -> Rows:
        if chosen.mode == "hnsw":
            return self._hnsw[modality].search(queries, k, allowed, ef=chosen.ef)
        return self._exact[modality].search(queries, k, allowed)

    def _hits(self, found: Sequence[_Found], q: int, k: int, query_modality: Modality | None) -> Hits:
        """Merge the tables' answers to query q: best entry an object, then the best k."""
        counts = [int(np.count_nonzero(part.rows[q] >= 0)) for part in found]
        rows = np.concatenate([part.rows[q, :n] for part, n in zip(found, counts, strict=True)])
        scores = np.concatenate([part.scores[q, :n] for part, n in zip(found, counts, strict=True)])
        names = np.repeat([part.modality for part in found], counts)
        tails = self._tails(found, counts, scores, query_modality)
        order = np.lexsort((rows, -scores, -scores if tails is None else tails))
        _, first = np.unique(rows[order], return_index=True)
        order = order[np.sort(first)][:k]
        rows = rows[order]
        ids = self.catalog.take(rows, ["object_id"]).column(0).to_pylist()
        percentiles = None if tails is None else np.asarray(100.0 * (1.0 - tails[order]), np.float32)
        return Hits(rows, ids, scores[order], percentiles, [_modality(name) for name in names[order]])

    def _tails(
        self,
        found: Sequence[_Found],
        counts: Sequence[int],
        scores: npt.NDArray[np.float32],
        query_modality: Modality | None,
    ) -> npt.NDArray[np.float64] | None:
        """Upper-tail probability of each score among its pair's; None unless every pair has a table."""
        tables = [self._percentiles.get((query_modality, part.modality)) for part in found]
        if any(table is None and n for table, n in zip(tables, counts, strict=True)) or query_modality is None:
            return None
        pieces = np.split(scores, np.cumsum(counts)[:-1])
        return np.concatenate(
            [t.upper_tail(s) if t is not None else np.empty(0) for t, s in zip(tables, pieces, strict=True)]
        )

    def _check_queries(self, queries: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(
                f"query vectors of shape {queries.shape}; wanted (Q, {self.dim}); embed with the index's own model",
                code="wrong_dimension",
                field="vector",
            )
        if len(queries) > MAX_QUERIES:
            raise LimitError(
                f"{len(queries)} queries in one call; wanted at most {MAX_QUERIES}; send them in parts",
                field="vector",
                limit=MAX_QUERIES,
            )
        norm = np.linalg.norm(queries, axis=1, keepdims=True)
        if not np.all(np.isfinite(norm) & (norm > 0)):
            raise InputError(
                "a query vector holds NaN or infinity or is zero; wanted finite numbers, not all zero; embed it again",
                code="bad_vector",
                field="vector",
            )
        return queries / norm

    def _check_request(
        self, target: str, k: int, query_modality: str | None, mask: npt.NDArray[np.bool_] | None
    ) -> None:
        if target not in (*MODALITIES, "either"):
            raise InputError(f"target {target!r}; wanted image, spectrum or either", code="bad_target", field="target")
        if query_modality is not None and query_modality not in MODALITIES:
            raise InputError(
                f"modality {query_modality!r}; wanted image or spectrum", code="bad_modality", field="modality"
            )
        if not 1 <= k <= MAX_K:
            raise InputError(f"k is {k}; wanted 1..{MAX_K}; ask for fewer", code="bad_k", field="k", limit=MAX_K)
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (len(self),)):
            raise ValueError(f"mask {mask.dtype} {mask.shape}; wanted bool ({len(self)},)")

    # -- opening -------------------------------------------------------------------------------------------------

    def _table(self, modality: Modality) -> VectorTable:
        name = f"vectors-{modality}.npy"
        rows = np.flatnonzero(self.catalog.flag(f"has_{modality}"))
        shape = (self.manifest.counts[modality], self.dim)
        vectors = load_npy(self.folder / name, name, shape=shape, dtype=self.manifest.vector_dtype)
        if len(rows) != len(vectors):
            raise IndexFileError(
                f"index file {name} has {len(vectors)} vectors for {len(rows)} objects with a {modality}; "
                "wanted one each; rebuild the index",
                field=name,
            )
        return VectorTable(vectors, rows)

    def _graph(self, modality: Modality) -> HnswBackend:
        name = f"{modality}.faiss"
        return HnswBackend.read(self.folder / name, name, count=len(self.tables[modality]), dim=self.dim)


def _combined(reports: Sequence[SearchReport]) -> SearchReport:
    """One report for a search of several tables: the less sure one's mode and recall, all candidates."""
    worst = min(reports, key=lambda report: report.expected_recall)
    approximate: Mode = next((r.mode for r in reports if r.mode != "exact"), "exact")
    return SearchReport(approximate, sum(r.candidates for r in reports), worst.expected_recall, worst.index_id)


def _modality(name: str) -> Modality:
    return "image" if name == "image" else "spectrum"
