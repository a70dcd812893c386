"""The base class of management commands that are async."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import BaseCommand, CommandParser
from django.db import connections

from django_asyncsession.conf import settings
from django_asyncsession.scope import RequestScope, new_session
from django_asyncsession.session.session import Session

from .loop import LoopFactory, run


class AsyncCommand(BaseCommand):
    """A management command whose work is `async def handle_async(self, session, ...)`.

    It runs in an event loop of its own, with a session that is committed at the end and rolled back
    when something is raised, at Ctrl-C for example; in native mode the session is the current one.
    The pools are closed with the loop. The rest is as in Django's `BaseCommand`: what
    `handle_async` returns is printed, and `CommandError` is for what the user has to be told.
    """

    # Alias of the session's database, which --database changes; None is that of the middleware.
    database: str | None = None
    # Options of the session, such as {"autocommit": True}; see `Session`.
    session_options: ClassVar[Mapping[str, Any]] = {}
    # What makes the event loop, such as `uvloop.new_event_loop`.
    loop_factory: LoopFactory | None = None

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Django's parser, with --database unless the command has such an option itself."""
        parser = super().create_parser(prog_name, subcommand, **kwargs)
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(
                "--database",
                default=self.database or settings.ALIAS,
                choices=tuple(connections),
                help="alias of the database (default: %(default)s)",
            )
        return parser

    def handle(self, *args: Any, **options: Any) -> str | None:
        """Run `handle_async`."""

        async def main() -> str | None:
            alias = options.get("database") or self.database
            session = new_session(alias, self.session_options)
            async with RequestScope(session):
                return await self.handle_async(session, *args, **options)

        # Not of self, which would make a method of it.
        return run(self, main, type(self).loop_factory)

    async def handle_async(self, session: Session, *args: Any, **options: Any) -> str | None:
        """The work of the command, for subclasses to write.

        Returns:
            What is printed, or None.
        """
        raise NotImplementedError(
            "subclasses of AsyncCommand must provide an `async def handle_async(self, session, "
            "*args, **options)` method"
        )
