"""Joins: every vector of an index compared with every other, a chunk of queries at a time, resumable.

Exact: one matrix product serves the k-th neighbour, the close pairs and the ranks of partners, of which a graph or an
inverted file gives the first alone, and not all of it (docs/architecture.md has the rates). The state of a join is a
few numbers an object. It is published after every chunk of `QUERIES` (written aside, fsynced, renamed), so a killed
join goes on with the next chunk, and since chunks and blocks have fixed bounds, its bytes are those of a join that was
never stopped.

Memory beyond the opened index: some 250 MB for a block of scores and its copies, 24 bytes an object, and 12 bytes for
each of at most `2 MAX_PAIRS` pairs.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from index.vectors import VectorTable

__all__ = ["MAX_PAIRS", "QUERIES", "Neighbours", "Partners", "join_neighbours", "join_partners"]

QUERIES = 2_048  # of a chunk: seconds of work at a million objects, so a kill costs little
_BLOCK = 8_192  # targets of one product: 64 MB of scores
MAX_PAIRS = 1_000_000  # close pairs kept: beyond it, the threshold finds a population and not duplicates
_ROUNDING = 1e-6  # cosines of float32 products this close are the same: a twin of the partner is not nearer than it

Slots = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Advance = Callable[[int], None]
"""Told the queries that are done, those of an earlier run first."""


@dataclass
class Neighbours:
    """Of every slot of one table: kth (n,) cosine with its k-th nearest other, -inf where there are fewer; nearest
    (n,) the nearest slot, -1 where there is none. Pairs: left < right (P,) slots, their cosine, and `found`, how many
    there were before the best `MAX_PAIRS` were taken."""

    kth: Scores
    nearest: Slots
    left: Slots
    right: Slots
    cosine: Scores
    found: npt.NDArray[np.int64]


@dataclass
class Partners:
    """Of every image slot and every spectrum slot: the cosine with the object's own other vector (NaN where it has
    none), how many of the other table are nearer than that, and the nearest of them."""

    own: Scores
    nearer_spectra: Slots
    nearest_spectrum: Slots
    nearer_images: Slots
    nearest_image: Slots
    nearest_image_score: Scores


State = TypeVar("State", Neighbours, Partners)


def join_neighbours(
    table: VectorTable,
    other: VectorTable,
    *,
    k: int,
    threshold: float,
    first: bool,
    state_file: Path,
    advance: Advance,
) -> Neighbours:
    """The self-join of `table`.

    threshold: pairs of at least this cosine are kept if the two objects' vectors in `other` reach it too, or are not
    both there. first: where both are there, keep the pair (the join of the other table leaves it out then).
    """
    n = len(table)
    blank = Neighbours(
        kth=np.full(n, -np.inf, np.float32),
        nearest=np.full(n, -1, np.int32),
        left=np.empty(0, np.int32),
        right=np.empty(0, np.int32),
        cosine=np.empty(0, np.float32),
        found=np.zeros(1, np.int64),
    )
    others = _counterparts(table, other)

    def chunk(state: Neighbours, start: int, stop: int) -> None:
        queries = table.block(start, stop)
        best = np.full((len(queries), min(k, n)), -np.inf, np.float32)
        top = np.full(len(queries), -np.inf, np.float32)
        for low, high in _bounds(0, n, _BLOCK):
            scores = queries @ table.block(low, high).T
            itself = np.arange(max(low, start), min(high, stop))
            scores[itself - start, itself - low] = -np.inf
            place = scores.argmax(axis=1)
            value = scores[np.arange(len(scores)), place]
            better = value > top
            top[better], state.nearest[start:stop][better] = value[better], place[better] + low
            close = np.flatnonzero(value >= threshold)  # few rows: the rest of the block is not looked at again
            if high > start and len(close):
                left, right = np.nonzero(scores[close] >= threshold)
                left = close[left]
                ahead = right + low > left + start
                left, right = left[ahead], right[ahead]
                _add_pairs(state, left + start, right + low, scores[left, right], others, other, threshold, first)
            gain = np.flatnonzero(value > best.min(axis=1))
            best[gain] = _largest(np.concatenate([best[gain], _largest(scores[gain], k)], axis=1), best.shape[1])
        if n > k:
            state.kth[start:stop] = best.min(axis=1)

    state = _run(blank, n, chunk, state_file, advance)
    _prune(state, MAX_PAIRS)
    return state


def join_partners(images: VectorTable, spectra: VectorTable, *, state_file: Path, advance: Advance) -> Partners:
    """All images against all spectra, looked at from both sides."""
    n, m = len(images), len(spectra)
    own_slot, own_image = _counterparts(images, spectra), _counterparts(spectra, images)
    blank = Partners(
        own=np.full(n, np.nan, np.float32),
        nearer_spectra=np.zeros(n, np.int32),
        nearest_spectrum=np.full(n, -1, np.int32),
        nearer_images=np.zeros(m, np.int32),
        nearest_image=np.full(m, -1, np.int32),
        nearest_image_score=np.full(m, -np.inf, np.float32),
    )
    paired = np.flatnonzero(own_slot >= 0)
    for low, high in _bounds(0, len(paired), QUERIES):
        some = paired[low:high]
        blank.own[some] = np.einsum("nd,nd->n", images.take(some), spectra.take(own_slot[some].astype(np.int64)))
    # What a score must pass to be nearer than the own partner; nothing passes where there is none.
    bar = np.where(own_slot >= 0, blank.own + np.float32(_ROUNDING), np.inf).astype(np.float32)
    spectrum_bar = np.where(own_image >= 0, bar[own_image], np.inf).astype(np.float32)

    def chunk(state: Partners, start: int, stop: int) -> None:
        queries = images.block(start, stop)
        top = np.full(len(queries), -np.inf, np.float32)
        for low, high in _bounds(0, m, _BLOCK):
            scores = queries @ spectra.block(low, high).T
            state.nearer_spectra[start:stop] += np.count_nonzero(scores > bar[start:stop, None], axis=1)
            state.nearer_images[low:high] += np.count_nonzero(scores > spectrum_bar[None, low:high], axis=0)
            place = scores.argmax(axis=1)
            value = scores[np.arange(len(scores)), place]
            better = value > top
            top[better], state.nearest_spectrum[start:stop][better] = value[better], place[better] + low
            value = scores.max(axis=0)
            gain = np.flatnonzero(value > state.nearest_image_score[low:high])
            state.nearest_image_score[low:high][gain] = value[gain]
            state.nearest_image[low:high][gain] = scores[:, gain].argmax(axis=0) + start

    return _run(blank, n, chunk, state_file, advance)


def _run(
    blank: State, count: int, chunk: Callable[[State, int, int], None], state_file: Path, advance: Advance
) -> State:
    """Every chunk not yet in `state_file`, which is renewed after each."""
    state, done = _load(blank, state_file)
    advance(done)
    for start, stop in _bounds(done, count, QUERIES):
        chunk(state, start, stop)
        _save(state, stop, state_file)
        advance(stop)
    return state


def _load(blank: State, path: Path) -> tuple[State, int]:
    """The state of an earlier run and its finished queries; `blank` where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:  # zip: every array carries its CRC
            arrays = {field.name: stored[field.name] for field in fields(blank)}
            return type(blank)(**arrays), int(stored["done"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return blank, 0


def _save(state: Neighbours | Partners, done: int, path: Path) -> None:
    arrays: Mapping[str, Any] = {field.name: getattr(state, field.name) for field in fields(state)}
    aside = path.with_suffix(".part")
    with aside.open("wb") as stream:
        np.savez(stream, done=np.int64(done), **arrays)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def _add_pairs(
    state: Neighbours,
    left: npt.NDArray[np.int64],
    right: npt.NDArray[np.int64],
    cosine: Scores,
    others: Slots,
    other: VectorTable,
    threshold: float,
    first: bool,
) -> None:
    a, b = others[left].astype(np.int64), others[right].astype(np.int64)
    shared = np.flatnonzero((a >= 0) & (b >= 0))
    keep = np.ones(len(left), bool)
    keep[shared] = first
    if first:
        for low, high in _bounds(0, len(shared), QUERIES):
            some = shared[low:high]
            agreed = np.einsum("nd,nd->n", other.take(a[some]), other.take(b[some]))
            keep[some] = agreed >= threshold
    if keep.any():
        state.found += np.count_nonzero(keep)
        state.left = np.concatenate([state.left, left[keep].astype(np.int32)])
        state.right = np.concatenate([state.right, right[keep].astype(np.int32)])
        state.cosine = np.concatenate([state.cosine, cosine[keep]])
        if len(state.left) > 2 * MAX_PAIRS:
            _prune(state, MAX_PAIRS)


def _prune(state: Neighbours, most: int) -> None:
    """The `most` closest pairs, closest first."""
    order = np.lexsort((state.right, state.left, -state.cosine))[:most]
    state.left, state.right, state.cosine = state.left[order], state.right[order], state.cosine[order]


def _counterparts(table: VectorTable, other: VectorTable) -> Slots:
    """(n,) the slot of each object of `table` in `other`, -1 where it has none there."""
    if not len(other):
        return np.full(len(table), -1, np.int32)
    place = np.minimum(np.searchsorted(other.rows, table.rows), len(other) - 1)
    return np.where(other.rows[place] == table.rows, place, -1).astype(np.int32)


def _largest(scores: Scores, k: int) -> Scores:
    """(Q, k) the k largest of each row, in no order; all where there are fewer."""
    width = scores.shape[1]
    return scores if width <= k else np.partition(scores, width - k, axis=1)[:, width - k :]


def _bounds(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
