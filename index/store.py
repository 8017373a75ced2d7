"""The survey index as it is searched: verified files, catalogue, vectors, backends, calibration, previews.

An opened index never changes and is safe to use from many threads. A directory holding `manifest.json` is an index; a
root whose `CURRENT` link points to one of `versions/` is resolved once, at opening, so an index opened before a new
version is published goes on reading its own files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Required, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from astroclip.errors import IndexFileError, InputError, LimitError
from astroclip.types import MODALITIES, Modality
from index.backends import ANN, ExactBackend, FaissBackend
from index.backends.base import Backend
from index.calibrate import KTH, ScoreTable
from index.catalog import CATALOG, STANDARD_PROPERTIES, Catalog
from index.examples import Examples
from index.head_build import BOTH
from index.head_files import read_head
from index.heads import DensityHead
from index.knn_files import KnnCalibration, read_knn
from index.manifest import MANIFEST, Manifest, check_files, file_stamps
from index.planner import MeasuredSearch
from index.previews import Previews
from index.table_search import Ask, Found, Order, TableSearch
from index.trust_tables import read_trust_tables
from index.vectors import VectorTable, load_npy

__all__ = [
    "EXACT",
    "MAX_K",
    "MAX_QUERIES",
    "HitTable",
    "Hits",
    "How",
    "SearchReport",
    "SurveyIndex",
    "Target",
    "resolve",
]

Target = Literal["image", "spectrum", "either"]
EXACT = ("numpy", "torch")  # what exact search may be made by
Rows = npt.NDArray[np.int64]

MAX_K = 10_000  # hits of one query: what a client can use, and what keeps an answer below some MB
MAX_QUERIES = 100_000  # queries of one call: evaluation sends a whole test set
_EXCLUDE_BY_RANK = 1000  # up to so many excluded rows are searched past; more become part of the mask


class How(TypedDict, total=False):
    """What is asked of a search, besides its vectors; `target` and `k` always.

    target "either": each object once, at the modality in which it ranks better - by percentile where `query_modality`
    is known, else by cosine (which favours the query's own modality). mask: (N,) bool over catalogue rows, True =
    allowed. exclude_rows: never returned, to any query; exclude_each: besides, those of each query alone. order:
    "least_similar" starts from the other end. score_threshold: cosine below which nothing is returned (least_similar:
    above which). mode: overrides the planner.
    """

    target: Required[Target]
    k: Required[int]
    query_modality: Modality | None
    mask: npt.NDArray[np.bool_] | None
    exclude_rows: Sequence[int] | Rows
    exclude_each: Sequence[Rows]
    order: Order
    score_threshold: float | None
    mode: str | None


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
class HitTable:
    """The nearest objects of many queries as arrays (Q, k'), best first: rows (int64, -1 where there are no more),
    scores (float32), percentiles (float32, or None as in `Hits`), kinds (places in `MODALITIES`)."""

    rows: Rows
    scores: npt.NDArray[np.float32]
    percentiles: npt.NDArray[np.float32] | None
    kinds: npt.NDArray[np.int64]


@dataclass(frozen=True)
class SearchReport:
    """How the search was made. mode: exact, hnsw, ivf-sq8 or ivf-pq. candidates: vectors compared with the query."""

    mode: str
    candidates: int
    expected_recall: float
    index_id: str


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

    def __init__(
        self, folder: Path, manifest: Manifest, manifest_sha256: str, exact: str = "numpy", device: str = "auto"
    ) -> None:
        self.folder, self.manifest, self.manifest_sha256 = folder, manifest, manifest_sha256
        self.catalog = Catalog.read(folder, manifest.properties)
        if len(self.catalog) != manifest.counts["objects"]:
            raise IndexFileError(
                f"index file {CATALOG} has {len(self.catalog)} rows; wanted {manifest.counts['objects']} as in the "
                "manifest; rebuild the index",
                field=CATALOG,
            )
        self.tables = {modality: self._table(modality) for modality in MODALITIES}
        self._searches = {modality: self._search_of(modality, exact, device) for modality in MODALITIES}
        self._percentiles = {
            (entry["query"], entry["target"]): ScoreTable.from_array(
                load_npy(folder / entry["file"], entry["file"], shape=(3, None), dtype="float64", mmap=False)
            )
            for entry in manifest.calibration.get("scores", [])
        }
        knn = manifest.calibration.get("knn")
        self.knn: KnnCalibration = read_knn(folder / knn["file"], knn["file"]) if knn else {}
        self.trust = read_trust_tables(folder, manifest.calibration, self.tables)
        self.heads: dict[str, DensityHead] = {  # by what they read: image, spectrum or both
            key: read_head(folder / entry["file"], entry["file"], dim=manifest.dim * (2 if key == BOTH else 1))
            for key, entry in manifest.heads.items()
        }
        self.previews = Previews.read(folder, manifest.previews, len(self)) if manifest.previews else None

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, *, exact: str = "numpy", device: str = "auto") -> SurveyIndex:
        """Open an index directory or root; every file is checked against the manifest before it is used.

        verify: False compares sizes only (FAISS files, which could crash the process, are hashed all the same).
        exact: what makes exact searches, one of `EXACT`; device: torch's, see `TorchBackend`.
        Raises IndexFileError naming the file that is missing, damaged or not ours.
        """
        folder = resolve(path)
        manifest, sha256 = Manifest.read(folder)
        before = file_stamps(folder, manifest)
        check_files(folder, manifest, hash=verify)
        if not verify:
            check_files(folder, manifest, [name for name in manifest.files if name.endswith(".faiss")])
        try:
            index = cls(folder, manifest, sha256, exact, device)
        except (KeyError, TypeError) as error:
            raise IndexFileError(
                f"index file {MANIFEST} lacks an entry ({error!r}); wanted a manifest as written; rebuild the index",
                field=MANIFEST,
            ) from error
        after = file_stamps(folder, manifest)
        changed = next((name for name in after if before[name] != after[name]), None)
        if changed is not None:
            raise IndexFileError(
                f"index file {changed} changed while the index was being opened; wanted a directory that nobody writes "
                "into; publish with `astroclip index build`, and open it again",
                code="index_changed",
                field=changed,
            )
        return index

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
        """Which neighbour's similarity lists compare, and `index.trust` in an index without `index.typical`."""
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

    def graph(self, modality: str) -> FaissBackend | None:
        """The approximate backend of a table, None where there is none."""
        return self._searches[modality].ann if modality in MODALITIES else None

    def vector(self, row: int, modality: Modality) -> npt.NDArray[np.float32] | None:
        """(D,) float32 embedding of an object, None where it lacks this modality."""
        slot = self.tables[modality].slot(row)
        return None if slot is None else self.tables[modality].block(slot, slot + 1)[0].copy()

    # -- searching -----------------------------------------------------------------------------------------------

    def search(self, queries: npt.NDArray[np.float32], **how: Unpack[How]) -> tuple[list[Hits], SearchReport]:
        """The k nearest objects of each query, fewer where fewer pass; see `How`.

        queries: (Q, D) or (D,), scaled to unit norm here. Raises InputError, LimitError.
        """
        table, report = self.search_table(queries, **how)
        return self._named(table), report

    def search_table(self, queries: npt.NDArray[np.float32], **how: Unpack[How]) -> tuple[HitTable, SearchReport]:
        """As `search`, without a Python object for every query: for thousands of queries a call."""
        queries = self._check_queries(queries)
        ask = self._ask(how)
        if len(ask.excluded_each) not in (0, len(queries)):
            raise ValueError(f"exclude_each has {len(ask.excluded_each)} entries for {len(queries)} queries")
        found = {m: self._searches[m].search(queries, ask) for m in _modalities(how["target"])}
        return self._merged(found, ask), _combined(list(found.values()), self.index_id)

    def search_examples(self, examples: Examples, **how: Unpack[How]) -> tuple[Hits, SearchReport]:
        """The k objects with the best score of `index.examples`, exactly.

        Scores are best scores, which the threshold bounds as well, and percentiles are None.
        """
        for vectors in (examples.positive, examples.negative):
            if len(vectors):
                self._check_queries(vectors)
        ask = replace(self._ask(how), query_modality=None)
        found = {m: self._searches[m].search_examples(examples, ask) for m in _modalities(how["target"])}
        return self._named(self._merged(found, ask))[0], _combined(list(found.values()), self.index_id)

    def _ask(self, how: How) -> Ask:
        """The request checked; many excluded rows become part of the mask."""
        self._check_request(how)
        mask = how.get("mask")
        excluded = np.unique(np.asarray(how.get("exclude_rows", ()), np.int64))
        if len(excluded) > _EXCLUDE_BY_RANK:
            mask = np.ones(len(self), bool) if mask is None else mask.copy()
            mask[excluded] = False
            excluded = excluded[:0]
        return Ask(
            how["k"],
            how.get("query_modality"),
            mask,
            excluded,
            how.get("order", "most_similar"),
            how.get("score_threshold"),
            how.get("mode"),
            how.get("exclude_each", ()),
        )

    def _named(self, table: HitTable) -> list[Hits]:
        """The rows of a table of hits as objects with their ids."""
        counts = np.count_nonzero(table.rows >= 0, axis=1)
        ids = self.catalog.take(table.rows[table.rows >= 0], ["object_id"]).column(0).to_pylist()
        starts = np.cumsum(counts) - counts
        return [
            Hits(
                table.rows[q, :n],
                ids[start : start + n],
                table.scores[q, :n],
                None if table.percentiles is None else table.percentiles[q, :n],
                [MODALITIES[kind] for kind in table.kinds[q, :n]],
            )
            for q, (start, n) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True))
        ]

    def _merged(self, found: Mapping[Modality, Found], ask: Ask) -> HitTable:
        """The tables' answers as one: best entry an object, then the best k of each query."""
        parts = list(found.values())
        rows = np.concatenate([part.rows for part in parts], axis=1)
        scores = np.concatenate([part.scores for part in parts], axis=1)
        kinds = np.repeat([MODALITIES.index(m) for m in found], [part.rows.shape[1] for part in parts])
        kinds = np.broadcast_to(kinds, rows.shape)
        tails = self._tails(found, ask.query_modality)
        if len(parts) > 1:
            order, rows = _best_of_each(rows, scores, tails, ask)
            scores, kinds = (np.take_along_axis(column, order, axis=1) for column in (scores, kinds))
            tails = None if tails is None else np.take_along_axis(tails, order, axis=1)
        percentiles = None if tails is None else np.asarray(100.0 * (1.0 - tails), np.float32)
        return HitTable(rows, scores, percentiles, kinds)

    def _tails(self, found: Mapping[Modality, Found], query_modality: str | None) -> npt.NDArray[np.float64] | None:
        """Upper-tail probability of each score among its pair's; None unless every pair with hits has a table."""
        if query_modality is None:
            return None
        columns = []
        for target, part in found.items():
            table = self._percentiles.get((query_modality, target))
            if table is None and np.any(part.rows >= 0):
                return None
            columns.append(np.ones(part.rows.shape) if table is None else table.upper_tail(part.scores))
        return np.concatenate(columns, axis=1)

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

    def _check_request(self, how: How) -> None:
        target, k, modality, mask = how["target"], how["k"], how.get("query_modality"), how.get("mask")
        if target not in (*MODALITIES, "either"):
            raise InputError(f"target {target!r}; wanted image, spectrum or either", code="bad_target", field="target")
        if modality is not None and modality not in MODALITIES:
            raise InputError(f"modality {modality!r}; wanted image or spectrum", code="bad_modality", field="modality")
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

    def _search_of(self, modality: Modality, exact: str, device: str) -> TableSearch:
        """The table with its backends; a file of a backend has been verified by now."""
        table, ann, measured = self.tables[modality], None, None
        for name, record in self.manifest.backends.get(modality, {}).items():
            if name not in ANN:
                raise IndexFileError(
                    f"index file {MANIFEST} names the backend {name[:40]!r}; wanted one of {', '.join(ANN)}; rebuild "
                    "the index",
                    field=MANIFEST,
                )
            file = f"{modality}.faiss"
            ann = ANN[name].read(self.folder / file, file, count=len(table), dim=self.dim)
            measured = MeasuredSearch.from_record(record, len(table))
        return TableSearch(table, _exact(table, exact, device), ann, measured)


def _exact(table: VectorTable, name: str, device: str) -> Backend:
    if name not in EXACT:
        raise InputError(f"exact search by {name!r}; wanted one of {', '.join(EXACT)}", code="bad_kind", field="exact")
    if name == "torch":
        from index.backends.torch_exact import TorchBackend

        return TorchBackend(table, device)
    return ExactBackend(table)


def _modalities(target: Target) -> tuple[Modality, ...]:
    return MODALITIES if target == "either" else (target,)


def _combined(found: Sequence[Found], index_id: str) -> SearchReport:
    """One report for a search of several tables: the less sure one's mode and recall, all candidates."""
    mode = next((part.mode for part in found if part.mode != "exact"), "exact")
    return SearchReport(mode, sum(p.candidates for p in found), min(p.expected_recall for p in found), index_id)


def _best_of_each(
    rows: Rows, scores: npt.NDArray[np.float32], tails: npt.NDArray[np.float64] | None, ask: Ask
) -> tuple[Rows, Rows]:
    """Places (Q, k) of the best entries of each query, and their rows: every object once, then -1."""
    sign = -1.0 if ask.order == "most_similar" else 1.0
    ranked = sign * scores if tails is None else -sign * tails
    order = np.lexsort((rows, sign * scores, np.where(rows >= 0, ranked, np.inf)), axis=1)
    sorted_rows = np.take_along_axis(rows, order, axis=1)
    by_row = np.argsort(sorted_rows, axis=1, kind="stable")
    same = np.diff(np.take_along_axis(sorted_rows, by_row, axis=1), axis=1, prepend=-2) == 0
    worse = np.empty(same.shape, bool)
    np.put_along_axis(worse, by_row, same, axis=1)
    keep = np.argsort(worse, axis=1, kind="stable")[:, : ask.k]
    best = np.where(worse, -1, sorted_rows)
    return np.take_along_axis(order, keep, axis=1), np.take_along_axis(best, keep, axis=1)
