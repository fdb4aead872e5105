"""The report: one HTML file that needs no network, shows what a run did, and can be forwarded.

Everything is inside the file (style, charts as SVG, photos as data URIs) and nothing in it is a script. Photos are
made smaller until the file fits in 5 MB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.report_charts import HEIGHT, WIDTH, draw_chart, number_text
from fieldmark.evaluation.report_images import heat_uri, outline_uri, photo_uri

MAX_BYTES = 5_000_000
_LOOKERS = (("teacher_attention", "Teacher"), ("pooler_attention", "Pooler"))
_COUNTS = ("n_queries", "n_gallery", "n_skipped")
_METRIC_NAMES = {
    "map@r": "MAP@R",
    "r_precision": "R-precision",
    "mrr": "MRR",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "Purity",
}


@dataclasses.dataclass(frozen=True)
class _Size:
    """How large photos are stored: longer side in pixels, and JPEG quality."""

    gallery: int
    pair: int
    quality: int


_SIZES = (_Size(176, 288, 82), _Size(144, 224, 74), _Size(112, 176, 66), _Size(80, 128, 55), _Size(56, 96, 45))


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    table: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Any] | None = None,
    galleries: Sequence[Mapping[str, Any]] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
    health: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report. A part that is empty is left out.

    Args:
        path: the HTML file.
        title: headline.
        subtitle: one or two sentences: what was trained on what, and what came out.
        table: one row per model: `model` (its name) and metrics under the keys of `retrieval_metrics` and
            `clustering_metrics`; a metric may be a number or (mean, spread), and `x_std` is shown as the spread of `x`.
        curves: per chart a list of (step, value), or a mapping from series names to such lists.
        galleries: per query `query` (photo), `query_label`, `results` (list of (photo, label, score, correct)),
            and optionally `note`.
        pairs: per pair `images` (two photos), `labels` (two), `truth_same` (bool), `verdict_same` (bool, or None where
            the teacher gave no valid answer), `words` (two attribute mappings, or the teacher's raw text), and
            optionally `teacher_attention`, `pooler_attention` (two [h, w] arrays or token vectors each), `masks` (two
            [h, w] arrays, true on the part that differs), `differing_attributes` (names) and `note`.
        health: name -> value, or name -> {"value": ..., "note": ...}.
        settings: name -> value, nested mappings allowed.
        cost: name -> value, such as minutes and memory.

    Returns:
        The path written.

    Raises:
        FieldmarkError: the file would exceed 5 MB even with the smallest photos, or an entry is malformed.
    """
    environment = Environment(
        loader=PackageLoader("fieldmark.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    fixed = {
        "title": title,
        "subtitle": subtitle,
        "table": _table(table),
        "charts": _charts(curves or {}),
        "chart_size": (WIDTH, HEIGHT),
        "health": _facts(health or {}),
        "settings": _facts(settings or {}),
        "cost": _facts(cost or {}),
    }
    for size in _SIZES:
        page = template.render(
            fixed
            | {
                "galleries": [_gallery(gallery, size) for gallery in galleries],
                "pairs": [_pair(pair, size, i) for i, pair in enumerate(pairs)],
            }
        ).encode("utf-8")
        if len(page) < MAX_BYTES:
            break
    else:
        raise FieldmarkError(
            f"the report would take {len(page) / 1e6:.1f} MB with {len(galleries)} galleries and {len(pairs)} pairs; "
            "it must stay below 5 MB: show fewer"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page)
    return path


def metric_name(key: str) -> str:
    """How a metric is headed: `recall@1` is R@1, `map@r` is MAP@R."""
    if key.startswith("recall@"):
        return "R@" + key.removeprefix("recall@")
    return _METRIC_NAMES.get(key, key.replace("_", " "))


def _is_fraction(key: str) -> bool:
    return key.startswith("recall@") or key in _METRIC_NAMES or key.endswith(("accuracy", "_share"))


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Header, rows of cells (text, spread, share of the bar, best of its column) and the counts they share."""
    if not rows:
        return None
    for row in rows:
        if "model" not in row:
            raise FieldmarkError(f"a table row has the keys {', '.join(row)}; each needs 'model', its name")
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "model"))
    shared = [key for key in _COUNTS if key in keys and len({row.get(key) for row in rows}) == 1]
    columns = [
        key for key in keys if key not in shared and not (key.endswith("_std") and key.removesuffix("_std") in keys)
    ]
    values = {key: [_mean_and_spread(row, key) for row in rows] for key in columns}
    return {
        "columns": [metric_name(key) for key in columns],
        "rows": [
            {"model": row["model"], "cells": [_cell(key, values[key], i) for key in columns]}
            for i, row in enumerate(rows)
        ],
        "about": _about_table(columns, values, {key: number_text(rows[0][key]) for key in shared}),
    }


def _about_table(columns: list[str], values: Mapping[str, Any], counts: Mapping[str, str]) -> str:
    """What a reader must know to read the numbers, in a few sentences."""
    sentences = []
    if any(_is_fraction(key) for key in columns):
        sentences.append("Numbers are percentages; the best of a column is bold.")
    if any(spread is not None for column in values.values() for _, spread in column):
        sentences.append("Behind ± stands the standard deviation over seeds.")
    if "n_queries" in counts:
        gallery = f" in a gallery of {counts['n_gallery']}" if "n_gallery" in counts else ""
        sentences.append(f"{counts['n_queries']} queries{gallery}.")
    if counts.get("n_skipped", "0") != "0":
        sentences.append(f"{counts['n_skipped']} queries without another photo of their class were left out.")
    return " ".join(sentences)


def _mean_and_spread(row: Mapping[str, Any], key: str) -> tuple[Any, float | None]:
    value = row.get(key)
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], float(value[1])
    spread = row.get(f"{key}_std")
    return value, None if spread is None else float(spread)


def _cell(key: str, column: list[tuple[Any, float | None]], row: int) -> dict[str, Any]:
    value, spread = column[row]
    if value is None:
        return {"text": "–", "spread": "", "share": None, "best": False}
    if isinstance(value, str):
        return {"text": value, "spread": "", "share": None, "best": False}
    if not _is_fraction(key):
        return {
            "text": number_text(float(value)),
            "spread": "" if spread is None else number_text(spread),
            "share": None,
            "best": False,
        }
    text = f"{100 * value:.1f}"
    others = [f"{100 * v:.1f}" for v, _ in column if v is not None]
    return {
        "text": text,
        "spread": "" if spread is None else f"{100 * spread:.1f}",
        "share": round(min(max(float(value), 0.0), 1.0) * 100, 1),
        "best": len(set(others)) > 1 and float(text) == max(map(float, others)),
    }


def _charts(curves: Mapping[str, Any]) -> list[Any]:
    drawn = [
        draw_chart(name, points if isinstance(points, Mapping) else {"": points}) for name, points in curves.items()
    ]
    return [chart for chart in drawn if chart is not None]


def _gallery(gallery: Mapping[str, Any], size: _Size) -> dict[str, Any]:
    label = str(gallery["query_label"])
    results = [
        {
            "src": photo_uri(_photo(photo), size.gallery, size.quality),
            "label": str(name),
            "score": f"{float(score):.3f}",
            "correct": bool(correct),
            "alt": f"Neighbour {rank}: {name}, {'same class as the query' if correct else 'another class'}",
        }
        for rank, (photo, name, score, correct) in enumerate(gallery["results"], start=1)
    ]
    return {
        "src": photo_uri(_photo(gallery["query"]), size.gallery, size.quality),
        "label": label,
        "alt": f"Query photo: {label}",
        "results": results,
        "right": sum(result["correct"] for result in results),
        "note": str(gallery.get("note", "")),
    }


def _pair(pair: Mapping[str, Any], size: _Size, number: int) -> dict[str, Any]:
    truth, verdict = bool(pair["truth_same"]), pair["verdict_same"]
    differing = [str(name) for name in pair.get("differing_attributes") or ()]
    rows, text = _words(pair["words"], differing)
    return {
        "number": number + 1,
        "labels": [str(label) for label in pair["labels"]],
        "truth": "same class" if truth else "different classes",
        "verdict": "no valid answer" if verdict is None else "same class" if verdict else "different classes",
        "right": verdict is not None and bool(verdict) == truth,
        "wrong": verdict is not None and bool(verdict) != truth,
        "photos": [_pair_photo(pair, side, size) for side in (0, 1)],
        "rows": rows,
        "text": text,
        "differing": [name.replace("_", " ") for name in differing],
        "looked": any(pair.get(key) is not None for key, _ in _LOOKERS),
        "masked": pair.get("masks") is not None,
        "note": str(pair.get("note", "")),
    }


def _pair_photo(pair: Mapping[str, Any], side: int, size: _Size) -> dict[str, Any]:
    label, name = pair["labels"][side], ("left", "right")[side]
    layers = []
    for key, who in _LOOKERS:
        if pair.get(key) is not None:
            alt = f"{who}'s attention over the {name} photo ({label}), brighter is more"
            layers.append({"who": who, "src": heat_uri(pair[key][side]), "alt": alt})
    masks = pair.get("masks")
    return {
        "src": photo_uri(_photo(pair["images"][side]), size.pair, size.quality),
        "label": str(label),
        "alt": f"{name.capitalize()} photo: {label}",
        "layers": layers,
        "outline": None if masks is None or masks[side] is None else outline_uri(masks[side]),
    }


def _words(words: Any, differing: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The teacher's attributes side by side, or its raw text."""
    if words is None or isinstance(words, str):
        return [], words or "The teacher said nothing."
    sides = list(words.values()) if isinstance(words, Mapping) else list(words)
    if len(sides) != 2 or not all(isinstance(side, Mapping) for side in sides):
        raise FieldmarkError("words of a pair are neither a text nor two attribute mappings; give one of these")
    left, right = ({str(k): str(v) for k, v in side.items()} for side in sides)
    names = list(dict.fromkeys([*differing, *left, *right]))
    rows = [
        {
            "name": name.replace("_", " "),
            "left": left.get(name, "–"),
            "right": right.get(name, "–"),
            "told": left.get(name) != right.get(name),
            "true": name in differing,
        }
        for name in names
    ]
    return rows, ""


def _photo(photo: Any) -> Image.Image:
    if not isinstance(photo, Image.Image):
        raise FieldmarkError(f"a photo of the report is a {type(photo).__name__}; give an opened PIL image")
    return photo


def _facts(values: Mapping[str, Any], prefix: str = "") -> list[dict[str, str]]:
    """Name, value, note; nested mappings become dotted names."""
    facts: list[dict[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "value" in value:
            facts.append({"name": name, "value": _fact_text(value["value"]), "note": str(value.get("note", ""))})
        elif isinstance(value, Mapping):
            facts.extend(_facts(value, f"{name}."))
        else:
            facts.append({"name": name, "value": _fact_text(value), "note": ""})
    return facts


def _fact_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, list | tuple):
        return ", ".join(_fact_text(item) for item in value)
    return str(value)
