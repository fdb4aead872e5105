"""Attention over many images of one size, in one call.

Qwen's vision towers pack all images of a batch into one sequence of patches and, without the flash-attention package,
split it again in every layer and attend image by image: B small calls, B copies, and a backward pass that fills B
gradients of the whole packed length with zeros. Students see square photos of one resolution, so each image holds the
same number of patches in the same windows; the packed sequence is then a batch in disguise, and reshaping [1, H, B*n,
d] into [B, H, n, d] computes the same numbers (patches of different images never meet in either form).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "fieldmark_packed_images"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside segments of a packed sequence; an attention function of transformers' ``AttentionInterface``.

    Args:
        module: The attention layer; its ``segment_lengths`` (patches of each window of one image, in packed order; one
            number where the layer attends over the whole image) says how the sequence of each image divides.
        query: [1, H, B*n, d], B images of n = sum(segment_lengths) patches.
        key: As query.
        value: As query.
        attention_mask: Not used: segments are complete.
        scaling: Factor on the scores, 1/sqrt(d) if None.
        dropout: Probability, as in ``scaled_dot_product_attention``.
        **kwargs: Ignored; part of the transformers interface.

    Returns:
        [1, B*n, H, d] and None (attention weights are never built).
    """
    _, heads, total, width = query.shape
    lengths: tuple[int, ...] = module.segment_lengths  # type: ignore[assignment]

    def images(packed: torch.Tensor, length: int) -> torch.Tensor:
        return packed[0].transpose(0, 1).reshape(-1, length, heads, width)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2)

    if len(set(lengths)) == 1:
        output = attend(*(images(x, lengths[0]) for x in (query, key, value)))
    else:
        windows = zip(*(images(x, sum(lengths)).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        output = torch.cat([attend(*window) for window in windows], dim=1)
    return output.reshape(1, total, heads, width), None


AttentionInterface.register(PACKED, packed_attention)


class PatchProjection(nn.Module):
    """A convolution whose kernel covers its whole input, done as the matrix product that it is.

    Takes over the parameters of ``convolution`` (same names), so checkpoints fit either form.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, C, T, P, P] patches -> [N, D]."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)
