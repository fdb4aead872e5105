"""Group-relative policy gradient over verdict rewards (SAGA, arXiv 2606.15134, section 3.2, Eq. 3-5)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-4, *, unbiased: bool = True) -> Tensor:
    """Advantage of each rollout inside its group: ``A = (r - mean) / (std + eps)``.

    Args:
        rewards: ``[P, G]`` rewards of G rollouts for each of P pairs.
        eps: added to the standard deviation.
        unbiased: sample standard deviation (our reading of the paper's method figure); False: population.

    Returns:
        ``[P, G]`` advantages; a group whose rewards are all equal (or that has one rollout) is exactly zero.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [pairs, rollouts], got shape {tuple(rewards.shape)}")
    rewards = rewards.float()
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, unbiased=unbiased)
    advantages = centred / (std + eps)
    # The mean of equal floats need not be that float: rounding must not become a signal.
    mixed = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    return torch.where(mixed, advantages, torch.zeros_like(advantages))


def policy_gradient_loss(logprobs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """On-policy GRPO loss with token-level normalisation over the whole buffer (Eq. 5).

    ``L = -(1 / |T|) sum_g sum_t A_g log pi(y_gt | y_g<t, S)`` with ``|T|`` the number of tokens of all completions.
    Each rollout is used once, so the ratio is 1, clipping has no effect and there is no reference KL.

    Args:
        logprobs: ``[N, T]`` log-probabilities of the generated tokens; padding may hold anything finite.
        mask: ``[N, T]`` true at generated tokens.
        advantages: ``[N]``, one a completion, no gradient.

    Returns:
        Scalar loss; zero (still attached to the graph) for an empty buffer.
    """
    if logprobs.shape != mask.shape or advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"expected logprobs [N,T], mask [N,T], advantages [N]; "
            f"got {tuple(logprobs.shape)}, {tuple(mask.shape)}, {tuple(advantages.shape)}"
        )
    return policy_gradient_sum(logprobs, mask, advantages) / mask.sum().clamp(min=1)


def policy_gradient_sum(logprobs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The numerator of :func:`policy_gradient_loss`, for a buffer that is back-propagated pair by pair."""
    weighted = logprobs * advantages.detach().to(logprobs.dtype).unsqueeze(1)
    return -weighted.masked_fill(~mask.bool(), 0.0).sum()
