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
    import datasets

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
        groups: JSONL of groups (image_0, image_1, caption_0, caption_1) for an image-text student; null makes them of
            the catalogue.
        bad_files: CSV file to write the photos to that were skipped; their number is printed in any case.
        json: print one JSON object.
    """

    model: str
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = 64
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    groups: str | None = None
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
    from fieldmark.data.groups import find_groups
    from fieldmark.evaluation.multimodal import evaluate_multimodal
    from fieldmark.evaluation.student import evaluate_student, has_positives
    from fieldmark.students.items import is_multimodal

    catalog, bad = read_catalog(options)
    catalog = select_split(catalog, options.split)
    bad = [one for one in bad if one.split == options.split]
    if options.bad_files is not None:
        write_bad_photos(bad, Path(options.bad_files))
    student = load_model(options.model)
    metrics: dict[str, float] = {"n_bad_photos": len(bad)} if options.bad_photos == "skip" else {}
    intervals: dict[str, tuple[float, float]] = {}
    more: dict[str, Any] = {}
    with_texts = is_multimodal(student) and any(catalog["title"])
    # A photo's title finds it, whether or not another photo of its class does.
    if not with_texts or (all(catalog["label"]) and has_positives(catalog)):
        measured = evaluate_student(student, catalog, batch_size=options.batch_size, ks=options.ks)
        metrics, intervals = measured.metrics | metrics, measured.intervals
        more |= _confusions(measured, catalog)
    if with_texts:
        groups = find_groups(options.data, catalog, options.groups)
        texts = evaluate_multimodal(student, catalog, groups, batch_size=options.batch_size)
        metrics, intervals = metrics | texts.metrics, intervals | texts.intervals
        more["groups_by_category"] = texts.by_category
    if options.json:
        about = {"model": options.model, "data": options.data, "split": options.split}
        print_json({**about, **metrics, "intervals": intervals, **more})
        return
    rows = [(name, number(value, name), interval(intervals.get(name))) for name, value in metrics.items()]
    title = f"{options.model} on {options.data} ({options.split})"
    print_table(title, ("metric", "value", "95 % interval over queries"), rows)
    _print_pairs(more.get("hardest_class_pairs", []))
    _print_by_attributes(more.get("recall_by_differing_attributes", []))
    _print_categories(more.get("groups_by_category", {}))


def _confusions(measured: Evaluation, catalog: datasets.Dataset) -> dict[str, Any]:
    """Hardest class pairs, their examples by item_id, and recall by the number of differing attributes."""
    from fieldmark.evaluation.confusions import hardest_class_pairs, recall_by_differing_attributes

    labels, attributes, items = (list(catalog[name]) for name in ("label", "attributes", "item_id"))
    pairs = hardest_class_pairs(measured.per_query, labels, attributes)
    return {
        "hardest_class_pairs": [_pair_summary(pair, items) for pair in pairs],
        "recall_by_differing_attributes": recall_by_differing_attributes(measured.per_query, labels, attributes),
    }


def _pair_summary(pair: ClassPair, item_ids: list[str]) -> dict[str, Any]:
    """A pair as JSON: its examples by item_id."""
    examples = [{"query": item_ids[query], "nearest": item_ids[wrong]} for query, wrong in pair.examples]
    return asdict(pair) | {"examples": examples}


def _print_pairs(pairs: list[dict[str, Any]]) -> None:
    if not pairs:
        return
    known = any(pair["differing"] is not None for pair in pairs)
    rows = []
    for pair in pairs:
        row = [" / ".join(pair["classes"]), f"{pair['count']} of {pair['queries']} queries"]
        if known:
            row.append("\n".join(f"{name}: {first} / {second}" for name, first, second in pair["differing"] or []))
        rows.append(row)
    columns = ("classes", "confused", *(["attributes that differ"] if known else []))
    print_table("hardest class pairs", columns, rows)


def _print_categories(categories: dict[str, dict[str, float]]) -> None:
    if categories:
        names = ("text_score", "image_score", "group_score", "n_groups")
        rows = [(name, *(number(found[key], key) for key in names)) for name, found in categories.items()]
        print_table("groups by category", ("category", *names), rows)


def _print_by_attributes(rows: list[dict[str, Any]]) -> None:
    if rows:
        title = "recall@1 by the number of attributes in which the nearest wrong class differs"
        cells = [(str(row["differing"]), number(row["recall@1"]), str(row["n_queries"])) for row in rows]
        print_table(title, ("differing", "recall@1", "n_queries"), cells)
