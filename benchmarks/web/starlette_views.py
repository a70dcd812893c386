"""Starlette with SQLAlchemy."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.web.sqlalchemy_engine import one, sessions, several


async def get(request: Request) -> JSONResponse:
    """A book."""
    async with sessions.begin() as session:
        return JSONResponse(await one(session, request.path_params["key"]))


async def list_all(request: Request) -> JSONResponse:
    """The books of an author."""
    async with sessions.begin() as session:
        return JSONResponse(await several(session, request.path_params["key"]))


application = Starlette(
    routes=[Route("/books/{key:int}", get), Route("/authors/{key:int}/books", list_all)]
)
