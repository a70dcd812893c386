"""manage.py asyncsql: what it prints, what it refuses, and that it changes nothing unasked.

With real commits where they, time limits or another process are the point.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connections

from django_asyncsession import DatabaseInterface
from django_asyncsession.exceptions import SharedConnectionWarning
from django_asyncsession.management import formats, job
from django_asyncsession.scanner import scanner
from django_asyncsession.statements import controls_transaction, is_query
from tests.models import User

NASTY = "\x1b[31mred\x9b\u202e\r\x00"


def make_users(alias: str) -> None:
    for name, level in (("heck", 1), ("anna", 2), ("=1+1", 3)):
        User.objects.using(alias).create(name=name, level=level)


@pytest.fixture
def users(database: DatabaseInterface) -> str:
    """Three users on each database in turn, in the test's transaction, which the command uses."""
    make_users(database.alias)
    return database.alias


@pytest.fixture
def real_users(alias: str, empty_tables: None) -> str:
    """Three users that are committed, for what a transaction that is read-only, or committed,
    does."""
    make_users(alias)
    return alias


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def asyncsql(*args: str) -> tuple[str, str]:
    """Run the command; returns what it wrote to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    call_command("asyncsql", *args, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()


def names(alias: str) -> list[str]:
    return list(User.objects.using(alias).order_by("level").values_list("name", flat=True))


# Formats


@pytest.mark.parametrize("name", ["table", "json", "csv", "markdown"])
def test_no_value_or_column_name_reaches_the_terminal_as_a_control_character(name: str) -> None:
    form = formats.make_format(name)
    text = form.start([f"a{NASTY}"]) + form.rows([[NASTY], [None], [{"k": NASTY}]]) + form.end()
    assert "red" in text
    assert not [c for c in text if c in NASTY and c not in "[31mred"]


def test_a_line_break_in_a_value_stays_inside_its_row() -> None:
    for name in ("table", "json", "markdown"):
        form = formats.make_format(name)
        form.start(["a"])
        form.rows([["the first row"]])
        assert form.rows([["one\ntwo"]]).strip(",\n").count("\n") == 0


@pytest.mark.parametrize("start", list("=+-@\t\r"))
def test_a_spreadsheet_takes_no_cell_for_a_formula(start: str) -> None:
    form = formats.make_format("csv")
    text = form.start([f"{start}head"]) + form.rows([[f"{start}cmd()"]])
    for row in csv.reader(io.StringIO(text)):
        assert row[0].startswith("'")


def test_negative_numbers_stay_numbers_in_csv() -> None:
    form = formats.make_format("csv")
    form.start(["a", "b", "c"])
    assert form.rows([[-1, decimal.Decimal("-1.50"), None]]) == "-1,-1.50,\n"


def test_csv_keeps_commas_quotes_and_line_breaks() -> None:
    form = formats.make_format("csv")
    form.start(["a", "b"])
    text = form.rows([['say "hi", you', "one\ntwo"]])
    assert list(csv.reader(io.StringIO(text))) == [['say "hi", you', "one\ntwo"]]


def test_json_is_json_and_loses_no_column() -> None:
    form = formats.make_format("json")
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    row = [1, 2, NASTY, None, float("nan"), decimal.Decimal("1.50"), moment, b"\x00\xff"]
    columns = ["id", "id", "text", "nothing", "nan", "price", "moment", "bytes"]
    text = form.start(columns) + form.rows([row]) + form.rows([row]) + form.end()
    first, second = json.loads(text)
    assert first == second
    assert first["id"] == 1 and first["id_2"] == 2
    assert first["text"] == NASTY and first["nothing"] is None and first["nan"] == "nan"
    assert first["price"] == "1.50" and first["moment"] == "2026-01-02T03:04:05.678901+00:00"


@pytest.mark.parametrize(("name", "expected"), [("json", "[]\n"), ("csv", "a\n")])
def test_no_rows_still_make_a_valid_file(name: str, expected: str) -> None:
    form = formats.make_format(name)
    assert form.start(["a"]) + form.end() == expected


def test_markdown_shows_markup_as_text() -> None:
    form = formats.make_format("markdown")
    form.start(["a"])
    assert form.rows([["a|b <i> *x*"]]) == "| a\\|b \\<i\\> \\*x\\* |\n"


def test_a_table_has_one_header_and_stable_columns_over_its_chunks() -> None:
    form = formats.make_format("table")
    text = form.start(["id", "name"])
    for first in (1, 3):
        text += form.rows([[first, "some name"], [first + 1, "x"]])
    lines = (text + form.end()).splitlines()
    assert lines[0] == "id  name"
    assert len(lines) == 6
    assert {line.find(word) for line in lines[2:] for word in ("some", "x") if word in line} == {4}


def test_a_number_is_never_broken_over_two_lines() -> None:
    form = formats.make_format("table", width=20)
    form.start(["id"])
    form.rows([[1]])
    assert form.rows([[1234567890]]) == "1234567890\n"


def test_a_table_fits_the_terminal() -> None:
    form = formats.make_format("table", width=40)
    text = form.start(["a", "b"]) + form.rows([["x" * 100, "short"]])
    assert max(map(len, text.splitlines())) <= 40
    assert text.count("x") == 100


def test_the_widest_columns_give_way_first() -> None:
    assert formats.fit([100, 3, 50], 60) == [26, 3, 27]
    assert formats.fit([5, 5, 5], 8) == [4, 4, 4]
    assert formats.fit([5, 5], 80) == [5, 5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NULL"),
        (True, "True"),
        (b"\x01\xff", "\\x01ff"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_every_kind_of_value_has_a_text(value: Any, text: str) -> None:
    assert formats.cell(value) == text


# Statements

POSTGRESQL = scanner("postgresql")


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("SELECT 1", 1),
        ("SELECT 1;", 1),
        ("SELECT ';'; -- the end;\n;", 1),
        ("SELECT 1; SELECT 2", 2),
        ("/* nothing */ ;", 0),
        ("CREATE FUNCTION f() RETURNS int AS $$ SELECT 1; SELECT 2 $$ LANGUAGE sql", 1),
    ],
)
def test_statements_are_counted(sql: str, count: int) -> None:
    assert len(POSTGRESQL.split(sql)) == count


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("/* now */ commit", "COMMIT"),
        ("START TRANSACTION READ WRITE", "START"),
        ("Begin", "BEGIN"),
        ("rollback to x", "ROLLBACK"),
        ("set transaction read write", "SET TRANSACTION"),
        ("SET LOCAL TRANSACTION READ WRITE", "SET TRANSACTION"),
        ("prepare transaction 'x'", "PREPARE TRANSACTION"),
        ("SELECT 'commit'", None),
        ("PREPARE q AS SELECT 1", None),
    ],
)
def test_what_would_end_the_transaction_is_recognised(sql: str, word: str | None) -> None:
    assert controls_transaction(sql, POSTGRESQL) == word


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT 1", True),
        ("(SELECT 1) UNION (SELECT 2)", True),
        ("WITH x AS (SELECT 1) SELECT * FROM x", True),
        ('SELECT "update" FROM t -- delete', True),
        ("WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x", False),
        ("SELECT * INTO t2 FROM t", False),
        ("SELECT * FROM t FOR UPDATE", False),
        ("EXPLAIN SELECT 1", False),
        ("UPDATE t SET a = 1", False),
    ],
)
def test_only_plain_queries_are_streamed(sql: str, expected: bool) -> None:
    assert is_query(sql, POSTGRESQL) is expected


# What was asked for


def test_parameters_are_text_or_json() -> None:
    given = ["name=a=b", "n:=1.5", "nothing:=null", "empty="]
    assert job.parse_params(given) == {"name": "a=b", "n": 1.5, "nothing": None, "empty": ""}
    assert job.parse_params([]) is None


@pytest.mark.parametrize("text", ["name", "=x", ":=1", "n:={"])
def test_a_parameter_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--param"):
        job.parse_params([text])


def test_with_several_databases_one_must_be_named() -> None:
    with pytest.raises(CommandError, match="--database is needed, one of: default"):
        asyncsql("SELECT 1")


def test_an_unknown_database_is_refused() -> None:
    with pytest.raises(CommandError, match="no database 'nowhere' in DATABASES; it has default"):
        asyncsql("SELECT 1", "--database", "nowhere")


@pytest.mark.parametrize("sql", ["", "-- nothing", ";"])
def test_no_statement_is_refused(sql: str) -> None:
    with pytest.raises(CommandError, match="no statement"):
        asyncsql(sql, "--database", "default")


def test_an_argument_and_a_file_are_refused() -> None:
    with pytest.raises(CommandError, match="not both"):
        asyncsql("SELECT 1", "--file", "x.sql", "--database", "default")


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(CommandError, match=r"cannot read 'missing\.sql'"):
        asyncsql("--file", "missing.sql", "--database", "default")


def test_a_role_is_for_postgresql() -> None:
    with pytest.raises(CommandError, match="--role is for PostgreSQL; 'sqlite' is sqlite"):
        asyncsql("SELECT 1", "--role", "x", "--database", "sqlite")


def test_neither_the_target_line_nor_an_error_has_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(connections["default"].settings_dict, "PASSWORD", "s3cr3t")
    options = {"database": "default", "sql": "SELECT 1", "file": None, "param": [], "role": None}
    more = {"format": "csv", "limit": 1, "timeout": 1.0, "multi": False, "write": False}
    line = job.describe(job.make_job({**options, **more}))
    assert line.startswith("default: postgresql, user 'postgres'")
    assert "s3cr3t" not in line
    error = job.one_line(ValueError("cannot use s3cr3t\x1b\nDETAIL: more"), "default")
    assert error == "ValueError: cannot use ***\\x1b"


# On databases

# In the test's transaction the command's own cannot be read-only.
in_transaction = pytest.mark.filterwarnings("ignore:read_only=True")


def test_in_a_test_the_warning_names_who_ran_the_command(users: str) -> None:
    with pytest.warns(SharedConnectionWarning, match=r"read_only=True.* made at .*test_asyncsql"):
        asyncsql("SELECT 1", "--database", users)


@in_transaction
def test_rows_are_printed(users: str) -> None:
    sql = "SELECT name, level FROM tests_user ORDER BY level"
    out, err = asyncsql(sql, "--database", users, "--format", "json")
    expected = [("heck", 1), ("anna", 2), ("=1+1", 3)]
    assert [(row["name"], row["level"]) for row in json.loads(out)] == expected
    assert f"{users}: " in err and "read-only, rolled back" in err and "3 rows in" in err


@in_transaction
def test_sql_comes_from_a_file_or_from_standard_input(
    users: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "count.sql"
    file.write_text("SELECT count(*) AS n FROM tests_user", encoding="utf-8")
    common = ("--database", users, "--format", "csv")
    assert asyncsql("--file", str(file), *common)[0] == "n\n3\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 7 AS n"))
    assert asyncsql(*common)[0] == "n\n7\n"


@in_transaction
def test_parameters_are_bound(users: str) -> None:
    sql = "SELECT name FROM tests_user WHERE name = %(name)s AND level = %(level)s"
    params = ("--param", "name==1+1", "--param", "level:=3")
    out, _ = asyncsql(sql, *params, "--database", users, "--format", "csv")
    assert out == "name\n'=1+1\n"


@in_transaction
def test_a_percent_sign_without_parameters_is_a_percent_sign(users: str) -> None:
    sql = "SELECT name FROM tests_user WHERE name LIKE 'h%'"
    assert asyncsql(sql, "--database", users, "--format", "csv")[0] == "name\nheck\n"


@in_transaction
def test_a_missing_parameter_is_one_line(users: str) -> None:
    with pytest.raises(CommandError) as caught:
        asyncsql("SELECT %(a)s, %(b)s", "--param", "a=1", "--database", users)
    assert "\n" not in str(caught.value)


@in_transaction
def test_wrong_sql_is_one_line_with_the_servers_word(users: str) -> None:
    with pytest.raises(CommandError) as caught:
        asyncsql("SELECT * FROM no_such_table", "--database", users)
    assert "no_such_table" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.returncode == 1


@pytest.mark.parametrize("sql", ["UPDATE tests_user SET name = 'x'", "DELETE FROM tests_user"])
def test_without_write_nothing_changes(real_users: str, sql: str) -> None:
    with pytest.raises(CommandError):
        asyncsql(sql, "--database", real_users)
    assert names(real_users) == ["heck", "anna", "=1+1"]


def test_with_write_the_change_is_committed(real_users: str) -> None:
    sql = "UPDATE tests_user SET name = 'x' WHERE level < 3"
    _, err = asyncsql(sql, "--database", real_users, "--write", "--yes")
    assert "2 rows changed" in err and "2 rows in" in err and "committed" in err
    assert names(real_users) == ["x", "x", "=1+1"]


@in_transaction
def test_write_needs_yes_when_nobody_can_be_asked(users: str) -> None:
    with pytest.raises(CommandError, match="--write needs --yes"):
        asyncsql("DELETE FROM tests_user", "--database", users, "--write")
    assert len(names(users)) == 3


@in_transaction
@pytest.mark.parametrize(("answer", "left"), [("yes", 0), ("y", 3), ("", 3)])
def test_on_a_terminal_write_asks(
    users: str, answer: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    try:
        asyncsql("DELETE FROM tests_user", "--database", users, "--write")
    except CommandError as exc:
        assert str(exc) == "not run"
    assert len(names(users)) == left


@in_transaction
def test_several_statements_need_multi(users: str) -> None:
    with pytest.raises(CommandError, match="2 statements; --multi"):
        asyncsql("SELECT 1; SELECT 2", "--database", users)


def test_several_statements_are_one_transaction(real_users: str) -> None:
    sql = "UPDATE tests_user SET name = 'x'; SELECT * FROM no_such_table"
    with pytest.raises(CommandError, match="no_such_table"):
        asyncsql(sql, "--database", real_users, "--multi", "--write", "--yes")
    assert names(real_users) == ["heck", "anna", "=1+1"]
    sql = "UPDATE tests_user SET name = 'y'; SELECT name FROM tests_user WHERE level = 1"
    common = ("--multi", "--write", "--yes", "--format", "csv")
    assert asyncsql(sql, "--database", real_users, *common)[0] == "name\ny\n"
    assert names(real_users) == ["y", "y", "y"]


@in_transaction
def test_a_commit_in_the_sql_is_refused(users: str) -> None:
    with pytest.raises(CommandError, match="COMMIT is not possible here"):
        asyncsql("COMMIT; DELETE FROM tests_user", "--multi", "--database", users)
    assert len(names(users)) == 3


@in_transaction
def test_the_limit_says_that_there_is_more(users: str) -> None:
    sql = "SELECT level FROM tests_user ORDER BY level"
    out, err = asyncsql(sql, "--database", users, "--format", "csv", "--limit", "2")
    assert out == "level\n1\n2\n"
    assert "only the first 2 rows; --limit 0 shows all" in err
    for limit in ("3", "0"):
        out, err = asyncsql(sql, "--database", users, "--format", "csv", "--limit", limit)
        assert out == "level\n1\n2\n3\n"
        assert "only the first" not in err


@in_transaction
def test_no_rows_still_have_a_header(users: str) -> None:
    sql = "SELECT id, name FROM tests_user WHERE 1 = 0"
    assert asyncsql(sql, "--database", users, "--format", "csv")[0] == "id,name\n"


SLOW = {
    "default": "SELECT pg_sleep(20)",
    "mysql": "SELECT sleep(20)",
    "sqlite": "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT max(i) "
    "FROM n",
}


def test_a_slow_statement_ends_after_the_timeout(alias: str) -> None:
    before = time.monotonic()
    with pytest.raises(CommandError, match="QueryTimeout"):
        asyncsql(SLOW[alias], "--database", alias, "--timeout", "0.3")
    assert time.monotonic() - before < 5


def test_a_role_is_taken_on_for_the_transaction() -> None:
    common = ("--database", "default", "--format", "csv")
    out, _ = asyncsql("SELECT current_user AS me", "--role", "pg_read_all_data", *common)
    assert out == "me\npg_read_all_data\n"
    with pytest.raises(CommandError, match=r'role "no" one" does not exist'):
        asyncsql("SELECT 1", "--role", 'no" one', *common)


@in_transaction
def test_each_run_is_one_line_in_the_audit_log(
    users: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "django_asyncsession.asyncsql")
    asyncsql("SELECT name FROM tests_user WHERE name <> 'secret'", "--database", users)
    with pytest.raises(CommandError):
        asyncsql("SELECT nothing", "--database", users)
    done, failed = [r.getMessage() for r in caplog.records if r.name.endswith(".asyncsql")]
    assert f"alias={users} mode=read sha256=" in done
    assert "rows=3 " in done and done.endswith("outcome=done")
    assert failed.endswith("outcome=failed")
    assert "secret" not in done


# As a process


@pytest.fixture
def manage() -> Iterator[Any]:
    """Starts `django asyncsql ...` as a process of its own, and ends what the test left."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **kwargs: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "django", "asyncsql", *args]
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", **kwargs.pop("env", {})}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def running(alias: str, marker: str) -> int:
    """How many statements with this marker, or of the application so named, the server runs."""
    counts = {
        "postgresql": "pg_stat_activity WHERE application_name = %s AND state = 'active'",
        "mysql": "information_schema.processlist WHERE info LIKE concat('%%/* ', %s, ' */')",
    }
    connection = connections[alias]
    if connection.vendor not in counts:
        return 0
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {counts[connection.vendor]}", [marker])
        return int(cursor.fetchone()[0])


def wait_until(condition: Any, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_statement_on_the_server(manage: Any, alias: str, number: int) -> None:
    marker = f"asyncsql {uuid.uuid4()}"
    ours, theirs = pty.openpty()
    sql = f"{SLOW[alias]} /* {marker} */"
    options = {"env": {"PGAPPNAME": marker}, "stderr": theirs}
    process = manage(sql, "--database", alias, "--timeout", "0", **options)
    said = ""
    while "0 rows, 1 s" not in said:
        said += os.read(ours, 1000).decode()
    assert running(alias, marker) == (connections[alias].vendor != "sqlite")
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    os.close(theirs)
    assert "CommandError: cancelled" in os.read(ours, 1000).decode()
    os.close(ours)
    wait_until(lambda: running(alias, marker) == 0, 2)


def test_a_result_needs_no_memory_for_its_rows() -> None:
    code = (
        "import resource, sys, django; django.setup();"
        "from django.core.management import call_command;"
        "call_command('asyncsql', sys.argv[1], database='default', format='csv', limit=0);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)"
    )

    def megabytes(rows: int) -> int:
        sql = f"SELECT n, repeat('x', 500) FROM generate_series(1, {rows}) n"
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
        done = subprocess.run(
            [sys.executable, "-c", code, sql], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.count("\n") == rows + 1
        return int(done.stderr.splitlines()[-1])

    # The rows alone would be 150 MB.
    assert megabytes(300_000) - megabytes(1000) < 30


def test_a_reader_that_leaves_ends_the_run_quietly(manage: Any) -> None:
    sql = "SELECT n FROM generate_series(1, 2000000) n"
    process = manage(sql, "--database", "default", "--format", "csv", "--limit", "0")
    assert process.stdout.readline() == "n\n"
    process.stdout.close()
    assert process.wait(timeout=20) == 1
    assert "Traceback" not in process.stderr.read()


def test_a_server_that_is_down_is_one_line_without_the_password(manage: Any) -> None:
    env = {
        "DJANGO_SETTINGS_MODULE": "testproject.settings",
        "DATABASE_URL": "postgresql://someone:s3cr3t@127.0.0.1:1/shop",
    }
    out, err = manage("SELECT 1", env=env).communicate(timeout=30)
    assert out == "" and "s3cr3t" not in err
    assert err.startswith("default: postgresql, user 'someone', host '127.0.0.1:1'")
    assert err.splitlines()[-1].startswith("CommandError: OperationalError: ")
    assert "Traceback" not in err


def test_a_terminal_sees_progress_and_no_control_character_of_a_value(manage: Any) -> None:
    ours, theirs = pty.openpty()
    sql = "SELECT pg_sleep(1.2)::text AS slept, chr(27) || '[31m' AS nasty"
    process = manage(sql, "--database", "default", stderr=theirs)
    out, _ = process.communicate(timeout=20)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "0 rows, 1 s" in shown and "1 row in" in shown
    assert "\\x1b[31m" in out and "\x1b" not in out


def test_the_aliases_of_these_tests_are_the_ones_of_the_settings() -> None:
    assert set(SLOW) >= set(settings.DATABASES)
