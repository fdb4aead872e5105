"""What a catalogue can be used for: each method and each group of metrics, with the reason where it is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datasets import Dataset


def uses_of(catalog: Dataset) -> dict[str, dict[str, str | None]]:
    """Methods and metrics.

    Returns:
        `methods` and `metrics`: name to None where the catalogue serves, else to the reason why not.
    """
    rows: list[dict[str, Any]] = catalog.remove_columns(["image"]).to_list()
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] == "test"]
    labels = _pairs_missing(train)
    return {
        "methods": {
            "metric": labels,
            "saga": labels,
            "maple": _titles_missing(train, "train"),
            "afmrl": _titles_missing(train, "train")
            or _titles_missing(test, "test")
            or _products_missing(train)
            or _answers_missing(test),
        },
        "metrics": {
            "recall@k, map@r": _answers_missing(test),
            "nmi, ari, purity": _classes_missing(test),
            "recall by differing attributes": _answers_missing(test) or _attributes_missing(test),
            "image-text recall": _titles_missing(test, "test"),
        },
    }


def _pairs_missing(train: list[dict[str, Any]]) -> str | None:
    counts = Counter(row["label"] for row in train if row["label"] is not None)
    pairs = sum(count > 1 for count in counts.values())
    if pairs >= 2:
        return None
    return f"it needs 2 train classes of 2 photos or more; there are {pairs}"


def _products_missing(train: list[dict[str, Any]]) -> str | None:
    counts = Counter(row["label"] for row in train)
    if counts[None]:
        known = len(train) - counts[None]
        return f"it needs the product (label) of every train photo; {known} of {len(train)} have one"
    return None if any(count > 1 for count in counts.values()) else "no train photo has another of its product (label)"


def _titles_missing(rows: list[dict[str, Any]], split: str) -> str | None:
    titled = sum(row["title"] is not None for row in rows)
    if titled and titled == len(rows):
        return None
    return f"it needs a title for every {split} photo; {titled} of {len(rows)} have one"


def _answers_missing(test: list[dict[str, Any]]) -> str | None:
    queries = Counter(row["label"] for row in test if row["role"] != "gallery" and row["label"] is not None)
    gallery = Counter(row["label"] for row in test if row["role"] != "query" and row["label"] is not None)
    both = {row["label"] for row in test if row["role"] == "both"}
    if any(gallery[label] > (label in both and queries[label] == 1) for label in queries):
        return None
    return "no test photo has another photo of its class to find"


def _classes_missing(test: list[dict[str, Any]]) -> str | None:
    found = len({row["label"] for row in test if row["label"] is not None})
    return None if found >= 2 else f"it needs 2 test classes; there are {found}"


def _attributes_missing(test: list[dict[str, Any]]) -> str | None:
    return None if any(row["attributes"] for row in test) else "it needs attributes of the test photos"
