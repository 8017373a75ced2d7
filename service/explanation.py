"""Explanations of a match, on request: uploads occluded window by window against the vector of one object.

The passes run in the inference thread in batches, each waiting its turn, so other requests come in between; one
explanation at a time, of at most `max_explain_passes` passes a modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from astroclip.errors import InputError, OverloadError
from astroclip.explain import LEAST_PASSES, Occlusion
from astroclip.types import MODALITIES, Modality
from index.previews import colour_jpeg
from service.engine import Embedded, Engine
from service.explain_plot import data_url, image_svg, spectrum_svg
from service.query import Vector, object_row
from service.schemas import ExplainAgainst, ExplanationModel, ObjectQuery, SearchAnswer, SearchRequest
from service.trace import Trace

__all__ = ["check_explain", "explain_answer"]

_DIGITS = 6
RETRY_EXPLAIN_S = 5.0  # of the model's time, a few explanations of the demo model


def check_explain(engine: Engine, request: SearchRequest, uploads: Mapping[Modality, Any], fmt: str) -> None:
    """Refuse, before any work, what cannot be explained. Raises InputError, NotFoundError, OverloadError."""
    if not request.explain:
        return
    if engine.settings.max_explain_passes < LEAST_PASSES:
        raise InputError(
            "This service does not explain: max_explain_passes is below what it takes. Leave explain out.",
            code="explain_off",
            field="explain",
            limit=engine.settings.max_explain_passes,
        )
    check_explaining(engine)
    if not uploads:
        raise InputError(
            "explain was asked for without an upload; of its own objects the index keeps vectors and previews only, "
            "which cannot be embedded again. Upload the image or the spectrum.",
            code="no_upload",
            field="explain",
        )
    if fmt != "json":
        raise InputError(
            f"explain was asked for in a {fmt} table, which has no place for it. Ask for JSON.",
            code="invalid_value",
            field="explain",
        )
    if isinstance(request.explain, ExplainAgainst):
        object_row(engine.index, request.explain.object_id)


def check_explaining(engine: Engine) -> None:
    """Raises OverloadError where as many explanations as may wait are waiting."""
    limit, waiting = engine.settings.max_explain_waiting, engine.workers.explanations
    if waiting >= limit:
        raise OverloadError(
            f"{waiting} explanations are at work or waiting, as many as may be (max_explain_waiting is "
            f"{limit}). Try again in {RETRY_EXPLAIN_S:g} s, or leave explain out.",
            retry_after_s=RETRY_EXPLAIN_S,
        )


async def explain_answer(
    engine: Engine, trace: Trace, request: SearchRequest, uploads: Mapping[Modality, Embedded], answer: SearchAnswer
) -> dict[Modality, ExplanationModel]:
    """What in each upload made it resemble the top hit, or the object that the request names."""
    against, reference = _reference(engine, request, uploads, answer)
    check_explaining(engine)
    workers = engine.workers
    workers.explanations += 1
    try:
        async with trace.in_time():
            await workers.explaining.acquire()
        try:
            return await _explained(engine, trace, uploads, against, reference)
        finally:
            workers.explaining.release()
    finally:
        workers.explanations -= 1


async def _explained(
    engine: Engine, trace: Trace, uploads: Mapping[Modality, Embedded], against: ObjectQuery, reference: Vector
) -> dict[Modality, ExplanationModel]:
    out: dict[Modality, ExplanationModel] = {}
    for modality in MODALITIES:
        if modality not in uploads or uploads[modality].vector is None:
            continue
        grid = uploads[modality].prepared.grid
        assert grid is not None
        occlusion = await engine.search(trace, Occlusion, grid, engine.settings.max_explain_passes)
        batch = engine.settings.encode_batch
        vectors = []
        for start in range(0, len(occlusion), batch):  # a batch at a time: its views are all that is in memory
            views = await engine.workers.decode(trace, occlusion.views, start, start + batch)
            vectors.append(await engine.encode(trace, views, modality))
        out[modality] = await engine.search(
            trace, _model, engine, occlusion, np.concatenate(vectors), reference, against
        )
    return out


def _reference(
    engine: Engine, request: SearchRequest, uploads: Mapping[Modality, Embedded], answer: SearchAnswer
) -> tuple[ObjectQuery, Vector]:
    """Which object is asked against and its vector: in the modality named, else the hit's, else the target's, else
    the upload's own."""
    named = request.explain if isinstance(request.explain, ExplainAgainst) else None
    if named is None and not answer.hits:
        raise InputError(
            "There is no hit to explain: nothing passes filter and exclusions. Widen them, or name an object.",
            code="no_hit",
            field="explain",
        )
    object_id = named.object_id if named else answer.hits[0].object_id
    hit = next((hit for hit in answer.hits if hit.object_id == object_id), None)
    target = request.target if request.target != "either" else None
    wishes: list[Modality | None] = [named.modality] if named and named.modality else []
    if not wishes:
        wishes = [hit.modality if hit else None, target, *uploads, *MODALITIES]
    row = object_row(engine.index, object_id)
    for modality in wishes:
        vector = None if modality is None else engine.index.vector(row, modality)
        if vector is not None:
            return ObjectQuery(object_id=object_id, modality=modality), vector / np.linalg.norm(vector)
    raise InputError(
        f"The object {object_id[:80]} has no {wishes[0]} in the index. Ask against its other modality.",
        code="no_such_modality",
        field="explain.modality",
    )


def _model(
    engine: Engine, occlusion: Occlusion, vectors: Vector, reference: Vector, against: ObjectQuery
) -> ExplanationModel:
    grid: Any = occlusion.grid
    found = occlusion.read(vectors, reference)
    title = f"{found.modality} against {against.object_id} ({against.modality})"
    most = max(float(found.drop.max()), 0.0)
    note = f"cosine {found.score:.3f}, less {most:.3f} at most; {found.control:.4f} scattered"
    common: dict[str, Any] = {
        "against": against,
        "score": round(found.score, _DIGITS),
        "control": round(found.control, _DIGITS),
        "drop": [round(float(d), _DIGITS) for d in found.drop],
        "share": [round(float(s), _DIGITS) for s in found.share],
        "passes": found.passes,
    }
    if found.modality == "image":
        svg = image_svg(
            colour_jpeg(grid.pixels, engine.embedder.image_grid.bands, 288, 80), found.importance, title, note
        )
        scale = engine.embedder.image_grid.pixel_scale_arcsec
        return ExplanationModel(
            **common, unit="pixel", windows=found.windows.tolist(), pixel_scale_arcsec=scale, plot=data_url(svg)
        )
    wave = engine.embedder.spectrum_grid.wave
    svg = spectrum_svg(wave, grid.flux, grid.ivar, found.importance, title, note)
    ranges = [[round(float(wave[a]), 2), round(float(wave[b - 1]), 2)] for a, b in found.windows]
    return ExplanationModel(**common, unit="Angstrom", windows=ranges, plot=data_url(svg))
