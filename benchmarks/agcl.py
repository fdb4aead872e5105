"""Cost of AGCL's weights: from the attributes of a batch to tanh(BM25) of all its pairs; milliseconds of one core.

    uv run python benchmarks/agcl.py --batch 1024

The catalogue is made up: eight attributes an item, from one that takes 8 values to one that takes 5,000, two of them of
two words. Training encodes the attributes of its items once and only selects rows in a step, so a step costs the last
two parts; "in all" is what it would cost without that. Processor time, the least of `--repeats`, so that a busy machine
disturbs little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fieldmark.losses.bm25 import BM25, bm25_scores

# How many values each attribute takes, and how many further words stand behind the value.
ATTRIBUTES = {
    "type": (60, 1), "brand": (2000, 0), "colour": (20, 0), "material": (12, 0), "size": (30, 0), "fit": (8, 0),
    "series": (5000, 1), "pattern": (200, 0),
}  # fmt: skip
PARTS = {
    "encode": "attributes to encoded rows, queries and candidates",
    "scores": "rows to BM25 scores",
    "tanh": "scores to tanh",
    "all": "in all",
}


def made_up(items: int, seed: int) -> list[dict[str, str]]:
    """Attributes of items, drawn evenly."""
    rng = np.random.default_rng(seed)
    columns = []
    for name, (values, extra) in ATTRIBUTES.items():
        drawn = rng.integers(0, values, items)
        columns.append([f"{name}{value}" + " Kind" * extra + str(value % 9) * extra for value in drawn.tolist()])
    return [dict(zip(ATTRIBUTES, row, strict=True)) for row in zip(*columns, strict=True)]


def least(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the processor: the least of some runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return 1000 * min(seconds)


def measure(batch: int, catalog: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each part, and seconds to prepare the catalogue."""
    items = made_up(max(catalog, 2 * batch), 0)
    queries, candidates = items[:batch], items[batch : 2 * batch]
    start = time.process_time()
    bm25 = BM25.fit(items)
    fitted = time.process_time() - start
    rows = [bm25.encode(side) for side in (queries, candidates)]
    scores = bm25_scores(*rows)
    ways: dict[str, Callable[[], Any]] = {
        "encode": lambda: [bm25.encode(side) for side in (queries, candidates)],
        "scores": lambda: bm25_scores(*rows),
        "tanh": lambda: torch.tanh(scores),
        "all": lambda: torch.tanh(bm25_scores(*(bm25.encode(side) for side in (queries, candidates)))),
    }
    return {
        "batch": batch,
        "catalog": len(items),
        "words_an_item": bm25.average_length,
        "vocabulary": len(bm25.vocabulary),
        "above_zero": float((scores > 0).float().mean()),
        "fit_seconds": fitted,
        "milliseconds": {name: least(way, repeats) for name, way in ways.items()},
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table."""
    size = result["batch"]
    lines = [
        f"{size:,} queries x {size:,} candidates, {result['words_an_item']:.1f} words an item, "
        f"{100 * result['above_zero']:.0f} % of the scores above zero; catalogue of {result['catalog']:,} items with "
        f"{result['vocabulary']:,} words, fitted in {result['fit_seconds']:.1f} s",
        "",
        "| part | ms |",
        "| --- | --- |",
    ]
    return "\n".join([*lines, *(f"| {text} | {result['milliseconds'][name]:.1f} |" for name, text in PARTS.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="queries, and as many candidates")
    parser.add_argument("--catalog", type=int, default=100_000, help="items whose words the statistics are of")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.batch, options.catalog, options.repeats)
    print(json.dumps(result, indent=2) if options.json else table(result))


if __name__ == "__main__":
    main()
