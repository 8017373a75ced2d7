"""What the FAISS backends share: files read safely, and filters that cannot fail unseen.

FAISS reads files that it cannot trust: hence `read` only after the caller has verified the SHA-256, with FAISS' limits
on bytes and loops set to the file's own size, and what was read checked: type, shape, and that every vector is there
once (an id outside the table would be an exception in some later search). A checksum says that a file is as it was
written, not that its writer meant well; so 960 files with changed bytes and matching manifests were opened and
searched in children (tests/index/test_index_hostile.py has 180 of them): refused or harmless, none ended the process.
That is why files are read in the serving process, and not first in another one. FAISS' limits are global, so one
thread reads at a time, and they are put back.

Filters are not given to FAISS. Its searches under an `IDSelector` look at the same part of the table as without one and
return whatever passes there: where a filter leaves out the query's surroundings, that is survivors from afar and no
sign of it. Measured on 20,000 clustered vectors of 128, recall@10 under a filter that passes 10 % at random, 10 % in
one region, 1 % in one: HNSW at ef 128 0.99, 0.88, 0.51; IVF at 64 of 512 lists 0.95, 0.84, 0.52; the graph's answers
had all ten hits in 100, 98 and 66 % of the cases. So the `fetch` nearest are asked for without the filter, those that
pass are the answer, and missing ones are visible.

Vectors are compared by Euclidean distance (on unit vectors the order of the cosine): float16 rounding moves a norm,
which an inner product feels to first order and a distance to second. More than k are proposed for the same reason;
rescoring in float32 picks the k.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from astroclip.errors import IndexFileError
from index.backends.base import Capabilities, Mask, Slots, Vectors
from index.vectors import VectorTable

__all__ = ["ADD", "FaissBackend", "faiss_module"]

ADD = 65_536  # vectors added at once
_PROPOSALS = 2**22  # held at once: 50 MB with their distances
_READING = threading.Lock()
_MARGIN = 8  # proposals beyond k, for float32 to choose from


class FaissBackend(ABC):
    """A FAISS index of one table. Subclasses say its class, how it is built, and what a breadth is."""

    name: ClassVar[str]
    kind: ClassVar[str]  # the class FAISS must have read
    least: ClassVar[int] = 1  # vectors it can be built over
    rerank: ClassVar[int] = 1  # proposals a hit wanted: codes that are coarse need more to be rescored
    can = Capabilities(filters=True, append=True)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return int(self._inner.ntotal)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it was built with, for the manifest."""

    @abstractmethod
    def ladder(self, least: int) -> tuple[int, ...]:
        """Breadths worth measuring, ascending, for searches that look at the `least` nearest or more."""

    @abstractmethod
    def candidates(self, breadth: int) -> int:
        """About how many vectors a search of this breadth compares with the query."""

    @classmethod
    @abstractmethod
    def _empty(cls, table: VectorTable) -> Any:
        """A trained FAISS index for vectors like the table's, without any."""

    @abstractmethod
    def _parameters(self, count: int, breadth: int) -> Any:
        """FAISS' search parameters."""

    @classmethod
    def build(cls, table: VectorTable, *, onto: Self | None = None) -> Self:
        """An index over the table; `onto` an earlier one of the table's first slots adds the rest to it."""
        inner = cls._empty(table) if onto is None else onto._inner
        for start in range(inner.ntotal, len(table), ADD):
            inner.add(np.ascontiguousarray(table.block(start, min(start + ADD, len(table)))))
        return cls(inner)

    def write(self, path: Path) -> None:
        faiss_module().write_index(self._inner, str(path))

    @classmethod
    def read(cls, path: Path, name: str, *, count: int, dim: int) -> Self:
        """An index from a file whose checksum has been verified. Raises IndexFileError."""
        faiss = faiss_module()
        try:
            with _limits(faiss, path.stat().st_size):
                inner = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except (RuntimeError, MemoryError) as error:
            raise IndexFileError(
                f"index file {name} cannot be read by FAISS ({error}); rebuild the index", field=name
            ) from error
        shape = (inner.ntotal, inner.d)
        if not isinstance(inner, getattr(faiss, cls.kind)) or shape != (count, dim):
            raise IndexFileError(
                f"index file {name} holds {type(inner).__name__} {shape}; wanted {cls.kind} {(count, dim)}; "
                "rebuild the index",
                field=name,
            )
        fault = cls._fault(inner)
        if fault:
            raise IndexFileError(f"index file {name} {fault}; rebuild the index", field=name)
        return cls(inner)

    @classmethod
    def _fault(cls, inner: Any) -> str | None:
        """What is wrong inside an index of the right class and shape ("holds ...; wanted ..."), None if nothing is."""
        return None

    def search(self, queries: Vectors, k: int, mask: Mask | None = None, *, breadth: int = 0, fetch: int = 0) -> Slots:
        """See `Backend.search`; may find fewer than k even where more exist.

        breadth: how widely it looks (ef of a graph, lists of an inverted file). fetch: under a mask, how many of the
        nearest are looked at. A place is only ever filled by one of these, so a filter that leaves out the query's
        surroundings shows as empty places.
        """
        wanted = min(self.rerank * k + max(_MARGIN, k // 8), len(self))
        count = wanted if mask is None else min(max(wanted, self.rerank * fetch), len(self))
        how = self._parameters(count, breadth or self.ladder(count)[0])
        out = np.empty((len(queries), wanted), np.int64)
        step = max(1, _PROPOSALS // count)
        for start in range(0, len(queries), step):
            _, found = self._inner.search(np.ascontiguousarray(queries[start : start + step]), count, params=how)
            out[start : start + step] = found if mask is None else _first_passing(found, mask, wanted)
        return out


@contextmanager
def _limits(faiss: Any, size: int) -> Iterator[None]:
    """FAISS' limits for a file of `size` bytes: nothing in it can be larger, and every turn of a loop reads a byte."""
    with _READING:
        before = (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def _first_passing(slots: Slots, mask: Mask, wanted: int) -> Slots:
    """The first `wanted` slots (Q, m) of each query that pass the mask, in order, padded with -1."""
    passing = (slots >= 0) & mask[slots]
    first = np.argsort(~passing, axis=1, kind="stable")[:, :wanted]
    return np.where(np.take_along_axis(passing, first, axis=1), np.take_along_axis(slots, first, axis=1), -1)


def faiss_module() -> Any:
    """The faiss module, imported at first use; its type stubs lag behind its Python wrappers."""
    import faiss

    return faiss
