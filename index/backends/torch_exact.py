"""Exact search by torch: the same products as `exact`, on a GPU in half precision, or on the processor.

A GPU holds the table in float16 (256 MB a million vectors of 128) and multiplies at the rate it can read it. Rounding
moves a cosine by up to `_ROUNDING`, so more than k are proposed, and where vectors crowd so closely about the k-th that
rounding could have pushed a true one out, the search is made again with more: rescoring in float32 then has every true
neighbour to choose from. On a processor float32 is as fast as half precision, and a table in memory is not copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from astroclip.errors import InputError
from index.backends.base import Capabilities, Mask, Slots, Vectors
from index.vectors import VectorTable

__all__ = ["TorchBackend"]

_CHUNK = 262_144  # vectors a product: scores of 256 queries take 256 MB
_QUERIES = 256
_MARGIN = 16  # proposals beyond k
_ROUNDING = {"float16": 2e-4, "float32": 1e-6}  # of a cosine: float16 about 2e-5 rms at D = 128, ten times that allowed


class TorchBackend:
    """Brute force over one table.

    device: torch's name of one, "auto" = a GPU where there is one. dtype: "float16", "float32", "auto" = half
    precision on a GPU. Raises InputError where the device cannot hold the table.
    """

    name = "torch"
    can = Capabilities(exact=True, filters=True, range_search=True, farthest=True)

    def __init__(self, table: VectorTable, device: str = "auto", dtype: str = "auto") -> None:
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._torch, self._device = torch, torch.device(device)
            self.dtype = dtype if dtype != "auto" else "float32" if self._device.type == "cpu" else "float16"
            self._rounding = _ROUNDING[self.dtype]
            self._vectors = self._load(table)
        except (RuntimeError, AssertionError) as error:  # out of memory, no such device, a wheel without CUDA
            raise InputError(
                f"{len(table)} vectors of {table.dim} cannot be held by {device[:40]!r} ({str(error)[:200]}); wanted "
                "cpu, or a GPU that holds them; search with numpy",
                code="no_gpu",
                field="device",
            ) from error

    def _load(self, table: VectorTable) -> Any:
        torch = self._torch
        if self.dtype == "float32" and self._device.type == "cpu":
            return torch.from_numpy(table.block(0, len(table)))
        out = torch.empty((len(table), table.dim), dtype=getattr(torch, self.dtype), device=self._device)
        for start in range(0, len(table), _CHUNK):
            block = np.ascontiguousarray(table.block(start, start + _CHUNK))
            out[start : start + len(block)] = torch.from_numpy(block).to(out.dtype)
        return out

    def search(self, queries: Vectors, k: int, mask: Mask | None = None, *, breadth: int = 0, fetch: int = 0) -> Slots:
        """See `Backend.search`."""
        torch = self._torch
        with torch.inference_mode():
            allowed = None if mask is None else torch.from_numpy(np.flatnonzero(mask)).to(self._device)
            count = len(self._vectors) if allowed is None else len(allowed)
            k = min(k, count)
            if not k:
                return np.full((len(queries), 0), -1, np.int64)
            parts = [
                self._certain(queries[i : i + _QUERIES], k, allowed, count) for i in range(0, len(queries), _QUERIES)
            ]
        width = max(part.shape[1] for part in parts)
        return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts])

    def _certain(self, queries: Vectors, k: int, allowed: Any, count: int) -> Slots:
        """As many proposals as it takes for the last to lie further off than rounding reaches from the k-th."""
        asked = self._torch.from_numpy(np.ascontiguousarray(queries)).to(self._device, self._vectors.dtype)
        wanted = min(k + _MARGIN, count)
        while True:
            scores, slots = self._top(asked, wanted, allowed, count)
            if wanted == count or bool((scores[:, -1] < scores[:, k - 1] - 2 * self._rounding).all()):
                return np.asarray(slots.cpu().numpy(), np.int64)
            wanted = min(4 * wanted, count)

    def _top(self, queries: Any, wanted: int, allowed: Any, count: int) -> tuple[Any, Any]:
        """Scores and slots of the `wanted` best, descending."""
        torch = self._torch
        best_scores = torch.empty((len(queries), 0), dtype=torch.float32, device=self._device)
        best_slots = torch.empty((len(queries), 0), dtype=torch.int64, device=self._device)
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            if allowed is None:
                slots, vectors = torch.arange(start, stop, device=self._device), self._vectors[start:stop]
            else:
                slots = allowed[start:stop]
                vectors = self._vectors[slots]
            scores = torch.cat([best_scores, self._products(queries, vectors)], dim=1)
            slots = torch.cat([best_slots, slots.expand(len(queries), -1)], dim=1)
            best_scores, first = scores.topk(min(wanted, scores.shape[1]), dim=1)
            best_slots = slots.gather(1, first)
        return best_scores, best_slots

    def _products(self, queries: Any, vectors: Any) -> Any:
        """Cosines in float32: summed so on a GPU as well, since a float16 near 1 has steps of 5e-4."""
        if self._device.type == "cuda" and self.dtype == "float16":
            return self._torch.mm(queries, vectors.T, out_dtype=self._torch.float32)
        return queries.float() @ vectors.float().T
