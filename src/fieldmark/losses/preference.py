"""Relative preference alignment: a frozen MLLM's graded preferences over candidates (MAPLE, arXiv 2506.06970)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.losses.processes import averaged_gradient

TAU_BOUNDS = (0.01, 0.5)
BETA_BOUNDS = (1.0, 100.0)


def relative_preference(
    similarity: Tensor, alignment: Tensor, beta: float | Tensor, kind: Literal["listwise", "pairwise"] = "listwise"
) -> Tensor:
    """Relative preference alignment in one direction (Eq. 5-8), the mean over anchors.

    The candidates of an anchor are put in the teacher's order, alignment falling: ``a_0 >= ... >= a_K``, with
    ``s = beta * similarity``.

    - Pairwise (Eq. 5, 6): ``-sum_{k<l} (a_k - a_l) log sigmoid(s_k - s_l)``.
    - Listwise (Eq. 7, 8): ``-sum_{k<K} w_k log(exp s_k / sum_{j>=k} exp s_j)``, ``w_k`` the mean of ``a_k - a_l`` over
      all ``l > k``.

    Candidates may come in any order. Of equal alignments the one given first stands first, which changes nothing
    pairwise (a tied pair weighs nothing) nor at the end of a list (neither does a tied suffix); listwise, a tie above
    a worse candidate keeps the order given. The paper averages the two directions (image to text, text to image).

    Args:
        similarity: ``[N, C]`` cosines of each anchor and its C = K + 1 candidates.
        alignment: ``[N, C]`` the teacher's scores in 0..1; no gradient flows into them.
        beta: scale of the similarities; a tensor gets its gradient.
        kind: ``"listwise"`` or ``"pairwise"``.

    Returns:
        Scalar, at least in float32; zero where every anchor's candidates are aligned alike. Memory: ``N * C * C``.

    Raises:
        FieldmarkError: other shapes, no anchor, fewer than two candidates, or an alignment that is no number in 0..1.
    """
    if kind not in ("listwise", "pairwise"):
        raise FieldmarkError(f"the preference {kind!r} was given; expected listwise or pairwise")
    _check(similarity, alignment)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    alignment, order = alignment.detach().to(similarity.dtype).sort(dim=1, descending=True, stable=True)
    scores = beta * similarity.gather(1, order)
    candidates = scores.shape[1]
    later = torch.ones(candidates, candidates, dtype=torch.bool, device=scores.device).triu(1)
    margins = (alignment[:, :, None] - alignment[:, None, :]).masked_fill(~later, 0.0)
    if kind == "pairwise":
        return -(margins * F.logsigmoid(scores[:, :, None] - scores[:, None, :])).sum() / len(scores)
    weights = margins.sum(dim=2) / later.sum(dim=1).clamp(min=1)
    suffixes = scores[:, None, :].expand(-1, candidates, -1).masked_fill(later.T, -math.inf)
    return (weights * (suffixes.logsumexp(dim=2) - scores)).sum() / len(scores)


def maple_loss(rpa: Tensor, contrastive: Tensor, lam: float) -> Tensor:
    """The total of Eq. 9: ``lam * rpa + (1 - lam) * contrastive``.

    Raises:
        FieldmarkError: ``lam`` is not in 0..1.
    """
    if not 0 <= lam <= 1:
        raise FieldmarkError(f"lambda is {lam}; expected 0 (contrastive alone) to 1 (preferences alone)")
    return lam * rpa + (1 - lam) * contrastive


class MapleTemperatures(nn.Module):
    """The learnable tau of the contrastive loss and beta of the preferences, kept as logarithms.

    The clamp is a projection of the parameter: whoever reads a value first puts a logarithm that an optimizer's step
    has carried over a bound back onto it. The value read is thus always inside, and its gradient is never cut: at a
    bound it leads back inside on the next step. (Clamping the value instead would give a zero gradient outside, and
    the parameter would stay there.)

    Over several processes the gradient of both is averaged in the backward pass, as DDP does with a model's: they stay
    equal everywhere, though a trainer does not wrap its loss.

    Args:
        tau: its value at the start.
        beta: its value at the start.
    """

    def __init__(self, tau: float = 0.07, beta: float = 1 / 0.07) -> None:
        super().__init__()
        for name, value, (low, high) in (("tau", tau, TAU_BOUNDS), ("beta", beta, BETA_BOUNDS)):
            if not low <= value <= high:
                raise FieldmarkError(f"{name} is {value} at the start; expected a value in {low:g}..{high:g}")
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))

    @property
    def tau(self) -> Tensor:
        """Scalar in 0.01..0.5."""
        return _bounded(self.log_tau, *TAU_BOUNDS)

    @property
    def beta(self) -> Tensor:
        """Scalar in 1..100."""
        return _bounded(self.log_beta, *BETA_BOUNDS)


def _bounded(log: nn.Parameter, low: float, high: float) -> Tensor:
    with torch.no_grad():
        log.clamp_(math.log(low), math.log(high))
    return averaged_gradient(log).exp()


def _check(similarity: Tensor, alignment: Tensor) -> None:
    if similarity.ndim != 2 or similarity.shape != alignment.shape:
        raise FieldmarkError(
            f"similarity has shape {tuple(similarity.shape)} and alignment {tuple(alignment.shape)}; expected "
            "[anchors, candidates] in both"
        )
    if similarity.shape[0] < 1 or similarity.shape[1] < 2:
        raise FieldmarkError(
            f"{similarity.shape[0]} anchors have {similarity.shape[1]} candidates each; a preference needs at least "
            "one anchor with two"
        )
    bad = ~((alignment >= 0) & (alignment <= 1)).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise FieldmarkError(
            f"the alignment scores of anchor {row} are {alignment[row].tolist()}; expected numbers in 0..1, so check "
            "the teacher or its cache"
        )
