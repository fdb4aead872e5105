"""Exact retrieval metrics against a bare top-k and against other libraries: time and memory.

    uv run python benchmarks/evaluation.py --json > evaluation.json

Vectors are Gaussian classes in 512 dimensions, hard enough that many first positives lie deep: "sop" has 5 items a
class, as Stanford Online Products, "cub" 100 classes, as the test half of CUB. 5,924 and 60,502 are the sizes of their
test sets. Every item queries all others.

- speed: Recall@{1,10,100,1000}, MAP@R, R-precision and MRR of Fieldmark against bare products of 256 rows into a
  buffer and `torch.topk(1000)`, which knows no labels and measures nothing. Both take turns in one process; the ratio
  is the median over the turns, of wall and of processor seconds (on a busy machine trust one thread and the latter).
- runs: each library once, in a process of its own. The memory is the process's peak resident memory (VmHWM, Linux) less
  what it held once the vectors were loaded and a small run had warmed the libraries up.
- cub: all metrics, k-means over five seeds included, of 5,924 items in 100 classes.
- growth: 1,000 queries against a gallery of 10^3 to 10^6 items, 5 a class.

faiss-cpu is no dependency: `uv pip install faiss-cpu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.retrieval import retrieval_metrics

DIM, DEPTH, KS = 512, 1000, (1, 10, 100, 1000)
SIZES = (5_924, 60_502)
GROWTH = (1_000, 10_000, 100_000, 1_000_000)
GROWTH_QUERIES = 1_000
NOISE = {"sop": 2.2, "cub": 3.5}
CLASSES = {"sop": lambda n: -(-n // 5), "cub": lambda n: 100}
NEEDS_FAISS = ("faiss", "pml")
NAMES = {
    "fieldmark": "Fieldmark, all retrieval metrics",
    "bare": "bare matmul + topk(1000), no metric",
    "faiss": "faiss IndexFlatIP(1001), Recall@k only",
    "pml": "pytorch-metric-learning AccuracyCalculator",
    "st": "sentence-transformers InformationRetrievalEvaluator",
}


def write_rows(path: Path, n: int, kind: str) -> np.ndarray:
    """[n, 512] float32 rows in a file, made a piece at a time; returns their labels."""
    rng = np.random.default_rng(0)
    classes = CLASSES[kind](n)
    labels = rng.permutation(np.arange(n) % classes)
    centres = rng.standard_normal((classes, DIM), dtype=np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, DIM))
    for start in range(0, n, 8192):
        piece = labels[start : start + 8192]
        rows[start : start + 8192] = centres[piece] + NOISE[kind] * rng.standard_normal((len(piece), DIM), np.float32)
    rows.flush()
    return labels


def fieldmark(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return retrieval_metrics(rows, labels, ks=KS)


def bare(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What any exact search has to do: the products, and the best 1,000 of each row."""
    unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    buffer = torch.empty(256, len(unit))
    for start in range(0, len(unit), 256):
        part = unit[start : start + 256]
        torch.topk(torch.mm(part, unit.T, out=buffer[: len(part)]), min(DEPTH, len(unit)))
    return {}


def faiss(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """One item more is asked for, and the query's own is taken out by its id."""
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    index = library.IndexFlatIP(DIM)
    index.add(unit)
    ranks = np.zeros(len(unit), dtype=np.int64)
    for start in range(0, len(unit), 4096):
        stop = min(start + 4096, len(unit))
        _, found = index.search(unit[start:stop], DEPTH + 1)
        own = found == np.arange(start, stop)[:, None]
        hits = (labels[found] == labels[start:stop, None]) & ~own
        first = hits.argmax(axis=1)
        before = np.take_along_axis(np.cumsum(own, axis=1), first[:, None], axis=1)[:, 0]
        ranks[start:stop] = np.where(hits.any(axis=1), first + 1 - before, len(unit))
    return {f"recall@{k}": float((ranks <= k).mean()) for k in KS}


def pml(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Precision at 1, R-precision and MAP@R: all it has of these; k covers the largest class."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    wanted = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=wanted, k="max_bin_count", device=torch.device("cpu"))
    unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    found = calculator.get_accuracy(unit, torch.from_numpy(labels))
    return dict(zip(("recall@1", "r_precision", "map@r"), (float(found[name]) for name in wanted), strict=True))


def st(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """It keeps the query's own item, which comes first: accuracy at k + 1 is Recall@k."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    class Embedded(InformationRetrievalEvaluator):
        def embed_inputs(self, model: Any, sentences: Any, *arguments: Any, **options: Any) -> Any:
            return torch.from_numpy(rows[[int(text) for text in sentences]])

    texts = {str(row): str(row) for row in range(len(rows))}
    members: dict[int, set[str]] = {}
    for row, label in enumerate(labels.tolist()):
        members.setdefault(label, set()).add(str(row))
    evaluator = Embedded(
        texts,
        texts,
        {str(row): members[label] - {str(row)} for row, label in enumerate(labels.tolist())},
        accuracy_at_k=[k + 1 for k in KS],
        score_functions={"cosine": cos_sim},
        write_csv=False,
    )
    found = evaluator.compute_all_metrics(None)["cosine"]["accuracy@k"]
    return {f"recall@{k}": float(found[k + 1]) for k in KS}


LIBRARIES: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "fieldmark": fieldmark,
    "bare": bare,
    "faiss": faiss,
    "pml": pml,
    "st": st,
}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, result."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - start, time.process_time() - cpu, result


def measure_speed(path: Path, labels: np.ndarray, repeats: int) -> dict[str, Any]:
    """Fieldmark and the bare top-k in turn, in this process; which goes first alternates."""
    rows = np.load(path)
    for name in ("fieldmark", "bare"):
        LIBRARIES[name](rows[:2000], labels[:2000] % 100)
    seconds: dict[str, list[tuple[float, float]]] = {"fieldmark": [], "bare": []}
    metrics: dict[str, float] = {}
    for turn in range(repeats):
        for name in ("fieldmark", "bare") if turn % 2 == 0 else ("bare", "fieldmark"):
            wall, cpu, found = timed(lambda name=name: LIBRARIES[name](rows, labels))
            seconds[name].append((wall, cpu))
            metrics = found or metrics
            print(f"{len(rows):,} items: {NAMES[name]}: {wall:.2f} s", file=sys.stderr, flush=True)
    pairs = list(zip(seconds["fieldmark"], seconds["bare"], strict=True))
    return {
        **{f"{name}_seconds": statistics.median(wall for wall, _ in values) for name, values in seconds.items()},
        "ratio": statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
        "cpu_ratio": statistics.median(ours[1] / theirs[1] for ours, theirs in pairs),
        "ratios": [ours[0] / theirs[0] for ours, theirs in pairs],
        "metrics": metrics,
    }


def memory_mb(field: str) -> float:
    """A line of /proc/self/status; VmHWM, the peak, starts anew with the program, unlike getrusage's ru_maxrss."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    assert found is not None
    return int(found[1]) / 1024


def work_alone(name: str, path: Path, n_queries: int | None) -> dict[str, Any]:
    """One library once in this process: seconds, and MB above the loaded vectors."""
    rows, labels = np.load(path), np.load(path.with_suffix(".labels.npy"))
    few = min(len(rows), 1100)
    LIBRARIES[name](rows[:few].copy(), np.arange(few) % 100)
    before = memory_mb("VmRSS")
    if n_queries is None:
        wall, cpu, metrics = timed(lambda: LIBRARIES[name](rows, labels))
    else:
        queries = slice(0, n_queries)
        task: dict[str, Any] = {"gallery": rows, "gallery_labels": labels, "ks": KS}
        wall, cpu, metrics = timed(lambda: retrieval_metrics(rows[queries], labels[queries], **task))
    extra = max(0.0, memory_mb("VmHWM") - before)
    return {"seconds": wall, "cpu_seconds": cpu, "extra_mb": extra, "metrics": metrics}


def run_alone(name: str, path: Path, labels: np.ndarray, threads: int, n_queries: int | None = None) -> dict[str, Any]:
    """`work_alone` in a process of its own; where faiss is missing that is said and the row has no numbers."""
    if name in NEEDS_FAISS and importlib.util.find_spec("faiss") is None:
        note = "faiss is not installed: uv pip install faiss-cpu"
        print(f"{NAMES[name]}: {note}", file=sys.stderr, flush=True)
        return {"library": name, "note": note}
    np.save(path.with_suffix(".labels.npy"), labels)
    command = [sys.executable, __file__, "--worker", name, "--rows", str(path), "--threads", str(threads)]
    if n_queries is not None:
        command += ["--queries", str(n_queries)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{NAMES[name]} failed:\n{done.stderr[-2000:]}")
    result = {"library": name, **json.loads(done.stdout.splitlines()[-1])}
    print(
        f"{len(labels):,} items: {NAMES[name]}: {result['seconds']:.2f} s, {result['extra_mb']:.0f} MB",
        file=sys.stderr,
        flush=True,
    )
    return result


def measure_cub(path: Path, labels: np.ndarray, repeats: int) -> dict[str, Any]:
    """All metrics of a test set of CUB's size: wall seconds of both parts and processor seconds of all, medians."""
    rows = np.load(path)
    turns: list[tuple[float, float, float]] = []
    metrics: dict[str, float] = {}
    for _ in range(repeats):
        retrieval, cpu, found = timed(lambda: retrieval_metrics(rows, labels))
        clustering, more_cpu, clusters = timed(lambda: clustering_metrics(rows, labels))
        turns.append((retrieval, clustering, cpu + more_cpu))
        metrics = found | clusters
    return {
        "retrieval_seconds": statistics.median(turn[0] for turn in turns),
        "clustering_seconds": statistics.median(turn[1] for turn in turns),
        "seconds": statistics.median(turn[0] + turn[1] for turn in turns),
        "cpu_seconds": statistics.median(turn[2] for turn in turns),
        "metrics": metrics,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"threads": options.threads, "repeats": options.repeats, "speed": [], "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        for n in options.sizes:
            for kind in options.kinds:
                labels = write_rows(path, n, kind)
                case = {"items": n, "kind": kind}
                results["speed"].append(case | measure_speed(path, labels, options.repeats))
                for name in options.libraries:
                    if name != "st" or n <= SIZES[0]:
                        results["runs"].append(case | run_alone(name, path, labels, options.threads))
        labels = write_rows(path, SIZES[0], "cub")
        results["cub"] = measure_cub(path, labels, options.repeats)
        results["growth"] = []
        for n in options.growth:
            labels = write_rows(path, n, "sop")
            run = run_alone("fieldmark", path, labels, options.threads, min(n, GROWTH_QUERIES))
            results["growth"].append({"items": n, "queries": min(n, GROWTH_QUERIES)} | run)
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown tables."""
    lines = [f"threads: {results['threads']}, turns: {results['repeats']}", ""]
    lines += [
        "| items | kind | Fieldmark, s | bare, s | ratio | CPU ratio | recall@1 | recall@1000 |",
        "|---" * 8 + "|",
    ]
    for row in results["speed"]:
        cells = [f"{row['items']:,}", row["kind"], f"{row['fieldmark_seconds']:.2f}", f"{row['bare_seconds']:.2f}"]
        cells += [f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}"]
        lines.append(_row([*cells, *(f"{row['metrics'][f'recall@{k}']:.3f}" for k in (1, 1000))]))
    lines += ["", "| items | kind | library | s | CPU s | extra MB | recall@1 | MAP@R |", "|---" * 8 + "|"]
    for row in results["runs"]:
        cells = [f"{row['items']:,}", row["kind"], NAMES[row["library"]]]
        if "note" in row:
            lines.append(_row([*cells, row["note"], "", "", "", ""]))
            continue
        cells += [f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['extra_mb']:.0f}"]
        found = (row["metrics"].get(name) for name in ("recall@1", "map@r"))
        lines.append(_row([*cells, *("" if value is None else f"{value:.4f}" for value in found)]))
    cub = results["cub"]
    lines += [
        "",
        f"All metrics of {SIZES[0]:,} items in 100 classes, k-means over 5 seeds included: {cub['seconds']:.1f} s "
        f"(retrieval {cub['retrieval_seconds']:.1f}, clustering {cub['clustering_seconds']:.1f}; "
        f"processor seconds of all: {cub['cpu_seconds']:.1f})",
    ]
    lines += ["", "| gallery | queries | s | CPU s | extra MB |", "|---" * 5 + "|"]
    for row in results["growth"]:
        cells = [f"{row['items']:,}", f"{row['queries']:,}", f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}"]
        lines.append(_row([*cells, f"{row['extra_mb']:.0f}"]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="items of the comparisons")
    parser.add_argument("--kinds", nargs="+", choices=list(NOISE), default=list(NOISE))
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=list(LIBRARIES), help="of the runs")
    parser.add_argument("--growth", type=int, nargs="*", default=list(GROWTH), help="gallery sizes; 10^6 takes 2.5 GB")
    parser.add_argument("--repeats", type=int, default=3, help="turns of Fieldmark and the bare top-k")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    parser.add_argument("--worker", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(work_alone(options.worker, options.rows, options.queries)))
        return
    results = measure(options)
    print(table(results), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
