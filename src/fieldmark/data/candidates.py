"""Anchors and their hard candidates: what one step of image-text training sees, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fieldmark.data.batches import stable_random
from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError

_ORDER, _CAPTION = range(2)  # random streams that must not share a seed


@dataclass(frozen=True)
class CandidateSets:
    """Items with a photo and texts, and the hard negatives of each.

    Attributes:
        photos: N photo references.
        texts: the texts of each item, one or more; a step takes one of them.
        negatives: [N, K] int64 items that look like each (K may be 0).
        keys: [N, 2] int64: label and title of each item as numbers, -1 where unknown; items that share one match.
    """

    photos: Sequence[PhotoRef]
    texts: Sequence[Sequence[str]]
    negatives: np.ndarray
    keys: Tensor

    def __post_init__(self) -> None:
        check_others(int((self.negatives < 0).any(axis=1).sum()), *self.negatives.shape)

    def text(self, item: int, *, seed: int, step: int) -> str:
        """The text of an item in one step: any of its texts alike (MAPLE table 8, strategy C)."""
        own = self.texts[item]
        return own[0] if len(own) == 1 else own[int(stable_random(seed, step, _CAPTION, item).integers(len(own)))]


@dataclass(frozen=True)
class CandidateBatch:
    """Anchors first, then the hard negatives that are not anchors themselves, each item once.

    Attributes:
        items: [M] items, the first `anchors` of them the anchors.
        anchors: N.
        candidates: [N, K + 1] rows of `items`: each anchor itself, then its negatives.
    """

    items: list[int]
    anchors: int
    candidates: Tensor

    @classmethod
    def of(cls, anchors: Sequence[int], negatives: np.ndarray) -> CandidateBatch:
        """The batch of some anchors, `negatives` [items, K] being those of all items."""
        chosen = negatives[list(anchors)]
        items = list(dict.fromkeys([*anchors, *chosen.flatten().tolist()]))
        row = {item: place for place, item in enumerate(items)}
        sets = [[row[anchor], *(row[other] for other in others)] for anchor, others in zip(anchors, chosen.tolist())]
        return cls(items, len(anchors), torch.tensor(sets))


def check_others(short: int, items: int, negatives: int) -> None:
    """Refuses items of which some (`short` of them) have too few others to be their hard negatives."""
    if short:
        raise FieldmarkError(
            f"{short} of {items} items have fewer than {negatives} others of another label and title to compare with; "
            "lower negatives, or add items"
        )


def match_keys(labels: Sequence[str | None], titles: Sequence[str | None]) -> Tensor:
    """[N, 2] int64: label and title of each item as numbers, -1 where unknown; items that share one match."""
    return torch.tensor([_numbered(labels), _numbered(titles)]).T


def _numbered(values: Sequence[str | None]) -> list[int]:
    """Equal values as equal numbers, unknown ones as -1."""
    numbers: dict[str, int] = {}
    return [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]


class AnchorSteps:
    """Batch sampler of a whole run: for step s, one slice a process of the anchors of s, in shuffled epochs.

    Args:
        items: number of items.
        anchors_per_batch: anchors of all processes together.
        seed: shuffles.
        steps: optimizer steps of the run.
        world_size: processes.

    Raises:
        FieldmarkError: more anchors than items, or a batch that the processes cannot share.
    """

    def __init__(self, items: int, anchors_per_batch: int, *, seed: int, steps: int, world_size: int = 1) -> None:
        if not 1 <= anchors_per_batch <= items:
            raise FieldmarkError(f"{anchors_per_batch} anchors a batch were asked for; there are {items} items")
        if anchors_per_batch % world_size:
            raise FieldmarkError(
                f"a batch of {anchors_per_batch} anchors cannot be shared by {world_size} processes; give a multiple"
            )
        self.items, self.anchors, self.seed, self.steps, self.world_size = (
            items, anchors_per_batch, seed, steps, world_size,
        )  # fmt: skip
        self.batch_size = anchors_per_batch // world_size
        self.steps_per_epoch = max(1, items // anchors_per_batch)
        self.drop_last = True

    def global_batch(self, step: int) -> list[int]:
        """Anchors of a step, of all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = stable_random(self.seed, epoch, _ORDER).permutation(self.items)
        return order[place * self.anchors : (place + 1) * self.anchors].tolist()

    def table(self) -> dict[str, list[int]]:
        """`item` and `step` of every anchor of the run, in order: the rows that the batches are ranges of."""
        batches = [self.global_batch(step) for step in range(self.steps)]
        return {
            "item": [item for batch in batches for item in batch],
            "step": [step for step in range(self.steps) for _ in range(self.anchors)],
        }

    def __len__(self) -> int:
        return self.steps * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.steps * self.anchors, self.batch_size):
            yield list(range(start, start + self.batch_size))
