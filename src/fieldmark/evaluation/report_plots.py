"""Scatter plots and histograms of the report: numbers in, coordinates for the template's inline SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fieldmark.evaluation.report_charts import HEIGHT, WIDTH, number_text, round_ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 28, 36
_BINS = 8
MINI_SIZE = (96, 48)
# Points of one kind in one plot: more make no other picture, only a larger file.
_MOST_POINTS = 1200
_FEWEST_IN_BIN = 5


@dataclass(frozen=True)
class Axes:
    """A plot's frame: (position, text) of the ticks, the names of its axes."""

    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    name_x: str
    name_y: str


@dataclass(frozen=True)
class Scatter:
    """Matched pairs as dots, mismatched ones as crosses, and the running median of all."""

    name: str
    note: str
    axes: Axes
    dots: str
    crosses: str
    median: str
    summary: str


@dataclass(frozen=True)
class Histogram:
    """Outlines of distributions: (name, SVG path) of each."""

    name: str
    axes: Axes
    lines: list[tuple[str, str]]
    summary: str
    facts: list[tuple[str, str]]


def draw_scatter(name: str, teacher: np.ndarray, cosines: np.ndarray, note: str) -> Scatter:
    """One plot of cosine against alignment score.

    Args:
        name: whose cosines.
        teacher: [G, 2, 2] scores in 0..1; the diagonal of each group is its matches.
        cosines: [G, 2, 2].
        note: what is said beside the name.
    """
    ticks_x, ticks_y = (round_ticks(float(values.min()), float(values.max()), 4) for values in (teacher, cosines))
    bottom = (ticks_y[0], ticks_y[-1])
    place = _placing((ticks_x[0], ticks_x[-1]), bottom, (WIDTH, HEIGHT))
    own = np.broadcast_to(np.eye(2, dtype=bool), teacher.shape)
    centres, medians = _medians(teacher.ravel(), cosines.ravel())
    shown = {kind: _thinned(np.stack([teacher[own == kind], cosines[own == kind]], 1)) for kind in (True, False)}
    spread = f"cosines from {number_text(float(cosines.min()))} to {number_text(float(cosines.max()))}"
    return Scatter(
        name=name,
        note=note,
        axes=_axes(place, ticks_x, ticks_y, bottom, "teacher's alignment score", "cosine"),
        dots=_dots(place(shown[True])),
        crosses=_crosses(place(shown[False])),
        median="" if len(centres) < 2 else _line(place(np.stack([centres, medians], 1))),
        summary=f"{teacher.size:,} pairs, {note}, {spread}",
    )


def mini_scatter(
    teacher: np.ndarray, cosines: np.ndarray, x: tuple[float, float], y: tuple[float, float]
) -> tuple[str, str]:
    """Matched and mismatched pairs of one category as two SVG paths in a box of `MINI_SIZE`; x and y are its bounds."""
    width, height = MINI_SIZE
    across = 4 + (teacher - x[0]) / max(x[1] - x[0], 1e-9) * (width - 8)
    down = height - 4 - (cosines - y[0]) / max(y[1] - y[0], 1e-9) * (height - 8)
    own = np.broadcast_to(np.eye(2, dtype=bool), teacher.shape)
    places = {kind: _thinned(np.stack([across[own == kind], down[own == kind]], 1)) for kind in (True, False)}
    return _dots(places[True]), _crosses(places[False], 1.5)


def draw_histogram(
    name: str, edges: np.ndarray, densities: Mapping[str, np.ndarray], facts: Sequence[tuple[str, Any]] = ()
) -> Histogram:
    """Outlines of histograms over the same bins.

    Args:
        name: what is shown.
        edges: [bins + 1].
        densities: of each distribution [bins], which integrate to one.
        facts: (name, value) said below.
    """
    top = max(float(values.max()) for values in densities.values())
    place = _placing((float(edges[0]), float(edges[-1])), (0.0, top or 1.0), (WIDTH, HEIGHT))
    low, high = float(edges[0]), float(edges[-1])
    ticks = [tick for tick in round_ticks(low, high, 5) if low - 1e-9 <= tick <= high + 1e-9]
    middles = (edges[:-1] + edges[1:]) / 2
    means = {key: float((values * middles).sum() / max(values.sum(), 1e-12)) for key, values in densities.items()}
    return Histogram(
        name=name,
        axes=_axes(place, ticks, [], (0.0, top), "cosine", "density"),
        lines=[(key, _outline(place, edges, values)) for key, values in densities.items()],
        summary="; ".join(f"{key}: mean {number_text(round(mean, 3))}" for key, mean in means.items()),
        facts=[(key, number_text(float(value))) for key, value in facts],
    )


def _placing(x: tuple[float, float], y: tuple[float, float], size: tuple[int, int]) -> Any:
    """A function from [n, 2] numbers to [n, 2] places in the box."""
    start, span = np.array([x[0], y[0]]), np.array([max(x[1] - x[0], 1e-9), max(y[1] - y[0], 1e-9)])
    inner = np.array([size[0] - _LEFT - _RIGHT, -(size[1] - _TOP - _BOTTOM)])
    origin = np.array([_LEFT, size[1] - _BOTTOM])
    return lambda points: origin + (np.asarray(points, dtype=np.float64) - start) / span * inner


def _axes(
    place: Any, ticks_x: Sequence[float], ticks_y: Sequence[float], y: tuple[float, float], name_x: str, name_y: str
) -> Axes:
    left = [(float(place([[tick, y[0]]])[0, 0]), number_text(tick)) for tick in ticks_x]
    return Axes(left, [(float(place([[0.0, tick]])[0, 1]), number_text(tick)) for tick in ticks_y], name_x, name_y)


def _medians(scores: np.ndarray, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median cosine of equally many pairs each, in the order of their scores."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part) >= _FEWEST_IN_BIN]
    return np.array([np.median(scores[p]) for p in parts]), np.array([np.median(cosines[p]) for p in parts])


def _thinned(points: np.ndarray) -> np.ndarray:
    if len(points) <= _MOST_POINTS:
        return points
    return points[np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)]


def _dots(places: np.ndarray) -> str:
    """Lines of no length, which a round cap draws as dots."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)


def _crosses(places: np.ndarray, arm: float = 2.0) -> str:
    return "".join(
        f"M{x - arm:.1f} {y - arm:.1f}l{2 * arm:g} {2 * arm:g}m0-{2 * arm:g}l-{2 * arm:g} {2 * arm:g}"
        for x, y in places
    )


def _line(places: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _outline(place: Any, edges: np.ndarray, values: np.ndarray) -> str:
    """The steps of a histogram, from the axis up and back."""
    x = np.repeat(edges, 2)
    y = np.concatenate([[0.0], np.repeat(values, 2), [0.0]])
    return _line(place(np.stack([x, y], axis=1)))
