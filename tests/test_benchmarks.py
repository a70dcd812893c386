"""The benchmarks: their statistics, bars, tables and files, and that a wrong result counts for
nothing; then each work for real, with the package, raw psycopg and Django only."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from rich.console import Console

from benchmarks import bars, figures, options, results, rounds, rows, tables, works
from benchmarks.bars import Bar, Verdict
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import ASYNCPG, PSYCOPG
from benchmarks.results import MEAN, Section
from benchmarks.rounds import Plan, Series
from benchmarks.web import bodies, loader
from benchmarks.works import WORKS, WrongResult

ROOT = Path(__file__).parent.parent
GET = WORKS["get"]


def test_a_ratio_is_of_medians_and_its_spread_of_single_rounds() -> None:
    assert figures.ratio([2, 4, 60], [1, 2, 3]) == (2.0, 2.0, 11.0)
    assert figures.ratio([3], [2]) == (1.5, 1.5, 1.5)
    for measured, unit in ([1.0], [1.0, 2.0]), ([], []):
        with pytest.raises(ValueError, match="rounds cannot be compared"):
            figures.ratio(measured, unit)


def test_twice_and_half_have_the_mean_one() -> None:
    assert figures.geometric_mean([2, 0.5]) == pytest.approx(1)
    assert figures.geometric_mean([1, 10, 100]) == pytest.approx(10)
    with pytest.raises(ValueError, match="no ratios"):
        figures.geometric_mean([])


def section(done: Iterable[str] = ("get", "count"), **times: list[float]) -> Section:
    """A section of these works, in which every competitor did each in these times."""
    measured = [Series(work, 20, times=dict(times)) for work in done]
    titles = {name: f"the {name}" for name in times}
    named = {work: WORKS[work].title for work in done}
    (found,) = results.sections_of("postgresql", "psycopg", titles, named, measured)
    return found


def test_competitors_of_two_groups_are_compared_by_the_unit_of_their_own() -> None:
    found = section(psycopg=[10, 10], session=[5, 5])
    found.add(Series("get", 20, times={"psycopg": [40, 40], "django": [80, 80]}))
    assert found.ratio("get", "django") == 2.0
    assert found.ratio("get", "session", "django") == 0.25
    assert found.figures["get"]["psycopg"].median == 10


def test_the_mean_is_of_all_works_or_there_is_none() -> None:
    found = section(psycopg=[10, 10], session=[5, 5])
    assert found.ratio(MEAN, "session") == pytest.approx(0.5)
    del found.figures["count"]["session"]
    assert found.ratio(MEAN, "session") is None


def test_a_bar_is_held_missed_or_not_measured() -> None:
    found = section(psycopg=[10, 10], session=[5, 5])
    asked = [
        Bar("session", "get", 0.5),
        Bar("session", "get", 0.49),
        Bar("session", "get", 0.51, is_least=True),
        Bar("session", "filter", 1.0),
        Bar("session", "get", 1.0, tasks=200),
        Bar("session", "get", 1.0, section="http"),
    ]
    missing = [Verdict.NOT_MEASURED] * 3
    wanted = [Verdict.HELD, Verdict.MISSED, Verdict.MISSED, *missing]
    assert [result.verdict for result in bars.judge([found], asked)] == wanted


def test_the_bar_of_the_mean_is_judged_when_all_works_were_done() -> None:
    asked = [Bar("session", MEAN, 0.6)]
    (some,) = bars.judge([section(psycopg=[10, 10], session=[5, 5])], asked)
    (every,) = bars.judge([section(WORKS, psycopg=[10, 10], session=[5, 5])], asked)
    assert (some.verdict, every.verdict) == (Verdict.NOT_MEASURED, Verdict.HELD)


def test_every_work_of_the_package_has_a_bar_and_every_bar_a_work() -> None:
    on_postgresql = [bar for bar in bars.BARS if bar.section == "postgresql"]
    of_session = {b.work for b in on_postgresql if (b.competitor, b.base) == ("session", "psycopg")}
    assert of_session == {*WORKS, MEAN}
    assert {bar.work for bar in on_postgresql} <= {*WORKS, MEAN}
    assert {bar.section for bar in bars.BARS} == set(options.SECTIONS)


def test_the_table_has_ratios_spreads_times_and_why_a_figure_is_missing() -> None:
    found = section(psycopg=[10, 20], session=[20, 30_000])
    found.add(Series("count", 20, absent={"tortoise": "not installed: tortoise"}))
    console = Console(width=120, record=True, file=io.StringIO())
    tables.show(console, found)
    tables.show_bars(console, bars.judge([found]))
    shown = console.export_text()
    for text in (
        "postgresql, 20 tasks",
        "get by key",
        "the session",
        "1000.7",
        "376.5-1125.5",
        "15.0 ms",
    ):
        assert text in shown
    assert "tortoise: not installed: tortoise (count)" in shown
    assert "missed" in shown and "bars not measured" in shown


def test_the_file_has_each_round_each_ratio_and_each_bar(tmp_path: Path) -> None:
    found = section(psycopg=[10, 20], session=[20, 30])
    judged = [each.as_dict() for each in bars.judge([found])]
    results.save(tmp_path / "new" / "run.json", results.to_json([found], {"loop": "x"}, judged))
    read = json.loads((tmp_path / "new" / "run.json").read_text())
    figure = read["sections"][0]["figures"]["get"]["session"]
    assert figure == {
        "median": 25,
        "ratio": pytest.approx([25 / 15, 1.625, 1.875]),
        "rounds": [20, 30],
    }
    assert read["sections"][0]["geometric_means"]["session"] == pytest.approx(25 / 15)
    assert read["about"] == {"loop": "x"} and len(read["bars"]) == len(bars.BARS)
    assert read["bars"][0]["verdict"] == "missed"


def test_as_many_pools_are_open_as_the_server_has_room_for() -> None:
    pools = ["unit", "ours", "ours", "a", "b", "c"]
    assert list(rounds.groups(pools, 100, 10)) == [[0, 1, 2, 3, 4, 5]]
    assert list(rounds.groups(pools, 30, 10)) == [[0, 1, 2, 3], [0, 4, 5]]
    # One beside the unit, whatever the server says.
    assert list(rounds.groups(pools, 0, 10)) == [[0, 1, 2], [0, 3], [0, 4], [0, 5]]


def test_every_task_has_as_many_operations_as_any_other() -> None:
    assert Plan(1).turn(GET, 20) == (400, 20)
    assert Plan(1).turn(WORKS["values"], 200) == (200, 200)
    # A quick run may have fewer tasks.
    assert Plan(1, 0.05).turn(WORKS["values"], 20) == (1, 1)


def test_the_unit_is_always_there_and_first() -> None:
    chosen = options.parse(["--competitors", "session", "--quick", "--tasks", "1", "200"])
    assert chosen.competitors == ("psycopg", "session") and chosen.tasks == (1, 200)
    assert chosen.plan == Plan(options.QUICK_ROUNDS, options.QUICK_SHARE)
    assert options.parse(["http", "--applications", "native", "django"]).applications == (
        "django",
        "native",
    )


@pytest.mark.parametrize("wrong", [["nowhere"], ["--tasks", "0"], ["--works", "nothing"]])
def test_an_option_that_cannot_be_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.parse(wrong)
    assert wrong[-1] in capsys.readouterr().err


def test_both_drivers_get_the_same_statements() -> None:
    assert PSYCOPG.related.count("%s") == 1 and "%s" not in ASYNCPG.related
    assert ASYNCPG.values.endswith("WHERE id >= $1 AND id < $2 ORDER BY id")
    assert PSYCOPG.values.replace("%s", "{}").format("$1", "$2") == ASYNCPG.values


class Fake(Competitor, Client):
    """A competitor that answers what it is made with."""

    pool = "fake"

    def __init__(self, name: str, log: list[str], answer: Any = rows.book) -> None:
        self.name = self.title = name  # type: ignore[misc]
        self.log, self.answer = log, answer

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        self.log.append(self.name)
        yield self

    async def get(self, number: int) -> Any:
        return self.answer(rows.book_key(number))


async def measured(*fakes: Competitor, work: works.Work = GET) -> Series:
    plan = Plan(2, 0.01)
    (series,) = await rounds.measure(fakes, [work], [1], plan, None, lambda text: None)
    return series


async def test_competitors_take_turns_and_the_first_round_is_not_counted() -> None:
    log: list[str] = []
    series = await measured(Fake("a", log), Fake("b", log))
    assert log == ["a", "b"] * 3
    assert [len(times) for times in series.times.values()] == [2, 2]


async def test_who_gives_a_wrong_result_has_no_figure() -> None:
    series = await measured(Fake("a", []), Fake("b", [], lambda key: rows.book(key + 1)))
    assert list(series.times) == ["a"]
    assert series.absent["b"].startswith("WrongResult: (2, 'Book 00002 of the library'")


async def test_who_does_not_offer_a_work_or_cannot_be_opened_is_told_of() -> None:
    class Closed(Fake):
        async def open(self) -> None:
            raise OSError("no server")

    series = await measured(Fake("a", []), Closed("b", []), work=WORKS["prefetch"])
    assert series.times == {}
    assert series.absent == {"a": "not offered", "b": "cannot be opened: OSError: no server"}


def test_what_was_not_written_is_found() -> None:
    for work in WORKS.values():
        if work.writes:
            count, pages = works.expected_drafts(work, 20)
            works.check_written(work, 20, (count, pages))
            with pytest.raises(WrongResult):
                works.check_written(work, 20, (count, pages - 1))


# The loader, with a server of a few lines.

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n"


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[int]:
    """A server that gives these answers by turns, the last one again and again; its port."""
    left = list(answers)

    class Answer(asyncio.Protocol):
        transport: Any

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(left.pop(0) if len(left) > 1 else left[0])

    server = await asyncio.get_running_loop().create_server(Answer, loader.HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED], ids=["length", "chunks"])
async def test_the_loader_counts_answers(answer: bytes) -> None:
    async with answering(answer) as port:
        first, content = await asyncio.to_thread(loader.ask, port, "/")
        assert (first, content) == (answer, b"ok")
        asked = loader.Connection("/", first)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: asked, loader.HOST, port)
        async with asyncio.timeout(30):
            while asked.answers < 3:
                await asyncio.sleep(0)
        asked.transport.abort()
        assert asked.error is None


@pytest.mark.parametrize(
    "wrong", [PLAIN.replace(b"ok", b"no"), PLAIN.replace(b"200 OK", b"500 No")], ids=["body", "500"]
)
async def test_the_loader_does_not_count_wrong_answers(wrong: bytes) -> None:
    async with answering(PLAIN, PLAIN, wrong) as port:
        first, _ = await asyncio.to_thread(loader.ask, port, "/")
        asked = loader.Connection("/", first)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: asked, loader.HOST, port)
        async with asyncio.timeout(30):
            while not asked.error:
                await asyncio.sleep(0)
        assert asked.answers == 1


def test_half_an_answer_is_none_yet_and_an_error_none_at_all() -> None:
    for answer in (PLAIN, CHUNKED):
        assert all(loader.whole_content(answer[:end]) is None for end in range(len(answer)))
        assert loader.whole_content(answer) == b"ok"
    with pytest.raises(loader.WrongAnswer, match="404"):
        loader.whole_content(b"HTTP/1.1 404 Not Found\r\n\r\n")


def test_the_wanted_answers_are_those_of_the_rows() -> None:
    assert bodies.expected("get")["id"] == bodies.KEY
    books = bodies.expected("list")["books"]
    assert {book["author"] for book in books} == {bodies.AUTHOR}
    assert len(books) == rows.BOOKS_EACH


# For real, in processes of their own: with settings of their own, and a database of their own.


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The sections of a quick run of one round."""
    command = [sys.executable, "-W", "error", "-m", "benchmarks", *arguments]
    command += ["--quick", "--rounds", "1", "--json", str(folder / "run.json")]
    # Of a server that other tests use as well.
    command += ["--connections", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["sections"]
    return found


OURS = ["session", "transaction", "native", "run_sync"]


def test_every_work_is_done_by_the_package_as_by_the_driver(tmp_path: Path) -> None:
    names = ["psycopg", *OURS, "django"]
    (found,) = run(tmp_path, "postgresql", "--competitors", *names)
    done = {work: list(measured) for work, measured in found["figures"].items()}
    assert done == dict.fromkeys(WORKS, names), found["absent"]
    assert all(found["geometric_means"][name] > 0 for name in names)


def test_requests_are_served_and_counted(tmp_path: Path) -> None:
    served = ["django", "native", "session_usual"]
    (found,) = run(tmp_path, "http", "--applications", *served)
    for work in bodies.PATHS:
        assert list(found["figures"][work]) == served, found["absent"]


def test_the_memory_of_rows_is_measured(tmp_path: Path) -> None:
    (found,) = run(tmp_path, "memory", "--competitors", "session")
    assert list(found["figures"]) == ["row", "stream"]
    for measured in found["figures"].values():
        assert list(measured) == ["psycopg", "session"], found["absent"]


def test_other_databases_are_compared_as_well(tmp_path: Path) -> None:
    found = {each["name"]: each["figures"]["get"] for each in run(tmp_path, "sqlite", "mariadb")}
    assert {"hop", "session"} <= found["sqlite"].keys()
    if "mysql" in settings.DATABASES:
        assert {"asyncmy", "session"} <= found["mariadb"].keys()
