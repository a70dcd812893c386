"""manage.py asyncsql: run SQL through a session, read-only unless told otherwise."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import getpass
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from django_asyncsession.exceptions import AsyncSessionError
from django_asyncsession.interface import databases
from django_asyncsession.management.formats import make_format
from django_asyncsession.management.job import Job, describe, make_job, one_line
from django_asyncsession.management.loop import run
from django_asyncsession.results import BaseResultSet
from django_asyncsession.scanner import scanner
from django_asyncsession.session.session import Session
from django_asyncsession.statements import is_query

logger = logging.getLogger("django_asyncsession.asyncsql")

ROWS_PER_CHUNK: Final = 500
PROGRESS_SECONDS: Final = 0.5
# What a database, a driver or our own session says to SQL and parameters that do not work.
_REFUSALS: Final = (Error, AsyncSessionError, LookupError, TypeError, ValueError, OSError)

DESCRIPTION = """
Run SQL on a database of the project, read-only and rolled back unless --write is given.

Prefer --file or standard input to an argument, which the shell's history and the process list keep.
Read-only guards against mistakes, not against malice: a privileged database role can still do harm
from a read-only transaction; choose a lesser one with --role.
"""


class Command(BaseCommand):
    """Run SQL on a database of the project."""

    help = DESCRIPTION
    # The database may be in any state.
    requires_system_checks = ()

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """A parser that keeps the lines of the description."""
        formatter = argparse.RawDescriptionHelpFormatter
        return super().create_parser(prog_name, subcommand, formatter_class=formatter, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        """The SQL, where it runs, how its rows are shown, and what it may do."""
        add = parser.add_argument
        add("sql", nargs="?", help="the SQL; without it, standard input is read")
        add("--file", help="read the SQL from this file")
        add("--database", help="alias of the database; needed when there are several")
        add(
            "--param",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="value for %%(NAME)s, as text; NAME:=VALUE takes JSON: 1, true, null; repeatable",
        )
        add("--format", choices=("table", "json", "csv", "markdown"), default="table")
        add("--limit", type=int, default=1000, help="rows shown; 0 for all (default: %(default)s)")
        add(
            "--timeout",
            type=float,
            default=30.0,
            help="seconds that a statement may take; 0 for no limit (default: %(default)s)",
        )
        add("--multi", action="store_true", help="allow several statements, in one transaction")
        add("--role", help="database role to take on (PostgreSQL)")
        add("--write", action="store_true", help="allow changes, and commit them")
        add("--yes", action="store_true", help="with --write: do not ask")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the SQL and print what it gives."""
        job = make_job(options)
        self._say(describe(job))
        if job.write and not options["yes"]:
            self._confirm(job)
        with audited(job) as progress, self._refusals_in_one_line(job):
            run(self, Run(job, self, progress).run)
        what = "committed" if job.write else "rolled back"
        self._say(f"{rows(progress.rows)} in {progress.seconds:.2f} s, {what}")

    def _confirm(self, job: Job) -> None:
        if not sys.stdin.isatty():
            raise CommandError("--write needs --yes when nobody can be asked")
        if input(f"This may change {job.alias!r} for good. Type yes to go on: ").strip() != "yes":
            raise CommandError("not run")

    @contextlib.contextmanager
    def _refusals_in_one_line(self, job: Job) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _leave_quietly()
        except _REFUSALS as exc:
            raise CommandError(one_line(exc, job.alias) + _remedy(exc, job)) from exc

    def _say(self, text: str) -> None:
        # Not the result: so that standard output has the rows and nothing else.
        self.stderr.write(text, style_func=str)


def _remedy(error: BaseException, job: Job) -> str:
    """What lets the job do what the database refused, if that is an option of the command."""
    is_refused = not job.write and re.search("read.?only", str(error), re.IGNORECASE)
    return "; --write allows changes, and commits them" if is_refused else ""


def _leave_quietly() -> NoReturn:
    """The reader of our output (head, less) is gone; flushing must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def rows(number: int) -> str:
    """A number of rows, as one says it."""
    return "1 row" if number == 1 else f"{number:,} rows"


@dataclasses.dataclass
class Progress:
    """How far the job has come."""

    # Shown or changed.
    rows: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


@contextlib.contextmanager
def audited(job: Job) -> Iterator[Progress]:
    """Log one line about the job, however it ends."""
    progress = Progress()
    outcome = "failed"
    try:
        yield progress
        outcome = "done"
    finally:
        logger.info(
            "user=%s alias=%s mode=%s sha256=%s rows=%d seconds=%.3f outcome=%s",
            _user(),
            job.alias,
            "write" if job.write else "read",
            hashlib.sha256(job.sql.encode("utf-8", "surrogatepass")).hexdigest(),
            progress.rows,
            progress.seconds,
            outcome,
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run as a user that has no name.
        return str(os.getuid())


# The run itself


class Run:
    """Runs a job: its statements one after another in one transaction."""

    def __init__(self, job: Job, command: Command, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._out, self._err = command.stdout, command.stderr
        self._is_first = True
        self._vendor = ""

    async def run(self) -> None:
        """Run every statement; then commit or roll back."""
        db = databases[self._job.alias]
        self._vendor = db.vendor
        shown = asyncio.create_task(self._show_progress())
        try:
            async with db.get_session(
                read_only=not self._job.write, timeout=self._job.timeout
            ) as session:
                await self._run_all(session)
        finally:
            shown.cancel()
            self._clear_progress()

    async def _run_all(self, session: Session) -> None:
        if self._job.role:
            await session.execute("SELECT set_config('role', %s, true)", [self._job.role])
        for sql in self._job.statements:
            await self._run_one(session, sql)
        if not self._job.write:
            session.set_rollback(True)

    async def _run_one(self, session: Session, sql: str) -> None:
        async with session.one_connection() as transaction:
            if is_query(sql, scanner(self._vendor)):
                result = await transaction.stream(sql, self._job.params, ROWS_PER_CHUNK)
            else:
                result = await transaction.cursor(sql, self._job.params)
            async with result:
                if result.keys:
                    await self._print(result)
                elif result.rowcount >= 0:
                    self._progress.rows += result.rowcount
                    self._say(f"{rows(result.rowcount)} changed")
            if transaction.wrapper.left_by_sql:
                raise CommandError("the SQL ended the transaction; nothing after it was run")

    async def _print(self, result: BaseResultSet) -> None:
        form = make_format(self._job.format, **self._terminal())
        self._write(form.start(result.keys), between=True)
        limit, shown = self._job.limit, 0
        while True:
            # One more than the limit tells whether there are more.
            wanted = min(ROWS_PER_CHUNK, limit + 1 - shown) if limit else ROWS_PER_CHUNK
            chunk = await result.fetch_many(wanted)
            shows = chunk[: limit - shown] if limit else chunk
            if shows:
                self._write(form.rows([row.values() for row in shows]))
            shown += len(shows)
            self._progress.rows += len(shows)
            if len(shows) < len(chunk):
                self._say(f"only the first {rows(limit)}; --limit 0 shows all")
            if len(chunk) < wanted or len(shows) < len(chunk):
                break
        self._write(form.end())

    def _terminal(self) -> dict[str, Any]:
        if not self._out.isatty():
            return {}
        return {"width": shutil.get_terminal_size().columns, "colour": "NO_COLOR" not in os.environ}

    def _write(self, text: str, between: bool = False) -> None:
        self._clear_progress()
        if between:
            # Several results are set apart by an empty line.
            text = text if self._is_first else f"\n{text}"
            self._is_first = False
        if text:
            self._out.write(text, ending="")

    def _say(self, text: str) -> None:
        self._clear_progress()
        self._err.write(text, style_func=str)

    async def _show_progress(self) -> None:
        while self._err.isatty():
            await asyncio.sleep(PROGRESS_SECONDS)
            # Rows on the same terminal are progress enough.
            if not (self._out.isatty() and self._progress.rows):
                text = f"\r\x1b[K{self._progress.rows:,} rows, {self._progress.seconds:.0f} s"
                self._err.write(text, style_func=str, ending="")
                self._err.flush()

    def _clear_progress(self) -> None:
        if self._err.isatty():
            self._err.write("\r\x1b[K", style_func=str, ending="")
