"""Small fixed parts of a catalogue, for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.data.catalog import load_catalog


def subset(source: str, path: Path, most: dict[str, int | None]) -> Path:
    """A table of some rows of each split, the same at every call."""
    return path if path.exists() else write_subset(load_catalog(source), path, most)


def write_subset(
    rows: Any, path: Path, most: dict[str, int | None], change: Callable[[int, dict[str, Any]], None] | None = None
) -> Path:
    """At most `most` rows of each split (None: all), drawn by a fixed seed; `change` may alter each (place, row)."""
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    left = dict(most)
    with path.with_suffix(".part").open("w", encoding="utf-8") as file:
        for i in order:
            row = rows[i]
            count = left.get(row["split"])
            if count == 0 or row["split"] not in left:
                continue
            left[row["split"]] = None if count is None else count - 1
            row["attributes"] = {k: v for k, v in (row["attributes"] or {}).items() if v is not None}
            if change is not None:
                change(i, row)
            file.write(json.dumps(row) + "\n")
    path.with_suffix(".part").rename(path)
    return path
