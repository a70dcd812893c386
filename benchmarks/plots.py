"""Plots of a run as SVG, which the README and the documentation can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import MEAN, Section

OURS = ("session", "transaction", "native", "run_sync", "session_usual")
COLORS = {True: "#0c7c59", False: "#9aa5b1"}


def save(folder: Path, sections: Sequence[Section], about: Mapping[str, Any]) -> list[Path]:
    """Write a file for each section, and return their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file; text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections:
        path = folder / f"{section.name}-{section.tasks}.svg"
        figure = _draw(section, about)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        written.append(path)
    return written


def _draw(section: Section, about: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    works = [MEAN, *section.works] if _has_mean(section) else list(section.works)
    columns = min(3, len(works))
    lines = -(-len(works) // columns)
    height = 0.9 + 0.26 * len(section.titles)
    figure = Figure(figsize=(4.6 * columns, height * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_visible(False)
    for axis, work in zip(axes, works, strict=False):
        axis.set_visible(True)
        _bars(axis, section, work)
    figure.suptitle(_caption(section, about), fontsize=9, x=0.01, ha="left")
    return figure


def _has_mean(section: Section) -> bool:
    return len(section.works) > 2 and section.ratio(MEAN, section.unit) is not None


def _bars(axis: Any, section: Section, work: str) -> None:
    figures = section.figures.get(work, {})
    shown = []
    for name, title in reversed(section.titles.items()):
        found = figures.get(name)
        value = section.ratio(work, name)
        if not section.unit and found is not None:
            value = found.median
        if value is not None:
            shown.append((name, title, value, found.ratio if found else None))
    values = [value for _, _, value, _ in shown]
    colors = [COLORS[name in OURS] for name, *_ in shown]
    axis.barh([title for _, title, _, _ in shown], values, color=colors)
    for place, (_, _, value, ratio) in enumerate(shown):
        end = value
        if ratio is not None:
            axis.plot([ratio.low, ratio.high], [place, place], color="#33404d", linewidth=1)
            end = max(value, ratio.high)
        axis.text(end, place, f" {value:,.2f}" if section.unit else f" {value:,.0f}", va="center")
    axis.set_title(section.works.get(work, "geometric mean"), fontsize=10)
    axis.margins(x=0.18)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _caption(section: Section, about: Mapping[str, Any]) -> str:
    what = "connections" if section.name == "http" else "tasks"
    better = "more is better" if section.is_speed else "less is better"
    unit = f"ratio to {section.titles[section.unit]}" if section.unit else "as measured"
    whose = f"{section.server}, " if section.server else ""
    where = f"{whose}Python {about['python']}, {about['loop']}, {about['machine']}"
    size = f"{section.tasks} {what}, pool of {about['pool']}"
    return f"{section.name}: {unit}, {better}; {size}; {where}"
