"""Fixtures: the application over the tiny model and a small index, and objects to ask it with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from sky import make_image, make_spectrum
from starlette.testclient import TestClient
from survey import build_survey

from astroclip.types import Image, Spectrum
from service.app import make_app
from service.engine import Engine
from service.settings import Settings


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory: pytest.TempPathFactory, tiny_embedder) -> Path:  # type: ignore[no-untyped-def]
    return build_survey(tmp_path_factory.mktemp("survey"), tiny_embedder)


@pytest.fixture(scope="session")
def settings(index_dir: Path, tiny_model_dir: Path) -> Settings:
    # Tests ask faster than people do; those of the rates set them.
    return Settings(index_dir=index_dir, model_dir=tiny_model_dir, max_k=100, max_rate_per_s=0, model_process=False)


@pytest.fixture(scope="session")
def engine(settings: Settings) -> Iterator[Engine]:
    engine = Engine.load(settings)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def client(settings: Settings, engine: Engine) -> Iterator[TestClient]:
    with TestClient(make_app(settings, engine)) as client:
        yield client


@contextmanager
def asking(app: FastAPI, **always: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """post(query, status, files=, **request) of /v1/estimate: the answer, or the error of a refused request."""
    with TestClient(app) as client:

        def post(query: Any = None, status: int = 200, *, files: Any = None, **request: Any) -> dict[str, Any]:
            request = {**always, **({"query": query} if query else {}), **request}
            if files:
                response = client.post("/v1/estimate", files=files, data={"request": json.dumps(request)})
            else:
                response = client.post("/v1/estimate", json=request)
            assert response.status_code == status, response.text
            return response.json() if status == 200 else response.json()["error"]

        post.client = client  # type: ignore[attr-defined]
        yield post


@pytest.fixture(scope="session")
def galaxy() -> Image:
    return make_image(np.random.default_rng(99), noise=0.3)


@pytest.fixture(scope="session")
def spectrum() -> Spectrum:
    return make_spectrum(np.random.default_rng(98), redshift=0.3, noise=0.2)
