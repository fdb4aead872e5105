"""Groups of two photos and two captions that must not be mixed up: where a catalogue's come from."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np

from fieldmark.data.aviary.groups import aviary_groups
from fieldmark.data.captions import Group, read_groups
from fieldmark.data.mining import folded
from fieldmark.errors import FieldmarkError

GROUPS = 240


def find_groups(source: str, rows: datasets.Dataset, path: str | None = None, *, split: str = "test") -> list[Group]:
    """The groups to measure on: of a file, of the aviary, else pairs of items that differ in one attribute.

    Args:
        source: the catalogue.
        rows: its rows that are measured on.
        path: a JSONL file, see `read_groups`.
        split: what these rows are called in the catalogue; the aviary's groups show the species of this split.

    Returns:
        Groups; none where the catalogue has no attributes or no such pairs.
    """
    if path is not None:
        return read_groups(Path(path))
    if source.partition(":")[0] == "aviary":
        return aviary_groups(split, GROUPS)
    return attribute_groups(rows, GROUPS)


def attribute_groups(rows: datasets.Dataset, count: int, seed: int = 0) -> list[Group]:
    """Pairs of items that differ in exactly one attribute, their own titles as captions, the attribute as category.

    Attributes take turns, an item stands in one group at most, and the titles of a group differ.

    Args:
        rows: items with titles and attributes; those without are left out.
        count: groups at most.
        seed: chooses pairs.
    """
    if count < 1:
        raise FieldmarkError(f"{count} groups were asked for; expected 1 or more")
    rng = np.random.default_rng(seed)
    items = [
        (image, title, {name: value for name, value in (attributes or {}).items() if value is not None})
        for image, title, attributes in zip(rows["image"], rows["title"], rows["attributes"], strict=True)
    ]
    items = [
        items[i] for i in rng.permutation(len(items)) if items[i][1] and items[i][2] and isinstance(items[i][0], str)
    ]
    names = sorted({name for _, _, attributes in items for name in attributes})
    found: dict[str, list[tuple[int, int]]] = {}
    for name in names:
        alike: dict[tuple, list[int]] = defaultdict(list)
        for i, (_, _, attributes) in enumerate(items):
            if name in attributes:
                alike[tuple(sorted((k, v) for k, v in attributes.items() if k != name))].append(i)
        found[name] = [pair for members in alike.values() for pair in _differing(members, items, name)]
    groups: list[Group] = []
    used: set[int] = set()
    while any(found.values()) and len(groups) < count:
        for name in [name for name in names if found[name]][: count - len(groups)]:
            one, other = found[name].pop()
            if used & {one, other}:
                continue
            used |= {one, other}
            (image_0, title_0, _), (image_1, title_1, _) = items[one], items[other]
            groups.append(Group(image_0, image_1, title_0, title_1, name))
    return groups


def _differing(members: list[int], items: list, name: str) -> list[tuple[int, int]]:
    """Neighbours in the (shuffled) order of `members` with other values of the attribute and other titles."""
    pairs = []
    for one, other in pairwise(members):
        (_, title, attributes), (_, other_title, others) = items[one], items[other]
        if attributes[name] != others[name] and folded(title) != folded(other_title):
            pairs.append((one, other))
    return pairs
