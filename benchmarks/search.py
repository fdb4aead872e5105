"""Exact search of a store against the bare matrix product, and what its approximate index gains and loses.

    OMP_NUM_THREADS=1 uv run python benchmarks/search.py --json > search.json

- exact: `Store.search` (vectors, order, facts of ten items) and the bare product of all rows with the query and the ten
  largest by numpy, which knows neither names nor filters. Both take turns on the same vectors in one process; the ratio
  is the median over the turns, of wall and of processor seconds (on a busy machine trust one thread and the latter).
- asked: the same store under a filter, with words (hybrid), and for an item's neighbours; medians.
- approximate: a store of `--approximate` rows above its bound: the time to build its index, its recall@10 as `fieldmark
  index` measures it, and the median seconds of a search, with and without the index. Left out at 0.

Rows are unit vectors around random centres, 20 a centre.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.search.card import StoredModel
from fieldmark.search.nearest import scan_nearest
from fieldmark.search.store import Store

COLOURS = ("red", "green", "blue")
AT_ONCE, FOUND, NOISE, A_CENTRE = 10_000, 10, 0.7, 20


def make_store(folder: Path, rows: int, dim: int, exact_up_to: int) -> Store:
    """A store of random rows, written as `fieldmark index` writes it."""
    store = Store.create(folder, StoredModel("/none", "0" * 64, dim, texts=True), exact_up_to=exact_up_to)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(rows // A_CENTRE, 1), dim), dtype=np.float32)
    with store.writing():
        for start in range(0, rows, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, rows))
            vectors = centres[rng.integers(0, len(centres), len(numbers))]
            vectors = vectors + NOISE * rng.standard_normal(vectors.shape, dtype=np.float32)
            items = [
                {
                    "item_id": f"item-{n}",
                    "image": f"/photos/{n}.jpg",
                    "label": f"class {n % 1000}",
                    "title": f"a {COLOURS[n % 3]} bird with number {n}",
                    "attributes": {"colour": COLOURS[n % 3]},
                }
                for n in numbers
            ]
            store.add(items, vectors, ["none"] * len(items))
            print(f"{numbers.stop:,} of {rows:,} rows written", file=sys.stderr, flush=True)
    return store


def seconds(work: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
    """Wall and processor seconds of each repeat."""
    found = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - start, time.process_time() - cpu))
    return found


def medians(found: list[tuple[float, float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in zip(("wall", "cpu"), zip(*found))}


def bare(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The product and the ten largest, best first."""
    scores = vectors @ query
    best = np.argpartition(scores, len(scores) - FOUND)[-FOUND:]
    return best[np.argsort(-scores[best])]


def measure_exact(store: Store, dim: int, repeats: int) -> dict[str, Any]:
    """Both ways in turn."""
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    store.search(rng.standard_normal(dim))
    loading = time.perf_counter() - start
    vectors = store._now().memory().vectors
    turns: dict[str, list[tuple[float, float]]] = {"store": [], "bare": []}
    for turn in range(repeats):
        query = rng.standard_normal(dim).astype(np.float32)
        query /= np.linalg.norm(query)
        ways: dict[str, Callable[[], Any]] = {
            "store": lambda query=query: store.search(query, FOUND),
            "bare": lambda query=query: bare(vectors, query),
        }
        for name in ways if turn % 2 else reversed(ways):
            turns[name] += seconds(ways[name], 1)
        hits = [hit.item_id for hit in store.search(query, FOUND)]
        assert hits == [store._now().memory().facts["item_id"][int(row)].as_py() for row in bare(vectors, query)]
    pairs = list(zip(turns["store"], turns["bare"], strict=True))
    query = rng.standard_normal(dim)
    asked = {
        "filter": lambda: store.search(query, FOUND, "colour = 'red'"),
        "hybrid": lambda: store.search(query, FOUND, text="number 77"),
        "similar": lambda: store.similar("item-5", FOUND),
    }
    return {
        "rows": store.count(),
        "seconds_to_load": loading,
        **{f"{name}_seconds": medians(found) for name, found in turns.items()},
        "ratio": {
            "wall": statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
            "cpu": statistics.median(ours[1] / theirs[1] for ours, theirs in pairs),
        },
        "asked_seconds": {name: medians(seconds(work, max(repeats // 4, 3))) for name, work in asked.items()},
    }


def measure_approximate(store: Store, dim: int, repeats: int) -> dict[str, Any]:
    """Builds the index by itself first, for its time; `finish` then has it measured as `fieldmark index` does."""
    rng = np.random.default_rng(2)
    table = store._now().table
    query = rng.standard_normal(dim).astype(np.float32)
    query /= np.linalg.norm(query)
    scanned = medians(seconds(lambda: scan_nearest(table, query[None], FOUND), 3))
    start, cpu = time.perf_counter(), time.process_time()
    index = store.finish().index
    assert index is not None
    built = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return {
        "rows": store.count(),
        "kind": index.kind,
        "recall@10": index.recall_at_10,
        "queries": index.queries,
        "build_and_measure_seconds": built,
        "search_seconds": medians(seconds(lambda: store.search(query, FOUND), repeats)),
        "scan_seconds": scanned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--approximate", type=int, default=0, help="rows of the store above its bound")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result: dict[str, Any] = {"dim": options.dim}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = make_store(folder / "exact", options.rows, options.dim, options.rows)
        store.finish()
        result["exact"] = measure_exact(store, options.dim, options.repeats)
        if options.approximate:
            store = make_store(folder / "large", options.approximate, options.dim, options.approximate - 1)
            result["approximate"] = measure_approximate(store, options.dim, options.repeats)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    exact = result["exact"]
    print(
        f"{exact['rows']:,} x {options.dim}: store {1000 * exact['store_seconds']['wall']:.1f} ms, bare product "
        f"{1000 * exact['bare_seconds']['wall']:.1f} ms, ratio {exact['ratio']['wall']:.2f} (of processor time "
        f"{exact['ratio']['cpu']:.2f})"
    )
    for name, found in exact["asked_seconds"].items():
        print(f"  {name}: {1000 * found['wall']:.1f} ms (processor {1000 * found['cpu']:.1f})")
    if options.approximate:
        large = result["approximate"]
        print(
            f"{large['rows']:,} x {options.dim}, {large['kind']}: recall@10 {large['recall@10']:.3f}, "
            f"{1000 * large['search_seconds']['wall']:.1f} ms a search, {1000 * large['scan_seconds']['wall']:.0f} ms "
            f"by reading all, {large['build_and_measure_seconds']['wall']:.0f} s to build"
        )


if __name__ == "__main__":
    main()
