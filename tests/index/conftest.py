"""One made-up survey and the indexes built from it, shared by the index tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from parts_fixture import write_parts, write_shard

from index import BuildOptions, SurveyIndex, build_index

N = 600


@dataclass(frozen=True)
class Toy:
    """parts, survey: directories. truth: what was written, all N objects. indexed: places in it of the index's rows."""

    parts: Path
    survey: Path
    truth: dict[str, np.ndarray]
    indexed: np.ndarray


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    truth = write_parts(root / "parts", N)
    write_shard(root / "survey", [str(i) for i in truth["id"][10:50]] + ["stranger"])
    return Toy(root / "parts", root / "survey", truth, np.flatnonzero(truth["has_image"] | truth["has_spectrum"]))


@pytest.fixture(scope="session")
def graph_root(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with HNSW graphs, float16 vectors and previews."""
    out = tmp_path_factory.mktemp("graph") / "index"
    build_index(toy.parts, out, survey="Toy Survey", previews=toy.survey, options=BuildOptions(hnsw="always"))
    return out


@pytest.fixture(scope="session")
def index(graph_root: Path) -> SurveyIndex:
    return SurveyIndex.open(graph_root)
