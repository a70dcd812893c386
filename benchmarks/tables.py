"""What is shown on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Result, Verdict
from benchmarks.results import MEAN, Figure, Section


def show(console: Console, section: Section) -> None:
    """A table with a row for each competitor, a column for each work, and why figures are
    missing."""
    console.print(table(section))
    for line in absences(section):
        console.print(f"  {line}", style="dim", highlight=False)


def table(section: Section) -> Table:
    """The section as a table: ratios with their quartiles, below them what was measured."""
    many = section.unit and len(section.works) > 2
    what = "connections" if section.name == "http" else "tasks"
    built = Table(title=f"{section.name}, {section.tasks} {what}", title_justify="left")
    built.add_column("")
    for title in section.works.values():
        built.add_column(title, justify="right")
    if many:
        built.add_column("geometric mean", justify="right")
    for name, title in section.titles.items():
        cells = [cell(section.figures.get(work, {}).get(name), section) for work in section.works]
        if many:
            mean = section.ratio(MEAN, name)
            cells.append("" if mean is None else f"{mean:.2f}")
        if any(cells):
            built.add_row(title, *cells)
    return built


def cell(figure: Figure | None, section: Section) -> str:
    """The ratio, its quartiles and the median, in two lines; empty where nothing was measured."""
    if figure is None:
        return ""
    measured = f"{figure.median:,.0f} {section.unit_of_measure}"
    if figure.ratio is None:
        return measured
    ratio = figure.ratio
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})\n{measured}"


def absences(section: Section) -> list[str]:
    """A line for each competitor and reason."""
    works: dict[tuple[str, str], list[str]] = {}
    for work, reasons in section.absent.items():
        for name, reason in reasons.items():
            works.setdefault((name, reason), []).append(section.works.get(work, work))
    return [
        f"{section.titles.get(name, name)}: {reason}"
        + ("" if len(where) == len(section.works) else f" ({', '.join(where)})")
        for (name, reason), where in works.items()
    ]


def show_bars(console: Console, results: Sequence[Result]) -> None:
    """A table of the bars."""
    built = Table(title="What must hold", title_justify="left")
    for title in ("", "work", "compared with", "bar", "measured", ""):
        built.add_column(title, justify="right" if title in ("bar", "measured") else "left")
    styles = {Verdict.HELD: "green", Verdict.MISSED: "red", Verdict.NOT_MEASURED: "dim"}
    for result in results:
        bar = result.bar
        limit = f"{'at least' if bar.is_least else 'at most'} {bar.limit:g}"
        measured = "" if result.measured is None else f"{result.measured:.2f}"
        where = "" if bar.section == "postgresql" else f"{bar.section}: "
        row = (bar.competitor, where + bar.work, bar.base or "MB", limit, measured)
        built.add_row(*row, str(result.verdict), style=styles[result.verdict])
    console.print(built)
