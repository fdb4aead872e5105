"""Exact nearest neighbours by cosine, a block at a time, in bounded memory.

Why the result does not depend on the block. A matrix product adds the same terms in another order when its shape
changes, so the last bits of a score depend on the shape, and with them which of two near-equal items comes first
(seen with MKL: a product of 7 rows differs from the same rows inside a product of 256). Here every product has one
shape, `tile_rows x D x tile_columns`, fixed by the numbers of queries and gallery items and padded with zero rows at
its edges; a block only says how many of them are held at once. Inside a full tile every score is summed in the same
order, so equal gallery rows get equal scores wherever they stand.

Why ties are exact. A float32 score and its column are packed into one int64 that sorts by (score descending, index
ascending): all keys differ, so any partial sort gives the one right answer.

Memory: one block of scores (64 MB), sorting space (at most 128 MB, far less below 10,000 neighbours a query, and 16 MB
a thread), and one float32 copy of the gallery if that takes at most 256 MB (a larger one is read again for every block
of queries).
Nothing grows with the number of queries, except the result itself where all neighbours are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows

BLOCK_BYTES = 64 * 2**20
_CACHE_BYTES = 256 * 2**20
# Scores handed to one partial sort: 1 M values are 4 MB and stay near the processor.
_SLICE_VALUES = 2**20
# Neighbours held for one block of queries: 8 M keys are 64 MB.
_BLOCK_KEYS = 8 * 2**20
_INDEX_MASK = 0xFFFFFFFF


class Scores:
    """Cosine scores of queries against a gallery, produced in blocks of whole tiles.

    Args:
        queries: Q rows.
        gallery: N rows of the same width.
        own: [Q] int64, the gallery position of each query's own item, -1 where it is not in the gallery.
            That score is set to minus infinity: an item is never its own neighbour.
        block_rows: queries held at once.
        block_bytes: bound on a block of scores (never less than one row of tiles by one tile).

    Raises:
        FieldmarkError: queries and gallery differ in width.
    """

    def __init__(
        self,
        queries: Rows,
        gallery: Rows,
        own: np.ndarray | None = None,
        *,
        block_rows: int = 256,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if queries.dim != gallery.dim:
            raise FieldmarkError(
                f"queries have {queries.dim} dimensions and the gallery {gallery.dim}; give equal ones"
            )
        if block_rows < 1:
            raise FieldmarkError(f"block_rows is {block_rows}; give at least 1")
        self.n_queries, self.n_gallery = len(queries), len(gallery)
        self._queries, self._gallery = queries, gallery
        self._own = np.full(self.n_queries, -1, dtype=np.int64) if own is None else own
        # Small problems use small tiles; both sides stay multiples of 64, so no kernel sees a ragged edge.
        self._tile_rows = 256 if self.n_queries >= 1024 else 64
        tiles = -(-self.n_gallery // 4096)
        self._tile_columns = _round_up(-(-self.n_gallery // tiles), 64)
        self._tiles = tiles
        self._block_rows = min(block_rows, self.n_queries)
        buffer_rows = _round_up(self._block_rows, self._tile_rows)
        fitting = block_bytes // (4 * buffer_rows * self._tile_columns)
        self._block_tiles = min(max(1, fitting), tiles)
        self.block_columns = self._block_tiles * self._tile_columns
        self._buffer = torch.empty(buffer_rows, self.block_columns)
        padded = tiles * self._tile_columns
        self._cached = [] if 4 * padded * gallery.dim > _CACHE_BYTES else [self._tile(tile) for tile in range(tiles)]

    def blocks(self, queries: np.ndarray, depths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cuts query numbers, and how many neighbours each needs, into blocks that fit in memory."""
        total = np.cumsum(np.minimum(depths, self.n_gallery))
        start = 0
        while start < len(queries):
            held = total[start - 1] if start else 0
            fitting = int(np.searchsorted(total, held + _BLOCK_KEYS, side="right"))
            stop = min(start + self._block_rows, max(fitting, start + 1))
            yield queries[start:stop], depths[start:stop]
            start = stop

    def columns(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Scores of one block of queries against the whole gallery, left to right.

        Args:
            queries: query numbers, at most one block of them.

        Yields:
            (first gallery index, [len(queries), n] float32). The array is overwritten by the next one.
        """
        padded = torch.zeros(_round_up(len(queries), self._tile_rows), self._queries.dim)
        padded[: len(queries)] = self._queries.unit(queries)
        for first in range(0, self._tiles, self._block_tiles):
            tiles = range(first, min(first + self._block_tiles, self._tiles))
            with _full_precision():
                for place, tile in enumerate(tiles):
                    self._fill(padded, tile, place * self._tile_columns)
            start = first * self._tile_columns
            width = min(len(tiles) * self._tile_columns, self.n_gallery - start)
            scores = self._buffer[: len(queries), :width].numpy()
            own = self._own[queries] - start
            inside = np.flatnonzero((own >= 0) & (own < width))
            scores[inside, own[inside]] = -np.inf
            yield start, scores

    def _tile(self, tile: int) -> torch.Tensor:
        start = tile * self._tile_columns
        rows = self._gallery.unit(slice(start, start + self._tile_columns))
        if len(rows) == self._tile_columns:
            return rows
        padded = torch.zeros(self._tile_columns, rows.shape[1])
        padded[: len(rows)] = rows
        return padded

    def _fill(self, padded: torch.Tensor, tile: int, column: int) -> None:
        gallery = (self._cached[tile] if self._cached else self._tile(tile)).T
        for row in range(0, len(padded), self._tile_rows):
            rows = slice(row, row + self._tile_rows)
            torch.mm(padded[rows], gallery, out=self._buffer[rows, column : column + self._tile_columns])


@dataclass(frozen=True)
class Neighbours:
    """The best gallery items of each query, best first.

    Attributes:
        indices: [Q, k] int64 gallery positions; -1 where the gallery has fewer than k other items.
        scores: [Q, k] float32 cosines; minus infinity where the index is -1.
    """

    indices: np.ndarray
    scores: np.ndarray


def nearest(scores: Scores, queries: np.ndarray, depths: np.ndarray) -> Iterator[tuple[np.ndarray, Neighbours]]:
    """The nearest items of one block of queries, each to its own depth.

    Args:
        scores: where scores come from.
        queries: [B] query numbers, one of `scores.blocks`.
        depths: [B] how many neighbours each needs. Queries of like depth are sorted together, so one deep query
            does not cost the others.

    Yields:
        (positions in `queries`, their neighbours to the largest depth among them).
    """
    groups = list(_like_depths(np.minimum(depths, scores.n_gallery), scores.block_columns))
    best: list[np.ndarray | None] = [None] * len(groups)

    def select(number: int, block: np.ndarray, start: int) -> None:
        rows, depth = groups[number]
        found, held = _best_keys(block[rows], depth, start), best[number]
        best[number] = found if held is None else _keep_lowest(np.concatenate([held, found], axis=1), depth)

    # numpy sorts outside the interpreter lock, so threads share the work as they share that of the product.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for start, block in scores.columns(queries):
            list(threads.map(select, range(len(groups)), repeat(block), repeat(start)))
    for (rows, _), keys in zip(groups, best):
        if keys is not None:
            yield rows, _unpack(np.sort(keys, axis=1))


def top_k(scores: Scores, k: int) -> Neighbours:
    """The k nearest gallery items of every query.

    Ties are ordered by gallery index. Besides the memory of `Scores`, the result takes 12 bytes a neighbour.

    Args:
        scores: where scores come from.
        k: neighbours per query, at least 1.

    Returns:
        [Q, k] indices and scores.

    Raises:
        FieldmarkError: k is below 1.
    """
    if k < 1:
        raise FieldmarkError(f"k is {k}; give at least 1")
    indices = np.full((scores.n_queries, k), -1, dtype=np.int64)
    values = np.full((scores.n_queries, k), -np.inf, dtype=np.float32)
    for queries, depths in scores.blocks(np.arange(scores.n_queries), np.full(scores.n_queries, k)):
        for rows, found in nearest(scores, queries, depths):
            width = found.indices.shape[1]
            indices[queries[rows], :width], values[queries[rows], :width] = found.indices, found.scores
    return Neighbours(indices, values)


def _like_depths(depths: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row groups of similar depth, small enough to sort at once."""
    order = np.argsort(depths, kind="stable")
    end = len(order)
    while end > 0:
        depth = max(int(depths[order[end - 1]]), 1)
        start = max(0, end - max(1, _SLICE_VALUES // max(depth, width)))
        # A depth more than twice the shallowest of the group would waste the work on the others.
        start = max(start, int(np.searchsorted(depths[order[:end]], depth // 2)))
        yield order[start:end], depth
        end = start


def _best_keys(block: np.ndarray, depth: int, start: int) -> np.ndarray:
    """[b, min(depth, n)] unsorted keys of each row's best scores."""
    rows, width = block.shape
    if depth >= width:
        return _pack(block, np.arange(start, start + width))
    least = np.partition(block, width - depth, axis=1)[:, width - depth, None]
    flat = np.flatnonzero(block >= least)
    counts = np.diff(np.searchsorted(flat, np.arange(rows + 1) * width))
    if counts.max() > depth:
        flat = flat[_without_late_ties(block.reshape(-1)[flat], flat // width, counts, depth)]
    columns = (flat % width).reshape(rows, depth)
    return _pack(np.take_along_axis(block, columns, axis=1), columns + start)


def _without_late_ties(values: np.ndarray, rows: np.ndarray, counts: np.ndarray, depth: int) -> np.ndarray:
    """Mask that keeps, of the scores equal to a row's last place, those that come first, `depth` a row in all."""
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tied = values == np.minimum.reduceat(values, first)[rows]
    seen = np.cumsum(tied)
    place = seen - (seen[first] - tied[first])[rows]
    better = counts - np.add.reduceat(tied.astype(np.int64), first)
    return ~tied | (place <= (depth - better)[rows])


def _keep_lowest(keys: np.ndarray, depth: int) -> np.ndarray:
    if keys.shape[1] <= depth:
        return keys
    return np.ascontiguousarray(np.partition(keys, depth - 1, axis=1)[:, :depth])


def _pack(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """int64 keys whose ascending order is (score descending, column ascending)."""
    bits = (values + np.float32(0)).view(np.int32)  # adding zero makes one zero of the two
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~rising).astype(np.int64) << 32) | columns


def _unpack(keys: np.ndarray) -> Neighbours:
    rising = ~(keys >> 32).astype(np.int32)
    values = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    return Neighbours(np.where(np.isneginf(values), -1, keys & _INDEX_MASK), values)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, whatever autocast or `set_float32_matmul_precision` the caller trains with."""
    switch: Any = torch.backends.mkldnn
    before = switch.enabled
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        switch.enabled = False
        try:
            yield
        finally:
            switch.enabled = before


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
