"""`fieldmark evaluate MODEL`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import interval, number, print_json, print_table, quiet_libraries
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.evaluation.confusions import ClassPair
    from fieldmark.evaluation.student import Evaluation


@dataclass
class EvaluateOptions(CatalogOptions):
    """Arguments of `evaluate`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        split: part of the catalogue to measure on.
        batch_size: photos embedded at once.
        ks: depths k of recall@k, for example 1,10,100,1000.
        bad_files: CSV file to write the photos to that were skipped; their number is printed in any case.
        json: print one JSON object.
    """

    model: str
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = 64
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    bad_files: str | None = None
    json: bool = False


EvaluateOptions.__doc__ = f"{CatalogOptions.__doc__}\n{EvaluateOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Measures retrieval and clustering, and prints tables or one JSON object."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="fieldmark evaluate",
        description="Measures a student on a catalogue.",
        positional=("model",),
        switches=("json",),
    )
    positive("batch_size", options.batch_size)
    if not options.ks:
        raise FieldmarkError("--ks was given no depth; expected one or more, such as 1,10,100.")
    for depth in options.ks:
        positive("ks", depth)
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import select_split
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.evaluation.confusions import hardest_class_pairs, recall_by_differing_attributes
    from fieldmark.evaluation.student import evaluate_student

    catalog, bad = read_catalog(options)
    catalog = select_split(catalog, options.split)
    bad = [one for one in bad if one.split == options.split]
    if options.bad_files is not None:
        write_bad_photos(bad, Path(options.bad_files))
    measured = evaluate_student(load_model(options.model), catalog, batch_size=options.batch_size, ks=options.ks)
    if options.bad_photos == "skip":
        measured.metrics["n_bad_photos"] = len(bad)
    labels, attributes = list(catalog["label"]), list(catalog["attributes"])
    pairs = hardest_class_pairs(measured.per_query, labels, attributes)
    by_attributes = recall_by_differing_attributes(measured.per_query, labels, attributes)
    if options.json:
        print_json(
            {
                "model": options.model,
                "data": options.data,
                "split": options.split,
                **measured.metrics,
                "intervals": measured.intervals,
                "hardest_class_pairs": [_pair_summary(pair, list(catalog["item_id"])) for pair in pairs],
                "recall_by_differing_attributes": by_attributes,
            }
        )
    else:
        _print_metrics(f"{options.model} on {options.data} ({options.split})", measured)
        _print_pairs(pairs)
        _print_by_attributes(by_attributes)


def _pair_summary(pair: ClassPair, item_ids: list[str]) -> dict[str, Any]:
    """A pair as JSON: its examples by item_id."""
    examples = [{"query": item_ids[query], "nearest": item_ids[wrong]} for query, wrong in pair.examples]
    return asdict(pair) | {"examples": examples}


def _print_metrics(title: str, measured: Evaluation) -> None:
    rows = [
        (name, number(value, name), interval(measured.intervals.get(name))) for name, value in measured.metrics.items()
    ]
    print_table(title, ("metric", "value", "95 % interval over queries"), rows)


def _print_pairs(pairs: list[ClassPair]) -> None:
    if not pairs:
        return
    known = any(pair.differing is not None for pair in pairs)
    rows = []
    for pair in pairs:
        row = [" / ".join(pair.classes), f"{pair.count} of {pair.queries} queries"]
        if known:
            row.append("\n".join(f"{name}: {first} / {second}" for name, first, second in pair.differing or []))
        rows.append(row)
    columns = ("classes", "confused", *(["attributes that differ"] if known else []))
    print_table("hardest class pairs", columns, rows)


def _print_by_attributes(rows: list[dict[str, Any]]) -> None:
    if rows:
        title = "recall@1 by the number of attributes in which the nearest wrong class differs"
        cells = [(str(row["differing"]), number(row["recall@1"]), str(row["n_queries"])) for row in rows]
        print_table(title, ("differing", "recall@1", "n_queries"), cells)
