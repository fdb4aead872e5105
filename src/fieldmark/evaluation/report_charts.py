"""Line charts of the report: numbers in, coordinates for the template's inline SVG out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 26
_MOST_POINTS = 300
# With more points than this the raw line is drawn thin behind its running mean.
_SMOOTHED_FROM = 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One series: SVG paths, where its end mark stands, its number in the legend."""

    name: str
    raw: str
    smooth: str
    end_x: float
    end_y: float
    last: str
    number: int


@dataclass(frozen=True)
class Chart:
    """One chart: its lines, and (position, text) of the ticks of both axes."""

    name: str
    lines: list[Line]
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    summary: str


def draw_chart(name: str, series: Mapping[str, Points]) -> Chart | None:
    """Lays out one chart.

    Args:
        name: what is shown.
        series: (step, value) points per series; points that are not finite are left out.

    Returns:
        The chart, or None if no point is finite.
    """
    cleaned = {key: _finite(points) for key, points in series.items()}
    cleaned = {key: points for key, points in cleaned.items() if len(points)}
    if not cleaned:
        return None
    everything = np.concatenate(list(cleaned.values()))
    ticks_x = round_ticks(everything[:, 0].min(), everything[:, 0].max(), 4, whole=True)
    ticks_y = round_ticks(everything[:, 1].min(), everything[:, 1].max(), 4)
    low_x, high_x = everything[:, 0].min(), max(everything[:, 0].max(), everything[:, 0].min() + 1e-9)
    low_y, high_y = min(ticks_y[0], everything[:, 1].min()), max(ticks_y[-1], everything[:, 1].max())

    def place(points: np.ndarray) -> np.ndarray:
        x = _LEFT + (points[:, 0] - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (points[:, 1] - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM)
        return np.stack([x, y], axis=1)

    lines = [
        _line(key, points, place(points), place(_running_mean(points)), i)
        for i, (key, points) in enumerate(cleaned.items())
    ]
    return Chart(
        name=name,
        lines=lines,
        ticks_x=[(float(place(np.array([[t, low_y]]))[0, 0]), number_text(t)) for t in ticks_x if low_x <= t <= high_x],
        ticks_y=[
            (float(place(np.array([[low_x, t]]))[0, 1]), text)
            for t, text in zip(ticks_y, _tick_texts(ticks_y), strict=True)
        ],
        summary="; ".join(_summary(key, points) for key, points in cleaned.items()),
    )


def number_text(value: float) -> str:
    """A number as a person writes it: whole numbers with thousands, others to three figures."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" in text else text.rstrip("0").rstrip(".") if "." in text else text


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks as text, each another one, also where they lie close together far from zero."""
    texts = [number_text(tick) for tick in ticks]
    return texts if len(set(texts)) == len(texts) else [f"{tick:,.10g}" for tick in ticks]


def _summary(name: str, points: np.ndarray) -> str:
    first, last = points[0], points[-1]
    start = f"from {number_text(first[1])} at step {number_text(first[0])} " if len(points) > 1 else ""
    return f"{name + ': ' if name else ''}{start}to {number_text(last[1])} at step {number_text(last[0])}"


def _finite(points: Points) -> np.ndarray:
    table = np.array([(float(step), float(value)) for step, value in points]).reshape(-1, 2)
    return table[np.isfinite(table).all(axis=1)]


def _running_mean(points: np.ndarray) -> np.ndarray:
    if len(points) < _SMOOTHED_FROM:
        return points
    half = max(1, len(points) // 30)
    total = np.concatenate([[0.0], np.cumsum(points[:, 1])])
    first = np.maximum(np.arange(len(points)) - half, 0)
    stop = np.minimum(np.arange(len(points)) + half + 1, len(points))
    return np.stack([points[:, 0], (total[stop] - total[first]) / (stop - first)], axis=1)


def _line(name: str, points: np.ndarray, raw: np.ndarray, smooth: np.ndarray, number: int) -> Line:
    return Line(
        name=name,
        raw=_path(raw) if len(points) >= _SMOOTHED_FROM else "",
        smooth=_path(smooth),
        end_x=round(float(smooth[-1, 0]), 1),
        end_y=round(float(smooth[-1, 1]), 1),
        last=number_text(float(f"{points[-1, 1]:.3g}")),
        number=number % 5,
    )


def _path(places: np.ndarray) -> str:
    if len(places) > _MOST_POINTS:
        places = places[np.linspace(0, len(places) - 1, _MOST_POINTS).round().astype(int)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def round_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers that enclose [low, high], about `count` of them."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]
