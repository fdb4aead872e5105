"""Product retrieval on two levels: the same product (instance), and any product of its category (coarse).

AFMRL (arXiv 2604.20135, section 4) measures both: Recall@k and NDCG@k where only the same product counts, mAP@k where
any product of the category does. The mean average precision is that of M5Product's own evaluator (`evaluate_unit.py`
of its toolkit), the only form that published numbers compare with: the precisions at the hits are divided by the number
of hits found, not by the number of positives.

Everything follows from the nearest items that `retrieval_per_query` finds, exactly and in bounded memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.retrieval import PerQuery, checked_ks, retrieval_per_query
from fieldmark.evaluation.uncertainty import bootstrap_intervals

KS = (1, 5, 10)
CATEGORY = "category"


def average_precision(hits: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Average precision of M5Product's evaluator: the mean of the precisions at the ranks of the hits.

    Args:
        hits: [Q, K] bool, whether the item at each rank is a positive, best first.
        depths: [Q] integers from 1 to K, how many ranks of each query count.

    Returns:
        [Q] float64 from 0 to 1; 0 where there is no hit.
    """
    found = _within(hits, depths)
    precisions = np.cumsum(found, axis=1) / np.arange(1, found.shape[1] + 1) * found
    return precisions.sum(axis=1) / np.maximum(found.sum(axis=1), 1)


def precision(hits: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Share of positives among the first `depths` items, [Q] float64; arguments as of `average_precision`."""
    return _within(hits, depths).sum(axis=1) / depths


def ndcg(hits: np.ndarray, positives: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain at k, with binary relevance.

    Args:
        hits: [Q, K] bool, whether the item at each rank is a positive, best first.
        positives: [Q] integers from 1, how many there are; the best list starts with min(k, positives) of them.
        k: depth; ranks beyond K are no hits.

    Returns:
        [Q] float64 from 0 to 1: the sum over ranks i up to k of hit_i / log2(i + 1), over that of the best list.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = (hits[:, :k] * discounts[: hits.shape[1]]).sum(axis=1)
    return gains / np.cumsum(discounts)[np.minimum(positives, k) - 1]


def instance_values(found: PerQuery, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """What each counted query adds to the means of fine-grained retrieval, where the same product alone is a positive.

    Args:
        found: a search with products as labels that kept the `max(ks)` nearest.
        ks: depths.

    Returns:
        `instance_recall@k` ([Q] bool: any hit) and `instance_ndcg@k` ([Q] float64) for each k.

    Raises:
        FieldmarkError: a depth below 1, or larger than the number of neighbours kept.
    """
    ks = _checked(ks, found)
    hits, positives = found.correct[found.counted], found.positives[found.counted]
    values: dict[str, np.ndarray] = {f"instance_recall@{k}": hits[:, :k].any(axis=1) for k in ks}
    return values | {f"instance_ndcg@{k}": ndcg(hits, positives, k) for k in ks}


def coarse_values(found: PerQuery, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """What each counted query adds to the means of coarse retrieval, where its category's products are positives.

    A category of n items, the query among them, is looked at to depth n where k is larger, as M5Product's evaluator
    does.

    Args:
        found: a search with categories as labels that kept the `max(ks)` nearest.
        ks: depths.

    Returns:
        `coarse_map@k` and `coarse_precision@k` ([Q] float64) for each k.

    Raises:
        FieldmarkError: a depth below 1, or larger than the number of neighbours kept.
    """
    ks = _checked(ks, found)
    hits = found.correct[found.counted]
    ranks = (found.neighbours[found.counted] >= 0).sum(axis=1)
    most = np.minimum(found.positives[found.counted] + 1, ranks)
    depths = {k: np.minimum(most, k) for k in ks}
    values = {f"coarse_map@{k}": average_precision(hits, depths[k]) for k in ks}
    return values | {f"coarse_precision@{k}": precision(hits, depths[k]) for k in ks}


@dataclass
class ProductEvaluation:
    """Products found by their photos.

    Attributes:
        metrics: means over queries of `instance_values` and, with categories, of `coarse_values` with
            `n_coarse_queries`.
        intervals: 95 % bootstrap interval over queries of each mean.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def evaluate_products(
    found: PerQuery | None,
    embeddings: np.ndarray,
    catalog: datasets.Dataset,
    categories: Sequence[str | None] | None,
    asked_with: np.ndarray | None = None,
) -> ProductEvaluation:
    """Instance retrieval, and coarse retrieval among the items that have a category.

    Args:
        found: a search by label that kept the `max(KS)` nearest; None leaves instance retrieval out.
        embeddings: [N, D], the vectors of the catalogue that were searched.
        catalog: their rows.
        categories: N categories, None where an item has none; None leaves coarse retrieval out.
        asked_with: [N, D], the vectors that ask, where they are others.

    Raises:
        FieldmarkError: no item of a category has another one to find.
    """
    values, counts = {} if found is None else instance_values(found), {}
    if categories is not None:
        rows = [row for row, category in enumerate(categories) if category]
        known, roles = [categories[row] for row in rows], list(catalog.select(rows)["role"])
        asked = None if asked_with is None else asked_with[rows]
        coarse = retrieval_per_query(embeddings[rows], known, roles=roles, asked_with=asked, k=max(KS))
        values |= coarse_values(coarse)
        counts = {"n_coarse_queries": int(coarse.counted.sum())}
    means = {name: float(per_query.mean()) for name, per_query in values.items()}
    return ProductEvaluation(means | counts, bootstrap_intervals(values))


def categories_of(catalog: datasets.Dataset, name: str | None = None) -> list[str | None] | None:
    """Each item's category: its attribute `name`, or the one called `category` where no name is given.

    Returns:
        N categories, None where an item has none; None instead of a list where the catalogue has no such attribute and
        no name was given.

    Raises:
        FieldmarkError: an attribute was named that no item of the catalogue has.
    """
    given = list(catalog["attributes"])
    found = [attributes.get(name or CATEGORY) if attributes else None for attributes in given]
    if any(found):
        return found
    if name is None:
        return None
    known = sorted({key for attributes in given for key in attributes or {}})
    raise FieldmarkError(
        f"the category {name!r} was asked for, which no photo has; expected one of the attributes "
        f"{', '.join(known) or '(the catalogue has none)'}"
    )


def _within(hits: np.ndarray, depths: np.ndarray) -> np.ndarray:
    return hits & (np.arange(hits.shape[1]) < depths[:, None])


def _checked(ks: Sequence[int], found: PerQuery) -> tuple[int, ...]:
    ks, kept = checked_ks(ks), found.correct.shape[1]
    if max(ks, default=0) > kept:
        raise FieldmarkError(f"the depth {max(ks)} was asked of a search that kept {kept} neighbours; keep more")
    return ks
