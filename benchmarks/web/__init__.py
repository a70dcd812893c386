"""Requests per second: applications under uvicorn in processes of their own, and their load."""

from __future__ import annotations

from typing import NamedTuple


class Application(NamedTuple):
    """One application: its title, where it is, what must be installed for it."""

    title: str
    place: str
    needs: tuple[str, ...] = ()


_DJANGO = "benchmarks.web.django_views:application"
_SQLALCHEMY = ("sqlalchemy", "asyncpg")
# Name, as an option has it; the unit first.
APPLICATIONS = {
    "django": Application("Django's async ORM", _DJANGO),
    "session": Application("session view", _DJANGO),
    "native": Application("native mode, Django's view", _DJANGO),
    "django_usual": Application("Django's async ORM, usual middleware", _DJANGO),
    "session_usual": Application("session view, usual middleware", _DJANGO),
    "starlette": Application(
        "Starlette, SQLAlchemy",
        "benchmarks.web.starlette_views:application",
        ("starlette", *_SQLALCHEMY),
    ),
    "fastapi": Application(
        "FastAPI, SQLAlchemy",
        "benchmarks.web.fastapi_views:application",
        ("fastapi", *_SQLALCHEMY),
    ),
}
