"""What a run found, as data: figures for tables, bars, plots and the JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Ratio, geometric_mean, ratio
from benchmarks.rounds import Series

MEAN = "mean"


@dataclass(frozen=True)
class Figure:
    """One competitor at one work.

    Attributes:
        median: microseconds per operation; of HTTP, requests per second; of memory, bytes or MB.
        ratio: to the unit of the same rounds; None where nothing is compared.
        rounds: what was measured in each round.
    """

    median: float
    ratio: Ratio | None = None
    rounds: tuple[float, ...] = ()


@dataclass
class Section:
    """One kind of comparison: a table.

    Attributes:
        name: "postgresql", "mariadb", "sqlite", "http", "memory".
        tasks: at the same time; of HTTP, connections.
        unit: the competitor that ratios refer to.
        server: the database, and its version where that is known.
        is_speed: more is better, as with requests per second.
        titles: of the competitors, in the order of the table.
        works: titles of the works, in the order of the table.
        figures: by work and competitor.
        absent: why a competitor has no figure, by work and competitor.
    """

    name: str
    tasks: int
    unit: str
    titles: dict[str, str]
    works: dict[str, str]
    server: str = ""
    is_speed: bool = False
    unit_of_measure: str = "µs"
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    absent: dict[str, dict[str, str]] = field(default_factory=dict)

    def ratio(self, work: str, competitor: str, base: str | None = None) -> float | None:
        """The ratio of a competitor to the unit, or to another one; None where one is missing.

        Args:
            work: its name, or MEAN for the geometric mean of all works of the section, which there
                is only when the competitor has done all of them.
        """
        if work == MEAN:
            found = [self.ratio(each, competitor, base) for each in self.works]
            done = [value for value in found if value is not None]
            return geometric_mean(done) if done and len(done) == len(found) else None
        figures = self.figures.get(work, {})
        measured = [figures.get(name) for name in (competitor, base or self.unit)]
        ratios = [f.ratio.median for f in measured if f is not None and f.ratio is not None]
        return ratios[0] / ratios[1] if len(ratios) == 2 else None

    def add(self, series: Series) -> None:
        """Take in what was measured of one work, in one group of competitors."""
        figures = self.figures.setdefault(series.work, {})
        absent = self.absent.setdefault(series.work, {})
        absent.update(series.absent)
        unit = series.times.get(self.unit)
        for name, times in series.times.items():
            compared = ratio(times, unit) if unit else None
            # The unit is in each group; what it took in the first one is shown.
            figures.setdefault(name, Figure(statistics.median(times), compared, tuple(times)))


def sections_of(
    name: str,
    unit: str,
    titles: Mapping[str, str],
    works: Mapping[str, str],
    measured: Iterable[Series],
) -> list[Section]:
    """A section for each number of tasks."""
    found: dict[int, Section] = {}
    for series in measured:
        if series.tasks not in found:
            found[series.tasks] = Section(name, series.tasks, unit, dict(titles), dict(works))
        found[series.tasks].add(series)
    return list(found.values())


def to_json(
    sections: Sequence[Section], about: Mapping[str, Any], bars: Sequence[Mapping[str, Any]]
) -> str:
    """The whole run as JSON: versions, each round of each competitor, ratios, bars."""
    content = {
        "about": dict(about),
        "sections": [asdict(section) | _means(section) for section in sections],
        "bars": list(bars),
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _means(section: Section) -> dict[str, Any]:
    return {"geometric_means": {name: section.ratio(MEAN, name) for name in section.titles}}


def save(path: Path, text: str) -> None:
    """Write the file, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
