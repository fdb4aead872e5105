"""Contrastive loss over expanded, de-duplicated negatives (MAPLE, arXiv 2506.06970, Eq. 1 and App. C.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.losses.processes import gather_rows

UNKNOWN = -1  # a key that says nothing: equal to no other


def expanded_contrastive(
    anchors: Tensor, candidates: Tensor, positive: Tensor, excluded: Tensor | None, tau: float | Tensor
) -> Tensor:
    """InfoNCE in one direction: the mean over anchors of ``-log(exp s_p / sum_c exp s_c)``, ``s = cosine / tau``.

    The sum runs over the anchor's positive and every candidate that is not excluded for it.

    Args:
        anchors: ``[N, D]``; normalised here.
        candidates: ``[M, D]``, each distinct candidate once (see :func:`deduplicate`); normalised here.
        positive: ``[N]`` int64, the column of each anchor's positive.
        excluded: candidates that are no negatives of an anchor: ``[N, M]`` bool, ``[P, 2]`` int64 pairs (anchor,
            candidate), or None. An anchor's own positive stays in, whatever stands here.
        tau: temperature; a tensor gets its gradient.

    Returns:
        Scalar, at least in float32.

    Raises:
        FieldmarkError: other shapes, no anchor, or a column that is not there.
    """
    _check(anchors, candidates, positive, excluded)
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):  # at a tau of 0.01 bf16 cosines are off by whole units
        scores = F.normalize(anchors.to(dtype), dim=1) @ F.normalize(candidates.to(dtype), dim=1).T / tau
    if excluded is not None:
        left_out = torch.zeros_like(scores, dtype=torch.bool)
        if excluded.dtype == torch.bool:
            left_out |= excluded
        else:
            left_out[excluded[:, 0], excluded[:, 1]] = True
        left_out[torch.arange(len(anchors), device=scores.device), positive] = False
        scores = scores.masked_fill(left_out, -math.inf)
    return F.cross_entropy(scores, positive)


def deduplicate(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once, in the order of first appearance.

    Args:
        ids: ``[M]`` int64.

    Returns:
        ``kept``: ``[U]`` rows where an id first appears; ``inverse``: ``[M]`` position of each row's id among them, so
        that ``ids[kept][inverse]`` are the ids.
    """
    _, sorted_inverse = torch.unique(ids, return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    distinct = int(sorted_inverse.max()) + 1 if len(ids) else 0
    first = torch.full((distinct,), len(ids), device=ids.device)
    first.scatter_reduce_(0, sorted_inverse, rows, "amin")
    kept, order = first.sort()
    place = torch.empty_like(order)
    place[order] = torch.arange(distinct, device=ids.device)
    return kept, place[sorted_inverse]


@dataclass(frozen=True)
class Candidates:
    """Embeddings of one modality, and what is known of them.

    Attributes:
        embeddings: ``[M, D]``.
        ids: ``[M]`` int64; rows of one id are the same candidate.
        keys: ``[M, G]`` int64, what each shows (its label, its title, ...): an image and a text that share a key in any
            of the G columns match. -1 stands for unknown. Equal things have equal numbers in all processes.
    """

    embeddings: Tensor
    ids: Tensor
    keys: Tensor

    def __post_init__(self) -> None:
        rows = len(self.embeddings)
        if self.embeddings.ndim != 2 or self.ids.shape != (rows,) or self.keys.ndim != 2 or len(self.keys) != rows:
            raise FieldmarkError(
                f"candidates have embeddings {tuple(self.embeddings.shape)}, ids {tuple(self.ids.shape)} and keys "
                f"{tuple(self.keys.shape)}; expected [M, D], [M] and [M, G]"
            )

    def pooled(self) -> Candidates:
        """The candidates of all processes, each id once; the gradient of a row flows back to its process.

        Of several rows of one id the first is kept, so only that one gets a gradient.
        """
        ids = gather_rows(self.ids)
        kept, _ = deduplicate(ids)
        return Candidates(gather_rows(self.embeddings)[kept], ids[kept], gather_rows(self.keys)[kept])


def matches(keys: Tensor, others: Tensor) -> Tensor:
    """``[N, M]`` bool: whether ``keys [N, G]`` and ``others [M, G]`` share a known key in any column."""
    found = torch.zeros(len(keys), len(others), dtype=torch.bool, device=keys.device)
    for ours, theirs in zip(keys.T, others.T, strict=True):
        found |= (ours[:, None] == theirs[None, :]) & (ours != UNKNOWN)[:, None]
    return found


def symmetric_contrastive(images: Candidates, texts: Candidates, anchors: int, tau: float | Tensor) -> Tensor:
    """Eq. 1 with expanded negatives: the mean of image-to-text and text-to-image over the pools of all processes.

    Every process scores its own anchors against the joint pool. With equally many anchors in each, and gradients
    averaged over processes as DDP does, loss and gradient are those of one process on the joint batch.

    Args:
        images: the anchors' images, then the hard negatives'.
        texts: the anchors' texts in the same order, then the hard negatives'.
        anchors: how many rows of both are matching pairs.
        tau: temperature; a tensor gets its gradient.

    Returns:
        Scalar.

    Raises:
        FieldmarkError: fewer rows than anchors, or other shapes.
    """
    if not 1 <= anchors <= min(len(images.ids), len(texts.ids)):
        raise FieldmarkError(
            f"{anchors} anchors were given with {len(images.ids)} images and {len(texts.ids)} texts; expected at least "
            "one, and a row for each in both"
        )
    forth = _one_direction(images, texts, anchors, tau)
    return (forth + _one_direction(texts, images, anchors, tau)) / 2


def _one_direction(queries: Candidates, candidates: Candidates, anchors: int, tau: float | Tensor) -> Tensor:
    pool = candidates.pooled()
    # Every id of ours is in the pool once: argmax finds its column.
    positive = (candidates.ids[:anchors, None] == pool.ids[None, :]).int().argmax(dim=1)
    excluded = matches(queries.keys[:anchors], pool.keys)
    return expanded_contrastive(queries.embeddings[:anchors], pool.embeddings, positive, excluded, tau)


def _check(anchors: Tensor, candidates: Tensor, positive: Tensor, excluded: Tensor | None) -> None:
    if anchors.ndim != 2 or candidates.ndim != 2 or anchors.shape[1] != candidates.shape[1] or len(anchors) < 1:
        raise FieldmarkError(
            f"anchors have shape {tuple(anchors.shape)} and candidates {tuple(candidates.shape)}; expected [N, D] and "
            "[M, D] with at least one anchor"
        )
    shape = (len(anchors), len(candidates))
    if positive.shape != shape[:1] or not bool(((positive >= 0) & (positive < shape[1])).all()):
        raise FieldmarkError(
            f"positive must hold one column of the {shape[1]} candidates for each of {shape[0]} anchors"
        )
    if excluded is None:
        return
    pairs = excluded.dtype == torch.int64 and excluded.ndim == 2 and excluded.shape[1] == 2
    if not (pairs or (excluded.dtype == torch.bool and tuple(excluded.shape) == shape)):
        raise FieldmarkError(
            f"excluded has shape {tuple(excluded.shape)} and type {excluded.dtype}; expected bool {list(shape)} or "
            "int64 pairs [P, 2]"
        )
