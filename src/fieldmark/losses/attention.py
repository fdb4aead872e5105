"""Attention alignment: the teacher's attention over a photo's tokens teaches the pooler (SAGA Eq. 6-7)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_alignment(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over rows of ``KL(teacher || student)``.

    Args:
        teacher: ``[B, N]``, rows sum to 1, zeros allowed (``0 log 0 = 0``); no gradient flows into it.
        student: ``[B, N]``, rows sum to 1 (the pooler's softmax).

    Returns:
        Scalar, zero for no rows. Where the student has a zero under teacher mass the value is large but finite
        (the student is floored at the smallest normal float).
    """
    if teacher.shape != student.shape or teacher.ndim != 2:
        raise ValueError(f"expected two [B, N] tensors, got {tuple(teacher.shape)} and {tuple(student.shape)}")
    if teacher.shape[0] == 0:
        return student.sum() * 0.0
    teacher = teacher.detach().to(student.dtype)
    tiny = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=tiny).log() - student.clamp(min=tiny).log()
    return (teacher * log_ratio).sum(dim=1).mean()
