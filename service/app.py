"""The application: settings, engine, middleware, routes. Wiring only."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from astroclip import __version__
from service import errors, logs, openapi
from service.access import Access, cross_origin
from service.admission import Admission
from service.engine import Engine
from service.keys import KeyRing
from service.life import Drain, Life, warm_up
from service.limits import BodyLimit
from service.metrics import Metrics
from service.rates import Rates
from service.routes import ROUTERS
from service.settings import Settings
from service.swap import Swapper
from service.telemetry import Telemetry, open_telemetry
from service.trace import TraceMiddleware
from service.unread import UnreadBody

__all__ = ["make_app"]

log = logging.getLogger("astroclip.service")

# Of the garbage collector, for (containers more than at the last collection, young ones, middle ones); Python's are
# (700, 10, 10). What requests leave is freed as they end, but for a few headers of astropy's: it holds no arrays, so it
# may wait. But each collection looks at all that is at work, too, and nobody is answered meanwhile: under overload
# every two seconds for 50 ms, now not at all.
GC_THRESHOLDS = (100_000, 10, 10)


def make_app(
    settings: Settings | None = None, engine: Engine | None = None, telemetry: Telemetry | None = None
) -> FastAPI:
    """The ASGI application.

    engine: given, it is served (and closed by who made it); else it is loaded from `settings` when the server starts,
    and a model or index that cannot be served ends the start with its error. Raises InputError where there is to be a
    key file that cannot be read. telemetry: where spans go, for tests; else what settings and environment ask for.
    """
    settings = settings or (engine.settings if engine else Settings())
    keys = KeyRing(settings.keys_file) if settings.keys_file else None
    metrics = engine.workers.metrics if engine else Metrics()
    telemetry = telemetry or open_telemetry(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        own = app.state.engine is None  # not the engine itself: its index may be replaced, and is to be freed then
        if own:
            load = partial(Engine.load, settings, metrics, apart=settings.model_process)
            app.state.engine = await asyncio.to_thread(load)
        try:
            await _make_ready(app.state.engine)
            thresholds = gc.get_threshold()
            gc.set_threshold(*GC_THRESHOLDS)
            app.state.swapper.start()
            yield
            gc.set_threshold(*thresholds)
            gc.unfreeze()  # libraries that count what is left at the end would complain
            await app.state.swapper.stop()
        finally:  # also of a start that failed
            if own:
                await asyncio.to_thread(app.state.engine.close)
            await asyncio.to_thread(telemetry.close)

    app = FastAPI(
        title="astroclip",
        version=__version__,
        summary="Galaxy images and optical spectra in one embedding space: embed, search, estimate.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads scripts from another host; ours does not
        redoc_url=None,
        openapi_url="/openapi.json",
        telemetry=telemetry.of_fastapi(),
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.metrics = metrics
    app.state.life, app.state.swapper = Life(), Swapper(app, settings)
    errors.install(app)
    openapi.install(app)
    for router in ROUTERS:
        app.include_router(router)
    # The last added is the outermost.
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
        max_total_bytes=settings.max_body_bytes_in_flight,
    )
    app.add_middleware(Admission, settings=settings)
    app.add_middleware(
        Rates,
        per_s=settings.max_rate_per_s,
        in_flight=settings.max_in_flight_per_caller,
        metrics_per_s=settings.max_metrics_rate_per_s,
    )
    app.add_middleware(Access, keys=keys, metrics_open=settings.metrics_open)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cross_origin(settings.cors_origins))
    app.add_middleware(Drain, life=app.state.life)
    app.add_middleware(UnreadBody, max_bytes=settings.max_body_bytes)  # outside all that may close the connection
    ended = (logs.AccessLog(settings.max_refusals_logged_per_s),) if settings.access_log else ()
    routes = [route for router in ROUTERS for route in router.routes]
    app.add_middleware(TraceMiddleware, metrics=metrics, telemetry=telemetry, routes=routes, ended=ended)
    return app


async def _make_ready(engine: Engine) -> None:
    """Warm, and what is loaded set apart from what is collected. Raises NotReadyError."""
    index = engine.index
    engine.workers.metrics.serving(index.index_id, index.manifest_sha256, index.model_sha256, len(index))
    log.info("serving index %s: %d objects", index.index_id, len(index), extra=_identity(engine))
    await warm_up(engine)
    # What is loaded now stays: a full collection would look through all of it each time, a third of a second in
    # which nobody is answered.
    gc.collect()
    gc.freeze()


def _identity(engine: Engine) -> dict[str, str]:
    """What is served, as the fields of a log line."""
    index, model = engine.index, engine.embedder
    return {"index": index.index_id, "manifest_sha256": index.manifest_sha256, "model_sha256": model.model_sha256}
