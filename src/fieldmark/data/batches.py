"""Samplers as pure functions of (seed, epoch, step): nothing is remembered, so a resumed run draws what it would have.

Every rank computes the same global batch and takes its own contiguous part, so the parts of all ranks, one after the
other, are the batch of a single process.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fieldmark.errors import FieldmarkError

PAIR_KINDS = ("balanced", "same", "lookalike", "random")
_CLASSES, _ITEMS, _PAIRS = range(3)  # random streams that must not share a seed

Labels = Sequence[Hashable] | np.ndarray | torch.Tensor


def class_balanced_batch(
    labels: Labels,
    classes_per_batch: int,
    items_per_class: int,
    *,
    seed: int,
    epoch: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[int]:
    """Indices of one batch of `classes_per_batch` classes with `items_per_class` items each, class by class.

    Within an epoch every class is visited once before any is visited again, and every item of a class is taken once
    before any is taken again. A batch never holds a class twice, nor an item twice, unless its class has fewer than
    `items_per_class` items: then each of them occurs as evenly as possible.

    Args:
        labels: the class of every item.
        classes_per_batch: classes in the global batch.
        items_per_class: items of each of them.
        seed, epoch, step: numbers from 0; the batch depends on nothing else.
        rank, world_size: this process's part; the size of the global batch must be a multiple of `world_size`.

    Returns:
        Indices into `labels`: the whole batch for one process, else the part of `rank`.
    """
    groups = _groups(labels)
    _check_batch(groups, classes_per_batch, items_per_class, rank, world_size)
    batch = _batch(groups, classes_per_batch, items_per_class, (seed, epoch, step))
    return _part_of_rank(batch, rank, world_size)


def sample_pairs(
    labels: Labels,
    count: int,
    *,
    seed: int,
    epoch: int,
    step: int,
    kind: str = "balanced",
    centroids: Mapping[Any, Any] | None = None,
    neighbours: Mapping[Any, Sequence[Any]] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[tuple[int, int, bool]]:
    """Pairs of different items, in random order, with a flag that says whether they are of one class.

    No pair occurs twice as long as there are others. Items take turns at being the first of a pair.

    Args:
        labels: the class of every item, of a batch or of a catalogue.
        count: pairs of all ranks together; a multiple of `world_size`.
        seed, epoch, step: numbers from 0; the pairs depend on nothing else.
        kind: `same` class; `lookalike`: of different classes, the second being the nearest of the first;
            `random`: any two items; `balanced`: half same, half different (of an odd count the odd one alternates with
            the step). The different half are look-alikes where any class has one by `centroids` or `neighbours`, else
            of random classes.
        centroids: a vector for every class; the nearest class has the greatest cosine (`class_centroids` makes them).
        neighbours: the classes that count as look-alikes of a class, in place of `centroids`.
        rank, world_size: this process's part.

    Returns:
        (index, index, same class) into `labels`.
    """
    if kind not in PAIR_KINDS:
        raise FieldmarkError(f"pairs of kind {kind!r} were asked for; expected one of {', '.join(PAIR_KINDS)}")
    if count < 0 or count % world_size:
        raise FieldmarkError(f"{count} pairs were asked for; expected a multiple of the {world_size} processes")
    draw = _PairDraw(labels, centroids, neighbours, stable_random(seed, epoch, _PAIRS, step))
    kinds = [kind] * count
    if kind == "balanced":
        n_same = (count + step % 2) // 2
        different = "lookalike" if draw.has_lookalikes else "different"
        kinds = draw.shuffled(["same"] * n_same + [different] * (count - n_same))
    elif kind == "lookalike" and not draw.has_lookalikes:
        raise FieldmarkError("look-alike pairs were asked for, but no class has one among these labels; give centroids")
    return _part_of_rank([draw.pair(one) for one in kinds], rank, world_size)


def class_centroids(labels: Labels, embeddings: Any) -> dict[Hashable, np.ndarray]:
    """Mean vector of every class, of embeddings [N, D] (numpy or torch) in the order of `labels`."""
    vectors = embeddings.detach().float().cpu().numpy() if isinstance(embeddings, torch.Tensor) else embeddings
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise FieldmarkError(f"embeddings of shape {vectors.shape} for {len(labels)} labels; expected one row a label")
    return {label: vectors[items].mean(axis=0) for label, items in _groups(labels).items()}


def stable_random(*key: int) -> np.random.Generator:
    """A generator that depends on the numbers alone: seed, epoch, step, and whatever tells streams apart."""
    if min(key) < 0:
        raise FieldmarkError(f"seed, epoch and step were {key}; expected numbers from 0")
    return np.random.default_rng(key)


def _values(labels: Labels) -> list[Hashable]:
    return labels.tolist() if isinstance(labels, (np.ndarray, torch.Tensor)) else list(labels)


def _groups(labels: Labels) -> dict[Hashable, np.ndarray]:
    """Indices of every class, classes in the order of their first item."""
    found: dict[Hashable, list[int]] = {}
    for index, label in enumerate(_values(labels)):
        found.setdefault(label, []).append(index)
    if None in found:
        raise FieldmarkError(f"item {found[None][0]} has no label; expected labelled items only, so filter them first")
    return {label: np.array(items) for label, items in found.items()}


def _check_batch(groups: dict[Hashable, np.ndarray], classes: int, items: int, rank: int, world_size: int) -> None:
    if classes < 1 or items < 1:
        raise FieldmarkError(f"a batch of {classes} classes with {items} items each was asked for; expected 1 or more")
    if classes > len(groups):
        raise FieldmarkError(
            f"a batch of {classes} classes was asked for, the labels have {len(groups)}; lower classes_per_batch"
        )
    if (classes * items) % world_size or not 0 <= rank < world_size:
        raise FieldmarkError(
            f"a batch of {classes * items} items cannot be shared by {world_size} processes (rank {rank}); "
            "expected a multiple, and ranks from 0"
        )


def _part_of_rank(whole: list[Any], rank: int, world_size: int) -> list[Any]:
    share = len(whole) // world_size
    return whole[rank * share : (rank + 1) * share]


def _batch(
    groups: dict[Hashable, np.ndarray], classes_per_batch: int, items_per_class: int, key: tuple[int, int, int]
) -> list[int]:
    seed, epoch, step = key
    items_of = list(groups.values())
    chosen, visits = _deal(len(items_of), classes_per_batch, step, (seed, epoch, _CLASSES))
    batch: list[int] = []
    for index, visit in zip(chosen.tolist(), visits.tolist()):
        items = items_of[index]
        taken, _ = _deal(len(items), items_per_class, visit, (seed, epoch, _ITEMS, index))
        batch += items[taken].tolist()
    return batch


def _deal(n: int, take: int, turn: int, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The cards that turn number `turn` gets, when `n` shuffled cards are dealt `take` a turn, round after round.

    Each round deals every card once, and with n >= take no turn gets a card twice. Returns cards and round of each.
    """
    if n < take:  # every turn gets all cards, as evenly as possible
        shuffles = [stable_random(*key, turn, again).permutation(n) for again in range(-(-take // n))]
        return np.concatenate(shuffles)[:take], np.full(take, turn)
    places = turn * take + np.arange(take)
    rounds = places // n
    if n < 2 * take:  # two rounds meet in nearly every turn: keep one order, so that no card comes twice
        return stable_random(*key).permutation(n)[places % n], rounds
    orders = {number: _round_order(n, take, number, key) for number in set(rounds.tolist())}
    return np.array([orders[number][place % n] for number, place in zip(rounds.tolist(), places.tolist())]), rounds


def _round_order(n: int, take: int, number: int, key: tuple[int, ...]) -> np.ndarray:
    """Order of one round, n >= 2 * take. Its first cards share a turn with the last of the round before: all differ."""
    order = stable_random(*key, number).permutation(n)
    carried = (number * n) % take
    if not carried:
        return order
    # what is moved lies within the first `take` cards of a round, so these last cards are where they were shuffled to
    last = stable_random(*key, number - 1).permutation(n)[-carried:]
    first = order[~np.isin(order, last)][: take - carried]
    return np.concatenate([first, order[~np.isin(order, first)]])


def _unit_rows(names: list[Hashable], centroids: Mapping[Any, Any]) -> np.ndarray:
    missing = [name for name in names if name not in centroids]
    if missing:
        raise FieldmarkError(f"there is no centroid for class {missing[0]!r}; expected one for every class")
    vectors = np.stack([np.asarray(centroids[name], dtype=np.float64) for name in names])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class _PairDraw:
    """One call of `sample_pairs`: its random stream, whose turn it is, and the pairs drawn so far."""

    def __init__(
        self,
        labels: Labels,
        centroids: Mapping[Any, Any] | None,
        neighbours: Mapping[Any, Sequence[Any]] | None,
        rng: np.random.Generator,
    ) -> None:
        self.rng = rng
        self.groups = _groups(labels)
        self.label_of = _values(labels)
        self.turns = rng.permutation(len(self.label_of)).tolist()
        self.used: dict[int, set[int]] = {}
        self.near: dict[Hashable, list[Hashable]] | None = None
        self.names, self.vectors = list(self.groups), np.empty((0, 0))
        if neighbours is not None:
            present = {
                name: [other for other in neighbours.get(name, ()) if other in self.groups and other != name]
                for name in self.names
            }
            self.near = {name: others for name, others in present.items() if others}
        elif centroids is not None and len(self.names) > 1:
            self.vectors = _unit_rows(self.names, centroids)
        self.has_lookalikes = bool(self.near) or len(self.vectors) > 1

    def lookalikes(self, name: Hashable) -> list[Hashable]:
        """Classes that count as look-alikes of one; of centroids the nearest, found when asked for."""
        if self.near is not None or not len(self.vectors):
            return (self.near or {}).get(name, [])
        own = self.names.index(name)
        similarity = self.vectors @ self.vectors[own]
        similarity[own] = -np.inf
        return [self.names[int(similarity.argmax())]]

    def shuffled(self, kinds: list[str]) -> list[str]:
        return [kinds[place] for place in self.rng.permutation(len(kinds)).tolist()]

    def pair(self, kind: str) -> tuple[int, int, bool]:
        first, second = self._fresh_pair(kind)
        self.used.setdefault(first, set()).add(second)
        self.used.setdefault(second, set()).add(first)
        if self.rng.random() < 0.5:
            first, second = second, first
        return first, second, self.label_of[first] == self.label_of[second]

    def _fresh_pair(self, kind: str) -> tuple[int, int]:
        repeated = None  # a pair that was drawn before, taken where no other is left
        for place, first in enumerate(self.turns):
            partners = self._partners(kind, first)
            fresh = np.setdiff1d(partners, list(self.used[first])) if first in self.used else partners
            if len(fresh):
                self.turns.append(self.turns.pop(place))
                return first, int(self.rng.choice(fresh))
            if len(partners) and repeated is None:
                repeated = place, int(self.rng.choice(partners))
        if repeated is None:
            raise FieldmarkError(
                f"no pair of kind {kind!r} in {len(self.label_of)} items of {len(self.groups)} classes; "
                "expected a class with two items for same pairs, two classes for the others"
            )
        first = self.turns.pop(repeated[0])
        self.turns.append(first)
        return first, repeated[1]

    def _partners(self, kind: str, first: int) -> np.ndarray:
        own = self.label_of[first]
        if kind == "same":
            return np.setdiff1d(self.groups[own], [first])
        if kind == "random":
            return np.setdiff1d(np.arange(len(self.label_of)), [first])
        others = self.lookalikes(own) if kind == "lookalike" else [name for name in self.names if name != own]
        return self.groups[others[int(self.rng.integers(len(others)))]] if others else np.empty(0, dtype=np.int64)
