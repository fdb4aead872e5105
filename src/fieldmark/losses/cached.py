"""GradCache (arXiv 2101.06983) for a loss over several columns of inputs: large batches in the memory of small ones.

Every column is embedded in sub-batches without a graph, the loss is taken over all embeddings, and each sub-batch is
then embedded again, with a graph, to carry the cached gradient of its embeddings into the model. sentence-transformers'
`CachedLossMixin` does all of this, under DDP and gradient accumulation too, and replays the random state of each
sub-batch, so dropout draws the same masks and the result is that of the plain loss. It back-propagates the loss inside
the forward pass, though, which would give a loss's own parameters (a temperature) their gradient there, before scaling
and averaging: here they get it in the backward pass, as the model's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn

from fieldmark.errors import FieldmarkError

LossOfColumns = Callable[[list[Tensor], Any], Tensor]


class ColumnsLoss(nn.Module):
    """A loss over the embeddings of several columns, all of them embedded at once; see :class:`CachedColumnsLoss`."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Any = None) -> Tensor:
        columns = [self.model(features)["sentence_embedding"].float() for features in sentence_features]
        with torch.autocast(columns[0].device.type, enabled=False):
            return self.loss(columns, labels)


class CachedColumnsLoss(CachedLossMixin, nn.Module):
    """A loss over the embeddings of several columns, computed by GradCache.

    Inputs: any number of columns (anchors' photos, their texts, hard negatives of both), each of its own length and
    modality. Labels: handed on to the loss.

    Args:
        model: what embeds a column of inputs, under ``sentence_embedding``.
        loss: ``loss(embeddings, labels) -> scalar`` with one ``[M, D]`` tensor a column. A module's parameters are
            trained with the model's.
        mini_batch_size: inputs embedded at once.

    Raises:
        FieldmarkError: a sub-batch of less than one input.
    """

    def __init__(self, model: nn.Module, loss: LossOfColumns, mini_batch_size: int) -> None:
        super().__init__()
        if mini_batch_size < 1:
            raise FieldmarkError(f"mini_batch_size is {mini_batch_size}; expected at least 1")
        self.model, self.loss, self.mini_batch_size = model, loss, mini_batch_size
        self._own_gradients: list[Tensor | None] = []

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        loss = self.forward_cached(sentence_features, labels)
        if torch.is_grad_enabled():
            for parameter, gradient in zip(self._own(), self._own_gradients, strict=True):
                if gradient is not None:  # adds exactly zero, and the gradient when the loss is back-propagated
                    loss = loss + ((parameter - parameter.detach()) * gradient).sum()
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss over all embeddings; `with_backward` leaves its gradient in each sub-batch's embeddings."""
        columns = [torch.cat(parts) for parts in reps]
        with torch.autocast(columns[0].device.type, enabled=False):
            loss = self.loss(columns, labels)
        if not with_backward:
            return loss
        embeddings, own = [part for parts in reps for part in parts], self._own()
        gradients = torch.autograd.grad(loss, [*embeddings, *own], allow_unused=True)
        for part, gradient in zip(embeddings, gradients):
            part.grad = gradient
        self._own_gradients = list(gradients[len(embeddings) :])
        return loss.detach()

    def _own(self) -> list[nn.Parameter]:
        """Parameters of the loss that are trained."""
        parameters = self.loss.parameters() if isinstance(self.loss, nn.Module) else ()
        return [parameter for parameter in parameters if parameter.requires_grad]
