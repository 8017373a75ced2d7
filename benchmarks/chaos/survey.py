"""A large made-up index that belongs to the demo model: clustered vectors under ids, for campaigns on search."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.chaos.server import ROOT
from index.build import BuildOptions, build_index
from service.settings import DEMO_INDEX

__all__ = ["make_index"]

sys.path.append(str(ROOT / "benchmarks"))  # its scripts import each other by their plain names
PART = 50_000
DRAW = 700  # number of the draws of `clustered`: no other campaign's


def make_index(folder: Path, count: int, backend: Literal["hnsw", "ivf-sq8", "none"]) -> Path:
    """An index of `count` spectra in `folder`, built once: what lies there is used again."""
    out = folder / f"{backend}-{count}"
    if not (out / "CURRENT").is_symlink():
        parts = folder / f"parts-{count}"
        if not (parts / "embedding.json").is_file():
            _write_parts(parts, count)
        options = BuildOptions(backend=backend, heads="never")
        build_index(parts, out, survey="clustered", index_id=f"clustered-{backend}", options=options)
    return out


def _write_parts(folder: Path, count: int) -> None:
    from clustered import DIM, draw  # type: ignore[import-not-found, unused-ignore]

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(DRAW)
    for number, start in enumerate(range(0, count, PART)):
        rows = min(PART, count - start)
        vectors = draw(rows, DRAW + number)
        table: dict[str, Any] = {
            "object_id": [f"sim-{start + i:07d}" for i in range(rows)],
            "ra": rng.uniform(0, 360, rows),
            "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, rows))),
            "source": pa.array(["clustered"] * rows),
            "error": pa.nulls(rows, pa.string()),
            "image_embedding": pa.nulls(rows, pa.list_(pa.float32(), DIM)),
            "spectrum_embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
            "quality_flags": pa.array([[]] * rows, pa.list_(pa.string())),
        }
        path = folder / f"part-{number:05d}.parquet"
        pq.write_table(pa.table(table), path)
        record = {"rows": rows, "failed": 0, "parquet_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        path.with_suffix(".done.json").write_text(json.dumps(record))
    manifest = json.loads((DEMO_INDEX / "manifest.json").read_text())
    about = {
        "format_version": 1,
        "model_id": manifest["model"].get("id", "demo"),
        "model_sha256": manifest["model"]["sha256"],
        "preprocess_version": manifest["preprocess_version"],
        "dim": DIM,
    }
    (folder / "embedding.json").write_text(json.dumps(about))
