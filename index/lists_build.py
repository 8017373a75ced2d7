"""Making the survey-wide lists: two self-joins and one join of images with spectra, ranked and written.

* isolated: by the cosine with the k-th nearest other object of the same modality; p-value by the sample of
  `calibrate.kth_scores`.
* disagreeing: objects whose own image and spectrum have the lowest cosine. Beside it, adjusted for how hard the object
  is to place, how many other spectra are nearer to the image than its own, and how many other images to the spectrum;
  `disagreement` is the geometric mean of the two shares, about 1/2 for a partner that is as good as random.
* duplicates: pairs of cosine `threshold` or more in image and in spectrum (in the one both have, where they share only
  one), in groups: the connected components of these pairs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from astroclip.errors import InputError
from astroclip.types import MODALITIES, Modality
from index.lists import KINDS, ListKind, Lists, lists_folder, write_list
from index.lists_join import MAX_PAIRS, Neighbours, Partners, join_neighbours, join_partners
from index.publish import alone
from index.sky import unit_vectors
from index.store import SurveyIndex
from index.typical import conformal_p

__all__ = ["DEFAULT_LIMIT", "MAX_LIMIT", "THRESHOLD", "build_lists"]

DEFAULT_LIMIT = 1_000  # rows of a list: what a person may look through; the rest is in the join's order anyway
MAX_LIMIT = 100_000  # some 10 MB a list, held in memory by every server
# Measured with the demo model (benchmarks/results/near_duplicates.json): in image and spectrum both, one in a million
# pairs of different galaxies reaches 0.97; 77 % of second exposures of a spectrum do, 97 % of an image's.
THRESHOLD = 0.97

Rows = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""Told the join, its queries done, and of how many."""


def build_lists(
    path: str | Path,
    kinds: Sequence[str] = KINDS,
    *,
    limit: int = DEFAULT_LIMIT,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
) -> Lists:
    """Compute the lists of the index at `path` and publish each beside it; a killed run goes on where it stopped.

    limit: rows of each list. threshold: cosine from which a pair counts as near-duplicate.
    Raises InputError, and what `SurveyIndex.open` raises.
    """
    wanted = _check(kinds, limit, threshold)
    index = SurveyIndex.open(path)
    folder = lists_folder(index.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, f"another process is making the lists in {folder}", "lists_busy"):
        work = folder / ".joins"
        maker = _Maker(index, work, limit, threshold, progress or (lambda *_: None))
        for kind in wanted:
            table, found, parameters = maker.make(kind)
            write_list(index.folder, index.index_id, index.manifest_sha256, kind, table, found, parameters)
        shutil.rmtree(work, ignore_errors=True)
        _remove_stale(index.folder)
    return Lists.read(index.folder, index.manifest_sha256)


class _Maker:
    """The lists of one index; joins that two lists need are made once."""

    def __init__(self, index: SurveyIndex, work: Path, limit: int, threshold: float, progress: Progress) -> None:
        self.index, self.work, self.limit, self.threshold = index, work, limit, threshold
        self._progress = progress
        self._neighbours: dict[Modality, Neighbours] = {}
        work.mkdir(exist_ok=True)

    def make(self, kind: ListKind) -> tuple[pa.Table, int, dict[str, Any]]:
        """The list, its candidates before the limit, and the parameters for its record."""
        if kind == "isolated":
            return self._isolated()
        return self._disagreeing() if kind == "disagreeing" else self._duplicates()

    # -- joins -----------------------------------------------------------------------------------------------------

    def _join(self, modality: Modality) -> Neighbours:
        if modality not in self._neighbours:
            image_first: tuple[Modality, Modality] = ("image", "spectrum")
            other = image_first[modality == "image"]
            name = f"{modality} to {modality}"
            self._neighbours[modality] = join_neighbours(
                self.index.tables[modality],
                self.index.tables[other],
                k=self.index.kth,
                threshold=self.threshold,
                first=modality == "image",
                state_file=self._state(name, k=self.index.kth, threshold=self.threshold),
                advance=lambda done: self._progress(name, done, len(self.index.tables[modality])),
            )
        return self._neighbours[modality]

    def _partners(self) -> Partners:
        images, spectra = (self.index.tables[m] for m in MODALITIES)
        name = "image to spectrum"
        return join_partners(
            images,
            spectra,
            state_file=self._state(name),
            advance=lambda done: self._progress(name, done, len(images)),
        )

    def _state(self, name: str, **parameters: Any) -> Path:
        """The checkpoint of a join: another index or other parameters have another file."""
        key = json.dumps([self.index.manifest_sha256, name, MAX_PAIRS, parameters])
        return self.work / f"{name.replace(' ', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"

    # -- lists -----------------------------------------------------------------------------------------------------

    def _isolated(self) -> tuple[pa.Table, int, dict[str, Any]]:
        parts, found = [], 0
        for modality in MODALITIES:
            table = self.index.tables[modality]
            if len(table) <= self.index.kth:
                continue
            join = self._join(modality)
            found += len(table)
            slots = np.lexsort((np.arange(len(table)), join.kth))[: self.limit]
            known = self.index.kth_table(modality)
            near = join.nearest[slots]
            nearest_score = table.scores(table.take(slots), near[:, None].astype(np.int64))[:, 0]
            parts.append(
                pa.table(
                    {
                        "rank": np.arange(1, len(slots) + 1),
                        "modality": [modality] * len(slots),
                        **self._object(table.rows[slots]),
                        "score": join.kth[slots],
                        "p": conformal_p(known, join.kth[slots]) if len(known) else pa.nulls(len(slots), pa.float64()),
                        "nearest_id": self._ids(table.rows[near]),
                        "nearest_score": np.minimum(nearest_score, 1.0),
                    }
                )
            )
        merged = pa.concat_tables(parts) if parts else _empty(_ISOLATED)
        return merged.sort_by([("rank", "ascending"), ("modality", "ascending")]), found, {"k": self.index.kth}

    def _disagreeing(self) -> tuple[pa.Table, int, dict[str, Any]]:
        images, spectra = (self.index.tables[m] for m in MODALITIES)
        rows = np.intersect1d(images.rows, spectra.rows)
        if not len(rows):
            return _empty(_DISAGREEING), 0, {}
        join = self._partners()
        image, spectrum = np.searchsorted(images.rows, rows), np.searchsorted(spectra.rows, rows)
        order = np.lexsort((rows, join.own[image]))[: self.limit]
        rows, image, spectrum = rows[order], image[order], spectrum[order]
        shares = (1.0 + join.nearer_spectra[image]) / len(spectra) * (1.0 + join.nearer_images[spectrum]) / len(images)
        table = pa.table(
            {
                "rank": np.arange(1, len(rows) + 1),
                **self._object(rows),
                "score": join.own[image],
                "disagreement": np.sqrt(shares),
                "nearer_spectra": join.nearer_spectra[image],
                "nearer_images": join.nearer_images[spectrum],
                "nearest_spectrum_id": self._ids(spectra.rows[join.nearest_spectrum[image]]),
                "nearest_image_id": self._ids(images.rows[join.nearest_image[spectrum]]),
            }
        )
        return table, int(np.count_nonzero(np.isfinite(join.own))), {}

    def _duplicates(self) -> tuple[pa.Table, int, dict[str, Any]]:
        pairs, found = [], 0
        for modality in MODALITIES:
            join = self._join(modality)
            rows = self.index.tables[modality].rows
            pairs.append(np.stack([rows[join.left], rows[join.right]], axis=1))
            found += int(join.found[0])
        both = np.concatenate(pairs)
        parameters = {"threshold": self.threshold, "max_pairs": MAX_PAIRS}
        if not len(both):
            return _empty(_DUPLICATES), 0, parameters
        scores = np.stack([self._cosines(both, modality) for modality in MODALITIES], axis=1)
        score = np.nanmin(scores, axis=1)
        group, size = _groups(both, len(self.index))
        best = np.full(group.max() + 1, -np.inf)
        np.maximum.at(best, group, score)
        order = np.lexsort((both[:, 1], both[:, 0], -score, group, -best[group]))[: self.limit]
        both, scores, score, group, size = both[order], scores[order], score[order], group[order], size[order]
        _, first, number = np.unique(group, return_index=True, return_inverse=True)
        table = pa.table(
            {
                "rank": np.arange(1, len(both) + 1),
                "group": 1 + np.argsort(np.argsort(first))[number],
                "group_size": size,
                **self._object(both[:, 0]),
                "partner_id": self._ids(both[:, 1]),
                "score": score.astype(np.float32),
                "image_score": pa.array(scores[:, 0], mask=np.isnan(scores[:, 0])),
                "spectrum_score": pa.array(scores[:, 1], mask=np.isnan(scores[:, 1])),
                "separation_arcsec": self._separations(both),
            }
        )
        return table, found, parameters

    # -- columns ---------------------------------------------------------------------------------------------------

    def _object(self, rows: Rows) -> dict[str, Any]:
        return {name: self.index.catalog.take(rows, [name]).column(0) for name in ("object_id", "ra", "dec")}

    def _ids(self, rows: Rows) -> pa.ChunkedArray:
        return self.index.catalog.take(rows, ["object_id"]).column(0)

    def _cosines(self, pairs: Rows, modality: Modality) -> npt.NDArray[np.float32]:
        """(P,) of row pairs, NaN where one of the two lacks the modality."""
        table = self.index.tables[modality]
        out = np.full(len(pairs), np.nan, np.float32)
        if not len(table):
            return out
        place = np.minimum(np.searchsorted(table.rows, pairs), len(table) - 1)
        there = np.flatnonzero((table.rows[place] == pairs).all(axis=1))
        for start in range(0, len(there), 65_536):
            some = there[start : start + 65_536]
            found = np.einsum("pd,pd->p", table.take(place[some, 0]), table.take(place[some, 1]))
            out[some] = np.minimum(found, 1.0)
        return out

    def _separations(self, pairs: Rows) -> pa.Array:
        """Great-circle distances (arcsec), null where a position is not known."""
        ra, dec = self.index.catalog.values("ra"), self.index.catalog.values("dec")
        a, b = (unit_vectors(ra[side], dec[side]) for side in pairs.T)
        half = np.minimum(np.linalg.norm(a - b, axis=-1) / 2.0, 1.0)
        away = 3600.0 * np.degrees(2.0 * np.arcsin(half))
        return pa.array(away, mask=np.isnan(away))


_ISOLATED = ("rank", "modality", "object_id", "ra", "dec", "score", "p", "nearest_id", "nearest_score")
_DISAGREEING = (
    *("rank", "object_id", "ra", "dec", "score", "disagreement", "nearer_spectra", "nearer_images"),
    *("nearest_spectrum_id", "nearest_image_id"),
)
_DUPLICATES = (
    *("rank", "group", "group_size", "object_id", "ra", "dec", "partner_id", "score"),
    *("image_score", "spectrum_score", "separation_arcsec"),
)
_TEXT = ("modality", "object_id", "nearest_id", "nearest_spectrum_id", "nearest_image_id", "partner_id")
_WHOLE = ("rank", "group", "group_size", "nearer_spectra", "nearer_images")


def _empty(columns: Sequence[str]) -> pa.Table:
    kinds = {**dict.fromkeys(_TEXT, pa.string()), **dict.fromkeys(_WHOLE, pa.int64())}
    return pa.table({name: pa.array([], kinds.get(name, pa.float64())) for name in columns})


def _groups(pairs: Rows, count: int) -> tuple[Rows, Rows]:
    """Of every pair, its connected component, and of how many objects that is."""
    graph = sparse.coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, label = sparse.csgraph.connected_components(graph, directed=False)
    sizes = np.bincount(label)
    group = label[pairs[:, 0]].astype(np.int64)
    return group, sizes[group]


def _check(kinds: Sequence[str], limit: int, threshold: float) -> list[ListKind]:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(
            f"kinds is {','.join(kinds)!r}; wanted some of {', '.join(KINDS)}; mend --kinds",
            code="bad_kind",
            field="kinds",
        )
    if not 1 <= limit <= MAX_LIMIT:
        raise InputError(
            f"limit is {limit}; wanted 1..{MAX_LIMIT} rows a list; ask for fewer",
            code="bad_limit",
            field="limit",
            limit=MAX_LIMIT,
        )
    if not 0.0 < threshold <= 1.0:
        raise InputError(
            f"threshold is {threshold}; wanted a cosine in 0..1, such as {THRESHOLD}; mend --threshold",
            code="bad_threshold",
            field="threshold",
        )
    return [kind for kind in KINDS if kind in kinds]


def _remove_stale(index_folder: Path) -> None:
    """Lists of versions that are no longer kept."""
    if index_folder.parent.name != "versions":
        return
    for path in lists_folder(index_folder).parent.iterdir():
        if path.is_dir() and not (index_folder.parent / path.name).exists():
            shutil.rmtree(path, ignore_errors=True)
