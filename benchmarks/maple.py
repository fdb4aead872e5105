"""The MAPLE ladder of docs/results.md: contrast, expanded negatives, preferences pairwise and listwise, three seeds.

    uv run python benchmarks/maple.py --data aviary:4 --teacher src/fieldmark/teacher/embedded --out runs/maple
    uv run python benchmarks/maple.py --data fashion:DIR --teacher TEACHER --out runs/fashion --train 1200 --test 600
    uv run python benchmarks/maple.py --data aviary:8 --scarce --start_steps 150 200 --teacher ... --out runs/scarce

MAPLE tables 2 and 3 on a small scale: the student is the teacher's own checkpoint with LoRA, every row starts from the
same weights, sees the same anchors for the same number of steps and shares one file of alignment scores. Finished runs
are kept, a killed table goes on. Print it with `uv run fieldmark compare runs/maple/*-?`.

A small teacher's states are no embedding yet, as a public model's already are in part. `--start_steps` makes one first:
contrast alone on the *teacher's* items, which no row of the table trains on or is measured on; all rows start there.
Its texts name at least eight attributes in the first stage, three in the second: short titles alone teach too slowly.

`--scarce` trains on many species and few words, as a catalogue has them: one photo each of the 2,400 species of the
teacher's part (a photo that the start has not seen), with a title of one or two of its twelve marks. Most titles of
other items are then true of an anchor too, which contrast cannot know and the teacher can.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from fieldmark.commands.console import quiet_libraries
from fieldmark.data.aviary import describe
from fieldmark.data.aviary.groups import aviary_groups
from fieldmark.data.catalog import load_catalog
from fieldmark.data.groups import GROUPS
from fieldmark.methods import maple
from fieldmark.students.enrich import enriched_text
from subsets import subset, write_subset

START_TRAIN, START_TEST, START_ANCHORS = 4800, 200, 48  # items of the teacher's part, anchors of a step
CONTRAST: dict[str, Any] = {"preference": "none", "expanded": False}
ROWS: dict[str, dict[str, Any]] = {
    "contrast": CONTRAST,
    "contrast-E": CONTRAST | {"expanded": True},
    "rpa-pair": {"preference": "pairwise", "expanded": False},
    "rpa-list": {"preference": "listwise", "expanded": False},
    "rpa-list-alone": {"preference": "listwise", "expanded": False, "preference_weight": 1.0},
    "rpa-list-E": {"preference": "listwise", "expanded": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", help="checkpoint that becomes the student; the teacher's if left out")
    parser.add_argument("--student_kind", choices=("mllm", "dual"), default="mllm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--anchors", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--tau", type=float, default=0.03, help="at the start, also of the start's contrast; beta is 1 / tau"
    )
    parser.add_argument("--temperature_rate", type=float, help="of tau and beta; 10 x the learning rate if left out")
    parser.add_argument("--warmup", type=float, default=0.025)
    parser.add_argument("--lora_rank", type=int, default=32, help="and alpha; 0 trains a dual encoder as a whole")
    parser.add_argument("--captions", help="file of `fieldmark label captions` for the training photos")
    parser.add_argument("--dedup_clusters", type=int, help="of SemDeDup, which is off if left out")
    parser.add_argument("--weight", type=float, default=0.5, help="lambda of the rows with both losses")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows to do")
    parser.add_argument("--tag", default="", help="name of a variant")
    parser.add_argument("--train", type=int, help="training items at most, drawn by a fixed seed")
    parser.add_argument("--test", type=int, help="test items at most, likewise")
    parser.add_argument("--scarce", action="store_true", help="one photo a species, titles of one or two marks")
    parser.add_argument("--groups", type=int, default=GROUPS, help="drawn groups to measure on, with --scarce")
    parser.add_argument("--start_steps", type=int, nargs="+", help="steps of contrast on the teacher's items before")
    parser.add_argument("--start_rate", type=float, default=1.5e-3, help="their learning rate")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare photos beside the training")
    parser.add_argument("--threads", type=int, default=1, help="two processes of one thread beat one of two")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = arguments.data
    if arguments.train or arguments.test:
        data = str(subset(data, arguments.out / "catalog.jsonl", {"train": arguments.train, "test": arguments.test}))
    student = start(arguments) if arguments.start_steps else arguments.student
    groups = None
    if arguments.scarce:
        data, groups = str(scarce(arguments)), str(write_groups(arguments.out, arguments.groups))
    for seed in arguments.seeds:
        for name in arguments.only or ROWS:
            out = arguments.out / f"{name}{arguments.tag}-{seed}"
            if (out / "metrics.json").exists():
                continue
            settings: dict[str, Any] = {
                "data": data,
                "teacher": arguments.teacher,
                "student": student,
                "student_kind": arguments.student_kind,
                "out": str(out),
                "groups": groups,
                "captions": arguments.captions,
                "dedup_clusters": arguments.dedup_clusters,
                "alignment": str(arguments.out / "alignment.parquet"),
                "anchors_per_batch": arguments.anchors,
                "max_steps": arguments.steps,
                "learning_rate": arguments.learning_rate,
                "temperature_learning_rate": arguments.temperature_rate or 10 * arguments.learning_rate,
                "warmup": arguments.warmup,
                "lora_rank": arguments.lora_rank,
                "lora_alpha": arguments.lora_rank or 32,
                "tau": arguments.tau,
                "beta": 1 / arguments.tau,
                "preference_weight": arguments.weight,
                "precision": "bf16",
                "workers": arguments.workers,
                "seed": seed,
                "resume": out.exists(),
            }
            maple.train(maple.MapleConfig(**settings | ROWS[name]))


def start(arguments: argparse.Namespace) -> str:
    """A student that contrast alone has made an embedder, on items of the teacher's part; long texts come first."""
    student = arguments.student
    for stage, (steps, least) in enumerate(zip(arguments.start_steps, (8, 3), strict=False), 1):
        out = arguments.out / f"start-{stage}"
        table = arguments.out / f"start-{stage}.jsonl"
        if not table.exists():
            rows = load_catalog(arguments.data, part="teacher")
            split = np.where(np.random.default_rng(0).permutation(len(rows)) < START_TEST, "test", "train")
            rows = rows.remove_columns("split").add_column("split", split.tolist())
            write_subset(rows, table, {"train": START_TRAIN, "test": START_TEST}, partial(say_more, least))
        if not (out / "metrics.json").exists():
            settings: dict[str, Any] = {
                "data": str(table),
                "teacher": arguments.teacher,
                "student": student,
                "student_kind": arguments.student_kind,
                "out": str(out),
                "anchors_per_batch": START_ANCHORS,
                "negatives": 0,
                "lora_rank": 256 if arguments.student_kind == "mllm" else 0,
                "lora_alpha": 256,
                "max_steps": steps,
                "learning_rate": arguments.start_rate,
                "temperature_learning_rate": 1e-3,
                "tau": arguments.tau,
                "warmup": 0.1,
                "precision": "bf16",
                "save_steps": 50,
                "resume": out.exists(),
            }
            maple.train(maple.MapleConfig(**settings | CONTRAST))
        student = str(out / "model")
    assert student is not None
    return student


def scarce(arguments: argparse.Namespace) -> Path:
    """One photo a species of the teacher's part with a short title to train on, the catalogue's test part as it is."""
    path = arguments.out / "scarce.jsonl"
    if path.exists():
        return path
    rows = load_catalog(arguments.data, part="teacher")
    tables = (arguments.out / f"start-{stage}.jsonl" for stage, _ in enumerate(arguments.start_steps or (), 1))
    seen = {json.loads(line)["item_id"] for table in tables for line in table.open(encoding="utf-8")}
    unseen = {label: i for i, (item, label) in enumerate(zip(rows["item_id"], rows["label"])) if item not in seen}
    chosen = rows.select(sorted(unseen.values()))
    chosen = chosen.remove_columns("split").add_column("split", ["train"] * len(chosen))
    test = load_catalog(arguments.data).filter(lambda row: row["split"] == "test")
    everything = datasets.concatenate_datasets([chosen.cast(test.features), test])
    return write_subset(everything, path, {"train": None, "test": None}, say_little)


def say_little(place: int, row: dict[str, Any]) -> None:
    """A training title of one or two of a bird's marks."""
    if row["split"] == "train":
        rng = np.random.default_rng([1, place])
        names = list(row["attributes"])
        chosen = [names[i] for i in rng.permutation(len(names))[: int(rng.integers(1, 3))]]
        row["title"] = describe(row["attributes"], chosen, int(rng.integers(5)))


def write_groups(folder: Path, count: int) -> Path:
    """The aviary's own groups, for a table that does not know them; fewer are the first ones of more."""
    path = folder / f"groups-{count}.jsonl"
    path.write_text("".join(json.dumps(asdict(group)) + "\n" for group in aviary_groups("test", count)), "utf-8")
    return path


def say_more(least: int, place: int, row: dict[str, Any]) -> None:
    """A training text that names `least` to all of the item's attributes, in words where the item is a drawn bird."""
    if row["split"] == "test":
        return
    rng = np.random.default_rng([least, place])
    names = list(row["attributes"])
    count = int(rng.integers(min(least, len(names)), len(names) + 1))
    chosen = [names[i] for i in rng.permutation(len(names))[:count]]
    if row["image"].startswith("aviary://"):
        row["title"] = describe(row["attributes"], chosen, int(rng.integers(5)))
    else:
        row["title"] = enriched_text(row["title"], {name: row["attributes"][name] for name in chosen})


if __name__ == "__main__":
    main()
