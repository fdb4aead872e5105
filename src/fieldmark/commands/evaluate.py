"""`fieldmark evaluate MODEL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import number, print_json, print_table, quiet_libraries


@dataclass
class EvaluateOptions:
    """Arguments of `evaluate`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        data: source of the catalogue.
        split: part of the catalogue to measure on.
        batch_size: photos embedded at once.
        json: print one JSON object.
    """

    model: str
    data: str
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = 64
    json: bool = False


def run(argv: list[str]) -> None:
    """Measures retrieval and clustering, and prints a table or one JSON object."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="fieldmark evaluate",
        description="Measures a student on a catalogue.",
        positional=("model",),
        switches=("json",),
    )
    positive("batch_size", options.batch_size)
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import load_catalog, select_split
    from fieldmark.evaluation.student import evaluate_student

    catalog = select_split(load_catalog(options.data), options.split)
    metrics = evaluate_student(load_model(options.model), catalog, batch_size=options.batch_size).metrics
    if options.json:
        print_json({"model": options.model, "data": options.data, "split": options.split, **metrics})
    else:
        title = f"{options.model} on {options.data} ({options.split})"
        print_table(title, ("metric", "value"), [(name, number(value, name)) for name, value in metrics.items()])
