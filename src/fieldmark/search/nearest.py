"""Nearest vectors by cosine: exact in memory, exact by reading the table, and by LanceDB's approximate index.

One query against N unit vectors is one matrix-vector product and a partial sort, bound by reading the matrix once. (The
tiles of `evaluation.neighbours` are made for many queries at once; one query would pay for 64.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from lancedb.index import HnswSq
from lancedb.table import Table

from fieldmark.search.card import ApproximateIndex
from fieldmark.search.rows import FACTS, KEY, vectors_of

ROWS_AT_ONCE = 8192  # 16 MB of 512 float32
REFINED = 10  # of that many times k candidates the exact cosine decides, since the index keeps 8 bits a number
EFFORT = 100  # a third of LanceDB's default, in a third of the time; the refined candidates make up for it
REBUILT_AT = 1.1
SAMPLED, DEPTH = 100, 10  # queries and neighbours of a measured recall
_TIE = 1e-6


@dataclass(frozen=True)
class InMemory:
    """All vectors and what is known of their items, for exact search.

    Attributes:
        facts: N rows with the columns of `FACTS` and `_rowid`.
        vectors: [N, D] float32, of unit length.
        row_ids: [N] uint64.
    """

    facts: pa.Table
    vectors: np.ndarray
    row_ids: np.ndarray

    @classmethod
    def read(cls, table: Table, dim: int) -> InMemory:
        """The whole table; the vectors are in memory once."""
        count = table.count_rows()
        vectors, start, facts = np.empty((count, dim), np.float32), 0, []
        for batch in scan(table, [*FACTS, "vector"]):
            vectors[start : start + len(batch)] = vectors_of(batch)
            start += len(batch)
            facts.append(pa.Table.from_batches([batch]).drop_columns("vector"))
        together = pa.concat_tables(facts).combine_chunks()
        return cls(together, vectors, together["_rowid"].to_numpy())

    def nearest(self, query: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[pa.Table, np.ndarray]:
        """Facts and cosines of the k nearest items, best first; equal cosines are ordered by item_id.

        Args:
            query: [D] float32, of unit length.
            k: items wanted.
            allowed: positions that may be found; None for all.
        """
        scores = self.vectors @ query
        values = scores if allowed is None else scores[allowed]
        chosen = np.arange(len(values))
        if k < len(values):
            chosen = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
        positions = chosen if allowed is None else allowed[chosen]
        keys = zip(-scores[positions], self.facts[KEY].take(positions).to_pylist(), positions)
        best = np.array([position for *_, position in sorted(keys)][:k], dtype=np.int64)
        return self.facts.take(best), scores[best]


def positions_of(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each row number stands among others, all of which differ."""
    order = np.argsort(among)
    return order[np.searchsorted(among, wanted, sorter=order)]


def scan(table: Table, columns: list[str], where: str | None = None) -> Any:
    """Record batches of the rows that a filter lets pass, with `_rowid`.

    The filter stands in brackets: LanceDB ignores what follows a condition, and half a filter is worse than none.
    """
    query = table.search().select(columns).with_row_id(True).limit(None)
    return (query if where is None else query.where(f"({where})")).to_batches(batch_size=ROWS_AT_ONCE)


def scan_nearest(table: Table, queries: np.ndarray, k: int, where: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and cosines [Q, min(k, N)] of the nearest rows of a table, exact, in the memory of one batch.

    Args:
        table: the store's table.
        queries: [Q, D] float32, of unit length.
        k: rows wanted of each query.
        where: SQL condition that rows must meet.
    """
    rows = np.empty((len(queries), 0), np.uint64)
    scores = np.empty((len(queries), 0), np.float32)
    for batch in scan(table, ["vector"], where):
        new = np.broadcast_to(batch.column("_rowid").to_numpy(), (len(queries), len(batch)))
        rows = np.concatenate([rows, new], axis=1)
        scores = np.concatenate([scores, queries @ vectors_of(batch).T], axis=1)
        if k < scores.shape[1]:
            best = np.argpartition(-scores, k, axis=1)[:, :k]
            rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def index_nearest(table: Table, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and cosines of about the k nearest rows, by the table's approximate index."""
    search: Any = table.search(query)
    search = search.distance_type("dot").refine_factor(REFINED).limit(k)
    found = search.select(["_distance"]).with_row_id(True).to_arrow()
    return found["_rowid"].to_numpy(), 1 - found["_distance"].to_numpy()


def renew_index(table: Table, before: ApproximateIndex | None) -> ApproximateIndex:
    """Makes the approximate index where there is none or where it is outgrown, and measures what it finds.

    Rows that came after it joined it when the table was optimised. It is made anew once they are a tenth.
    """
    count = table.count_rows()
    rows = count if before is None or count > REBUILT_AT * before.rows else before.rows
    if before is None or rows > before.rows:
        table.create_index("vector", config=HnswSq(distance_type="dot", ef_construction=EFFORT))
    recall, queries = measure_recall(table, lambda query, k: index_nearest(table, query, k)[0])
    return ApproximateIndex("IVF_HNSW_SQ", rows, recall, queries)


def measure_recall(table: Table, search: Callable[[np.ndarray, int], np.ndarray]) -> tuple[float, int]:
    """Recall@10 of an approximate search against the exact one, over stored items as queries, themselves left out.

    An item counts as found where its cosine is that of the exact tenth or better, so that equal photos do no harm.

    Args:
        table: the store's table.
        search: (query [D], k) -> row numbers.

    Returns:
        Recall and number of queries.
    """
    count = table.count_rows()
    sample = np.random.default_rng(0).choice(count, min(SAMPLED, count), replace=False)
    chosen = table.take_offsets(sorted(sample.tolist())).select(["vector"]).with_row_id().to_arrow()
    queries, own = vectors_of(chosen), chosen["_rowid"].to_pylist()
    hits = [
        [row for row in search(query, DEPTH + 1).tolist() if row != self_row] for query, self_row in zip(queries, own)
    ]
    distinct = sorted({row for rows in hits for row in rows})
    read = table.take_row_ids(distinct).select(["vector"]).with_row_id().to_arrow()
    vectors, places = vectors_of(read), {row: place for place, row in enumerate(read["_rowid"].to_pylist())}
    exact_rows, exact_scores = scan_nearest(table, queries, DEPTH + 1)
    shares = []
    for query, self_row, rows, scores, found in zip(queries, own, exact_rows, exact_scores, hits, strict=True):
        wanted = scores[rows != self_row][:DEPTH]
        cosines = vectors[[places[row] for row in found[:DEPTH]]] @ query
        shares.append(float((cosines >= wanted.min() - _TIE).sum() / len(wanted)))
    return float(np.mean(shares)), len(queries)
