"""Metric-learning losses: Potential Field (ours) and, through pytorch-metric-learning, Proxy Anchor,
Multi-Similarity, InfoNCE.

The loss classes gather embeddings and labels over processes with gradient and compute the loss of the *global* batch
on every process, so that proxies get the same gradient everywhere and two processes train as one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError


def potential_field(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    alpha: float = 3.0,
    delta: float = 0.2,
    *,
    floor: float = 1e-4,
) -> Tensor:
    """Potential Field metric loss (PFML, arXiv 2405.18560): the mean energy of all embeddings and proxies.

    A point ``r`` at distance ``d`` from a source feels ``-1/max(d, delta)^alpha`` when both are of one class (flat
    inside ``delta``, then rising) and ``+1/min(d, delta)^alpha`` when they are not (falling inside ``delta``, then
    flat). The field of class j sums the attraction of all its embeddings and proxies and the repulsion of all others;
    the energy sums it over all embeddings and proxies, without self-interaction. We divide by the number of terms and
    floor ``d``.

    Args:
        embeddings: ``[B, D]``; normalised here.
        labels: ``[B]`` class indices in ``0..C-1``.
        proxies: ``[C, M, D]``; normalised here.
        alpha: decay of the field.
        delta: radius inside which attraction is flat and outside which repulsion is.
        floor: smallest distance, which bounds the repulsion's gradient.

    Returns:
        Scalar energy per interaction.
    """
    classes, per_class, dim = proxies.shape
    points = F.normalize(torch.cat([embeddings.float(), proxies.float().reshape(-1, dim)]), dim=1)
    owners = torch.cat([labels, torch.arange(classes, device=labels.device).repeat_interleave(per_class)])
    # Not by 2 - 2 x.y: what that loses to rounding decides the energy of close points.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=floor)
    same = owners[:, None] == owners[None, :]
    attraction = -distance.clamp(min=delta).pow(-alpha)
    repulsion = distance.clamp(max=delta).pow(-alpha)
    energy = torch.where(same, attraction, repulsion)
    energy = energy.masked_fill(torch.eye(len(points), dtype=torch.bool, device=energy.device), 0.0)
    return energy.sum() / (len(points) * (len(points) - 1))


class PotentialField(nn.Module):
    """:func:`potential_field` with learnable proxies (15 a class, as the authors' ablation saturates there)."""

    def __init__(
        self, num_classes: int, embedding_dim: int, proxies_per_class: int = 15, alpha: float = 3.0, delta: float = 0.2
    ) -> None:
        super().__init__()
        self.alpha, self.delta = alpha, delta
        self.proxies = nn.Parameter(
            torch.randn(num_classes, proxies_per_class, embedding_dim) / math.sqrt(embedding_dim)
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return potential_field(embeddings, labels, self.proxies, self.alpha, self.delta)


def _proxy_anchor(num_classes: int, embedding_dim: int, **options: Any) -> nn.Module:
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    return ProxyAnchorLoss(num_classes, embedding_dim, **{"margin": 0.1, "alpha": 32, **options})


def _multi_similarity(num_classes: int, embedding_dim: int, **options: Any) -> nn.Module:
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    return _MinedLoss(MultiSimilarityLoss(**{"alpha": 2, "beta": 50, "base": 0.5, **options}), epsilon=0.1)


def _info_nce(num_classes: int, embedding_dim: int, **options: Any) -> nn.Module:
    from pytorch_metric_learning.losses import NTXentLoss

    return NTXentLoss(**{"temperature": 0.07, **options})


class _MinedLoss(nn.Module):
    """Multi-Similarity with the mining of its paper."""

    def __init__(self, loss: nn.Module, epsilon: float) -> None:
        super().__init__()
        from pytorch_metric_learning.miners import MultiSimilarityMiner

        self.loss, self.miner = loss, MultiSimilarityMiner(epsilon=epsilon)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


METRIC_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "proxy_anchor": _proxy_anchor,
    "potential_field": PotentialField,
    "multi_similarity": _multi_similarity,
    "info_nce": _info_nce,
}


def build_metric_loss(name: str, num_classes: int, embedding_dim: int, **options: Any) -> nn.Module:
    """A metric loss by name: ``loss(embeddings [B,D], labels [B]) -> scalar``; proxies, if any, are its parameters.

    Raises:
        FieldmarkError: unknown name or option.
    """
    if name not in METRIC_LOSSES:
        raise FieldmarkError(f"Unknown metric loss {name!r}; choose one of {', '.join(METRIC_LOSSES)}.")
    try:
        return METRIC_LOSSES[name](num_classes, embedding_dim, **options)
    except TypeError as error:
        raise FieldmarkError(f"{name} does not take these loss_options: {error}; see docs/papers.md.") from error


class MetricLoss(nn.Module):
    """A metric loss as sentence-transformers calls it: ``forward(features, labels)`` on one photo column.

    Inputs: one column of photos. Labels: class indices ``[B]``. Under several processes the loss is that of the global
    batch (embeddings gathered with gradient); averaging parameter gradients over processes then gives exactly its
    gradient.
    """

    def __init__(self, model: nn.Module, metric: nn.Module) -> None:
        super().__init__()
        self.model, self.metric = model, metric

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = self.model(features[0])["sentence_embedding"]
        with torch.autocast(embeddings.device.type, enabled=False):  # close embeddings differ by less than bf16 keeps
            return self.metric(gather_with_gradient(embeddings.float()), gather_with_gradient(labels))


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """``[B, ...]`` of every process, concatenated by rank; gradients flow back to the process they came from."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if not tensor.is_floating_point():
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))
