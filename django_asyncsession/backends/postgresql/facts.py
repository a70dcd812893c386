"""Which tables a statement can read, or write, without running anything that may leave something on
its connection: no trigger, rule, view, policy, or function of anybody's."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from .wire import Wire

# Seconds that the facts of a table are believed.
LIFETIME = 60.0
# Tables that are remembered, at most.
MOST_TABLES = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a table.

    Attributes:
        reads: a SELECT of its columns, compared by the operators of PostgreSQL, leaves nothing.
        writes: so do INSERT, UPDATE and DELETE, but for the last value of a sequence that belongs
            to a column of the table.
    """

    reads: bool = False
    writes: bool = False


NOTHING_KNOWN = Facts()

# Built-in functions that depend on the moment and leave nothing all the same. `random` is none of
# them: it goes on from a seed that the session may have set.
OF_THE_MOMENT = (
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "clock_timestamp",
    "gen_random_uuid",
    "uuidv4",
    "uuidv7",
    # From a point in time, by the time zone.
    "date",
    "timestamp",
    "timestamptz",
    "timezone",
)
# Objects from this number on were made by users. What is written in C can do anything, but only a
# superuser can have made it.
FIRST_OF_USERS = 16384
TRUSTED = "SELECT oid FROM pg_catalog.pg_language WHERE lanname IN ('internal', 'c')"

# True, but the planner does not know it, and takes it for rare: it would guess millions of rows,
# and compile the query to machine code, which takes seconds.
FEW = "{0}.name || '' = {0}.name"
# A name may stand for a table with children or partitions, and a change may reach other tables by
# foreign keys. An expression is read in the form that the server keeps: its functions are not all
# among its dependencies, since those that are built in are never dropped.
SQL = f"""
WITH RECURSIVE
wanted AS (
    SELECT name, pg_catalog.to_regclass(name)::oid AS oid
    FROM pg_catalog.unnest($1::text[]) AS given (name) WHERE {FEW.format("given")}
),
family (name, oid) AS (
    SELECT name, oid FROM wanted WHERE oid IS NOT NULL
    UNION
    SELECT f.name, i.inhrelid FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid
    WHERE {FEW.format("f")}
),
reached (name, oid) AS (
    SELECT name, oid FROM family
    UNION
    SELECT r.name, next.oid FROM reached r CROSS JOIN LATERAL (
        SELECT inhrelid AS oid FROM pg_catalog.pg_inherits WHERE inhparent = r.oid
        UNION ALL
        SELECT conrelid FROM pg_catalog.pg_constraint WHERE contype = 'f' AND confrelid = r.oid
            AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))
    ) next WHERE {FEW.format("r")}
),
types (name, oid) AS (
    SELECT r.name, a.atttypid FROM reached r JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
    WHERE a.attnum > 0 AND NOT a.attisdropped AND {FEW.format("r")}
    UNION
    SELECT t.name, part.oid FROM types t CROSS JOIN LATERAL (
        SELECT typbasetype AS oid FROM pg_catalog.pg_type WHERE oid = t.oid AND typbasetype <> 0
        UNION ALL
        SELECT typelem FROM pg_catalog.pg_type WHERE oid = t.oid AND typelem <> 0
        UNION ALL
        SELECT rngsubtype FROM pg_catalog.pg_range WHERE rngtypid = t.oid
        UNION ALL
        SELECT a.atttypid FROM pg_catalog.pg_type c
        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.typrelid
        WHERE c.oid = t.oid AND c.typtype = 'c' AND a.attnum > 0 AND NOT a.attisdropped
    ) part WHERE {FEW.format("t")}
),
operator_classes (name, oid) AS (
    SELECT r.name, pg_catalog.unnest(i.indclass::oid[])
    FROM reached r JOIN pg_catalog.pg_index i ON i.indrelid = r.oid
    UNION
    SELECT r.name, pg_catalog.unnest(p.partclass::oid[])
    FROM reached r JOIN pg_catalog.pg_partitioned_table p ON p.partrelid = r.oid
),
expressions (name, is_read, tree, sequences) AS (
    SELECT r.name, a.attgenerated = 'v', d.adbin::text, (
        SELECT pg_catalog.count(DISTINCT s.refobjid) FROM pg_catalog.pg_depend s
        JOIN pg_catalog.pg_depend o ON o.classid = s.refclassid AND o.objid = s.refobjid
        WHERE s.classid = 'pg_catalog.pg_attrdef'::regclass AND s.objid = d.oid
            AND s.refclassid = 'pg_catalog.pg_class'::regclass
            AND o.refclassid = s.refclassid AND o.refobjid = r.oid AND o.deptype IN ('a', 'i')
    )
    FROM reached r JOIN pg_catalog.pg_attrdef d ON d.adrelid = r.oid
    JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attnum = d.adnum
    UNION ALL
    SELECT r.name, false, c.conbin::text, 0
    FROM reached r JOIN pg_catalog.pg_constraint c ON c.conrelid = r.oid
    UNION ALL
    SELECT r.name, false, pg_catalog.concat(i.indexprs::text, i.indpred::text), 0
    FROM reached r JOIN pg_catalog.pg_index i ON i.indrelid = r.oid
    UNION ALL
    SELECT r.name, true, p.partexprs::text, 0
    FROM reached r JOIN pg_catalog.pg_partitioned_table p ON p.partrelid = r.oid
    UNION ALL
    SELECT t.name, false, c.conbin::text, 0
    FROM types t JOIN pg_catalog.pg_constraint c ON c.contypid = t.oid
    UNION ALL
    SELECT t.name, false, y.typdefaultbin::text, 0
    FROM types t JOIN pg_catalog.pg_type y ON y.oid = t.oid
),
found (name, is_read, sequences, nexts, functions, is_odd) AS (
    SELECT name, is_read, sequences,
        (SELECT pg_catalog.count(*) FROM pg_catalog.regexp_matches(
            tree, ':funcid ' || 'pg_catalog.nextval(regclass)'::regprocedure::oid || ' ', 'g')),
        ARRAY(SELECT m[1]::oid FROM pg_catalog.regexp_matches(
            tree, ':(?:op|hash|neg)?func(?:id) ([1-9][0-9]*)', 'g') AS m
        UNION ALL SELECT o.oprcode::oid FROM pg_catalog.regexp_matches(
            tree, ':opno ([0-9]+)', 'g') AS m
        JOIN pg_catalog.pg_operator o ON o.oid = m[1]::oid),
        tree ~ ':opnos |:(?:agg|win)fnoid '
    FROM expressions WHERE tree <> ''
),
-- Types for which an operator, or a cast, of a user's may be chosen before what is built in.
odd_types (oid, is_any) AS MATERIALIZED (
    SELECT y.oid, y.typtype = 'p' FROM pg_catalog.pg_operator o
    JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode
    JOIN pg_catalog.pg_type y ON y.oid IN (o.oprleft, o.oprright)
    WHERE o.oid >= {FIRST_OF_USERS} AND p.prolang NOT IN ({TRUSTED}) AND o.oprname IN (
        SELECT oprname FROM pg_catalog.pg_operator WHERE oid < {FIRST_OF_USERS})
    UNION
    SELECT y.oid, y.typtype = 'p' FROM pg_catalog.pg_cast c
    JOIN pg_catalog.pg_proc p ON p.oid = c.castfunc
    JOIN pg_catalog.pg_type y ON y.oid IN (c.castsource, c.casttarget)
    WHERE c.oid >= {FIRST_OF_USERS} AND p.prolang NOT IN ({TRUSTED})
),
harmful (name, is_read) AS (
    SELECT f.name, f.is_read FROM found f WHERE f.is_odd OR f.nexts > f.sequences OR EXISTS (
        SELECT FROM pg_catalog.pg_proc p WHERE p.oid = ANY (f.functions) AND NOT (
            p.pronamespace = 'pg_catalog'::regnamespace AND p.oid < {FIRST_OF_USERS} AND (
                p.provolatile = 'i' OR p.proname = ANY ('{{{",".join(OF_THE_MOMENT)}}}'::text[])
                OR p.oid = 'pg_catalog.nextval(regclass)'::regprocedure)))
    UNION ALL
    SELECT r.name, false FROM reached r JOIN pg_catalog.pg_trigger t ON t.tgrelid = r.oid
    WHERE NOT t.tgisinternal
    UNION ALL
    SELECT r.name, r.oid IN (SELECT f.oid FROM family f WHERE f.name = r.name)
    FROM reached r JOIN pg_catalog.pg_class c ON c.oid = r.oid
    WHERE c.relkind NOT IN ('r', 'p') OR c.relpersistence = 't' OR c.relhasrules
        OR c.relrowsecurity
    UNION ALL
    SELECT t.name, true FROM types t JOIN odd_types o ON o.oid = t.oid OR o.is_any
    UNION ALL
    SELECT c.name, true FROM operator_classes c JOIN pg_catalog.pg_opclass k ON k.oid = c.oid
    WHERE k.oid >= {FIRST_OF_USERS} AND EXISTS (
        SELECT FROM pg_catalog.pg_proc p WHERE p.prolang NOT IN ({TRUSTED}) AND p.oid IN (
            SELECT amproc::oid FROM pg_catalog.pg_amproc WHERE amprocfamily = k.opcfamily
            UNION ALL
            SELECT o.oprcode::oid FROM pg_catalog.pg_amop a
            JOIN pg_catalog.pg_operator o ON o.oid = a.amopopr
            WHERE a.amopfamily = k.opcfamily))
),
names_are_built_in AS (
    SELECT schema = 'pg_catalog' AS yes
    FROM pg_catalog.unnest(pg_catalog.current_schemas(true)) WITH ORDINALITY AS s (schema, place)
    WHERE schema NOT LIKE 'pg\\_temp\\_%' ORDER BY place LIMIT 1
)
SELECT w.name,
    w.oid IS NOT NULL AND yes
        AND NOT EXISTS (SELECT FROM harmful h WHERE h.name = w.name AND h.is_read),
    w.oid IS NOT NULL AND yes AND NOT EXISTS (SELECT FROM harmful h WHERE h.name = w.name)
FROM wanted w CROSS JOIN names_are_built_in
""".encode()


def array(names: Iterable[str]) -> bytes:
    """The names as a value of type text[], in the text format."""
    escaped = (name.replace("\\", "\\\\").replace('"', '\\"') for name in names)
    return ("{" + ",".join(f'"{name}"' for name in escaped) + "}").encode()


def parse(rows: Iterable[Sequence[Any]]) -> dict[str, Facts]:
    """The facts of each table of the rows that `SQL` gives."""
    return {name: Facts(bool(reads), bool(writes)) for name, reads, writes in rows}


class KnownFacts:
    """The facts of tables, for a minute each, of the last thousand that were asked for."""

    def __init__(self, lifetime: float = LIFETIME, size: int = MOST_TABLES) -> None:
        self._lifetime, self._size = lifetime, size
        self._known: OrderedDict[tuple[Hashable, str], tuple[float, Facts]] = OrderedDict()

    def get(self, database: Hashable, table: str) -> Facts | None:
        """What is known of a table; None when that is too old, or nothing."""
        found = self._known.get((database, table))
        if found is None or found[0] <= time.monotonic():
            return None
        return found[1]

    def add(self, database: Hashable, facts: dict[str, Facts]) -> None:
        """Believe these facts from now on."""
        until = time.monotonic() + self._lifetime
        for table, known in facts.items():
            self._known[database, table] = until, known
            self._known.move_to_end((database, table))
        while len(self._known) > self._size:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    async def look_up(
        self, wire: Wire, database: Hashable, tables: Iterable[str]
    ) -> dict[str, Facts]:
        """The facts of some tables, asking the server for those that are not known; all in one
        query, which leaves nothing itself.

        Args:
            wire: of a connection that nothing was set on, so that names mean what they mean to
                every other one.
            database: what tells it from others, such as its alias.
            tables: as they stand in SQL: quoted, with their schema if it was written.

        Raises:
            django.db.Error: as `Wire.execute`.
        """
        tables = list(tables)
        facts = {table: known for table in tables if (known := self.get(database, table))}
        if missing := [table for table in tables if table not in facts]:
            result = await wire.execute(SQL, [array(missing)], prepare=False, harmless=True)
            found = parse(wire.rows(result))
            self.add(database, found)
            facts |= found
        return facts
