"""Attribute-guided contrastive learning, AGCL (AFMRL, arXiv 2604.20135, Eq. 1-3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.losses.bm25 import EncodedAttributes, bm25_scores
from fieldmark.losses.expanded import matches
from fieldmark.losses.processes import gather_rows, processes


def attribute_guided_contrastive(
    similarity: Tensor, bm25: Tensor, temperature: float, delta: float, *, same: Tensor | None = None
) -> Tensor:
    """AGCL of B queries and their B candidates (Eq. 1-3), the mean over queries; positives on the diagonal.

    ``-log(w_ii e^(s_ii / tau) / (w_ii e^(s_ii / tau) + sum_j w_ij e^(s_ij / tau)))`` with ``w_ij = e^(1 + tanh B_ij)``,
    over the negatives j that are not masked as false ones: ``s_ij <= s_ii + delta``. Negatives that share telling
    attributes with the query thus weigh up to e times more. As ``w e^(s / tau) = e^(s / tau + 1 + tanh B)``, it is
    InfoNCE whose logits are raised by ``tanh B``; the 1 cancels.

    Args:
        similarity: ``[B, B]`` cosines of queries (rows) and candidates; no gradient flows through the mask.
        bm25: ``[B, B]`` BM25 of the query's attributes with the candidate's.
        temperature: tau, above zero.
        delta: margin of the mask; infinity masks none.
        same: ``[B, B]`` bool, candidates of the query's own product: no negatives either. The diagonal may be set.

    Returns:
        Scalar, at least in float32; a query without negatives adds zero.

    Raises:
        FieldmarkError: other shapes, no query, a temperature that is not above zero, or a NaN in `bm25`.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise FieldmarkError(
            f"similarity has shape {tuple(similarity.shape)}; expected [B, B] with the positives on the diagonal"
        )
    positive = torch.arange(len(similarity), device=similarity.device)
    return attribute_guided_rows(similarity, bm25, positive, temperature, delta, same=same)


def attribute_guided_rows(
    similarity: Tensor, bm25: Tensor, positive: Tensor, temperature: float, delta: float, *, same: Tensor | None = None
) -> Tensor:
    """:func:`attribute_guided_contrastive` of N queries and M candidates, ``positive [N]`` their columns."""
    _check(similarity, bm25, positive, temperature, same)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    left_out = false_negatives(similarity, positive, delta)
    if same is not None:
        left_out |= same
    left_out.scatter_(1, positive[:, None], False)
    logits = similarity / temperature + torch.tanh(bm25.to(similarity.dtype))
    return F.cross_entropy(logits.masked_fill(left_out, -math.inf), positive)


def false_negatives(similarity: Tensor, positive: Tensor, delta: float) -> Tensor:
    """``M [N, M]`` bool (Eq. 2): more similar to the query than its positive by over `delta`; never the positive."""
    similarity = similarity.detach()
    return (similarity > similarity.gather(1, positive[:, None]) + delta).scatter(1, positive[:, None], False)


def relative_to_positive(bm25: Tensor, positive: Tensor) -> Tensor:
    """``B_ij / B_ii [N, M]``: how much of what a query shares with its positive it shares with each candidate.

    A raw score of several rare words is above 2, where tanh no longer tells one from another. Zero where the positive
    itself scores zero.
    """
    own = bm25.gather(1, positive[:, None])
    return torch.where(own > 0, bm25 / own, 0.0)


class AttributeGuidedObjective(nn.Module):
    """AGCL over the embeddings of a batch's queries and candidates, those of all processes being candidates.

    Every process scores its own queries. With equally many in each, and gradients averaged over processes as DDP does,
    loss and gradient are those of one process on the joint batch. :class:`~fieldmark.losses.cached.CachedColumnsLoss`
    computes it by GradCache.

    Args:
        attributes: of everything that the labels' rows refer to, equal in all processes; needed by "bm25".
        weights: "bm25", or "none" for the control: InfoNCE with the same negatives, nothing weighted, nothing masked.
        scale: of BM25: "raw" as in Eq. 1, or relative to the positive's ("self", not in the paper).
        temperature: tau.
        delta: margin of the mask.
        symmetric: also from candidate to query, the mean of both directions (the paper: query to candidate alone).

    Attributes:
        parts: of the last batch's negatives of this process: `masked_share`, the share that was masked as false, and
            `tanh_bm25`, the mean of what their logits were raised by.

    Raises:
        FieldmarkError: "bm25" without attributes, or other weights or another scale.
    """

    def __init__(
        self,
        attributes: EncodedAttributes | None,
        *,
        weights: Literal["bm25", "none"] = "bm25",
        scale: Literal["raw", "self"] = "raw",
        temperature: float = 0.02,
        delta: float = 0.4,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if weights not in ("bm25", "none") or scale not in ("raw", "self"):
            raise FieldmarkError(
                f"weights {weights!r} of scale {scale!r} were given; expected bm25 or none, raw or self"
            )
        if weights == "bm25" and attributes is None:
            raise FieldmarkError("BM25 weights need attributes and none were given; give them, or weights 'none'")
        self.attributes = attributes if weights == "bm25" else None
        self.scale, self.temperature, self.symmetric = scale, temperature, symmetric
        self.delta = delta if weights == "bm25" else math.inf
        self.parts: dict[str, float] = {}

    def forward(self, columns: list[Tensor], labels: dict[str, Tensor]) -> Tensor:
        """Loss of `columns` (queries ``[B, D]``, candidates ``[B, D]``; row i of both is a pair).

        Args:
            columns: embeddings; normalised here.
            labels: `keys` ``[B]`` or ``[B, G]`` int64, the product of each pair (-1: unknown); pairs that share one in
                any of the G columns are no negatives of each other. With BM25 `query_rows` and `candidate_rows`
                ``[B]``, the attributes of each.
        """
        sides = {
            rows: F.normalize(column.to(torch.promote_types(column.dtype, torch.float32)), dim=1)
            for rows, column in zip(("query_rows", "candidate_rows"), columns, strict=True)
        }
        keys = labels["keys"] if labels["keys"].ndim == 2 else labels["keys"][:, None]
        same = matches(keys, gather_rows(keys))
        rank = dist.get_rank() if processes() > 1 else 0
        positive = (gather_rows(torch.full_like(keys[:, 0], rank)) == rank).nonzero()[:, 0]
        losses, parts = [], []
        for ours, theirs in (tuple(sides), tuple(sides)[::-1])[: 1 + self.symmetric]:
            similarity = sides[ours] @ gather_rows(sides[theirs]).T
            bm25 = torch.zeros_like(similarity)
            if self.attributes is not None:
                bm25 = self._bm25(self.attributes, labels[ours], gather_rows(labels[theirs]), positive).to(similarity)
            losses.append(attribute_guided_rows(similarity, bm25, positive, self.temperature, self.delta, same=same))
            parts.append(_parts(bm25, false_negatives(similarity, positive, self.delta), positive, same))
        self.parts = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return torch.stack(losses).mean()

    def _bm25(self, attributes: EncodedAttributes, ours: Tensor, theirs: Tensor, positive: Tensor) -> Tensor:
        bm25 = bm25_scores(*(attributes[rows.cpu().numpy()] for rows in (ours, theirs)))
        return relative_to_positive(bm25, positive.cpu()) if self.scale == "self" else bm25


def _parts(bm25: Tensor, masked: Tensor, positive: Tensor, same: Tensor) -> dict[str, float]:
    """What the log shows of a direction; without a negative, zeros."""
    negative = (~same).scatter(1, positive[:, None], False)
    count = negative.sum().clamp(min=1)
    means = {"masked_share": masked & negative, "tanh_bm25": torch.tanh(bm25) * negative}
    return {name: float(values.sum() / count) for name, values in means.items()}


def _check(similarity: Tensor, bm25: Tensor, positive: Tensor, temperature: float, same: Tensor | None) -> None:
    shape = tuple(similarity.shape)
    if len(shape) != 2 or 0 in shape or tuple(bm25.shape) != shape:
        raise FieldmarkError(
            f"similarity has shape {shape} and bm25 {tuple(bm25.shape)}; expected [queries, candidates] in both, with "
            "at least one query"
        )
    if positive.shape != shape[:1] or not bool(((positive >= 0) & (positive < shape[1])).all()):
        raise FieldmarkError(
            f"positive must hold one column of the {shape[1]} candidates for each of {shape[0]} queries"
        )
    if same is not None and (same.dtype != torch.bool or tuple(same.shape) != shape):
        raise FieldmarkError(f"same has shape {tuple(same.shape)} and type {same.dtype}; expected bool {list(shape)}")
    if not temperature > 0:
        raise FieldmarkError(f"the temperature is {temperature}; expected a number above zero")
    if bool(bm25.isnan().any()):
        raise FieldmarkError(
            "bm25 holds NaN; expected a number for each query and candidate, 0 where nothing is shared"
        )
