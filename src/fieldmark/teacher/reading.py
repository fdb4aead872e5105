"""Stage 1 of `build-teacher`: a vision tower learns to read the attributes of a catalogue.

Heads on the tower's tokens (the merged tokens and each DeepStack feature) say, for every attribute, where in the photo it
can be read and which value it has; the photo's answer is the value at the places that speak for it. Where the catalogue
knows the true places (the aviary's part masks) they are taught too, which makes a tower from nothing learn in minutes.
The heads are thrown away: what stays are tokens a small language model can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AttributeTable:
    """Names and values of a catalogue's attributes, and the value index of each item (-1: not given)."""

    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[dict[str, str] | None]) -> AttributeTable:
        """The attributes that occur in `rows`, in the order they first occur."""
        seen: dict[str, set[str]] = {}
        for row in rows:
            for name, value in (row or {}).items():
                if value is not None:
                    seen.setdefault(name, set()).add(value)
        return cls(tuple(seen), tuple(tuple(sorted(values)) for values in seen.values()))

    def encode(self, rows: Sequence[dict[str, str] | None]) -> Tensor:
        """[items, attributes] value indices."""
        index = [{value: i for i, value in enumerate(values)} for values in self.values]
        return torch.tensor(
            [[index[a].get((row or {}).get(name) or "", -1) for a, name in enumerate(self.names)] for row in rows]
        )


class AttributeReader(nn.Module):
    """Reads attributes off one feature map: for each attribute a place score and a score of each value, token by token."""

    def __init__(self, token_dim: int, table: AttributeTable) -> None:
        super().__init__()
        self.sizes = [len(values) for values in table.values]
        self.norm = nn.LayerNorm(token_dim)
        self.place = nn.Linear(token_dim, len(table.names))
        self.value = nn.Linear(token_dim, sum(self.sizes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B,N,D] -> place scores [B,N,A], value scores [B,N,sum of values]."""
        tokens = self.norm(tokens)
        return self.place(tokens), self.value(tokens)

    def loss(self, tokens: Tensor, truth: Tensor, cover: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and the share of attributes read right.

        Args:
            tokens: [B, N, D].
            truth: [B, A] value indices, -1 where not given.
            cover: [B, A, N] share of each token's area that shows the attribute, or None.
        """
        place, value = self(tokens)
        weight = place.softmax(dim=1)
        losses, right, start = [], [], 0
        for a, size in enumerate(self.sizes):
            scores = value[..., start : start + size]
            start += size
            answer = torch.einsum("bn,bnv->bv", weight[..., a], scores)
            target = truth[:, a]
            known = target >= 0
            losses.append(F.cross_entropy(answer, target, ignore_index=-1))
            right.append((answer.argmax(1) == target)[known].float().mean())
            if cover is not None:
                losses.append(self._places(place[..., a], scores, target, cover[:, a]))
        return torch.stack(losses).sum() / len(self.sizes), torch.stack(right)

    @staticmethod
    def _places(place: Tensor, scores: Tensor, target: Tensor, cover: Tensor) -> Tensor:
        there = (cover > 0.02).float()
        seen = cover > 0.05
        local = target[:, None].expand_as(cover)[seen]
        if len(local) == 0:
            return F.binary_cross_entropy_with_logits(place, there)
        return F.binary_cross_entropy_with_logits(place, there) + F.cross_entropy(scores[seen], local, ignore_index=-1)
