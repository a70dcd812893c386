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
    built.add_column("", min_width=18)
    for title in section.works.values():
        built.add_column(title, justify="right", overflow="fold")
    if many:
        built.add_column("geometric mean", justify="right")
    for name, title in section.titles.items():
        cells = [cell(section.figures.get(work, {}).get(name), section) for work in section.works]
        if many:
            mean = section.ratio(MEAN, name)
            cells.append("" if mean is None else short(mean))
        if any(cells):
            built.add_row(title, *cells)
    return built


def cell(figure: Figure | None, section: Section) -> str:
    """The ratio, its quartiles and the median, in three lines; empty where nothing was measured."""
    if figure is None:
        return ""
    measured = quantity(figure.median, section.unit_of_measure)
    if figure.ratio is None:
        return measured
    ratio = figure.ratio
    return f"{short(ratio.median)}\n{short(ratio.low)}-{short(ratio.high)}\n{measured}"


def quantity(value: float, unit: str) -> str:
    """A number with its unit; microseconds become milliseconds where they are many."""
    if unit == "µs" and value >= 1_000:
        value, unit = value / 1_000, "ms"
    return f"{value:,.{0 if value >= 100 else 1}f} {unit}".strip()


def short(ratio: float) -> str:
    """A ratio with as many decimals as mean something."""
    return f"{ratio:.{2 if ratio < 10 else 1}f}"


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
    measured = [each for each in results if each.verdict is not Verdict.NOT_MEASURED]
    built = Table(title="What must hold", title_justify="left")
    for title in ("", "work", "compared with", "bar", "measured", ""):
        built.add_column(title, justify="right" if title in ("bar", "measured") else "left")
    styles = {Verdict.HELD: "green", Verdict.MISSED: "red"}
    for result in measured:
        bar = result.bar
        limit = f"{'at least' if bar.is_least else 'at most'} {bar.limit:g}"
        where = "" if bar.section == "postgresql" else f"{bar.section}: "
        row = (bar.competitor, where + bar.work, bar.base or "MB", limit, f"{result.measured:.2f}")
        built.add_row(*row, str(result.verdict), style=styles[result.verdict])
    if measured:
        console.print(built)
    if rest := len(results) - len(measured):
        console.print(f"  {rest} of {len(results)} bars not measured", style="dim", highlight=False)
