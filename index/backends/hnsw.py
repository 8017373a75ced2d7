"""HNSW search: a FAISS small-world graph over float16 vectors.

The backend of choice up to what memory holds, 0.6 GB a million vectors of 128. Defaults from measurements on 2 cores
(1 M x 128): M = 32, efConstruction = 80 builds in 160 s and finds 0.995 of the true ten nearest at ef = 32. What an
index reaches is measured at build time and written into its manifest.
"""

from __future__ import annotations

from typing import Any, ClassVar

from index.backends.faiss_file import ADD, FaissBackend, faiss_module
from index.vectors import VectorTable

__all__ = ["EF_CONSTRUCTION", "EF_LADDER", "HnswBackend", "M"]

M = 32
EF_CONSTRUCTION = 80
EF_LADDER = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # breadths: nearest candidates kept while walking the graph


class HnswBackend(FaissBackend):
    """A FAISS HNSW graph; a breadth is its efSearch."""

    name: ClassVar[str] = "hnsw"
    kind: ClassVar[str] = "IndexHNSW"

    @classmethod
    def _empty(cls, table: VectorTable) -> Any:
        faiss = faiss_module()
        graph = faiss.IndexHNSWSQ(table.dim, faiss.ScalarQuantizer.QT_fp16, M, faiss.METRIC_L2)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        graph.train(table.block(0, min(len(table), ADD)))  # fp16 has nothing to learn; FAISS wants the call
        return graph

    @property
    def settings(self) -> dict[str, Any]:
        return {"m": M, "ef_construction": EF_CONSTRUCTION}

    def ladder(self, least: int) -> tuple[int, ...]:
        return tuple(ef for ef in EF_LADDER if least <= ef < 2 * len(self)) or (least,)

    def candidates(self, breadth: int) -> int:
        return min(breadth, len(self))

    def _parameters(self, count: int, breadth: int) -> Any:
        return faiss_module().SearchParametersHNSW(efSearch=max(breadth, count))
