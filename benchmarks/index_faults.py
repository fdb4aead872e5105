"""Kills `fieldmark index` at random moments and runs it again: is an item lost, doubled or half there?

    uv run python benchmarks/index_faults.py

One run without a kill is the reference: its rows, and how many versions of the table it makes (a write each, and those
of the indexes). Then, for each kill, a run into a new store is killed (SIGKILL) up to a fifth of a second after one of
these versions, drawn at random, the store is looked at, and the same command is run to its end. A run that ended before
its kill does not count. Rows must be those of the reference: after the kill some of them, after the second run all,
each once, with the same vector, title and attributes. Exit code 1 if they are not.

Each run is a fork of a process that has imported everything and used nothing, which saves the imports. Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark import cli
from fieldmark.search import indexing
from fieldmark.search.card import NAME
from fieldmark.search.store import Store
from fieldmark.students.build import build_student

ROWS_A_WRITE = 8  # many writes, so that a kill often meets one
LONGEST_DELAY = 0.2  # seconds


def fork(work: Callable[[], Any], log: Path) -> int:
    """Starts `work` in a process of its own, whose output goes to a file; its result is the exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        indexing.ROWS_A_WRITE = ROWS_A_WRITE
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def to_end(work: Callable[[], Any], log: Path) -> None:
    """Runs `work` in a fork and waits; what it wrote is shown if it fails."""
    _, status = os.waitpid(fork(work, log), 0)
    if status:
        raise SystemExit(f"a run that was not killed failed:\n{log.read_text(encoding='utf-8')[-3000:]}")


def make_student(folder: Path) -> None:
    """An untrained student of the embedded teacher's tower."""
    teacher = Path(str(resources.files("fieldmark.teacher") / "embedded"))
    build_student(teacher, pooling="mean", resolution=64).save_pretrained(str(folder), create_model_card=False)


def write_rows(store: Path, out: Path) -> None:
    """What a store holds, as a file: a row of the table each, so that doubled ones are there twice."""
    table = Store.open(store)._now().table.search().limit(None).to_arrow().sort_by("item_id")
    rows = [
        {name: row[name] for name in ("item_id", "title", "attributes", "photo_hash", "vector")}
        for row in table.to_pylist()
    ]
    out.write_text(json.dumps(rows), encoding="utf-8")


def faults(found: list[dict[str, Any]], reference: dict[str, dict[str, Any]], *, all_there: bool) -> dict[str, int]:
    """How many rows are doubled, differ from the reference, or are lost."""
    names = [row["item_id"] for row in found]
    differ = 0
    for row in found:
        right = reference.get(row["item_id"])
        same = right is not None and all(row[name] == right[name] for name in ("title", "attributes", "photo_hash"))
        differ += not (same and np.allclose(row["vector"], right["vector"], atol=1e-5))  # type: ignore[index]
    lost = len(reference.keys() - set(names)) if all_there else 0
    return {"doubled": len(names) - len(set(names)), "differ": differ, "lost": lost}


def measure(model: str, data: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills and resumes; one entry a kill."""

    def command(store: Path) -> Callable[[], int]:
        argv = ["index", model, "--data", data, "--out", str(store), "--batch_size", str(ROWS_A_WRITE)]
        return lambda: cli.main(argv)

    def rows(store: Path) -> list[dict[str, Any]]:
        if not versions(store):
            return []
        to_end(lambda: write_rows(store, folder / "rows.json"), log)
        return json.loads((folder / "rows.json").read_text(encoding="utf-8"))

    log, whole = folder / "log.txt", folder / "whole"
    to_end(command(whole), log)
    made = versions(whole)
    reference = {row["item_id"]: row for row in rows(whole)}
    rng, results = random.Random(seed), []
    while len(results) < kills:
        store, version, delay = folder / "killed", rng.randrange(made), rng.uniform(0, LONGEST_DELAY)
        shutil.rmtree(store, ignore_errors=True)
        child = fork(command(store), log)
        if wait_for(lambda store=store, version=version: (store / NAME).exists() and versions(store) >= version, child):
            continue
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            continue
        kept = rows(store)
        after_kill = faults(kept, reference, all_there=False)
        to_end(command(store), log)
        after_all = faults(rows(store), reference, all_there=True)
        results.append(
            {
                "version": version,
                "delay": round(delay, 3),
                "items_kept": len(kept),
                "after_kill": after_kill,
                "after_all": after_all,
            }
        )
        print(f"kill {len(results)} of {kills}: {results[-1]}", file=sys.stderr, flush=True)
    total = sum(sum(one[when].values()) for one in results for when in ("after_kill", "after_all"))
    return {"items": len(reference), "faults": total, "kills": results}


def versions(store: Path) -> int:
    """Versions of the table that were finished."""
    return sum(1 for _ in (store / "items.lance").rglob("*.manifest"))


def wait_for(state: Callable[[], bool], child: int) -> bool:
    """Waits until it is so; whether the child ended before."""
    while not state():
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a student; an untrained one of the embedded teacher's tower if left out")
    parser.add_argument("--data", default="aviary:1")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="lancedb fork support is experimental")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.model is None:
            to_end(lambda: make_student(folder / "student"), folder / "log.txt")
        result = measure(options.model or str(folder / "student"), options.data, options.kills, options.seed, folder)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{options.kills} kills among {result['items']} items: {result['faults']} rows lost, doubled or different"
        )
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
