"""Stage 1 of `build-teacher`: a vision tower learns to read the attributes of a catalogue.

Heads on the tower's tokens (the merged tokens and each DeepStack feature) say, for every attribute, where in the
photo it can be read and which value it has; the photo's answer is the value at the places that speak for it. Where
the catalogue knows the true places (the aviary's part masks) they are taught too, which makes a tower from nothing
learn in minutes. The heads are thrown away: what stays are tokens a small language model can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fieldmark.data.aviary import draw_with_masks_uri
from fieldmark.data.photos import open_photo
from fieldmark.students.tower import VisionTower


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
    """Reads attributes off one feature map: for each attribute a place score and a score of each value, token by
    token."""

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


class PhotoSource(Dataset):
    """Photos of a catalogue, normalised for a tower, with the value indices and, for drawn birds, the true places.

    Half of the photos are mirrored at random (a pure function of seed, epoch and index).
    """

    def __init__(
        self, tower: VisionTower, refs: Sequence[str], truth: Tensor, table: AttributeTable, seed: int
    ) -> None:
        self.tower, self.refs, self.truth, self.table, self.seed = tower, refs, truth, table, seed
        self.epoch = 0
        self.drawn = all(isinstance(ref, str) and ref.startswith("aviary://") for ref in refs)
        self.side = math.isqrt(tower.tokens_per_image)

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ref = self.refs[index]
        cover = torch.zeros(0)
        if self.drawn:
            drawing = draw_with_masks_uri(ref, size=self.tower.resolution)  # masks that the tokens' grid divides
            photo: Any = drawing.image
            masks = np.stack([drawing.masks[name] for name in self.table.names]).astype(np.float32)
            cell = masks.shape[-1] // self.side
            cover = torch.from_numpy(masks.reshape(len(masks), self.side, cell, self.side, cell).mean((2, 4)))
        else:
            photo = open_photo(ref)
        pixels = self.tower.preprocess([photo])["pixel_values"][0]
        if np.random.default_rng((self.seed, self.epoch, index)).random() < 0.5:
            pixels, cover = pixels.flip(-1), cover.flip(-1)
        return pixels, self.truth[index], cover.flatten(1) if self.drawn else cover


def train_tower(
    tower: VisionTower,
    refs: Sequence[str],
    truth: Tensor,
    table: AttributeTable,
    *,
    steps: int,
    batch_size: int = 48,
    learning_rate: float = 1.5e-3,
    workers: int = 1,
    bf16: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Trains all of the tower to read the attributes; returns the share read right over the last steps (training
    photos).

    Args:
        tower: changed in place.
        refs: photos.
        truth: [photos, A] value indices, -1 where not given.
        table: names and values.
        steps: optimizer steps.
        batch_size: photos a step; all of them where there are fewer.
        learning_rate: peak of a warm-up and cosine schedule.
        workers: processes that decode or draw.
        bf16: run the tower under bf16 autocast.
        seed: of order, mirroring and heads.
        progress: called with the number of steps done and the loss.
    """
    torch.manual_seed(seed)
    heads = nn.ModuleList(AttributeReader(tower.token_dim, table) for _ in range(1 + _deepstack_count(tower)))
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    source = PhotoSource(tower, refs, truth, table, seed)
    recent: list[float] = []
    tower.train()
    step = 0
    while step < steps:
        order = torch.Generator().manual_seed(seed + source.epoch)
        sampler = torch.randperm(len(refs), generator=order).tolist()
        loader = DataLoader(source, min(batch_size, len(refs)), sampler=sampler, num_workers=workers, drop_last=True)
        for pixels, target, cover in loader:
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
                features = tower({"pixel_values": pixels})
            maps = [tokens.float() for tokens in (features["token_embeddings"], *features["deepstack"])]
            losses, right = [], torch.zeros(0)
            for number, (head, tokens) in enumerate(zip(heads, maps, strict=True)):
                loss, read = head.loss(tokens, target, cover if source.drawn else None)  # type: ignore[operator]
                losses.append(loss if number == 0 else 0.5 * loss)
                right = read if number == 0 else right
            total = torch.stack(losses).sum()
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent = [*recent[-19:], float(right.nanmean())]
            step += 1
            if progress is not None:
                progress(step, float(total.detach()))
            if step == steps:
                break
        source.epoch += 1
    tower.eval()
    return sum(recent) / len(recent)


@torch.no_grad()
def fit_projector(
    tower: VisionTower,
    refs: Sequence[Any],
    *,
    batch_size: int = 64,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Sets the projector of a pre-trained tower to the principal components of its tokens; returns the variance kept.

    Principal components keep what tells photos apart in general, not only what told the few classes of this catalogue
    apart, which is what a verdict about unseen classes needs. Tokens come out centred, with a mean variance of one.
    """
    projector = tower.projector
    assert projector is not None
    width = tower.encoder.token_dim
    count, total, second = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(refs), batch_size):
        pixels = tower.preprocess(refs[start : start + batch_size])["pixel_values"]
        tokens = tower.encoder(pixels)[0].flatten(0, 1)
        count, total = count + len(tokens), total + tokens.sum(0)
        second += (tokens.T @ tokens).double()
        if progress is not None:
            progress(min(start + batch_size, len(refs)), 0.0)
    mean = total / count
    values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    kept, axes = values[-projector.out_features :], vectors[:, -projector.out_features :]
    weight = (axes / kept.mean().sqrt()).T
    projector.weight.copy_(weight)
    projector.bias.copy_(-weight @ mean)
    return float(kept.sum() / values.sum())


def _deepstack_count(tower: VisionTower) -> int:
    return len(tower.vision_config.get("deepstack_visual_indexes") or ())


def warm_cosine(step: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear rise, then a cosine down to `floor`."""
    rise = min(1.0, (step + 1) / min(warm, max(1, steps // 10)))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
