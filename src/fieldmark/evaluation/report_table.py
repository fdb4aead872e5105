"""The numbers of the report: the table of models, the bars of recall by difference, and lists of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.report_charts import number_text

_COUNTS = ("n_queries", "n_gallery", "n_skipped", "n_images", "n_texts", "n_groups")
_METRIC_NAMES = {
    "map@r": "MAP@R",
    "r_precision": "R-precision",
    "mrr": "MRR",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "Purity",
    "text_score": "Text score",
    "image_score": "Image score",
    "group_score": "Group score",
}
_AT_K = {"recall@": "R@", "ndcg@": "NDCG@", "map@": "mAP@", "precision@": "P@"}
_DIRECTIONS = {
    "i2t_": "Photo to text",
    "t2i_": "Text to photo",
    "instance_": "Product",
    "coarse_": "Category",
}
_LOWER_IS_BETTER = {"gap_ratio": "Modality gap"}


def metric_name(key: str) -> str:
    """How a metric is headed: `recall@1` is R@1, `map@r` is MAP@R."""
    named = _METRIC_NAMES | _LOWER_IS_BETTER
    if key in named:
        return named[key]
    for start, name in _AT_K.items():
        if key.startswith(start):
            return name + key.removeprefix(start)
    for prefix, direction in _DIRECTIONS.items():
        if key.startswith(prefix):
            return f"{direction} {metric_name(key.removeprefix(prefix))}"
    return key.replace("_", " ")


def table_view(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Header, rows of cells (text, spread, interval, share of the bar, best of its column) and what they share.

    Args:
        rows: see `write_report`.

    Raises:
        FieldmarkError: a row without `model`.
    """
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
    values = {key: [_parts(row, key) for row in rows] for key in columns}
    return {
        "columns": [metric_name(key) for key in columns],
        "rows": [
            {"model": row["model"], "cells": [_cell(key, values[key], i) for key in columns]}
            for i, row in enumerate(rows)
        ],
        "about": _about(columns, values, {key: number_text(rows[0][key]) for key in shared}),
    }


def bars_view(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Recall@1 by the number of differing attributes, one column a model.

    Args:
        rows: model -> rows with `differing`, `recall@1`, `n_queries`.
    """
    if not any(rows.values()):
        return None
    by_model = {name: {row["differing"]: row for row in of_model} for name, of_model in rows.items()}
    numbers = sorted({number for of_model in by_model.values() for number in of_model})
    return {
        "models": list(by_model),
        "rows": [
            {
                "differing": f"{number} attribute" + "s" * (number != 1),
                "cells": [_bar(of_model.get(number)) for of_model in by_model.values()],
            }
            for number in numbers
        ],
    }


def facts_view(values: Mapping[str, Any], prefix: str = "") -> list[dict[str, str]]:
    """Name, value, note; nested mappings become dotted names."""
    facts: list[dict[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "value" in value:
            facts.append({"name": name, "value": _fact_text(value["value"]), "note": str(value.get("note", ""))})
        elif isinstance(value, Mapping):
            facts.extend(facts_view(value, f"{name}."))
        else:
            facts.append({"name": name, "value": _fact_text(value), "note": ""})
    return facts


def _is_fraction(key: str) -> bool:
    prefix = next((prefix for prefix in _DIRECTIONS if key.startswith(prefix)), "")
    return (
        key.removeprefix(prefix).startswith(tuple(_AT_K))
        or key in _METRIC_NAMES
        or key.endswith(("accuracy", "_share"))
    )


def _about(columns: list[str], values: Mapping[str, Any], counts: Mapping[str, str]) -> str:
    """What a reader must know to read the numbers, in a few sentences."""
    parts = [part for column in values.values() for part in column]
    sentences = []
    if any(_is_fraction(key) for key in columns):
        sentences.append("Numbers are percentages; the best of a column is bold.")
    if any(key.startswith("instance_") for key in columns):
        sentences.append("Product: only an item of the query's own product is right.")
    if any(key.startswith("coarse_") for key in columns):
        sentences.append("Category: any item of its category is.")
    if any(spread is not None for _, spread, _ in parts):
        sentences.append("Behind ± stands the standard deviation over seeds.")
    if any(interval is not None for _, _, interval in parts):
        drawn = "groups" if "n_groups" in counts else "queries"
        sentences.append(f"Below stands the 95 % bootstrap interval over the {drawn}.")
    if any(key in _LOWER_IS_BETTER for key in columns):
        sentences.append("The modality gap is a ratio; lower is better.")
    if {"n_images", "n_texts"} <= counts.keys():
        sentences.append(f"{counts['n_images']} photos and {counts['n_texts']} texts search each other.")
    if "n_groups" in counts:
        sentences.append(f"{counts['n_groups']} groups; chance is 25, 25 and 16.7 %.")
    if "n_queries" in counts:
        gallery = f" in a gallery of {counts['n_gallery']}" if "n_gallery" in counts else ""
        sentences.append(f"{counts['n_queries']} queries{gallery}.")
    if counts.get("n_skipped", "0") != "0":
        sentences.append(f"{counts['n_skipped']} queries without another photo of their class were left out.")
    return " ".join(sentences)


def _parts(row: Mapping[str, Any], key: str) -> tuple[Any, float | None, tuple[float, float] | None]:
    """Value, spread, interval of one entry."""
    value = row.get(key)
    if isinstance(value, Mapping):
        interval = value.get("interval")
        return value["value"], value.get("spread"), None if interval is None else (interval[0], interval[1])
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], None if value[1] is None else float(value[1]), None
    spread = row.get(f"{key}_std")
    return value, None if spread is None else float(spread), None


def _cell(key: str, column: list[tuple[Any, float | None, tuple[float, float] | None]], row: int) -> dict[str, Any]:
    value, spread, interval = column[row]
    plain = {"spread": "", "interval": "", "share": None, "best": False}
    if value is None or isinstance(value, str):
        return {"text": "–" if value is None else value, **plain}
    if not _is_fraction(key):
        return {"text": number_text(float(value)), **plain, "spread": "" if spread is None else number_text(spread)}
    text = f"{100 * value:.1f}"
    others = [f"{100 * other:.1f}" for other, _, _ in column if other is not None]
    return {
        "text": text,
        "spread": "" if spread is None else f"{100 * spread:.1f}",
        "interval": "" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}",
        "share": _share(value),
        "best": len(set(others)) > 1 and float(text) == max(map(float, others)),
    }


def _bar(row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"text": "–", "share": 0.0, "queries": ""}
    count = int(row["n_queries"])
    queries = f"{count:,} {'query' if count == 1 else 'queries'}"
    return {"text": f"{100 * row['recall@1']:.1f}", "share": _share(row["recall@1"]), "queries": queries}


def _share(value: float) -> float:
    return round(min(max(float(value), 0.0), 1.0) * 100, 1)


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
