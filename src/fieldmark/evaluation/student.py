"""Embeds a catalogue with a student and measures it."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.retrieval import evaluate_retrieval


@dataclass
class Evaluation:
    """Metrics of one student on one catalogue, and the vectors they were computed from (`[N, D]`, float32)."""

    metrics: dict[str, float]
    embeddings: np.ndarray


def embed_catalog(
    student: SentenceTransformer, catalog: datasets.Dataset, *, batch_size: int = 64, show_progress: bool = False
) -> np.ndarray:
    """Vectors of all photos of a catalogue, `[N, D]` float32, in its order."""
    was_training = student.training
    student.eval()
    with torch.inference_mode():
        vectors = student.encode(
            list(catalog["image"]),
            batch_size=batch_size,
            convert_to_numpy=True,
            normalize_embeddings=False,
            show_progress_bar=show_progress,
        )
    student.train(was_training)
    return np.asarray(vectors, dtype=np.float32)


def evaluate_student(
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    ks: tuple[int, ...] = (1, 2, 4, 8),
    cluster: bool = True,
) -> Evaluation:
    """Retrieval (with the catalogue's roles) and clustering metrics of a student.

    Raises:
        FieldmarkError: the catalogue is empty or has photos without label.
    """
    if len(catalog) == 0:
        raise FieldmarkError("The catalogue has no photos to evaluate on; check its split column.")
    labels = list(catalog["label"])
    if any(label is None for label in labels):
        raise FieldmarkError("The catalogue has photos without a label; evaluation needs the class of each.")
    embeddings = embed_catalog(student, catalog, batch_size=batch_size)
    metrics = evaluate_retrieval(embeddings, labels, roles=list(catalog["role"]), ks=ks)
    if cluster:
        metrics |= clustering_metrics(embeddings, labels)
    return Evaluation(metrics, embeddings)
