"""A command as a project would write it."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from django_asyncsession import Session
from django_asyncsession.management.base import AsyncCommand
from tests.models import User


class Command(AsyncCommand):
    """Adds a user, says so, and then does what it is told."""

    help = "Add a user."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--sql", help="run this as well")
        parser.add_argument("--refuse", action="store_true", help="fail after that")

    async def handle_async(self, session: Session, *args: Any, **options: Any) -> str:
        await session.add(User(name=options["name"]))
        self.stderr.write("added", style_func=str)
        if options["sql"]:
            await session.execute(options["sql"])
        if options["refuse"]:
            raise CommandError("no more users", returncode=3)
        return f"{options['name']} is registered"
