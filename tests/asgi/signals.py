"""Receivers of the signals of a request, which note what they hear."""

from __future__ import annotations

from typing import Any

from django.core.signals import request_finished, request_started

from tests.asgi.site import note


class Receivers:
    """Receivers of both signals, connected in the block: sync ones, or async ones, which Django
    before 6.1 calls at the same time as the others."""

    def __init__(self, sender: Any = None, are_async: bool = False) -> None:
        self.sender = sender
        methods = (self.astarted, self.afinished) if are_async else (self.started, self.finished)
        self.all = tuple(zip((request_started, request_finished), methods, strict=True))

    def started(self, sender: Any, scope: Any, **kwargs: Any) -> None:
        note(("started", sender, scope["path"]))

    def finished(self, sender: Any, **kwargs: Any) -> None:
        note(("finished", sender))

    async def astarted(self, sender: Any, scope: Any, **kwargs: Any) -> None:
        self.started(sender, scope)

    async def afinished(self, sender: Any, **kwargs: Any) -> None:
        self.finished(sender)

    def __enter__(self) -> None:
        for signal, receiver in self.all:
            signal.connect(receiver, sender=self.sender)

    def __exit__(self, *exc_info: object) -> None:
        for signal, receiver in self.all:
            signal.disconnect(receiver, sender=self.sender)
