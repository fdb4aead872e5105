"""The AFMRL ladder of docs/results.md: InfoNCE, AGCL, distilled generator, rewarded generator, CIT, and controls.

    uv run python benchmarks/afmrl.py --data aviary:8 --teacher TEACHER --student STUDENT --out runs/afmrl
    uv run python benchmarks/afmrl.py --data grocery:DIR --titles two --teacher TEACHER --out runs/afmrl_grocery

AFMRL table 2 on a small scale. One generator is cold-started; its attributes serve all embedders. Every embedder
starts from the same weights and takes the same steps on the same pairs; in rows of one seed only the weights of the
negatives differ (with the catalogue's attributes also the texts: half of the training queries are followed by them).
The loop goes on from its seed's AGCL row, and so does its control, which keeps the attributes of before the reward.
Finished parts are kept, a killed table goes on; at the end it is printed as Markdown.

`--titles two` gives each photo a title of two of its attributes, drawn by a fixed seed, and holds the others back (the
groceries' own titles name the product).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldmark.commands.console import quiet_libraries
from fieldmark.data.catalog import load_catalog
from fieldmark.methods import afmrl, agcl, generator
from subsets import subset, write_subset

COLUMNS = (
    "i2t_recall@1",
    "t2i_recall@1",
    "instance_recall@1",
    "instance_recall@10",
    "instance_ndcg@10",
    "coarse_map@10",
)

ROWS = ("infonce", "agcl", "shuffled", "catalogue")
CONTROL = "cit-distilled"
WITH = {"agcl": "agcl + distilled generator"}  # as `train afmrl` names it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, help="multimodal LLM that becomes the generator")
    parser.add_argument("--student", help="multimodal LLM that becomes the embedder; the teacher where not given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--titles", choices=("own", "two"), default="own")
    parser.add_argument("--several", action="store_true", help="only items of products with several photos")
    parser.add_argument("--train", type=int, help="training items at most, drawn by a fixed seed")
    parser.add_argument("--test", type=int, help="test items at most, likewise")
    parser.add_argument("--generator_steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.02)
    parser.add_argument("--tasks", nargs="+", help="what pairs show, see `fieldmark train agcl --help`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="rows to do beside the loops")
    parser.add_argument("--loops", type=int, nargs="+", default=[0], help="seeds that go on to RAR and CIT")
    parser.add_argument("--rar_steps", type=int, default=60)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--k", type=int, default=50, help="depth of the reward")
    parser.add_argument("--rar_rate", type=float, default=3e-4)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1, help="two processes of one thread beat one of two")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    quiet_libraries()
    given.out.mkdir(parents=True, exist_ok=True)
    shared = {"data": catalogue(given), "precision": "bf16"}
    made = cold_start(given, shared)
    for seed in given.loops:
        loop = run_loop(given, shared | {"seed": seed}, made)
        run_control(given, shared | {"seed": seed}, loop)
    attributes = given.out / f"loop-{given.loops[0]}" / "2-attributes.parquet"
    for seed in given.seeds:
        for name, settings in embedders(given, seed).items():
            if name not in given.only:
                continue
            own = embedder_settings(given) | {"attributes": str(attributes)}
            own |= shared | settings | {"student": given.student or given.teacher, "seed": seed}
            run(agcl.train, agcl.AgclConfig, given.out / f"{name}-{seed}", own)
    print(table(given))


def catalogue(given: argparse.Namespace) -> str:
    """The source, or a table made of it."""
    most = {"train": given.train, "test": given.test}
    path = given.out / "catalog.jsonl"
    if given.several or given.titles == "two":
        if not path.exists():
            rows = load_catalog(given.data)
            if given.several:
                places = list(zip(rows["split"], rows["label"]))
                counts = Counter(places)
                rows = rows.select([i for i, place in enumerate(places) if place[1] is not None and counts[place] > 1])
            write_subset(rows, path, most, retitle if given.titles == "two" else None)
    elif given.train or given.test:
        subset(given.data, path, most)
    else:
        return str(given.data)
    return str(path)


def retitle(place: int, row: dict[str, Any]) -> None:
    """Two of the item's attributes for a title; it has two or more."""
    names = sorted(name for name, value in row["attributes"].items() if value != "none")
    chosen = np.random.default_rng([0, place]).choice(len(names), size=2, replace=False)
    row["title"] = ", ".join(f"{names[i].replace('_', ' ')} {row['attributes'][names[i]]}" for i in sorted(chosen))


def cold_start(given: argparse.Namespace, shared: dict[str, Any]) -> str:
    """The generator that all rows share."""
    settings = {
        "teacher": given.teacher,
        "max_steps": given.generator_steps,
        "learning_rate": 5e-4,
        "max_new_tokens": given.max_new_tokens,
        "eval_items": 128,
    }
    run(generator.train, generator.GeneratorConfig, given.out / "generator", shared | settings)
    return str(given.out / "generator" / "model")


def embedder_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Of AGCL, in all rows."""
    settings = {
        "max_steps": given.steps,
        "pairs_per_batch": given.pairs,
        "learning_rate": given.learning_rate,
        "temperature": given.temperature,
        "pooling": "mean",
        "attention": "bidirectional",
    }
    return settings | ({"tasks": given.tasks} if given.tasks else {})


def embedders(given: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """The rows that are one run of AGCL each; they differ in one setting. A loop has its own AGCL row."""
    rows: dict[str, dict[str, Any]] = {
        "infonce": {"weights": "none"},
        "agcl": {},
        "shuffled": {"weights": "shuffled"},
        "catalogue": {"attributes": "catalogue"},
    }
    return {name: settings for name, settings in rows.items() if name != "agcl" or seed not in given.loops}


def run_loop(given: argparse.Namespace, shared: dict[str, Any], made: str) -> Path:
    """`train afmrl` from the shared generator."""
    settings = {
        "teacher": made,
        "cold_start": False,
        "student": given.student or given.teacher,
        "max_new_tokens": given.max_new_tokens,
        "agcl_settings": embedder_settings(given),
        "rar_settings": {
            "max_steps": given.rar_steps,
            "queries_per_step": given.queries,
            "learning_rate": given.rar_rate,
            "k": given.k,
            "lora_rank": 32,  # TRL copies no composed teacher for the KL term; adapters need no copy
            "per_device_batch": 64,
            "checkpoint_activations": False,
            "eval_items": 128,
        },
    }
    return run(afmrl.train, afmrl.AfmrlConfig, given.out / f"loop-{shared['seed']}", shared | settings)


def run_control(given: argparse.Namespace, shared: dict[str, Any], loop: Path) -> Path:
    """CIT's steps on CIT's items, but with the attributes of before the reward: what more training alone gives."""
    settings = embedder_settings(given) | {
        "student": str(loop / "3-agcl" / "model"),
        "attributes": str(loop / "2-attributes.parquet"),
        "sample_share": afmrl.CIT_SHARE,
    }
    return run(agcl.train, agcl.AgclConfig, given.out / f"{CONTROL}-{shared['seed']}", shared | settings)


def run(method: Any, config: Any, out: Path, settings: dict[str, Any]) -> Path:
    """Trains what is not finished."""
    if not (out / "metrics.json").exists():
        method(config(**settings | {"out": str(out), "resume": out.exists()}))
    return out


def table(given: argparse.Namespace) -> str:
    """Mean and standard deviation of each row over the seeds that are done, `seeds` beside it."""
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in given.seeds:
        for name in (*embedders(given, seed), CONTROL):
            path = given.out / f"{name}-{seed}" / "metrics.json"
            if not path.exists():
                continue
            found = json.loads(path.read_text())["after"]
            rows.setdefault(name, []).append(found)
            rows.setdefault(WITH.get(name, f"{name}, attributes in queries"), []).append(enriched(found))
    for seed in given.loops:
        for name, found in json.loads((given.out / f"loop-{seed}" / "metrics.json").read_text())["ladder"].items():
            rows.setdefault(name, []).append(found)
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, found in rows.items():
        cells = [spread([one[key] for one in found if key in one]) for key in COLUMNS]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def enriched(found: dict[str, float]) -> dict[str, float]:
    """What queries with attributes found."""
    prefix = "enriched_"
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def spread(values: list[float]) -> str:
    """0.512 ± 0.004"""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
