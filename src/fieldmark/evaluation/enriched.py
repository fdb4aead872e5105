"""Measures a product embedder, with a generator's attributes in its queries and without (AFMRL, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.cross_modal import cross_modal_recall
from fieldmark.evaluation.products import KS, categories_of, evaluate_products
from fieldmark.evaluation.retrieval import PerQuery, retrieval_per_query
from fieldmark.evaluation.student import has_positives
from fieldmark.progress import JobProgress
from fieldmark.students.enrich import enriched_text
from fieldmark.students.items import encode_items

logger = logging.getLogger(__name__)

Enrich = Literal["query", "both", "none"]
PREFIX = "enriched_"


@dataclass
class EnrichedEvaluation:
    """What a product embedder does on a catalogue.

    Attributes:
        metrics: `i2t_recall@k`, `t2i_recall@k`; of photos with titles, where products have several items, the keys of
            `evaluate_products` and of `clustering_metrics`; those of enriched queries start with `enriched_`.
        intervals: 95 % bootstrap interval over queries.
        embeddings: [N, D] vectors of photos with titles.
        per_query: what each query found without attributes; None where no product has two items.
        enriched: what each query found with them; None where nothing was enriched.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    embeddings: np.ndarray
    per_query: PerQuery | None = None
    enriched: PerQuery | None = None


def evaluate_enriched(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    attributes: Sequence[Mapping[str, Any] | None],
    *,
    enrich: Enrich = "query",
    category: str | None = None,
    batch_size: int = 64,
) -> EnrichedEvaluation:
    """Cross-modal recall of photos and titles, and retrieval of products by photos with titles.

    Args:
        student: embeds a photo together with a text.
        catalog: rows with titles, and roles.
        attributes: of each row, to join the titles; None where there are none.
        enrich: whose titles they join: the queries', those of both sides, or none's.
        category: attribute with the product's category, for coarse retrieval; None takes `category` where it is.
        batch_size: items embedded at once.

    Raises:
        FieldmarkError: no row, a title is missing, or attributes for another number of rows.
    """
    images, titles = list(catalog["image"]), list(catalog["title"])
    if len(attributes) != len(images):
        raise FieldmarkError(f"{len(attributes)} attributes were given for {len(images)} items; expected one for each")
    labelled = all(catalog["label"]) and has_positives(catalog)
    steps = 3 * len(images)
    with JobProgress("measuring", steps + labelled * len(enriched_rows(catalog, attributes, enrich))) as job:
        done = 0

        def embed(photos: list | None, texts: list[str] | None) -> np.ndarray:
            nonlocal done
            start = done
            done += len(images)
            return encode_items(
                student, images=photos, texts=texts, batch_size=batch_size, progress=lambda n: job.update(start + n)
            )

        photos, texts, both = embed(images, None), embed(None, titles), embed(images, titles)
        ids = [image if label is None else label for image, label in zip(images, catalog["label"], strict=True)]
        names = [str(one) for one in ids]
        found = EnrichedEvaluation(cross_modal_recall(photos, texts, names, names, KS), {}, both)
        if not labelled:
            logger.warning(
                "Test items without a label, or no two of one product: products and categories are not measured"
            )
            return found
        labels, categories = catalog["label"][:], categories_of(catalog, category)
        found.per_query = retrieval_per_query(both, labels, roles=list(catalog["role"]), k=max(KS))
        products = evaluate_products(found.per_query, both, catalog, categories)
        found.metrics |= products.metrics | clustering_metrics(both, labels)
        found.intervals |= products.intervals
        if enrich != "none":
            asked = evaluate_asked(
                student, catalog, attributes, both, enrich=enrich, categories=categories, labelled=True,
                batch_size=batch_size, progress=lambda n: job.update(steps + n),
            )  # fmt: skip
            found.enriched = asked.per_query
            found.metrics |= asked.metrics
            found.intervals |= asked.intervals
    return found


class AskedWithAttributes(NamedTuple):
    """What queries with attributes find: the means of `evaluate_products` and their intervals, as `enriched_...`; what
    each query found, None without labels.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: PerQuery | None


def evaluate_asked(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    attributes: Sequence[Mapping[str, Any] | None],
    vectors: np.ndarray,
    *,
    enrich: Enrich,
    categories: Sequence[str | None] | None,
    labelled: bool,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> AskedWithAttributes:
    """Retrieval of products by photos with titles and attributes, where that without attributes is measured already.

    Args:
        student: embeds a photo together with a text.
        catalog: N rows with titles, and roles.
        attributes: of each row, None where there are none.
        vectors: [N, D] of photos with titles alone; rows that attributes do not change keep them.
        enrich: whose titles attributes join, see `evaluate_enriched`.
        categories: of each row, for coarse retrieval; None leaves it out.
        labelled: whether the labels are products with several items; false leaves instance retrieval out.
        batch_size: items embedded at once.
        progress: called with the number of `enriched_rows` embedded.
    """
    asked, rows = vectors.copy(), enriched_rows(catalog, attributes, enrich)
    if rows:
        part = catalog.select(rows)
        texts = [enriched_text(title, attributes[row]) for row, title in zip(rows, part["title"], strict=True)]
        asked[rows] = encode_items(
            student, images=list(part["image"]), texts=texts, batch_size=batch_size, progress=progress
        )
    gallery, found = asked if enrich == "both" else vectors, None
    if labelled:
        roles = list(catalog["role"])
        found = retrieval_per_query(gallery, catalog["label"][:], roles=roles, asked_with=asked, k=max(KS))
    products = evaluate_products(found, gallery, catalog, categories, asked_with=asked)
    means = {PREFIX + name: products.metrics[name] for name in products.intervals}  # counts are those without
    return AskedWithAttributes(means, {PREFIX + name: bounds for name, bounds in products.intervals.items()}, found)


def enriched_rows(
    catalog: datasets.Dataset, attributes: Sequence[Mapping[str, Any] | None], enrich: Enrich
) -> list[int]:
    """Rows that attributes change: those that ask, of both sides also those that are found."""
    if enrich == "none":
        return []
    sides = zip(attributes, catalog["role"], strict=True)
    return [row for row, (own, role) in enumerate(sides) if own and (enrich == "both" or role != "gallery")]
