"""What 8-bit weights and shorter vectors cost: Recall@1 on the test photos, exact, as everywhere in fieldmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.retrieval import retrieval_per_query
from fieldmark.evaluation.student import has_positives
from fieldmark.evaluation.uncertainty import bootstrap_interval
from fieldmark.export.check import Runner
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.progress import JobProgress

TIMED_BATCHES = 8


@dataclass(frozen=True)
class Variant:
    """One way to use an export, measured on the test photos.

    Attributes:
        name: `float32` or `int8`.
        dim: numbers of the vector that are kept, from the first; the rest is cut and the vector normalised anew.
        recall: Recall@1, from 0 to 1.
        interval: its 95 % bootstrap interval over the queries.
        loss: percentage points below the whole float32 vector; negative where it is better.
    """

    name: str
    dim: int
    recall: float
    interval: tuple[float, float]
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """As a part of `export.json`."""
        found = asdict(self)
        found["recall@1"] = found.pop("recall")
        found["loss_points"] = found.pop("loss")
        return found


def check_dims(dims: Sequence[int], dim: int) -> None:
    """Refuses lengths that a vector of `dim` numbers cannot be cut to.

    Raises:
        FieldmarkError: one is below 1, not shorter than the vector, or given twice.
    """
    for wanted in dims:
        if not 1 <= wanted < dim:
            raise FieldmarkError(
                f"--dims {wanted} was given; expected lengths from 1 to {dim - 1}, below the student's."
            )
    if len(set(dims)) < len(dims):
        raise FieldmarkError("--dims was given a length twice; give each once.")


def check_measurable(test: datasets.Dataset) -> None:
    """Refuses test photos that Recall@1 cannot be measured on.

    Raises:
        FieldmarkError: a label is missing, or no photo has another one of its class to find.
    """
    if not all(test["label"]) or not has_positives(test):
        raise FieldmarkError(
            "--int8 and --dims measure Recall@1 on the test photos of --data; expected a label for each of them, and "
            "two photos of a class."
        )


def measure(vectors: dict[str, np.ndarray], test: datasets.Dataset, dims: Sequence[int]) -> tuple[list[Variant], int]:
    """Recall@1 of whole and of cut vectors, and the number of queries it is the mean of.

    Args:
        vectors: `float32` first, and `int8` where there is one; each [N, D], rows as in the catalogue.
        test: labelled photos with their roles.
        dims: lengths below D.
    """
    labels, roles = list(test["label"]), list(test["role"])
    found: list[Variant] = []
    queries = 0
    for name, whole in vectors.items():
        for dim in (whole.shape[1], *dims):
            hits = retrieval_per_query(cut(whole, dim), labels, roles=roles, k=0).values((1,))["recall@1"]
            recall, queries = float(hits.mean()), len(hits)
            loss = 100 * (found[0].recall - recall) if found else 0.0
            found.append(Variant(name, dim, recall, bootstrap_interval(hits), loss))
    return found, queries


def cut(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` numbers of each vector, of length 1 again (a row of zeros stays)."""
    kept = vectors[:, :dim]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def embed_with(
    run: Runner,
    other: Runner,
    preprocessing: Preprocessing,
    photos: Sequence[PhotoRef],
    *,
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[np.ndarray, float, float]:
    """Embeds photos by one runner; the other runs on the first batches too, in turn, so that their times compare.

    Returns:
        [N, D] float32; milliseconds a photo of `run` and of `other`, medians over these batches, without decoding.
    """
    parts: list[np.ndarray] = []
    times: list[tuple[float, float]] = []
    with JobProgress("measuring int8", len(photos)) as job:
        for start in range(0, len(photos), batch_size):
            pixels = preprocessing.pixels(photos[start : start + batch_size])
            began = clock()
            parts.append(run({"pixel_values": pixels}))
            middle = clock()
            if len(times) < TIMED_BATCHES:
                other({"pixel_values": pixels})
                times.append(((middle - began) / len(pixels), (clock() - middle) / len(pixels)))
            job.update(start + len(pixels))
    own, others = (1000 * float(np.median(one)) for one in zip(*times, strict=True))
    return np.concatenate(parts), own, others
