"""Routes, one module a noun; `ROUTERS` is what the application mounts."""

from __future__ import annotations

from fastapi import APIRouter

from service.routes import admin, embed, health, info, lists, metrics, objects, pages, search, vectors, vo

__all__ = ["ROUTERS"]

ROUTERS: tuple[APIRouter, ...] = (
    embed.router,
    search.router,
    vectors.router,
    objects.router,
    lists.router,
    info.router,
    vo.router,
    admin.router,
    health.router,
    metrics.router,
    pages.router,
)
