"""Errors of the API as JSON: {"error": "...", "fields": {...}} with the status that fits."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.core.exceptions import BadRequest, ObjectDoesNotExist
from django.http import Http404, HttpRequest, HttpResponseBase, JsonResponse

logger = logging.getLogger(__name__)

AsyncHandler = Callable[[HttpRequest], Awaitable[HttpResponseBase]]


class InvalidFields(BadRequest):
    """What was sent does not validate; `fields` says what is wrong with each field."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__("some fields are not valid")
        self.fields = fields


class Conflict(Exception):
    """What was asked cannot be done with the data as it is now."""


class ApiErrors:
    """Middleware that answers every error under /api/ with JSON."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: AsyncHandler) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        response = await self.get_response(request)
        # Django has its own pages for an unknown address and a wrong method.
        if _is_api(request) and response.status_code >= 400 and not _is_json(response):
            return _error(getattr(response, "reason_phrase", "error").lower(), response.status_code)
        return response

    async def process_exception(
        self, request: HttpRequest, exception: Exception
    ) -> JsonResponse | None:
        """The answer for an exception of a view."""
        if not _is_api(request):
            return None
        match exception:
            case InvalidFields():
                return _error(str(exception), 400, fields=exception.fields)
            case BadRequest():
                return _error(str(exception), 400)
            case Http404() | ObjectDoesNotExist():
                return _error(str(exception), 404)
            case Conflict():
                return _error(str(exception), 409)
        logger.error("%s %s failed", request.method, request.path, exc_info=exception)
        return _error("the server failed; nothing was saved", 500)


def _is_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")


def _is_json(response: HttpResponseBase) -> bool:
    return response.headers.get("Content-Type", "").startswith("application/json")


def _error(message: str, status: int, **more: Any) -> JsonResponse:
    return JsonResponse({"error": message, **more}, status=status)
