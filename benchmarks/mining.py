"""Time and peak memory of de-duplication and hard negatives on random features with planted near-duplicates.

    uv run python benchmarks/mining.py semdedup --rows 1000000 --clusters 3000
    uv run python benchmarks/mining.py hard_negatives --rows 1000000 --queries 4096

Every tenth row is a copy of the row before with a little noise (cosine about 0.98), so SemDeDup has some to find. Hard
negatives are found for `--queries` rows against all of them; the time of all rows is that in proportion, for every
query costs the same. Memory is by how much the peak of the process rises, so it is beside the features.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fieldmark.data.mining import hard_negatives, semdedup
from fieldmark.progress import JobProgress


def features_of(rows: int, dim: int) -> np.ndarray:
    """float32 rows around 1,000 directions."""
    rng = np.random.default_rng(0)
    features = np.empty((rows, dim), dtype=np.float32)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    for start in range(0, rows, 10_000):
        block = rng.standard_normal((min(10_000, rows - start), dim), dtype=np.float32)
        block += centres[rng.integers(1000, size=len(block))]
        block[9::10] = block[8::10][: len(block[9::10])] + 0.2 * block[9::10]
        features[start : start + len(block)] = block
    return features


def measured(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, its seconds by the clock and of the processor, and by how much it raises the peak memory."""
    before, clock, processor = _peak(), time.perf_counter(), time.process_time()
    result = run()
    return result, {
        "seconds": round(time.perf_counter() - clock, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "gigabytes": round((_peak() - before) / 2**20, 2),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("semdedup", "hard_negatives"))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--k", type=int, default=3)
    given = parser.parse_args()
    features = features_of(given.rows, given.dim)
    result = {"job": given.job, "rows": given.rows, "dim": given.dim}
    if given.job == "semdedup":
        with JobProgress("semdedup", given.rows) as job:
            kept, cost = measured(lambda: semdedup(features, clusters=given.clusters, progress=job.update))
        result |= {"clusters": given.clusters, "kept": len(kept)} | cost
    else:
        labels = np.arange(given.rows) // 5
        rows = np.random.default_rng(1).permutation(given.rows)[: given.queries]
        with JobProgress("hard negatives", len(rows)) as job:
            _, cost = measured(lambda: hard_negatives(features, given.k, labels=labels, rows=rows, progress=job.update))
        result |= {"queries": len(rows), "k": given.k} | cost
        result["seconds_for_all_rows"] = round(cost["seconds"] * given.rows / len(rows), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
