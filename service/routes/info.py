"""GET /v1/info: what is served, within which limits, and whom to cite."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Depends, Request

from astroclip import __version__
from service.engine import Engine
from service.routes.common import ERRORS, engine_of, known_parameters, settings_of
from service.schemas import InfoAnswer
from service.trace import trace_of

__all__ = ["router"]

router = APIRouter(tags=["info"], dependencies=[Depends(known_parameters)])

_PACKAGES = ("torch", "transformers", "numpy", "astropy", "faiss-cpu", "faiss-gpu-cuvs", "fastapi", "pyarrow")
_LIMITS = (
    "max_body_bytes",
    "max_json_bytes",
    "max_files",
    "max_items",
    "max_k",
    "default_k",
    "max_vectors",
    "max_hits",
    "max_query_terms",
    "max_query_depth",
    "max_columns",
    "max_density_bins",
    "max_explain_passes",
    "max_radius_arcsec",
    "max_rows",
    "max_in_flight",
    "max_in_flight_per_caller",
    "max_rate_per_s",
    "body_timeout_s",
)
_CITATIONS = (
    "AstroCLIP: Parker et al. 2024, MNRAS 531, 4990 (arXiv:2310.03024)",
    "Intervals of k-NN: Papadopoulos, Vovk and Gammerman 2011, JAIR 40, 815",
    "Intervals of heads: Chernozhukov, Wuethrich and Zhu 2021, PNAS 118, e2107794118",
    "k-NN with conformal trust: Bates et al. 2023, Ann. Statist. 51, 149 (arXiv:2104.08279)",
)


@router.get(
    "/v1/info",
    response_model=InfoAnswer,
    responses={c: ERRORS[c] for c in (400, 503)},
    summary="Models, indexes, limits, versions, licences, citations",
)
async def info(request: Request) -> dict[str, Any]:
    engine, settings = engine_of(request), settings_of(request)
    return {
        "request_id": trace_of(request).request_id,
        **engine.provenance(),
        "models": [_model(engine)],
        "indexes": [_index(engine)],
        "limits": {
            **{name: getattr(settings, name) for name in _LIMITS},
            "reader": asdict(settings.reader),
            "filter": asdict(settings.filter),
        },
        "versions": _versions(),
        "uptime_s": round(time.time() - engine.started, 1),
        "licences": {"software": "BSD-3-Clause", "index": engine.index.manifest.licence or None},
        "citations": [*_CITATIONS, *engine.index.manifest.citations],
    }


def _model(engine: Engine) -> dict[str, Any]:
    embedder = engine.embedder
    return {
        **engine.provenance()["model"],
        "dim": embedder.dim,
        "modalities": list(embedder.modalities),
        "device": embedder.device,
        "dtype": embedder.dtype,
        "dtype_reason": embedder.dtype_reason,
    }


def _index(engine: Engine) -> dict[str, Any]:
    manifest, catalog = engine.index.manifest, engine.index.catalog
    return {
        **engine.provenance()["index"],
        "survey": manifest.survey,
        "created": manifest.created,
        "counts": dict(manifest.counts),
        "dim": engine.index.dim,
        "properties": [{"name": name, "unit": unit} for name, unit in catalog.properties.items()],
        "default_properties": list(engine.index.default_properties),
        "methods": ["knn", *(["head"] if engine.index.heads else [])],
        "heads": {name: head["properties"] for name, head in manifest.heads.items()},
        "knn": list(manifest.calibration.get("knn", {}).get("pairs", [])),
        "columns": catalog.columns,
        "backends": dict(manifest.backends),
        "licence": manifest.licence or None,
        "citations": list(manifest.citations),
    }


def _versions() -> dict[str, str]:
    found = {"astroclip": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
