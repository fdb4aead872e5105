"""A student's vectors of a catalogue as a Parquet file, or as a `.npy` file with the items' names beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import embed_catalog

KEPT = ("item_id", "label", "split", "role")
NAMED = ("item_id", "label", "title", "split", "role")  # beside a .npy file
SUFFIXES = (".parquet", ".npy")
BATCHES_A_CHUNK = 4

Chunks = Iterator[tuple[datasets.Dataset, np.ndarray]]


def vector_files(path: Path) -> list[Path]:
    """The files that `write_vectors` writes for a name, in the order in which they appear; the vectors are the last.

    Raises:
        FieldmarkError: the name ends in something else than `.parquet` or `.npy`.
    """
    if path.suffix not in SUFFIXES:
        raise FieldmarkError(f"The file {path} was given; expected a name that ends in {' or '.join(SUFFIXES)}.")
    return [path] if path.suffix == ".parquet" else [path.with_suffix(".ids.jsonl"), path]


def write_vectors(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    path: Path,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Embeds a catalogue in its order, chunk by chunk; at no time are more than four batches of vectors in memory.

    Args:
        student: the student.
        catalog: photos and what is known of them.
        path: Parquet file with the columns `item_id`, `label`, `split`, `role` (text) and `embedding` (a float32 list
            of fixed size); or NAME.npy, [N, D] float32, with NAME.ids.jsonl beside it: line i is an object with the
            `item_id`, `label`, `title`, `split` and `role` of row i. Files appear when they are whole.
        batch_size: photos embedded at once.
        progress: called now and then with the number of photos done.

    Returns:
        Size of a vector.

    Raises:
        FieldmarkError: the name ends in something else, the catalogue is empty, or a photo cannot be read.
    """
    files = vector_files(path)
    if len(catalog) == 0:
        raise FieldmarkError("The catalogue has no photos to embed; check its split column.")
    dim = student.get_embedding_dimension()
    assert dim is not None
    unfinished = [file.with_name(f"{file.name}.unfinished") for file in files]
    chunks = _embedded(student, catalog, batch_size, progress)
    try:
        if path.suffix == ".parquet":
            _write_parquet(unfinished[0], chunks, dim)
        else:
            _write_npy(unfinished[0], unfinished[1], chunks, (len(catalog), dim))
        for made, file in zip(unfinished, files, strict=True):
            made.replace(file)
    finally:
        for made in unfinished:
            made.unlink(missing_ok=True)
    return dim


def _embedded(
    student: SentenceTransformer, catalog: datasets.Dataset, batch_size: int, progress: Callable[[int], None]
) -> Chunks:
    """Rows and their vectors, in the catalogue's order."""
    chunk = BATCHES_A_CHUNK * batch_size
    for start in range(0, len(catalog), chunk):
        rows = catalog.select(range(start, min(start + chunk, len(catalog))))
        yield rows, embed_catalog(student, rows, batch_size=batch_size)
        progress(start + len(rows))


def _write_parquet(path: Path, chunks: Chunks, dim: int) -> None:
    schema = pa.schema([*((name, pa.string()) for name in KEPT), ("embedding", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema) as writer:
        for rows, vectors in chunks:
            columns = [pa.array(rows[name][:], pa.string()) for name in KEPT]
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim))
            writer.write_table(pa.table(columns, schema=schema))


def _write_npy(ids: Path, path: Path, chunks: Chunks, shape: tuple[int, int]) -> None:
    with path.open("wb") as file, ids.open("w", encoding="ascii", newline="\n") as lines:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows, vectors in chunks:
            file.write(vectors.astype("<f4", copy=False).tobytes())
            for row in rows.select_columns(list(NAMED)):
                # Escaped to ASCII: some readers take a line separator of Unicode in a title for the end of a line.
                lines.write(json.dumps({name: row[name] for name in NAMED}) + "\n")
