"""The statistics: ratios of medians, their spread, and the geometric mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """How one competitor compares with another.

    Attributes:
        median: ratio of the medians of all rounds.
        low: first quartile of the ratios of the single rounds.
        high: third quartile of them.
    """

    median: float
    low: float
    high: float


def ratio(measured: Sequence[float], unit: Sequence[float]) -> Ratio:
    """Compare two series that were measured by turns, one value a round.

    Raises:
        ValueError: the series have no rounds, or not as many.
    """
    if not measured or len(measured) != len(unit):
        raise ValueError(f"{len(measured)} rounds cannot be compared with {len(unit)}")
    low, high = quartiles([one / other for one, other in zip(measured, unit, strict=True)])
    return Ratio(statistics.median(measured) / statistics.median(unit), low, high)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile, between the smallest and the greatest value."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def geometric_mean(ratios: Collection[float]) -> float:
    """The mean of ratios, in which twice and half make one.

    Raises:
        ValueError: there are none.
    """
    if not ratios:
        raise ValueError("the mean of no ratios")
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
