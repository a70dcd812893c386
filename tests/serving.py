"""An application of one view, which runs the SQL that it is given for a long time on the alias that
it is given; for tests that end its server."""

from __future__ import annotations

import os
from typing import Any

import django
from django.http import HttpRequest, HttpResponse
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from django.conf import settings  # noqa: E402
from django.core.handlers.asgi import ASGIHandler  # noqa: E402

settings.ROOT_URLCONF = __name__
settings.ALLOWED_HOSTS = ["*"]
settings.ASYNC_SESSION = {"ALIAS": os.environ.get("SERVED_ALIAS", "default")}


async def run(request: Any) -> HttpResponse:
    """Run the statement of the query string."""
    await request.db_session.execute(request.GET["sql"])
    return HttpResponse("done")


def alive(request: HttpRequest) -> HttpResponse:
    """Answer."""
    return HttpResponse("alive")


urlpatterns = [path("run", run), path("alive", alive)]
django_application = ASGIHandler()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Django's handler."""
    await django_application(scope, receive, send)


async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """The same, with an answer to the events of the server's life."""
    if scope["type"] != "lifespan":
        await django_application(scope, receive, send)
        return
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
