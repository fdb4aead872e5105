"""`fieldmark embed MODEL`."""

from __future__ import annotations

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
        out: Parquet file to write, with the columns item_id, label, split, role and embedding; photos that were
            skipped are listed beside it in a file that ends in .bad_files.csv.
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
        description="Writes a student's vectors of a catalogue to a Parquet file.",
        positional=("model",),
    )
    positive("batch_size", options.batch_size)
    out = check_file(Path(options.out))
    bad_files = out.with_suffix(".bad_files.csv")
    if options.bad_photos == "skip" and bad_files.exists():
        raise FieldmarkError(f"{bad_files} exists; give --out another name, or delete it first.")
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import select_split
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.evaluation.vectors import write_vectors
    from fieldmark.progress import JobProgress

    catalog, bad = read_catalog(options)
    if options.split is not None:
        catalog = select_split(catalog, options.split)
        bad = [one for one in bad if one.split == options.split]
    student = load_model(options.model)
    with JobProgress("photos", len(catalog)) as job:
        dim = write_vectors(student, catalog, out, batch_size=options.batch_size, progress=job.update)
    if options.bad_photos == "skip":
        write_bad_photos(bad, bad_files)
    console().print(f"{len(catalog)} vectors of {dim} numbers: {out}", markup=False, highlight=False, soft_wrap=True)
    if bad:
        console().print(f"{len(bad)} photos left out: {bad_files}", markup=False, highlight=False, soft_wrap=True)


def check_file(out: Path) -> Path:
    """The file to write, its folder made; nothing is written over."""
    if out.suffix != ".parquet":
        raise FieldmarkError(f"--out {out} was given; expected the name of a .parquet file.")
    if out.exists():
        raise FieldmarkError(f"--out {out} exists; give another name, or delete it first.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FieldmarkError(f"--out {out} does not lie in a folder; give another name.") from error
    return out
