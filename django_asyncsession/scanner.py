"""Reads SQL text as the databases read it: where statements, strings, names and comments end.

Everything is linear in the text, whatever it holds: the patterns have possessive quantifiers only,
and none goes back over what another has matched. The rules are those of scan.l of PostgreSQL,
sql_lex.cc of MariaDB and MySQL, and tokenize.c and complete.c of SQLite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache, wraps
from itertools import islice
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

T = TypeVar("T")
P = ParamSpec("P")

# Caches keep no texts of more bytes, and not more of them: 8 MB each at the most, and about as much
# of what was made of them.
LONGEST_CACHED, MOST_CACHED = 4096, 2048
# Characters of a normalised statement.
LONGEST_NORMALISED = 2048

SPACES = " \t\n\r\f\v"
SPACE = f"[{SPACES}]"
# Begins strings, names and comments, or ends a statement.
OTHERWISE = "'\";/-"


def _ascii(*, but: str) -> str:
    """What is inside of a class of the ASCII characters that are no letters, and not in `but`."""
    signs = (chr(n) for n in range(128) if not chr(n).isalpha())
    return "".join(re.escape(sign) for sign in signs if sign not in but)


def _letter(*, or_one_of: str = "") -> str:
    """The class of what a word begins with; for all databases what is not ASCII is a letter.

    It says what it leaves out: naming all of Unicode takes `re` 30 ms to compile.
    """
    return f"[^{_ascii(but='_' + or_one_of)}]"


DIGITS = "0123456789"
FIRST, ALNUM, IN_WORD = _letter(), _letter(or_one_of=DIGITS), _letter(or_one_of=DIGITS + "$")
NUMBER = r"[0-9]++(?:\.[0-9]++)?+(?:[eE][+\-]?[0-9]++)?+"
# What follows the signs that begin a comment, but for those that end it.
IN_COMMENT = r"[^*]*+(?:\*(?!/)[^*]*+)*+"
# To the next signs that begin or end comments, over comments without others inside.
_NO_SIGN = r"[^*/]++|\*(?!/)|/(?!\*)"
_COMMENT_SIGNS = re.compile(
    rf"(?:{_NO_SIGN}|/\*(?:{_NO_SIGN})*+\*/)*+(?:(?P<begin>(?:/\*)++)|(?P<end>(?:\*/)++))",
    re.DOTALL,
)
_TOKEN = re.compile(r"[\w$]++|''|\"\"|\S")
_WORD = re.compile(r"[\w$]++")
_SPACES = re.compile(rf"{SPACE}++")
_LITERAL = re.compile(
    rf"(?<!{_letter(or_one_of=DIGITS + '$.')})(?:0[xX][0-9A-Fa-f]++|{NUMBER})(?!{ALNUM})"
)
# How statements begin that may have semicolons of their own.
_MAY_HOLD_MORE = re.compile(r"(?i:create|begin|explain)|/\*")
_REPLACED = {"nothing": " ", "marker": " ", "string": "''", "name": '""'}


# A part of a text: its kind, where it begins and ends, and whether what follows is in a comment
# whose content runs. The kinds: "code" (words, numbers, signs, space), "string", "name" (in
# quotes), "nothing" (comments), "end" (semicolons), "marker" (begin or end of such a comment).
# A tuple, because a text may have a hundred thousand.
Piece = tuple[str, int, int, bool]


class Scanner:
    """How a database, in one of its modes, reads SQL.

    Args:
        string, name, comment, plain: patterns of what is one thing for the database; `plain` is
            what is nothing else: words, numbers, signs.
        plain_inside: `plain` in a comment whose content runs.
        space: the pattern of a character of white space.
    """

    def __init__(
        self,
        *,
        string: str,
        name: str,
        comment: str,
        plain: str,
        plain_inside: str = "",
        space: str = SPACE,
    ) -> None:
        self._nothing = _compile(rf"(?:{space}++|{comment}|;)*+")
        self._parts = f"{plain}|{space}++", string, name, comment, space
        self._patterns = []
        for signs in (plain, plain_inside or plain):
            code = rf"{signs}|{space}++"
            self._patterns.append(
                (
                    _compile(rf"(?:{code}|{string}|{name}|{comment})*+"),
                    _compile(
                        rf"(?P<nothing>(?:{comment})(?:{comment}|{space}++)*+)"
                        rf"|(?P<code>(?:{code})++)|(?P<string>(?:{string})++)"
                        rf"|(?P<name>(?:{name})++)|(?P<end>;++)"
                    ),
                )
            )

    @cached_property
    def _simple(self) -> re.Pattern[str]:
        """One statement, or the rest of the text when something comes that is not so simple."""
        code, string, name, comment, _ = self._parts
        return _compile(
            rf"{self._nothing.pattern}((?!{_MAY_HOLD_MORE.pattern})"
            rf"(?:{code}|{string}|{name}|{comment})++)(?=;|\Z)|.++"
        )

    @cached_property
    def _kinds(self) -> re.Pattern[str]:
        """What `bare` keeps or replaces, or the rest of the text as above."""
        code, string, name, comment, space = self._parts
        return _compile(
            rf"(?P<kept>(?:{code}|;)++)|(?P<string>(?:{string})++)|(?P<name>(?:{name})++)"
            rf"|(?P<nothing>(?:{comment})(?:{comment}|{space})*+)|(?P<rest>.++)"
        )

    def pieces(self, text: str, position: int = 0, inside: bool = False) -> Iterator[Piece]:
        """What the text consists of from `position` on."""
        length = len(text)
        match = self._patterns[inside][1].match
        while position < length:
            found = match(text, position)
            if found is not None and not inside:
                yield found.lastgroup or "", position, (position := found.end()), False
                continue
            if found is None:
                piece = self._odd(text, position, inside)
            else:
                kind = found.lastgroup or ""
                # A semicolon ends the comment as well.
                piece = kind, position, found.end(), kind != "end"
            yield piece
            _, _, position, inside = piece
            match = self._patterns[inside][1].match

    def statements(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of each statement, without those that are only comments."""
        found: tuple[int, int] | None = (0, 0)
        while found is not None:
            position = found[1]
            for simple in self._simple.finditer(text, position):
                if simple.lastindex != 1:
                    break
                position = simple.end()
                yield simple.span(1)
            found = self.next_statement(text, position)
            if found is not None:
                yield found

    def next_statement(self, text: str, position: int = 0) -> tuple[int, int] | None:
        """Begin and end of the next statement from `position` on."""
        begin = self._begin(text, position)
        return None if begin == len(text) else (begin, self._end_of_statement(text, begin))

    def split(self, text: str) -> list[str]:
        """The statements of a script, without those that are only comments."""
        return [text[begin:end].rstrip() for begin, end in self.statements(text)]

    def bare(self, text: str) -> str:
        """The text with a space for each comment, '' for strings and "" for quoted names."""
        parts: list[str] = []
        position = 0
        while position < len(text):
            for found in self._kinds.finditer(text, position):
                kind = found.lastgroup or ""
                if kind == "rest":
                    position = found.start()
                    break
                parts.append(found[0] if kind == "kept" else _REPLACED[kind])
            else:
                break
            position = self._bare_of_odd(text, position, parts)
        return "".join(parts)

    def _bare_of_odd(self, text: str, position: int, parts: list[str]) -> int:
        """The same for what is not of the usual kinds, to its end, which is returned."""
        kind, begin, position, inside = self._odd(text, position, False)
        parts.append(_REPLACED.get(kind) or text[begin:position])
        if inside:
            for kind, begin, end, goes_on in self.pieces(text, position, inside):
                parts.append(_REPLACED.get(kind) or text[begin:end])
                position = end
                if not goes_on:
                    break
        return position

    def words(self, text: str) -> list[str]:
        """The words, numbers and signs of the text in upper case; '' and "" for those in quotes."""
        return _TOKEN.findall(self.bare(text).upper())

    def opening(self, text: str, count: int) -> list[str]:
        """The first of the words, so many at the most."""
        found: list[str] = []
        for kind, begin, end, _ in self.pieces(text):
            if kind in ("code", "end"):
                tokens = islice(_TOKEN.finditer(text, begin, end), count)
                found += [token[0].upper() for token in tokens]
            elif kind in ("string", "name"):
                found.append(_REPLACED[kind])
            if len(found) >= count:
                break
        return found[:count]

    def first_word(self, text: str) -> str:
        """The first word in upper case, behind parentheses too; empty when something else comes
        first."""
        for kind, begin, end, _ in self.pieces(text):
            if kind in ("string", "name"):
                break
            if kind == "code" and (code := text[begin:end].lstrip(" \t\n\r\f\v(")):
                found = _WORD.match(code)
                return found[0].upper() if found else ""
        return ""

    def normalise(self, text: str) -> str:
        """The text as a log may show it: `?` for literals, no comments, one space for any; of
        2,048 characters at the most."""
        parts: list[str] = []
        length = 0
        for kind, begin, end, _ in self.pieces(text):
            part = text[begin:end]
            if kind == "code":
                # The rest will be cut off.
                part = _LITERAL.sub("?", _SPACES.sub(" ", part)[: 4 * LONGEST_NORMALISED])
            elif kind != "name":
                part = {"string": "?", "end": ";"}.get(kind, " ")
            parts.append(part)
            length += len(part)
            if length > 4 * LONGEST_NORMALISED:
                break
        short = _SPACES.sub(" ", "".join(parts)).strip(" ;")
        if len(short) > LONGEST_NORMALISED:
            short = short[: LONGEST_NORMALISED - 3] + "..."
        return short

    def _begin(self, text: str, position: int) -> int:
        """Where the next statement begins; the text's length when there is none."""
        while True:
            position = _end(self._nothing.match(text, position))
            if position == len(text):
                return position
            kind, _, end, _ = self._odd(text, position, False)
            if kind != "nothing":
                return position
            position = end

    def _end_of_statement(self, text: str, begin: int) -> int:
        """Where the statement that begins there ends: at a semicolon, or with the text."""
        position, inside = begin, False
        while True:
            position = _end(self._patterns[inside][0].match(text, position))
            if position == len(text):
                return position
            if text[position] == ";":
                may_hold_more = _MAY_HOLD_MORE.match(text, begin)
                return (may_hold_more and self._end_of_compound(text, begin)) or position
            _, _, position, inside = self._odd(text, position, inside)

    def _odd(self, text: str, position: int, inside: bool) -> Piece:
        """What the patterns do not match there: what is never closed, in the first place."""
        kind = "string" if text[position] == "'" else "name" if text[position] in '"`[' else "code"
        return kind, position, position + 1 if kind == "code" else len(text), inside

    def _end_of_compound(self, text: str, begin: int) -> int | None:
        """The end of a statement that has semicolons of its own; None if it is no such one."""
        return None

    def _tokens(self, text: str, begin: int) -> Iterator[tuple[str, int]]:
        """Words, signs and semicolons in upper case with where they are."""
        for kind, start, end, _ in self.pieces(text, begin):
            if kind == "code":
                for token in _TOKEN.finditer(text[start:end].upper()):
                    yield token[0], start + token.start()
            elif kind != "nothing":
                yield ";" if kind == "end" else '""', start


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


def _end(match: re.Match[str] | None) -> int:
    assert match is not None  # what may be empty matches always
    return match.end()


# PostgreSQL

_LINE = r"--[^\n\r]*+"
# A string of one part goes on behind a new line.
_GOES_ON = rf"'(?:[ \t\f\v]|{_LINE})*+[\n\r](?:{SPACE}|{_LINE}[\n\r])*+'"
_ESCAPED = rf"'(?:[^'\\]++|\\.|''|{_GOES_ON})*+'"
_TAG = rf"(?:{FIRST}{ALNUM}*+)?+"
_DOLLAR = re.compile(rf"\${_TAG}\$")


def _nested(depth: int) -> str:
    inner = rf"|{_nested(depth - 1)}" if depth else ""
    return rf"/\*(?:[^*/]++|\*(?!/)|/(?!\*){inner})*+\*/"


class PostgreSQLScanner(Scanner):
    """PostgreSQL, with or without `standard_conforming_strings`."""

    def __init__(self, standard_strings: bool = True) -> None:
        # A dollar quote without an end takes all the text, so that no end is looked for twice.
        string = rf"[eE]{_ESCAPED}|\$(?P<tag>{_TAG})\$.*?\$(?P=tag)\$"
        string += r"|'[^']*+'" if standard_strings else rf"|{_ESCAPED}|[bBxX]'[^']*+'"
        prefixes = "eE" if standard_strings else "eEbBxX"
        super().__init__(
            string=string,
            name=r'"[^"]*+"',
            comment=rf"{_LINE}|{_nested(4)}",
            plain=rf"(?![{prefixes}]'){FIRST}{IN_WORD}*+|{NUMBER}|\$[0-9]++|-(?!-)|/(?!\*)"
            rf"|\$(?!{_TAG}\$)|[{_ascii(but=DIGITS + OTHERWISE + SPACES + '_$')}]++",
        )

    def _odd(self, text: str, position: int, inside: bool) -> Piece:
        if text.startswith("/*", position):
            return "nothing", position, _end_of_nested(text, position), False
        if text[position] in "eEbBxX" or _DOLLAR.match(text, position):
            return "string", position, len(text), False
        return super()._odd(text, position, inside)

    def _end_of_compound(self, text: str, begin: int) -> int | None:
        # CREATE FUNCTION ... BEGIN ATOMIC ...; ...; END
        tokens = self._tokens(text, begin)
        head = next(tokens, ("", 0))[0]
        while head in ("CREATE", "OR", "REPLACE"):
            head = next(tokens, ("", 0))[0]
        if head not in ("FUNCTION", "PROCEDURE"):
            return None
        depth, parentheses, before = 0, 0, ""
        for word, position in tokens:
            if word == ";" and depth == 0:
                return position
            if word in "()":
                parentheses += 1 if word == "(" else -1
            elif (word == "ATOMIC" and before == "BEGIN") and parentheses == 0:
                depth += 1
            elif word == "CASE":
                depth += depth > 0
            elif word == "END":
                depth -= depth > 0
            before = word
        return len(text)


def _end_of_nested(text: str, position: int, levels: int | None = None) -> int:
    """The end of a comment that may hold others, down to so many levels."""
    depth, position = 1, position + 2
    while depth:
        if depth == levels:
            # What looks like the begin of another one is none: `/*/` ends it.
            end = text.find("*/", position)
            if end < 0:
                return len(text)
            depth, position = depth - 1, end + 2
            continue
        signs = _COMMENT_SIGNS.match(text, position)
        if signs is None:
            return len(text)
        position, kind = signs.end(), signs.lastgroup or ""
        count = (position - signs.start(kind)) // 2
        if kind == "end":
            position -= 2 * max(count - depth, 0)
            depth = max(depth - count, 0)
        else:
            too_many = 0 if levels is None else max(depth + count - levels, 0)
            position -= 2 * too_many
            depth += count - too_many
    return position


# MySQL and MariaDB

_CONTROL = r"[\x00-\x20\x7f]"
_MARKER = re.compile(r"/\*(M?)!([0-9]{5,6})?")
_STORED = frozenset({"PROCEDURE", "FUNCTION", "TRIGGER", "EVENT", "PACKAGE"})
# Words that begin a block which END ends, where a statement may begin.
_BLOCKS = frozenset({"IF", "LOOP", "WHILE", "REPEAT", "FOR"})
_BEFORE_STATEMENT = frozenset({";", ":", "BEGIN", "THEN", "ELSE", "DO", "LOOP", "REPEAT", "ROW"})


class MySQLScanner(Scanner):
    """MySQL or MariaDB in one of their modes.

    Args:
        backslashes: a backslash escapes in strings; False with NO_BACKSLASH_ESCAPES.
        ansi_quotes: double quotes are those of names.
        version: the server's, such as 101106; comments run that ask for no later one.
        mariadb: the server is MariaDB.
    """

    def __init__(
        self,
        backslashes: bool = True,
        ansi_quotes: bool = False,
        version: int = 101100,
        mariadb: bool = True,
    ) -> None:
        self._version, self._mariadb = version, mariadb
        inner = r"(?:[^{0}\\]++|\\.)*+" if backslashes else "[^{0}]*+"
        string, name = "'" + inner.format("'") + "'", "`[^`]*+`"
        if ansi_quotes:
            name += '|"[^"]*+"'
        else:
            string += '|"' + inner.format('"') + '"'
        signs = rf"-(?!-(?:{_CONTROL}|\Z))|/(?!\*)|"
        runs = "M?!" if mariadb else "!"
        super().__init__(
            string=string,
            name=name,
            comment=rf"(?:#|--(?={_CONTROL}|\Z))[^\n]*+|/\*(?!{runs}){IN_COMMENT}\*/",
            plain=signs + r"""[^'"`#;/\- \t\n\r\f\v]++""",
            plain_inside=signs + r"""\*(?!/)|[^'"`#;/\-* \t\n\r\f\v]++""",
        )

    def _odd(self, text: str, position: int, inside: bool) -> Piece:
        if inside and text.startswith("*/", position):
            return "marker", position, position + 2, False
        marker = _MARKER.match(text, position)
        if marker is None or (marker[1] and not self._mariadb):
            if text.startswith("/*", position):
                return "nothing", position, len(text), inside
            return super()._odd(text, position, inside)
        if marker[2] is None or self._runs(int(marker[2]), bool(marker[1])):
            return "marker", position, marker.end(), True
        return "nothing", position, _end_of_nested(text, position, 2), inside

    def _runs(self, version: int, for_mariadb: bool) -> bool:
        # MariaDB knows nothing of what came after MySQL 5.6.
        foreign = self._mariadb and not for_mariadb and 50700 <= version <= 99999
        return version <= self._version and not foreign

    def _end_of_compound(self, text: str, begin: int) -> int | None:
        # CREATE PROCEDURE ... BEGIN ...; END, BEGIN NOT ATOMIC ...; END
        tokens = self._tokens(text, begin)
        head = [next(tokens, ("", 0))[0] for _ in range(2)]
        is_block = head == ["BEGIN", "NOT"]
        if not is_block and head[0] != "CREATE":
            return None
        depth, before = int(is_block), head[1]
        for word, position in tokens:
            if word == ";" and depth == 0:
                return position
            if not is_block:
                # What stands before the kind: OR REPLACE, DEFINER = ...
                is_block = word in _STORED or before in _STORED
            elif word == "END":
                depth -= depth > 0
            elif _begins_block(word, before):
                depth += 1
            before = word
        return len(text)


def _begins_block(word: str, before: str) -> bool:
    if word in ("BEGIN", "CASE"):
        return before != "END"
    return word in _BLOCKS and before in _BEFORE_STATEMENT


# SQLite

LITE_SPACES = " \t\n\r\f"
# A variable as Tcl has them: its parentheses may hold anything but space.
_TCL = rf"[$@:#](?:::)*+(?:{IN_WORD}(?:{IN_WORD}|::)*+(?:\([^ \t\n\r\f\v)]*+\)?+)?+)?+"


class SQLiteScanner(Scanner):
    """SQLite."""

    def __init__(self) -> None:
        super().__init__(
            string=r"'[^']*+'",
            name=r'"[^"]*+"|`[^`]*+`|\[[^\]]*+\]',
            # Two signs at the very end are no comment, and a vertical tab is no space.
            comment=rf"--[^\n]*+|/\*(?!\Z){IN_COMMENT}(?:\*/|\Z)",
            plain=rf"{ALNUM}{IN_WORD}*+|{_TCL}|-(?!-)|/(?!\*(?!\Z))"
            rf"|[{_ascii(but=DIGITS + OTHERWISE + LITE_SPACES + '_$@:#`[')}]++",
            space=f"[{LITE_SPACES}]",
        )

    def _end_of_compound(self, text: str, begin: int) -> int | None:
        # CREATE TRIGGER ... BEGIN ...; END ends with a semicolon, END, and another semicolon.
        tokens = self._tokens(text, begin)
        word = next(tokens, ("", 0))[0]
        if word == "EXPLAIN":
            word = next((w for w, _ in tokens if w not in ("QUERY", "PLAN")), "")
        if word != "CREATE":
            return None
        word = next((w for w, _ in tokens if w not in ("TEMP", "TEMPORARY")), "")
        if word != "TRIGGER":
            return None
        last = ["", ""]
        for word, position in tokens:
            if word == ";" and last == [";", "END"]:
                return position
            last = [last[1], word]
        return len(text)


def cached_by_text(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A cache for a function of SQL text that is bounded in bytes: long texts are not kept."""
    cached: Any = lru_cache(MOST_CACHED)(function)

    @wraps(function)
    def call(text: str, *args: P.args, **kwargs: P.kwargs) -> T:
        return (cached if may_be_cached(text) else function)(text, *args, **kwargs)

    return cast("Callable[Concatenate[str, P], T]", call)


def may_be_cached(text: str) -> bool:
    """Whether a text is so short that caches may keep it; a character may take four bytes."""
    return len(text) * (1 if text.isascii() else 4) <= LONGEST_CACHED


@cache
def scanner(vendor: str) -> Scanner:
    """How the databases of this vendor read SQL, as long as nothing more is known of them; others
    than those here as the standard has it."""
    classes: dict[str, type[Scanner]] = {"mysql": MySQLScanner, "sqlite": SQLiteScanner}
    return classes.get(vendor, PostgreSQLScanner)()  # type: ignore[call-arg]


@cached_by_text
def normalise(sql: str, vendor: str = "postgresql") -> str:
    """The statement as a log may show it: `?` for literals, no comments, one space for any, and
    no more than 2,048 characters."""
    return scanner(vendor).normalise(sql)
