"""The corpus of mutated bodies: every file through the readers and the application, again at every run.

`tests/corpus/` holds bodies that campaigns (benchmarks/chaos/fuzz.py) found to matter: one for each refusal they
reached, and every one that was once a fault, after it was mended. All were made by `benchmarks.chaos.mutations`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from astroclip.errors import AstroClipError
from astroclip.io import detect_modality, read_images, read_spectra
from benchmarks.chaos.fuzz import fault

CORPUS = sorted((Path(__file__).parents[1] / "corpus").glob("*"))
CALLS = ("/v1/embed/image", "/v1/embed/spectrum", "/v1/search", "/v1/estimate")
SLOW_S = 3.0


def test_there_is_a_corpus_and_it_is_small() -> None:
    assert len(CORPUS) > 40
    assert sum(path.stat().st_size for path in CORPUS) < 300_000


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_readers_and_application_survive(path: Path, client: TestClient) -> None:
    body, start = path.read_bytes(), time.process_time()
    for read in (read_images, read_spectra, detect_modality):
        try:
            read(body)
        except AstroClipError:
            continue
    kind = "application/json" if path.name.startswith("json") else "application/octet-stream"
    for call in CALLS:
        response = client.post(call, content=body, headers={"content-type": kind})
        assert fault(response.status_code, dict(response.headers), response.content) is None, response.text[:300]
    assert time.process_time() - start < SLOW_S
