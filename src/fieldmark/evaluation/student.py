"""Embeds a catalogue with a student and measures it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.retrieval import PerQuery, checked_ks, retrieval_per_query
from fieldmark.evaluation.uncertainty import bootstrap_intervals
from fieldmark.progress import JobProgress
from fieldmark.students.items import encode_items, is_multimodal

KEPT_NEIGHBOURS = 8


@dataclass
class Evaluation:
    """One student measured on one catalogue.

    Attributes:
        metrics: means of retrieval and, unless it was left out, of clustering.
        embeddings: [N, D] float32, the vectors they were computed from, in the order of the catalogue.
        per_query: what each query found, with its nearest items (8 unless more were asked for); rows are those of the
            catalogue.
        intervals: 95 % bootstrap interval over queries of each retrieval metric (`recall@k`, `map@r`, `r_precision`,
            `mrr`).
    """

    metrics: dict[str, float]
    embeddings: np.ndarray
    per_query: PerQuery
    intervals: dict[str, tuple[float, float]]


def embed_catalog(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    with_titles: bool = False,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Vectors of all items of a catalogue, `[N, D]` float32, in its order.

    Args:
        student: the student.
        catalog: photos and what is known of them.
        batch_size: items at once.
        with_titles: embed each photo together with its title; else photos alone, see `embed_photos`.
        progress: called with the number of items done.

    Raises:
        FieldmarkError: with titles, the student does not embed a photo together with a text, or a title is missing.
    """
    photos = list(catalog["image"])
    if not with_titles:
        return embed_photos(student, photos, batch_size=batch_size, progress=progress)
    report = progress or (lambda done: None)
    return encode_items(student, images=photos, texts=list(catalog["title"]), batch_size=batch_size, progress=report)


def embed_photos(
    student: SentenceTransformer,
    photos: Sequence[PhotoRef],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Vectors of photos, `[N, D]` float32.

    Args:
        student: of photos, or of photos and texts; in eval mode while it embeds.
        photos: references.
        batch_size: photos at once.
        progress: called with the number of photos done.
    """
    if is_multimodal(student):
        return encode_items(student, images=photos, batch_size=batch_size, progress=progress or (lambda done: None))
    was_training, parts = student.training, []
    student.eval()
    with torch.inference_mode():
        for start in range(0, len(photos), batch_size):
            chosen = list(photos[start : start + batch_size])
            parts.append(student.encode(chosen, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False))
            if progress is not None:
                progress(start + len(chosen))
    student.train(was_training)
    return np.concatenate(parts).astype(np.float32, copy=False)


def has_positives(catalog: datasets.Dataset) -> bool:
    """Whether any query of a labelled catalogue has another photo of its class to find."""
    labels, roles = catalog["label"][:], catalog["role"][:]
    gallery = Counter(label for label, role in zip(labels, roles, strict=True) if role != "query")
    # A photo that is both never finds itself.
    found = (gallery[label] > (role == "both") for label, role in zip(labels, roles, strict=True) if role != "gallery")
    return any(found)


def evaluate_student(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    ks: Sequence[int] = (1, 2, 4, 8),
    with_titles: bool = False,
    clustering: bool = True,
    neighbours: int = KEPT_NEIGHBOURS,
) -> Evaluation:
    """Retrieval (with the catalogue's roles) and clustering metrics of a student, with a progress bar.

    Args:
        student: the student.
        catalog: labelled photos.
        batch_size: items embedded at once.
        ks: depths of recall@k.
        with_titles: embed each photo together with its title, queries and gallery alike.
        clustering: also k-means of as many clusters as labels; hours where there are tens of thousands.
        neighbours: nearest items kept of each query.

    Raises:
        FieldmarkError: a depth in `ks` is no whole number from 1, the catalogue is empty or has photos without label,
            or what `embed_catalog` says.
    """
    ks = checked_ks(ks)
    if len(catalog) == 0:
        raise FieldmarkError("The catalogue has no photos to evaluate on; check its split column.")
    labels = list(catalog["label"])
    if any(label is None for label in labels):
        raise FieldmarkError("The catalogue has photos without a label; evaluation needs the class of each.")
    with JobProgress("measuring", len(catalog)) as job:
        embeddings = embed_catalog(
            student, catalog, batch_size=batch_size, with_titles=with_titles, progress=job.update
        )
    found = retrieval_per_query(embeddings, labels, roles=list(catalog["role"]), k=neighbours)
    metrics = found.metrics(ks) | (clustering_metrics(embeddings, labels) if clustering else {})
    return Evaluation(metrics, embeddings, found, bootstrap_intervals(found.values(ks)))
