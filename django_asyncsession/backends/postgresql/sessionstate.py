"""Tells from the text of a statement whether it may change what outlives its transaction on the
connection.

A pooled connection must carry nothing from one session to the next, and resetting it costs a round
trip. So the text
decides: what is known to change nothing needs no reset, and everything else is reset.
"""

from __future__ import annotations

import re
from typing import Any

from django_asyncsession.scanner import cached_by_text, scanner, stripped

# Statements that change data, schema or the transaction, never the connection.
HARMLESS = frozenset(
    """
    abort alter analyze begin close comment commit copy create delete drop end explain fetch
    grant insert lock merge move notify refresh reindex release revoke rollback savepoint select
    show start table truncate update vacuum values with
    """.split()
)
# Transaction-local forms of a statement that otherwise outlives it.
LOCAL = re.compile(r"set\s+(local|transaction|constraints)\b")
# Words that make a harmless statement one that leaves something behind.
TRACES = re.compile(
    r"\b(temp|temporary|hold|pg_temp\w*|into\s+temp)\b|\bcreate\s++(?:(?!schema)\w++\s++)?schema\b"
)
# A name, quoted or not, which may be qualified; a limit keeps the search fast.
_PART = r"""(?:""|[\w$]+)"""
_NAME = rf"""(?<![\w$".])({_PART}(?:\s*+\.\s*+{_PART}){{0,3}})"""
# What may be a function call.
CALL = re.compile(rf"{_NAME}\s*\(")
READER = scanner("postgresql")
MAX_LENGTH = 20_000

# What may stand before a parenthesis without being a function that keeps state: SQL words, types
# with a length, and
# functions that Django's compiler emits or that reports use. Any other name may be a function that
# calls SET.
KNOWN = frozenset(
    """
    abs acos add all and any array array_agg array_length array_to_string arrayagg as asc asin
    atan atan2 avg between bit_and bit_length bit_or bool_and bool_or btrim by cardinality case
    cast ceil ceiling char char_length chr coalesce collate concat concat_ws conflict corr cos
    cot count covar_pop cross cube current_date current_time current_timestamp current_user
    cume_dist date date_part date_trunc decimal degrees delete dense_rank desc distinct else end
    escape every except exists exp extract filter first_value float floor for format from
    gen_random_uuid generate_series greatest group grouping having in inner insert int4range
    int8range intersect interval into is json_agg json_array_elements json_build_object
    json_object jsonb jsonb_agg jsonb_array_elements jsonb_array_length jsonb_build_array
    jsonb_build_object jsonb_exists jsonb_extract_path jsonb_extract_path_text jsonb_object_agg
    jsonb_path_exists jsonb_path_query jsonb_set jsonb_typeof join key lag last_value lateral
    lead least left length like limit ln localtimestamp log lower lpad ltrim make_date
    make_interval make_timestamptz materialized md5 max min mod mode not now nth_value ntile
    nullif numeric numrange octet_length on or order over overlay partition percent_rank
    percentile_cont percentile_disc pg_backend_pid pg_sleep pg_size_pretty
    pg_total_relation_size pi plainto_tsquery phraseto_tsquery position power primary radians
    random range rank references regexp_match regexp_matches regexp_replace regr_avgx regr_count
    regr_slope repeat replace returning reverse right rollup round row row_number row_to_json
    rpad rtrim select set setweight sha224 sha256 sha384 sha512 sign similarity sin some
    split_part sqrt statement_timestamp stddev_pop stddev_samp string_agg strpos substr
    substring sum table tan then time timestamp timestamptz to_char to_date to_json to_jsonb
    to_number to_timestamp to_tsquery to_tsvector transaction_timestamp translate trim trunc
    ts_headline ts_rank ts_rank_cd tsrange tstzrange unaccent union unique unnest update upper
    using uuid values var_pop var_samp varchar variance version websearch_to_tsquery when where
    width_bucket window with word_similarity xmlagg
    """.split()
)
# After these words the name before the parenthesis is a table with a column list, not a call.
_BEFORE = "into|table|index|as|references|with|copy"
TABLE_LIST = re.compile(rf"\b(?:{_BEFORE})\s+(?:only\s+)?{_NAME}\s*\(")
# In DDL also after ON, which in a query comes before a condition.
DDL_TABLE_LIST = re.compile(rf"\b(?:{_BEFORE}|on)\s+(?:only\s+)?{_NAME}\s*\(")


def changes_session(sql: Any) -> bool:
    """Whether the statement may leave something on the connection after its transaction.

    Args:
        sql: the statement's text; anything that is not a string counts as changing.
    """
    return not isinstance(sql, str) or len(sql) > MAX_LENGTH or _changes(sql)


@cached_by_text
def _changes(sql: str) -> bool:
    text = stripped(sql, READER).lower()
    first = re.match(r"\w+", text)
    if first is None:
        return bool(text)
    if first[0] not in HARMLESS:
        return LOCAL.match(text) is None
    # A second statement behind a semicolon would have to be looked at as well.
    if ";" in text.rstrip().rstrip(";") or TRACES.search(text):
        return True
    lists = DDL_TABLE_LIST if first[0] in ("create", "alter") else TABLE_LIST
    return _calls_unknown(text, lists)


def _calls_unknown(text: str, lists: re.Pattern[str]) -> bool:
    """Whether a function is called that is not known to change nothing."""
    tables = {match.start(1) for match in lists.finditer(text)}
    calls = (match for match in CALL.finditer(text) if match.start(1) not in tables)
    # PostGIS's functions, whose names all begin alike, keep no state.
    return any(
        (name := match[1].removeprefix("pg_catalog.")) not in KNOWN and not name.startswith("st_")
        for match in calls
    )
