"""MySQL and MariaDB: asyncmy in Django's own backend."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionOptions, TransactionState
from django_asyncsession.backends.sockets import has_hung_up, is_quiet
from django_asyncsession.bridge import await_, in_bridge
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.scanner import MySQLScanner, Scanner, cached_by_text
from django_asyncsession.statements import has_any

from . import install_driver

# Before Django's backend, and what is below, import it.
install_driver()

import asyncmy.converters  # noqa: E402
import MySQLdb  # noqa: E402
import MySQLdb.converters  # noqa: E402
from asyncmy import errors  # noqa: E402
from asyncmy.connection import Connection as Driver  # noqa: E402
from django.db.backends.mysql import base  # noqa: E402
from django.db.backends.utils import typecast_time  # noqa: E402

from . import connection as driver  # noqa: E402
from .errors import SERVER_LOST, translated  # noqa: E402
from .killer import killer_for  # noqa: E402
from .values import time_or_text  # noqa: E402

if TYPE_CHECKING:

    class _Base(base.DatabaseWrapper):
        """Django's names that are used here, which its type stubs leave out."""

        def _cursor(self, name: str | None = None) -> Any: ...
        def _set_autocommit(self, autocommit: bool) -> None: ...

else:
    _Base = object

logger = logging.getLogger("django_asyncsession")

# Options of OPTIONS that go to asyncmy as they are.
PASSED_ON = frozenset(
    {"user", "database", "unix_socket", "host", "port", "charset", "client_flag", "connect_timeout"}
    | {"read_timeout", "local_infile", "max_allowed_packet", "auth_plugin_map", "program_name"}
    | {"read_default_file", "read_default_group", "server_public_key"}
)
# Those that are dealt with here, and those that mean nothing here.
TLS = frozenset({"ssl", "ssl_mode", "ssl_ca", "ssl_cert", "ssl_key", "ssl_verify_cert"})
OWN = frozenset({"conv", "password", "passwd", "db", "init_command", "sql_mode", "collation"}) | TLS
IGNORED = frozenset(
    {"write_timeout", "compress", "named_pipe", "cursorclass", "use_unicode", "autocommit"}
    | {"multi_statements", "binary_prefix", "auth_plugin", "ssl_disabled", "ssl_verify_identity"}
)
CONNECT_SECONDS = 10
# What tells servers, and users on them, apart.
PLACE = ("unix_socket", "host", "port", "user")
# How long the reader of a stream may take between two chunks.
STREAM_PAUSE_SECONDS = 3600

# Access denied, no such database, an account that is locked or needs what asyncmy has not.
PERMANENT = frozenset({1044, 1045, 1049, 1251, 1698, 1820, 2059, 3118, 3159})
DEADLOCK = 1213
LOCK_TIMEOUT = 1205
# Seconds; the server's own limits are whole seconds, from 1.
SHORTEST_WAIT = 0.5
# The server closed the session because nothing came for too long.
IDLE_TOO_LONG = 4031
STATEMENT_TIMEOUTS = frozenset({1969, 3024})

# Statements before which the server commits.
IMPLICIT_COMMIT = re.compile(
    r"\A(alter|create(?!\s+temporary)|drop(?!\s+temporary)|rename|truncate|grant|revoke|lock|"
    r"unlock|analyze\s+((local|no_write_to_binlog)\s+)?table|optimize|repair|flush|install|"
    r"uninstall|load\s+index|cache\s+index|set\s+password)\b",
    re.IGNORECASE,
)
ENDS_TRANSACTION = re.compile(
    r"\A(begin|start\s+transaction|commit|rollback(?!\s+(work\s+)?to)|xa)\b", re.IGNORECASE
)

# What Django asks each server once, by what tells servers apart.
_server_data: dict[tuple[Any, ...], dict[str, Any]] = {}

# Before each statement of a read-only session, in the same packet.
READ_ONLY = ("SET SESSION TRANSACTION READ ONLY",)
# Statements that are made of others, which the server runs whatever they set; a procedure may
# begin transactions.
COMPOUND = frozenset({"BEGIN", "IF", "CASE", "LOOP", "REPEAT", "WHILE", "FOR", "DECLARE", "XA"})
COMPOUND |= {"CALL"}
# Statements that can let a transaction write, and what they say then.
SETTING = frozenset({"SET", "START"})
OPENS = frozenset({"WRITE", "STATEMENT", "GLOBAL", "PERSIST", "PERSIST_ONLY", "PASSWORD", '""'})
# Statements that a read-only transaction allows although they change the server, or run what is
# in a string.
CHANGES_MORE = frozenset(
    {
        "PREPARE",
        "EXECUTE",
        "FLUSH",
        "KILL",
        "PURGE",
        "RESET",
        "SHUTDOWN",
        "CHANGE",
        "STOP",
        "CACHE",
        "LOAD",
    }
    | {"BINLOG", "BACKUP", "CHECK", "REPAIR", "OPTIMIZE", "INSTALL", "UNINSTALL", "IMPORT"}
)

LOOKED_AT = COMPOUND | SETTING | CHANGES_MORE | {"ANALYZE"}
INTO_FILE = "outfile", "dumpfile"


class Mixin(BridgedMixin, _Base):
    """What bridges Django's MySQL wrapper, or one that derives from it."""

    statement_rollback = True
    # Statements are ended over it.
    connections_beside = 1
    # What connects outside the bridge is the sync driver, which cannot await.
    both_modes = False
    connection: Any

    # Connecting

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        if not in_bridge():
            return super().get_new_connection(conn_params)
        init_sql = _init_sql(conn_params)
        make = partial(_make_driver, conn_params, self.alias)
        raw = make()
        seconds = conn_params.get("connect_timeout") or CONNECT_SECONDS
        try:
            await_(_connect(raw, seconds, init_sql))
        except errors.MySQLError as exc:
            raise translated(exc) from exc
        key = (self.alias, *(conn_params.get(name) for name in PLACE))
        connection = driver.Connection(self, raw, init_sql, killer_for(key, make))
        connection.sets_more = connection._may_differ = bool(conn_params.get("init_command"))
        return connection

    @cached_property
    def mysql_server_data(self) -> dict[str, Any]:
        """What Django asks of a server; asked once for all connections of a pool."""
        names = ("ENGINE", "NAME", "HOST", "PORT", "USER")
        key = (self.alias, *(self.settings_dict[name] for name in names))
        if key not in _server_data:
            with self.in_own_use():
                _server_data[key] = super().mysql_server_data
        return _server_data[key]

    @staticmethod
    def is_permanent(error: BaseException) -> bool:
        return bool(error.args) and error.args[0] in PERMANENT

    def open(self) -> None:
        super().open()
        self.connection.note_opened()

    def init_connection_state(self) -> None:
        if isinstance(self.connection, driver.Connection):
            # Django says all it has to say in one text.
            with self.connection.several():
                super().init_connection_state()
        else:
            super().init_connection_state()

    # Cursors

    def chunked_cursor(self) -> Any:
        if not isinstance(self.connection, driver.Connection):
            return super().chunked_cursor()
        return self._cursor(name="streaming")

    def create_cursor(self, name: str | None = None) -> Any:
        if name is None:
            return super().create_cursor(name)
        return base.CursorWrapper(self.connection.streaming_cursor())

    # Transactions

    def start(self, options: TransactionOptions) -> None:
        self.check_options(options)
        self._read_only(options)
        connection = self.connection
        connection.began = connection.left_by_sql = connection.taken_back = False
        begin = "START TRANSACTION"
        if options.read_only is not None:
            begin += " READ ONLY" if options.read_only else " READ WRITE"
        connection.begin = (begin,)
        if options.isolation is not None:
            level = f"SET TRANSACTION ISOLATION LEVEL {options.isolation.upper()}"
            connection.begin = (level, begin)
        self._set_in_session(self._timeouts(options))

    def configure_autocommit(self, options: TransactionOptions) -> None:
        self.check_options(options)
        self._read_only(options)
        settings = self._timeouts(options)
        if options.isolation is not None:
            level = options.isolation.upper()
            settings.append(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
        if options.read_only is not None:
            access = "READ ONLY" if options.read_only else "READ WRITE"
            settings.append(f"SET SESSION TRANSACTION {access}")
        self._set_in_session(settings)

    def _read_only(self, options: TransactionOptions) -> None:
        """Let the server refuse writes in what follows a COMMIT too, which it does itself before
        statements that change the schema."""
        self.reads_only = bool(options.read_only)
        self.connection.always = READ_ONLY if options.read_only else ()

    def way_to_write(self, sql: str) -> str:
        first = self.scanner.first_word(sql)
        if first not in LOOKED_AT and not has_any(sql, INTO_FILE):
            return ""
        words = self.scanner.words(sql)
        opens = first in SETTING and any(word in OPENS or "READ_ONLY" in word for word in words)
        opens = opens or (first == "ANALYZE" and "TABLE" in words[:3])
        opens = opens or (first in COMPOUND and words != ["BEGIN"])
        opens = opens or first in CHANGES_MORE or not {"OUTFILE", "DUMPFILE"}.isdisjoint(words)
        return " ".join(words[:3]) if opens else ""

    def _set_in_session(self, settings: list[str]) -> None:
        """Send these with the next statement."""
        self.connection.prelude = tuple(settings)

    def _timeouts(self, options: TransactionOptions) -> list[str]:
        """The server's settings for the given times; those for locks and idleness take whole
        seconds."""
        settings: dict[str, float] = {}
        if options.timeout is not None and self.mysql_is_mariadb:
            settings["max_statement_time"] = options.timeout
        elif options.timeout is not None:
            # MySQL has none for other statements than SELECT.
            settings["max_execution_time"] = max(1, round(options.timeout * 1000))
        if options.lock_timeout is not None:
            settings["innodb_lock_wait_timeout"] = math.ceil(options.lock_timeout)
            settings["lock_wait_timeout"] = math.ceil(options.lock_timeout)
        if options.idle_timeout is not None:
            settings["wait_timeout"] = math.ceil(options.idle_timeout)
        return [f"SET SESSION {name} = {value}" for name, value in settings.items()]

    @property
    def transaction_state(self) -> TransactionState:
        connection = self.connection
        if connection is None or connection.closed or connection.dirty:
            return TransactionState.UNKNOWN
        if connection.raw._stream_broken:
            return TransactionState.UNKNOWN
        if self.dead:
            return TransactionState.FAILED
        return TransactionState.ACTIVE if connection.in_transaction else TransactionState.IDLE

    @property
    def left_by_sql(self) -> bool:
        return bool(self.connection is not None and self.connection.left_by_sql)

    def is_quiet(self) -> bool:
        connection = self.connection
        if connection.resetting:
            # What comes is the answer to that.
            return not self.has_hung_up()
        # What the event loop has read of the socket, and what it has not.
        return not connection.raw._stream_broken and is_quiet(connection.fd)

    def has_hung_up(self) -> bool:
        connection = self.connection
        return bool(connection.raw._stream_broken) or has_hung_up(connection.fd)

    # Errors

    def is_fatal(self, error: BaseException) -> bool:
        connection = self.connection
        return bool(error.args[:1] == (DEADLOCK,) or connection.taken_back or connection.closed)

    def is_timeout(self, error: BaseException, options: TransactionOptions) -> bool:
        cause = error.__cause__
        code = cause.args[0] if cause is not None and cause.args else None
        if code == LOCK_TIMEOUT:
            # MariaDB has the same error for NOWAIT, which waits for nothing.
            waited = self.connection.last_took >= SHORTEST_WAIT
            return options.lock_timeout is not None and waited
        return code in STATEMENT_TIMEOUTS

    def ended_before(self, error: BaseException) -> bool:
        return bool(error.args) and error.args[0] == IDLE_TOO_LONG

    # Statements

    @property
    def scanner(self) -> Scanner:
        if "mysql_server_data" not in self.__dict__:
            # It is being asked for now.
            return super().scanner
        modes, connection = self.sql_mode, self.connection
        backslashes = "NO_BACKSLASH_ESCAPES" not in modes
        if isinstance(connection, driver.Connection):
            backslashes = connection.escapes_with_backslashes
        major, minor, patch = self.mysql_version[:3]
        version = major * 10_000 + minor * 100 + patch
        return _scanner(backslashes, "ANSI_QUOTES" in modes, version, self.mysql_is_mariadb)

    def before_statement(self, sql: Any) -> None:
        super().before_statement(sql)
        if not isinstance(self.connection, driver.Connection):
            return
        self.connection.commits_implicitly = False
        if self.in_atomic_block and isinstance(sql, str):
            self._note_end_of_transaction(" ".join(_opening(sql, self.scanner)))

    def _note_end_of_transaction(self, text: str) -> None:
        if IMPLICIT_COMMIT.match(text):
            self.connection.commits_implicitly = True
            logger.warning(
                "%s commits the transaction on %r, because %s cannot roll it back; use it "
                "outside transactions",
                " ".join(text.split()[:2]),
                self.alias,
                self.display_name,
            )
        elif ENDS_TRANSACTION.match(text):
            self.connection.left_by_sql = True

    # The begin and the end of a lease

    def begin_lease(self, lease: object) -> None:
        super().begin_lease(lease)
        if self.pooled:
            self.connection.clean = False

    def end_streams(self) -> None:
        self.connection.end_stream()

    def connected(self) -> None:
        self.connection.set_up = "".join(f"\n; {text}" for text in [self._role(), *self.set_up])
        self.connection.note_set_up()
        self.connection.clean = True

    def _role(self) -> str:
        """What brings back the role, which a reset of the server leaves as it is."""
        if not self.mysql_is_mariadb:
            return "SET ROLE DEFAULT"
        with self.in_own_use(), self.cursor() as cursor:
            cursor.execute("SELECT CURRENT_ROLE()")
            role = cursor.fetchone()[0]
        return "SET ROLE NONE" if role is None else f"SET ROLE {self.ops.quote_name(role)}"

    def compose(self, sql: Any, params: Any) -> str:
        return str(self.connection.mogrify(sql, params).decode(self.connection.raw._encoding))

    def reset_at_once(self) -> bool:
        if self.set_up_touches or self.transaction_state is not TransactionState.IDLE:
            return False
        self.reads_only = False
        if not self.connection.forget_lease():
            return False
        if not self.connection.clean:
            try:
                self.connection.send_reset()
            except MySQLdb.Error:
                return False
        return True

    def reset(self) -> None:
        self.reads_only = False
        self.connection.end_stream()
        self.connection.forget_lease()
        self.connection.reset()
        if self.set_up_touches:
            self.set_up_again()
            self.connection.clean = True

    def settle(self) -> Callable[[], bool] | None:
        connection = self.connection

        def read() -> bool:
            try:
                connection.finish_reset()
            except MySQLdb.Error:
                return False
            return True

        return read if connection.resetting else None

    def scrub(self) -> None:
        super().scrub()
        self.connection.restore()

    def close_driver(self) -> None:
        if self.connection is not None:
            self.connection.abandon()

    def farewell(self) -> Awaitable[None] | None:
        if self.connection is None or not self.cut:
            return None
        return self.connection.farewell()  # type: ignore[no-any-return]


@cached_by_text
def _opening(sql: str, reader: Scanner) -> list[str]:
    """As many words as tell what a statement does to the transaction."""
    return reader.opening(sql, 4)


@cache
def _scanner(backslashes: bool, ansi_quotes: bool, version: int, mariadb: bool) -> MySQLScanner:
    return MySQLScanner(backslashes, ansi_quotes, version, mariadb)


async def _connect(raw: Any, seconds: float, init_sql: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            await raw.connect()
            await raw.query(init_sql)
            while raw._result.has_next:
                await raw.next_result()
    except TimeoutError as exc:
        raw.close()
        raise errors.OperationalError(
            SERVER_LOST, f"no answer from the server within {seconds} s while connecting"
        ) from exc
    except BaseException:
        raw.close()
        raise


def _make_driver(conn_params: Mapping[str, Any], alias: str) -> Any:
    """asyncmy's connection, not connected yet, for Django's parameters."""
    if unknown := conn_params.keys() - PASSED_ON - OWN - IGNORED:
        raise ConfigurationError(
            f"unknown OPTIONS {sorted(unknown)} for {alias!r}; asyncmy takes "
            f"{sorted(PASSED_ON | OWN)}"
        )
    options = {name: value for name, value in conn_params.items() if name in PASSED_ON}
    options.setdefault("database", conn_params.get("db"))
    password = conn_params.get("password") or conn_params.get("passwd") or ""
    if password:
        # The bytes that mysqlclient sends; a function, so that no frame shows them.
        options["password_creator"] = lambda: str.encode(password)
    raw: Any = Driver(  # type: ignore[no-untyped-call]
        **options, conv=_conversions(conn_params), ssl=_tls(conn_params, alias), autocommit=True
    )
    raw._client_flag |= driver.SESSION_TRACK
    return raw


def _conversions(conn_params: Mapping[str, Any]) -> dict[Any, Any]:
    """asyncmy's own conversions, but for those that Django, or the user, has changed."""
    given: Mapping[Any, Any] = conn_params.get("conv") or {}
    usual = MySQLdb.converters.conversions
    changed = {key: value for key, value in given.items() if usual.get(key) is not value}
    # Django's function for times fails without saying where.
    changed = {key: time_or_text if f is typecast_time else f for key, f in changed.items()}
    return {**asyncmy.converters.conversions, **changed}


def _init_sql(conn_params: Mapping[str, Any]) -> str:
    """What makes the session on the server what the settings say, new or reset."""
    charset = conn_params.get("charset") or "utf8mb4"
    names = f"SET NAMES {charset}"
    if collation := conn_params.get("collation"):
        names += f" COLLATE {collation}"
    # While the reader of a stream pauses, so does the server, which gives up after 60 s.
    pause = f"net_write_timeout = GREATEST(@@net_write_timeout, {STREAM_PAUSE_SECONDS})"
    statements = [names, f"SET autocommit = 1, SESSION {pause}"]
    if database := conn_params.get("database") or conn_params.get("db"):
        # It is not among what a reset brings back.
        statements.append("USE `{}`".format(str(database).replace("`", "``")))
    if (mode := conn_params.get("sql_mode")) is not None:
        statements.append("SET SESSION sql_mode = '{}'".format(str(mode).replace("'", "''")))
    if command := conn_params.get("init_command"):
        statements.append(str(command).strip().rstrip(";"))
    return "; ".join(statements)


def _tls(conn_params: Mapping[str, Any], alias: str) -> ssl.SSLContext | None:
    """The TLS context that the options ask for.

    Raises:
        ConfigurationError: an `ssl_mode` that cannot be kept.
    """
    given = conn_params.get("ssl")
    if isinstance(given, ssl.SSLContext):
        return given
    files = {name: conn_params.get(f"ssl_{name}") for name in ("ca", "cert", "key")}
    files |= dict(given) if isinstance(given, Mapping) else {}
    mode = str(conn_params.get("ssl_mode") or "").upper()
    if mode == "DISABLED" or conn_params.get("ssl_disabled"):
        return None
    if mode == "PREFERRED":
        raise ConfigurationError(
            f"ssl_mode='PREFERRED' of {alias!r} may send the password unencrypted; use "
            "'REQUIRED', 'VERIFY_CA', 'VERIFY_IDENTITY' or 'DISABLED'"
        )
    files = {name: value for name, value in files.items() if value is not None}
    if not mode and not files and not given:
        return None
    verify = bool(files.get("ca") or files.get("capath"))
    verify = bool(conn_params.get("ssl_verify_cert", verify)) or mode.startswith("VERIFY")
    names = mode != "VERIFY_CA" and files.pop("check_hostname", True)
    return _tls_context(tuple(sorted(files.items())), verify and mode != "REQUIRED", bool(names))


@cache
def _tls_context(
    files: tuple[tuple[str, Any], ...], verify: bool, check_names: bool
) -> ssl.SSLContext:
    """Made once: reading certificates takes longer than the event loop may stand still."""
    options = dict(files)
    context = ssl.create_default_context(cafile=options.get("ca"), capath=options.get("capath"))
    context.check_hostname = verify and check_names
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if "cert" in options:
        context.load_cert_chain(options["cert"], options.get("key"))
    if "cipher" in options:
        context.set_ciphers(options["cipher"])
    return context


class DatabaseWrapper(Mixin, base.DatabaseWrapper):
    """Django's MySQL wrapper, bridged: MySQLdb in sync code, asyncmy in the bridge."""
