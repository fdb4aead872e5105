"""Embeds a catalogue with a student and measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.retrieval import evaluate_retrieval
from fieldmark.progress import JobProgress


@dataclass
class Evaluation:
    """Metrics of one student on one catalogue, and the vectors they were computed from (`[N, D]`, float32)."""

    metrics: dict[str, float]
    embeddings: np.ndarray


def embed_catalog(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Vectors of all photos of a catalogue, `[N, D]` float32, in its order.

    Args:
        student: in eval mode while it embeds.
        catalog: photos.
        batch_size: photos at once.
        progress: called with the number of photos done.
    """
    was_training = student.training
    student.eval()
    photos, parts = list(catalog["image"]), []
    with torch.inference_mode():
        for start in range(0, len(photos), batch_size):
            chosen = photos[start : start + batch_size]
            parts.append(student.encode(chosen, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False))
            if progress is not None:
                progress(start + len(chosen))
    student.train(was_training)
    return np.concatenate(parts).astype(np.float32, copy=False)


def evaluate_student(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    ks: tuple[int, ...] = (1, 2, 4, 8),
) -> Evaluation:
    """Retrieval (with the catalogue's roles) and clustering metrics of a student, with a progress bar.

    Raises:
        FieldmarkError: the catalogue is empty or has photos without label.
    """
    if len(catalog) == 0:
        raise FieldmarkError("The catalogue has no photos to evaluate on; check its split column.")
    labels = list(catalog["label"])
    if any(label is None for label in labels):
        raise FieldmarkError("The catalogue has photos without a label; evaluation needs the class of each.")
    with JobProgress("measuring", len(catalog)) as job:
        embeddings = embed_catalog(student, catalog, batch_size=batch_size, progress=job.update)
    metrics = evaluate_retrieval(embeddings, labels, roles=list(catalog["role"]), ks=ks)
    metrics |= clustering_metrics(embeddings, labels)
    return Evaluation(metrics, embeddings)
