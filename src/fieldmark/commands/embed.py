"""`fieldmark embed MODEL`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, quiet_libraries
from fieldmark.errors import FieldmarkError


@dataclass
class EmbedOptions:
    """Arguments of `embed`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        data: source of the catalogue.
        out: Parquet file to write, with the columns item_id, label, split, role and embedding.
        split: part of the catalogue; null embeds all of it.
        batch_size: photos embedded at once.
    """

    model: str
    data: str
    out: str
    split: Literal["train", "val", "test"] | None = None
    batch_size: int = 64


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
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import load_catalog, select_split
    from fieldmark.evaluation.vectors import write_vectors
    from fieldmark.progress import JobProgress

    catalog = load_catalog(options.data)
    if options.split is not None:
        catalog = select_split(catalog, options.split)
    student = load_model(options.model)
    with JobProgress("photos", len(catalog)) as job:
        dim = write_vectors(student, catalog, out, batch_size=options.batch_size, progress=job.update)
    console().print(f"{len(catalog)} vectors of {dim} numbers: {out}", markup=False, highlight=False, soft_wrap=True)


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
