"""Measures a product embedder, with a generator's attributes in its queries and without (AFMRL, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    with JobProgress("measuring", (3 + (enrich != "none")) * len(images)) as job:
        done = 0

        def embed(photos: list | None, texts: list[str] | None) -> np.ndarray:
            nonlocal done
            start = done
            done += len(images)
            return encode_items(
                student, images=photos, texts=texts, batch_size=batch_size, progress=lambda n: job.update(start + n)
            )

        photos, texts, both = embed(images, None), embed(None, titles), embed(images, titles)
        asked = both
        if enrich != "none":
            joined = [enriched_text(title, own) for title, own in zip(titles, attributes, strict=True)]
            asked = embed(images, joined)
    ids = [image if label is None else label for image, label in zip(images, catalog["label"], strict=True)]
    names = [str(one) for one in ids]
    metrics = cross_modal_recall(photos, texts, names, names, KS)
    found = EnrichedEvaluation(metrics, {}, both)
    if not (all(catalog["label"]) and has_positives(catalog)):
        logger.warning("Test items without a label, or no two of one product: products and categories are not measured")
        return found
    labels, roles, categories = catalog["label"][:], list(catalog["role"]), categories_of(catalog, category)
    found.per_query = retrieval_per_query(both, labels, roles=roles, k=max(KS))
    products = evaluate_products(found.per_query, both, catalog, categories)
    found.metrics |= products.metrics | clustering_metrics(both, labels)
    found.intervals |= products.intervals
    if enrich != "none":
        gallery = asked if enrich == "both" else both
        found.enriched = retrieval_per_query(gallery, labels, roles=roles, asked_with=asked, k=max(KS))
        products = evaluate_products(found.enriched, gallery, catalog, categories, asked_with=asked)
        found.metrics |= {PREFIX + name: value for name, value in products.metrics.items()}
        found.intervals |= {PREFIX + name: values for name, values in products.intervals.items()}
    return found
