"""A student's vectors of a catalogue as a Parquet file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import embed_catalog

KEPT = ("item_id", "label", "split", "role")
BATCHES_A_CHUNK = 4


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
            of fixed size). It appears when it is whole.
        batch_size: photos embedded at once.
        progress: called now and then with the number of photos done.

    Returns:
        Size of a vector.

    Raises:
        FieldmarkError: the catalogue is empty, or a photo cannot be read.
    """
    if len(catalog) == 0:
        raise FieldmarkError("The catalogue has no photos to embed; check its split column.")
    dim = student.get_embedding_dimension()
    assert dim is not None
    schema = pa.schema([*((name, pa.string()) for name in KEPT), ("embedding", pa.list_(pa.float32(), dim))])
    unfinished = path.with_name(f"{path.name}.unfinished")
    chunk = BATCHES_A_CHUNK * batch_size
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, len(catalog), chunk):
                rows = catalog.select(range(start, min(start + chunk, len(catalog))))
                vectors = embed_catalog(student, rows, batch_size=batch_size)
                columns = [pa.array(rows[name][:], pa.string()) for name in KEPT]
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim))
                writer.write_table(pa.table(columns, schema=schema))
                progress(start + len(rows))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return dim
