"""The application: settings, engine, middleware, routes. Wiring only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from astroclip import __version__
from service import errors, openapi
from service.admission import Admission
from service.engine import Engine
from service.life import Drain, Life, warm_up
from service.limits import BodyLimit
from service.metrics import Metrics
from service.routes import ROUTERS
from service.settings import Settings
from service.swap import Swapper
from service.trace import TraceMiddleware

__all__ = ["make_app"]


def make_app(settings: Settings | None = None, engine: Engine | None = None) -> FastAPI:
    """The ASGI application.

    engine: given, it is served (and closed by who made it); else it is loaded from `settings` when the server starts,
    and a model or index that cannot be served ends the start with its error.
    """
    settings = settings or (engine.settings if engine else Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        own = app.state.engine is None  # not the engine itself: its index may be replaced, and is to be freed then
        if own:
            app.state.engine = await asyncio.to_thread(Engine.load, settings, app.state.metrics)
        await warm_up(app.state.engine)
        app.state.swapper.start()
        yield
        await app.state.swapper.stop()
        if own:
            await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(
        title="astroclip",
        version=__version__,
        summary="Galaxy images and optical spectra in one embedding space: embed, search, estimate.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads scripts from another host; ours does not
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.metrics = engine.workers.metrics if engine else Metrics()
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
    app.add_middleware(Drain, life=app.state.life)
    app.add_middleware(TraceMiddleware)
    return app
