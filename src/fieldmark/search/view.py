"""One version of the store's table, as it is searched: nothing of it changes, so any number of threads may read it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.rerankers import RRFReranker
from lancedb.table import Table

from fieldmark.errors import FieldmarkError
from fieldmark.search.card import StoreCard
from fieldmark.search.nearest import InMemory, index_nearest, positions_of, scan, scan_nearest
from fieldmark.search.rows import FACTS, FILTERS, KEY, is_one_of, vectors_of

FUSED = 100  # at least that many items by vector and by words are fused
IDS_AT_ONCE = 1000
REASON = 100  # characters of what LanceDB says


class View:
    """A version of the table.

    Args:
        table: a handle of its own, at that version.
        card: the store's description.
    """

    def __init__(self, table: Table, card: StoreCard) -> None:
        self.table, self.card = table, card
        self.version, self.count = table.version, table.count_rows()
        self._in_memory = self.count <= card.exact_up_to
        self._memory: InMemory | None = None
        self._facets: dict[str, dict[str, int]] | None = None
        self._loading = threading.Lock()

    def memory(self) -> InMemory:
        """The vectors, read when they are first asked for."""
        with self._loading:
            if self._memory is None:
                self._memory = InMemory.read(self.table, self.card.model.dim)
            return self._memory

    def nearest(self, query: np.ndarray, k: int, where: str | None = None) -> tuple[pa.Table, np.ndarray]:
        """Facts and cosines of the k nearest items that a filter lets pass, best first.

        Raises:
            FieldmarkError: the filter is wrong.
        """
        if self._in_memory:
            memory = self.memory()
            allowed = None if where is None else positions_of(self._passing(where), memory.row_ids)
            return memory.nearest(query, k, allowed)
        if where is None and self.card.index is not None:
            rows, scores = index_nearest(self.table, query, k)
        else:
            with self._filtered(where):
                found = scan_nearest(self.table, query[None], k, where)
            rows, scores = found[0][0], found[1][0]
        return self._rows(rows)[0], scores

    def fused(self, query: np.ndarray, k: int, where: str | None, text: str) -> tuple[pa.Table, np.ndarray]:
        """Facts and cosines of k items, ordered by reciprocal rank fusion of vector search and full-text search.

        Raises:
            FieldmarkError: the filter is wrong.
        """
        depth = max(k, FUSED)
        near, _ = self.nearest(query, depth, where)
        order = RRFReranker().rerank_hybrid(
            text, near.select(["_rowid"]), pa.table({"_rowid": self._by_words(text, depth, where)})
        )
        facts, vectors = self._rows(order["_rowid"].to_numpy())
        scores = vectors @ query
        keys = zip(-order["_relevance_score"].to_numpy(), -scores, facts[KEY].to_pylist(), range(len(facts)))
        best = np.array([place for *_, place in sorted(keys)][:k], dtype=np.int64)  # typed, where there is none too
        return facts.take(best), scores[best]

    def by_id(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows of these items that there are, in any order, with `_rowid`."""
        parts = []
        for start in range(0, max(len(ids), 1), IDS_AT_ONCE):
            query = self.table.search().where(is_one_of(ids[start : start + IDS_AT_ONCE])).select(list(columns))
            parts.append(query.with_row_id(True).limit(None).to_arrow())
        return pa.concat_tables(parts)

    def facets(self) -> dict[str, dict[str, int]]:
        """Column of an attribute -> its values and how many items have each, the most frequent first."""
        with self._loading:
            if self._facets is None:
                columns = [column for column in self.card.columns.values() if column in self.table.schema.names]
                table = self.table.search().select(columns).limit(None).to_arrow() if columns else pa.table({})
                self._facets = {column: _counts(table[column]) for column in columns}
            return self._facets

    def _passing(self, where: str) -> np.ndarray:
        """Numbers of the rows that a filter lets pass."""
        with self._filtered(where):
            batches = scan(self.table, [KEY], where)
            parts = [batch.column("_rowid").to_numpy() for batch in batches]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    def _by_words(self, text: str, depth: int, where: str | None) -> pa.Array:
        """Numbers of the rows that have words of a text, best first by BM25."""
        query = self.table.search(text, query_type="fts").select(["_score"]).with_row_id(True).limit(depth)
        if where is not None:
            query = query.where(f"({where})", prefilter=True)
        with self._filtered(where):
            found = query.to_arrow()
        return found["_rowid"].combine_chunks()

    def _rows(self, row_ids: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """Facts and vectors of rows, in the order given."""
        if self._in_memory:
            memory = self.memory()
            positions = positions_of(row_ids, memory.row_ids)
            return memory.facts.take(positions), memory.vectors[positions]
        found = self.table.take_row_ids(row_ids.tolist()).select([*FACTS, "vector"]).with_row_id().to_arrow()
        found = found.take(positions_of(row_ids, found["_rowid"].to_numpy()))  # LanceDB gives them in its own order
        return found.drop_columns("vector"), vectors_of(found)

    @contextmanager
    def _filtered(self, where: str | None) -> Iterator[None]:
        """What LanceDB says of a filter becomes a sentence."""
        if where is None:
            yield
            return
        try:
            if _closes_early(where):
                raise ValueError("it closes a bracket that it did not open")
            yield
        except (ValueError, RuntimeError) as error:
            columns = ", ".join([*FILTERS, *self.card.columns.values()])
            raise FieldmarkError(
                f"The filter {where!r} was not understood ({_reason(error)}); give a condition on {columns}, such as "
                "label = 'x'."
            ) from error


def _reason(error: Exception) -> str:
    """LanceDB's message without its list of all columns and its place in the source."""
    text = str(error).removeprefix("Invalid input, ").partition(". Valid fields")[0].partition(", /")[0]
    parser = re.search(r"\(sql parser error: (.+)\)$", text)
    return " ".join((parser[1] if parser else text).split())[:REASON]


def _closes_early(where: str) -> bool:
    """Whether a filter gets out of the brackets it is put in; LanceDB would ignore what follows."""
    depth = 0
    for sign in re.sub(r"""'[^']*'|"[^"]*"|`[^`]*`""", "", where):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return True
    return False


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    found = pc.value_counts(values.drop_null()).to_pylist()
    return {one["values"]: one["counts"] for one in sorted(found, key=lambda one: (-one["counts"], one["values"]))}
