"""Retrieval metrics: Recall@k, MAP@R, R-precision and mean reciprocal rank, exact.

Every metric follows from two things known per query: the rank of its first positive, and which of its R nearest items
are positive (R = number of its positives). So the depth of the search is R, not the largest k: Recall@1000 needs no
list of 1,000 neighbours. A first positive that lies deeper than the search is found by counting the items before it.
The best item of another label needs depth R + 1: of so many items one at least is no positive.

MAP@R is that of Musgrave, Belongie and Lim, "A Metric Learning Reality Check" (arXiv 2003.08505), Eq. 1-2:
1/R times the sum over i <= R of precision at i where the i-th item is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows, checked_labels, encode_labels
from fieldmark.evaluation.neighbours import BLOCK_BYTES, Scores, nearest

ROLES = ("query", "gallery", "both")
# Deep enough that few queries need the counting pass; a partial sort of 256 costs no more than one of 1.
_LEAST_DEPTH = 256


@dataclass(frozen=True)
class PerQuery:
    """What each query found. Row i of every array belongs to the same query.

    Attributes:
        query: [Q] int64, the query's row in the embeddings that were given.
        positives: [Q] int64, gallery items of its label, itself left out; 0 means the query is not counted.
        first_hit: [Q] int64, rank (from 1) of the first positive; 0 where there is none.
        average_precision: [Q] float64, average precision at R; 0 where there is no positive.
        r_precision: [Q] float64, share of positives among the first R; 0 where there is no positive.
        neighbours: [Q, k] int64, gallery rows, best first; -1 where the gallery has fewer items.
        scores: [Q, k] float32, their cosines; minus infinity where the neighbour is -1.
        correct: [Q, k] bool, whether the neighbour has the query's label.
        nearest_wrong: [Q] int64, gallery row of the best item of another label; -1 where there is none.
        nearest_wrong_score: [Q] float32, its cosine; minus infinity where there is none.
        n_gallery: items searched.
    """

    query: np.ndarray
    positives: np.ndarray
    first_hit: np.ndarray
    average_precision: np.ndarray
    r_precision: np.ndarray
    neighbours: np.ndarray
    scores: np.ndarray
    correct: np.ndarray
    nearest_wrong: np.ndarray
    nearest_wrong_score: np.ndarray
    n_gallery: int

    @property
    def counted(self) -> np.ndarray:
        """[Q] bool: queries that have a positive, over which the means are taken."""
        return self.positives > 0

    @property
    def hit_at_1(self) -> np.ndarray:
        """[Q] bool: whether the nearest item is a positive."""
        return self.first_hit == 1

    def values(self, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, np.ndarray]:
        """What each counted query adds to the means: `recall@k` (bool), `map@r`, `r_precision`, `mrr` (float64)."""
        first_hit = self.first_hit[self.counted]
        values: dict[str, np.ndarray] = {f"recall@{k}": first_hit <= k for k in checked_ks(ks)}
        values["map@r"] = self.average_precision[self.counted]
        values["r_precision"] = self.r_precision[self.counted]
        values["mrr"] = 1.0 / first_hit
        return values

    def metrics(self, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
        """The keys of :func:`retrieval_metrics`."""
        metrics: dict[str, float] = {name: float(values.mean()) for name, values in self.values(ks).items()}
        metrics["n_queries"] = int(self.counted.sum())
        metrics["n_gallery"] = self.n_gallery
        metrics["n_skipped"] = int((~self.counted).sum())
        return metrics


def retrieval_metrics(
    embeddings: Any,
    labels: Any,
    *,
    gallery: Any = None,
    gallery_labels: Any = None,
    ks: Sequence[int] = (1, 2, 4, 8),
) -> dict[str, float]:
    """Retrieval metrics by cosine in float32.

    Without a gallery every item queries all others; an item is left out of its own search by its position, so another
    item with the same vector is an ordinary neighbour. Items of equal score are ordered by index.

    Args:
        embeddings: [Q, D] torch or numpy, any float or integer type.
        labels: Q integers (of any size) or strings.
        gallery: [N, D]; None to search `embeddings` themselves.
        gallery_labels: N labels of the same kind.
        ks: depths of Recall@k; a k beyond the gallery means the whole gallery.

    Returns:
        `recall@k` for each k, `map@r`, `r_precision`, `mrr` (fractions from 0 to 1, means over queries that have a
        positive), `n_queries` (those queries), `n_gallery`, `n_skipped` (queries without positive, left out).
        Memory beyond the input is that of `neighbours` (about 0.5 GB at most), whatever Q and N, plus 52 bytes a query.

    Raises:
        FieldmarkError: empty input, lengths or widths that differ, NaN or infinity, a row of zeros, labels that are
            no integers or strings, a k below 1, a gallery without labels, or no query with a positive.
    """
    ks = checked_ks(ks)
    return retrieval_per_query(embeddings, labels, gallery=gallery, gallery_labels=gallery_labels, k=0).metrics(ks)


def evaluate_retrieval(
    embeddings: Any, labels: Any, *, roles: Sequence[str] | None = None, ks: Sequence[int] = (1, 2, 4, 8)
) -> dict[str, float]:
    """`retrieval_metrics` of a catalogue: each row says itself whether it is a query, in the gallery, or both.

    Args:
        embeddings: [N, D].
        labels: N labels.
        roles: N of "query", "gallery" or "both"; None is "both" for all. A row that is both never finds itself.
        ks: depths of Recall@k.

    Returns:
        The keys of `retrieval_metrics`.

    Raises:
        FieldmarkError: as `retrieval_metrics`; also an unknown role, or no row for one side.
    """
    ks = checked_ks(ks)
    return retrieval_per_query(embeddings, labels, roles=roles, k=0).metrics(ks)


def retrieval_per_query(
    embeddings: Any,
    labels: Any,
    *,
    gallery: Any = None,
    gallery_labels: Any = None,
    roles: Sequence[str] | None = None,
    asked_with: Any = None,
    k: int = 8,
    block_rows: int = 256,
    block_bytes: int = BLOCK_BYTES,
) -> PerQuery:
    """The rank of the first positive, the precisions, the k nearest items and the nearest wrong one of every query.

    Args:
        embeddings: [Q, D].
        labels: Q labels.
        gallery: [N, D], or None.
        gallery_labels: N labels, with `gallery` only.
        roles: role of each row, without `gallery` only. `query`, `neighbours` and
            `nearest_wrong` then hold rows of `embeddings`.
        asked_with: [Q, D], with `roles` only: what each row searches with, where that is not what it is found by (a
            query whose text says more than the gallery's); rows that are no queries are not looked at.
        k: neighbours to keep per query (12 bytes each); 0 keeps none.
        block_rows: queries held at once; changes speed and memory, never the result.
        block_bytes: size of a block of scores; likewise.

    Returns:
        One row per query, queries without a positive included.

    Raises:
        FieldmarkError: as `retrieval_metrics` and `evaluate_retrieval`.
    """
    if k < 0:
        raise FieldmarkError(f"k is {k}; give 0 or more neighbours to keep")
    if asked_with is not None and roles is None:
        raise FieldmarkError("asked_with was given without roles; give the role of each row")
    task = _with_gallery(embeddings, labels, gallery, gallery_labels, roles)
    if asked_with is not None:
        task = _asked_with(task, asked_with, len(labels))
    scores = Scores(task.queries, task.gallery, task.own, block_rows=block_rows, block_bytes=block_bytes)
    result = _empty_result(task, k)
    depths = np.maximum(result.positives + 1, max(k, min(_LEAST_DEPTH, len(task.gallery))))
    for queries, block_depths in scores.blocks(np.arange(len(task.queries)), depths):
        for rows, found in nearest(scores, queries, block_depths):
            _record(result, task, queries[rows], found.indices, found.scores)
    missed = np.flatnonzero(result.counted & (result.first_hit == 0))
    for queries, _ in scores.blocks(missed, np.ones_like(missed)):
        result.first_hit[queries] = _count_to_first_hit(scores, task, queries)
    if roles is not None:
        for kept in (result.neighbours, result.nearest_wrong):
            kept[kept >= 0] = task.gallery_numbers[kept[kept >= 0]]
    return result


@dataclass(frozen=True)
class _Task:
    """A search with its right answers: rows, label codes, the rows' numbers for the caller, and own positions."""

    queries: Rows
    gallery: Rows
    query_codes: np.ndarray
    gallery_codes: np.ndarray
    query_numbers: np.ndarray
    gallery_numbers: np.ndarray
    own: np.ndarray


def _with_gallery(embeddings: Any, labels: Any, gallery: Any, gallery_labels: Any, roles: Any) -> _Task:
    if (gallery is None) != (gallery_labels is None):
        raise FieldmarkError("one of gallery and gallery_labels is missing; give both or neither")
    if gallery is None:
        return _with_roles(embeddings, labels, roles)
    if roles is not None:
        raise FieldmarkError("both a gallery and roles were given; roles already say which rows are the gallery")
    queries, searched = Rows(embeddings), Rows(gallery, "gallery")
    codes, gallery_codes = encode_labels(
        checked_labels(len(queries), labels), checked_labels(len(searched), gallery_labels, "gallery_labels")
    )
    numbers, gallery_numbers = np.arange(len(queries)), np.arange(len(searched))
    return _Task(queries, searched, codes, gallery_codes, numbers, gallery_numbers, np.full(len(queries), -1))


def _with_roles(embeddings: Any, labels: Any, roles: Any) -> _Task:
    rows = Rows(embeddings)
    (codes,) = encode_labels(checked_labels(len(rows), labels))
    everyone = np.arange(len(rows))
    if roles is None:
        return _Task(rows, rows, codes, codes, everyone, everyone, everyone)
    given = np.asarray(list(checked_labels(len(rows), roles, "roles")), dtype=object)
    unknown = [role for role in dict.fromkeys(given.tolist()) if role not in ROLES]
    if unknown:
        raise FieldmarkError(f"role {unknown[0]!r} is unknown; use one of {', '.join(ROLES)}")
    asking, searched = np.flatnonzero(given != "gallery"), np.flatnonzero(given != "query")
    if not len(asking) or not len(searched):
        side = "query" if not len(asking) else "gallery"
        raise FieldmarkError(f"no row has the role {side} or both; without a {side} there is nothing to measure")
    position = np.full(len(rows), -1)
    position[searched] = np.arange(len(searched))
    return _Task(
        queries=Rows(embeddings, index=asking),
        gallery=Rows(embeddings, index=searched),
        query_codes=codes[asking],
        gallery_codes=codes[searched],
        query_numbers=asking,
        gallery_numbers=searched,
        own=position[asking],
    )


def _asked_with(task: _Task, vectors: Any, rows: int) -> _Task:
    shape = tuple(np.shape(vectors))
    if shape != (rows, task.gallery.dim):
        raise FieldmarkError(
            f"asked_with has shape {shape}; expected {(rows, task.gallery.dim)} as the embeddings have"
        )
    return replace(task, queries=Rows(vectors, "asked_with", index=task.query_numbers))


def _empty_result(task: _Task, k: int) -> PerQuery:
    n_queries = len(task.queries)
    n_codes = int(max(task.query_codes.max(), task.gallery_codes.max())) + 1
    positives = np.bincount(task.gallery_codes, minlength=n_codes)[task.query_codes] - (task.own >= 0)
    if not (positives > 0).any():
        raise FieldmarkError(
            f"none of the {n_queries} queries has another item of its label in the gallery; "
            "retrieval needs at least two items of one label"
        )
    return PerQuery(
        query=task.query_numbers.copy(),
        positives=positives,
        first_hit=np.zeros(n_queries, dtype=np.int64),
        average_precision=np.zeros(n_queries),
        r_precision=np.zeros(n_queries),
        neighbours=np.full((n_queries, k), -1, dtype=np.int64),
        scores=np.full((n_queries, k), -np.inf, dtype=np.float32),
        correct=np.zeros((n_queries, k), dtype=bool),
        nearest_wrong=np.full(n_queries, -1, dtype=np.int64),
        nearest_wrong_score=np.full(n_queries, -np.inf, dtype=np.float32),
        n_gallery=len(task.gallery),
    )


def _record(result: PerQuery, task: _Task, queries: np.ndarray, indices: np.ndarray, scores: np.ndarray) -> None:
    """Fills in some queries from their neighbours, which reach at least to depth R + 1 or through the gallery."""
    there = indices >= 0
    same = task.gallery_codes[indices] == task.query_codes[queries, None]
    hits = same & there
    wrong = there & ~same
    first_wrong, any_wrong = wrong.argmax(axis=1), wrong.any(axis=1)
    place = np.arange(len(queries)), first_wrong
    result.nearest_wrong[queries] = np.where(any_wrong, indices[place], -1)
    result.nearest_wrong_score[queries] = np.where(any_wrong, scores[place], -np.inf)
    result.first_hit[queries] = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    width = min(result.neighbours.shape[1], indices.shape[1])
    result.neighbours[queries, :width] = indices[:, :width]
    result.scores[queries, :width] = scores[:, :width]
    result.correct[queries, :width] = hits[:, :width]
    positives = result.positives[queries]
    rank = np.arange(1, int(positives.max(initial=0)) + 1)
    within = hits[:, : len(rank)] & (rank <= positives[:, None])
    divisor = np.maximum(positives, 1)
    result.r_precision[queries] = within.sum(axis=1) / divisor
    result.average_precision[queries] = (np.cumsum(within, axis=1) / rank * within).sum(axis=1) / divisor


def _count_to_first_hit(scores: Scores, task: _Task, queries: np.ndarray) -> np.ndarray:
    """Rank of the best positive: one more than the items of a higher score, or of the same score and a lower index."""
    codes = task.query_codes[queries, None]
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    place = np.zeros(len(queries), dtype=np.int64)
    for start, block in scores.columns(queries):
        positive = task.gallery_codes[None, start : start + block.shape[1]] == codes
        block[~positive] = -np.inf
        top = block.argmax(axis=1)  # the first of equal ones
        value = block[np.arange(len(queries)), top]
        better = value > best
        best[better], place[better] = value[better], top[better] + start
    before = np.zeros(len(queries), dtype=np.int64)
    for start, block in scores.columns(queries):
        earlier = np.arange(start, start + block.shape[1]) < place[:, None]
        before += np.count_nonzero(block > best[:, None], axis=1)
        before += np.count_nonzero((block == best[:, None]) & earlier, axis=1)
    return before + 1


def checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """Depths of Recall@k as plain integers.

    Raises:
        FieldmarkError: one is no whole number from 1.
    """
    values = tuple(ks) if isinstance(ks, Sequence | np.ndarray | range) else (ks,)
    for k in values:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise FieldmarkError(f"k {k!r} in ks is no depth; give whole numbers from 1")
    return tuple(int(k) for k in values)
