"""Inverted files: vectors in lists by their nearest centroid, compressed; a search looks at the nearest lists.

For tables whose graph would not fit into memory. `ivf-sq8` keeps a byte a dimension, `ivf-pq` a
product code of a byte for two, whose coarse distances need several proposals a hit; the stored vectors rescore them in
either case. Lists are 4 sqrt(n), rounded to a power of two (FAISS' guideline for a million), each
centroid learned from 64 vectors drawn by a fixed seed; appended vectors go into the lists there are, and the recall
measured anew says what that costs.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from index.backends.faiss_file import FaissBackend, faiss_module
from index.vectors import VectorTable

__all__ = ["NPROBE_LADDER", "IvfPqBackend", "IvfSq8Backend"]

NPROBE_LADDER = (4, 8, 16, 32, 64, 128, 256, 512)  # lists looked at
_POINTS = 64  # training vectors a centroid
_ITERATIONS = 10
_SEED = 1234


class IvfBackend(FaissBackend):
    """An inverted file; a breadth is its nprobe."""

    least: ClassVar[int] = 512  # fewer give centroids nothing to learn from

    @classmethod
    def _codes(cls, coarse: Any, dim: int, lists: int) -> Any:
        """The untrained FAISS index."""
        raise NotImplementedError

    @classmethod
    def _empty(cls, table: VectorTable) -> Any:
        lists = max(1, min(2 ** round(math.log2(4 * math.sqrt(len(table)))), len(table) // 39))
        faiss = faiss_module()
        inner = cls._codes(faiss.IndexFlatL2(table.dim), table.dim, lists)
        inner.cp.niter = _ITERATIONS
        sample = np.random.default_rng(_SEED).permutation(len(table))[: max(_POINTS * lists, 20_000)]
        inner.train(np.ascontiguousarray(table.take(np.sort(sample))))
        return inner

    @classmethod
    def _fault(cls, inner: Any) -> str | None:
        faiss = faiss_module()
        if inner.quantizer.ntotal != inner.nlist or inner.quantizer.d != inner.d:
            return f"holds {inner.quantizer.ntotal} centroids; wanted {inner.nlist}"
        sizes = [inner.invlists.list_size(i) for i in range(inner.nlist)]
        if sum(sizes) != inner.ntotal:
            return f"holds {sum(sizes)} entries in its lists; wanted {inner.ntotal}"
        met = np.zeros(inner.ntotal, bool)
        for i, size in enumerate(sizes):
            if size:
                ids = faiss.rev_swig_ptr(inner.invlists.get_ids(i), size)
                if ids.min() < 0 or ids.max() >= inner.ntotal:
                    return f"names a vector outside 0..{inner.ntotal - 1}"
                met[ids] = True
        return None if met.all() else "names some vectors twice, others not at all"

    @property
    def settings(self) -> dict[str, Any]:
        return {"lists": int(self._inner.nlist), "code_bytes": int(self._inner.code_size)}

    def ladder(self, least: int) -> tuple[int, ...]:
        lists = int(self._inner.nlist)
        return (*(n for n in NPROBE_LADDER if n < lists), lists) if lists <= NPROBE_LADDER[-1] else NPROBE_LADDER

    def candidates(self, breadth: int) -> int:
        return round(min(1.0, breadth / self._inner.nlist) * len(self))

    def _parameters(self, count: int, breadth: int) -> Any:
        return faiss_module().SearchParametersIVF(nprobe=min(breadth, int(self._inner.nlist)))


class IvfSq8Backend(IvfBackend):
    """A byte a dimension: distances good enough that a few proposals beyond k do."""

    name: ClassVar[str] = "ivf-sq8"
    kind: ClassVar[str] = "IndexIVFScalarQuantizer"

    @classmethod
    def _codes(cls, coarse: Any, dim: int, lists: int) -> Any:
        faiss = faiss_module()
        coarse.this.disown()
        inner = faiss.IndexIVFScalarQuantizer(coarse, dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
        inner.own_fields = True
        return inner


class IvfPqBackend(IvfBackend):
    """A product code of a byte for two dimensions (four where their number is odd)."""

    name: ClassVar[str] = "ivf-pq"
    kind: ClassVar[str] = "IndexIVFPQ"
    least: ClassVar[int] = 1024
    rerank: ClassVar[int] = 4

    @classmethod
    def _codes(cls, coarse: Any, dim: int, lists: int) -> Any:
        faiss = faiss_module()
        coarse.this.disown()
        inner = faiss.IndexIVFPQ(coarse, dim, lists, dim // 2 if dim % 2 == 0 else dim, 8, faiss.METRIC_L2)
        inner.own_fields = True
        inner.use_precomputed_table = -1  # a kilobyte of floats a list and byte of code: 270 MB at 4,096 lists
        inner.pq.cp.niter = _ITERATIONS
        inner.pq.cp.max_points_per_centroid = _POINTS
        return inner
