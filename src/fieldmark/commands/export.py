"""`fieldmark export MODEL --to FORMAT --out DIR`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, print_json, print_table, quiet_libraries
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError

DRAWN = "aviary:1"


@dataclass
class ExportOptions(CatalogOptions):
    """Arguments of `export`.

    Attributes:
        data: catalogue to check the export with, and to measure --int8 and --dims on; its sources are those of
            `evaluate`. Without it the export is checked with drawn birds.
        model: run folder, model folder or hub id of a student.
        to: format: onnx, openvino or sentence-transformers.
        out: folder to write; it must not exist, or be empty.
        tolerance: largest allowed absolute difference of a number of the embedding from the student's.
        int8: also write a file of the photo side with 8-bit weights, and measure what it loses (onnx; needs --data
            with labels).
        dims: shorter vectors to measure, for example 256 128 64: their first numbers, normalised again (needs --data
            with labels).
        runs: further runs that differ from MODEL's in their seed alone; the card then states mean and spread.
        batch_size: photos at once while measuring.
        json: print one JSON object, the content of export.json.
    """

    model: str
    to: Literal["onnx", "openvino", "sentence-transformers"]
    out: str
    data: str = field(default="", kw_only=True)
    tolerance: float = 1e-4
    int8: bool = False
    dims: list[int] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    batch_size: int = 32
    json: bool = False


def run(argv: list[str]) -> None:
    """Writes the export, and prints how far it is from the student and what its variants lose."""
    options = parse(
        ExportOptions,
        argv,
        prog="fieldmark export",
        description="Writes a student as ONNX, OpenVINO or a sentence-transformers folder, checked against itself, "
        "with a model card.",
        positional=("model",),
        switches=("int8", "json"),
        several=("dims", "runs"),
    )
    positive("batch_size", options.batch_size)
    if not (options.tolerance >= 0 and math.isfinite(options.tolerance)):
        raise FieldmarkError(f"--tolerance {options.tolerance} was given; expected 0 or more.")
    if (options.int8 or options.dims) and not options.data:
        raise FieldmarkError("--int8 and --dims are measured on labelled photos; give --data with them.")
    out = Path(options.out)
    quiet_libraries()
    from fieldmark.export.folder import check_free
    from fieldmark.export.packages import require

    check_free(out)
    require(options.to)
    from fieldmark.commands.models import load_model
    from fieldmark.export.exporting import ExportTask, export
    from fieldmark.export.provenance import provenance_of

    provenance = provenance_of(options.model, options.runs)
    options.data = options.data or DRAWN
    catalog, _ = read_catalog(options)
    student = load_model(options.model).to("cpu").eval()
    about = export(
        ExportTask(
            student=student,
            kind=options.to,
            catalog=catalog,
            source=provenance.shown(options.data),
            provenance=provenance,
            tolerance=options.tolerance,
            int8=options.int8,
            dims=options.dims,
            batch_size=options.batch_size,
        ),
        out,
    )
    if options.json:
        print_json(about)
    else:
        _print(about, out)


def _print(about: dict[str, Any], out: Path) -> None:
    check = about["check"]
    sides = [f"{check['photos']['largest_difference']:.1e} on {check['photos']['count']} photos"]
    if "texts" in check:
        sides.append(f"{check['texts']['largest_difference']:.1e} on {check['texts']['count']} texts")
    _say(
        f"largest difference from the student in {check['precision']}: {', '.join(sides)} "
        f"(allowed {check['tolerance']:g})"
    )
    whole = check.get("whole_photos", {"count": 0})
    if whole["count"]:
        _say(f"{whole['count']} photos of other sizes, resized by the folder itself: {whole['largest_difference']:.1e}")
    if "texts_left_out" in about:
        _say(f"The text side was left out: {about['texts_left_out']}.")
    if "loading" in about:
        _say(about["loading"]["says"])
    if "variants" in about:
        _print_variants(about)
    _say(f"The export: {out}")


def _print_variants(about: dict[str, Any]) -> None:
    found = about["variants"]
    rows = [
        (
            one["name"],
            str(one["dim"]),
            f"{one['recall@1']:.4f}",
            " – ".join(f"{bound:.3f}" for bound in one["interval"]),
            f"{one['loss_points']:.2f}",
        )
        for one in found["measured"]
    ]
    columns = ("weights", "numbers", "recall@1", "95 % interval over queries", "loss, points")
    print_table(f"{found['queries']:,} queries on the test photos of {found['source']}", columns, rows)
    if "int8" in about:
        int8 = about["int8"]
        _say(
            f"int8 ({int8['method']}): {int8['megabytes']:.1f} MB against {int8['megabytes_float32']:.1f}, "
            f"{int8['milliseconds_per_photo']:.2f} ms a photo against {int8['milliseconds_per_photo_float32']:.2f}"
        )


def _say(sentence: str) -> None:
    console().print(sentence, markup=False, highlight=False, soft_wrap=True)
