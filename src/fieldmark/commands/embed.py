"""`fieldmark embed MODEL`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, quiet_libraries
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError


@dataclass
class EmbedOptions(CatalogOptions):
    """Arguments of `embed`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        out: file to write. NAME.parquet has the columns item_id, label, split, role and embedding; NAME.npy has the
            vectors alone, and NAME.ids.jsonl beside it names the item of each row. Photos that were skipped are listed
            in NAME.bad_files.csv.
        split: part of the catalogue; null embeds all of it.
        batch_size: photos embedded at once.
    """

    model: str
    out: str
    split: Literal["train", "val", "test"] | None = None
    batch_size: int = 64


EmbedOptions.__doc__ = f"{CatalogOptions.__doc__}\n{EmbedOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Writes the vectors, with a progress bar."""
    options = parse(
        EmbedOptions,
        argv,
        prog="fieldmark embed",
        description="Writes a student's vectors of a catalogue to a Parquet or .npy file.",
        positional=("model",),
    )
    positive("batch_size", options.batch_size)
    out, skip = Path(options.out), options.bad_photos == "skip"
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import select_split
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.evaluation.vectors import vector_files, write_vectors
    from fieldmark.progress import JobProgress

    files, bad_files = vector_files(out), out.with_suffix(".bad_files.csv")
    check_files([bad_files, *files] if skip else files)
    catalog, bad = read_catalog(options)
    if options.split is not None:
        catalog = select_split(catalog, options.split)
        bad = [one for one in bad if one.split == options.split]
    student = load_model(options.model)
    with JobProgress("photos", len(catalog)) as job:
        dim = write_vectors(student, catalog, out, batch_size=options.batch_size, progress=job.update)
    if skip:
        write_bad_photos(bad, bad_files)
    console().print(f"{len(catalog)} vectors of {dim} numbers: {out}", markup=False, highlight=False, soft_wrap=True)
    if bad:
        console().print(f"{len(bad)} photos left out: {bad_files}", markup=False, highlight=False, soft_wrap=True)


def check_files(files: Sequence[Path]) -> None:
    """Makes the folder of files to write; nothing is written over."""
    for file in files:
        if file.exists():
            raise FieldmarkError(f"{file} exists; give another name by --out, or delete it first.")
    try:
        files[-1].parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FieldmarkError(f"--out {files[-1]} does not lie in a folder; give another name.") from error
