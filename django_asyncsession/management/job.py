"""What asyncsql was asked to do, read from its command line; nothing here touches a database."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError
from django.db import connections

from django_asyncsession.scanner import scanner
from django_asyncsession.statements import controls_transaction

from .formats import escape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run, and how."""

    alias: str
    sql: str
    statements: Sequence[str]
    params: dict[str, Any] | None
    format: str
    # Rows printed of each result; 0: all.
    limit: int
    # Seconds that a statement may take; None: no limit.
    timeout: float | None
    role: str | None
    write: bool


def make_job(options: dict[str, Any]) -> Job:
    """The job that the command line asks for.

    Raises:
        CommandError: it asks for something that cannot be.
    """
    if options["limit"] < 0 or not options["timeout"] >= 0:
        raise CommandError("--limit and --timeout are 0 or more")
    alias = choose_database(options["database"])
    if options["role"] and connections[alias].vendor != "postgresql":
        raise CommandError(f"--role is for PostgreSQL; {alias!r} is {connections[alias].vendor}")
    sql = read_sql(options["sql"], options["file"])
    return Job(
        alias=alias,
        sql=sql,
        statements=split_sql(sql, options["multi"], connections[alias].vendor),
        params=parse_params(options["param"]),
        format=options["format"],
        limit=options["limit"],
        timeout=options["timeout"] or None,
        role=options["role"],
        write=options["write"],
    )


def choose_database(alias: str | None) -> str:
    """The alias that was asked for, or the only one there is."""
    aliases = sorted(connections)
    if alias is None and len(aliases) > 1:
        raise CommandError(f"--database is needed, one of: {', '.join(aliases)}")
    alias = alias or aliases[0]
    if alias not in aliases:
        raise CommandError(
            f"no database {escape(alias)!r} in DATABASES; it has {', '.join(aliases)}"
        )
    return alias


def read_sql(argument: str | None, file: str | None) -> str:
    """The SQL from the argument, the file, or else standard input."""
    if argument is not None and file is not None:
        raise CommandError("give the SQL as an argument or with --file, not both")
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as exc:
            raise CommandError(f"cannot read {escape(file)!r}: {escape(str(exc))}") from exc
    if argument not in (None, "-"):
        return str(argument)
    if sys.stdin.isatty():
        raise CommandError("no SQL; give it as an argument, with --file, or on standard input")
    return sys.stdin.read()


def split_sql(sql: str, multi: bool, vendor: str) -> list[str]:
    """The statements to run.

    Raises:
        CommandError: there is none, several without --multi, or one that ends our transaction.
    """
    reader = scanner(vendor)
    found = reader.split(sql)
    if not found:
        raise CommandError("there is no statement in the SQL")
    if len(found) > 1 and not multi:
        raise CommandError(f"{len(found)} statements; --multi runs them in one transaction")
    for statement in found:
        if word := controls_transaction(statement, reader):
            raise CommandError(f"{word} is not possible here; --write commits, all else rolls back")
    # One statement goes to the database as it was written.
    return found if multi else [sql]


def parse_params(given: Sequence[str]) -> dict[str, Any] | None:
    """The values by name; None without any, so that a % in the SQL stands for itself."""
    params = {}
    for text in given:
        name, equals, value = text.partition("=")
        is_json = name.endswith(":")
        name = name.removesuffix(":")
        if not equals or not name:
            raise CommandError(f"--param is NAME=VALUE or NAME:=JSON, not {escape(text)!r}")
        try:
            params[name] = json.loads(value) if is_json else value
        except ValueError as exc:
            raise CommandError(f"--param {escape(name)} is not JSON: {exc}") from exc
    return params or None


def describe(job: Job) -> str:
    """Where the job runs and what it may do; for people, without any secret."""
    connection = connections[job.alias]
    settings = connection.settings_dict
    options = settings.get("OPTIONS", {})
    host = settings.get("HOST") or options.get("host", "")
    port = settings.get("PORT") or options.get("port", "")
    parts = {
        "service": options.get("service"),
        "user": settings.get("USER") or options.get("user"),
        "host": f"{host}:{port}" if host and port else host,
        "database": settings.get("NAME") or options.get("dbname"),
        "role": job.role,
    }
    given = [f"{name} {escape(str(value))!r}" for name, value in parts.items() if value]
    mode = "changes are committed" if job.write else "read-only, rolled back"
    return f"{job.alias}: {connection.vendor}, {', '.join(given)}; {mode}"


def one_line(error: BaseException, alias: str) -> str:
    """The error's class and first line, with nothing that acts on a terminal and no password."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0].strip()}"
    password = connections[alias].settings_dict.get("PASSWORD")
    return escape(text.replace(str(password), "***") if password else text)
