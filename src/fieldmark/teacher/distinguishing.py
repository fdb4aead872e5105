"""Which attributes tell an item from its look-alikes, as far as a catalogue knows: the cold start's own examples.

AFMRL (arXiv 2604.20135, appendix D) asks a 72 B model for the attributes that set a product apart from a hard negative.
Where a catalogue has an attribute column, the rule below answers the same question without one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

LOOKALIKES = 5
_CELLS_AT_ONCE = 2**24


def distinguishing_attributes(
    classes: Sequence[Mapping[str, str | None]], lookalikes: int = LOOKALIKES
) -> list[list[str]]:
    """For each class the names of the attributes that tell it from its look-alikes, the most telling first.

    The look-alikes of a class are, of those that differ from it at all, the ones that share the most values with it (of
    equal ones the first). A name is as telling as the number of them that have another value; names in which none
    differs are left out, and a value that one side lacks differs from nothing. Of equally telling names the first one
    in the catalogue comes first. Time grows with the square of the number of classes: 10,000 take ten seconds.

    Args:
        classes: attributes of each class; None or no entry where a value is unknown.
        lookalikes: how many each class is compared with.

    Returns:
        Names for each class; none for a class from which none differs.
    """
    names = list(dict.fromkeys(name for row in classes for name in row))
    codes = _codes(classes, names)
    found: list[list[str]] = []
    block = max(1, _CELLS_AT_ONCE // max(1, len(codes)))
    for start in range(0, len(codes), block):
        own = codes[start : start + block]
        others = codes[_nearest(own, codes, min(lookalikes, len(codes)))]
        differ = _differ(others, own[:, None]).sum(1)
        order = np.argsort(-differ, axis=1, kind="stable")
        found += [[names[a] for a in row if count[a]] for row, count in zip(order, differ, strict=True)]
    return found


def held_back(attributes: Mapping[str, str], title: str | None) -> list[str]:
    """Names of the attributes whose value an item's title does not say.

    A title says a value where it has it as a word of its own, as often as the item has attributes of that value: "a red
    crown" says nothing sure of a bird whose crown and breast are red.
    """
    if not title:
        return list(attributes)
    owners = Counter(value.casefold() for value in attributes.values())
    said = {value for value, count in owners.items() if _occurrences(value, title.casefold()) >= count}
    return [name for name, value in attributes.items() if value.casefold() not in said]


def key_attributes(
    names: Sequence[str], attributes: Mapping[str, str | None], title: str | None, most: int
) -> dict[str, str]:
    """What should be answered of an item: its values of the first `most` of `names` that its title holds back.

    What the title says is known already to whoever reads title and attributes together; it counts only where nothing
    else would be left.

    Args:
        names: of `distinguishing_attributes`.
        attributes: of the item.
        title: of the item.
        most: attributes at most.
    """
    own = {name: value for name, value in attributes.items() if value}
    telling = [name for name in names if name in own]
    untold = set(held_back(own, title))
    chosen = [name for name in telling if name in untold] or telling
    return {name: own[name] for name in chosen[:most]}


def _occurrences(value: str, title: str) -> int:
    """How often a title has a value as a word of its own; in "long-necked" there is no "long"."""
    return len(re.findall(rf"(?<![\w-]){re.escape(value)}(?![\w-])", title))


def _codes(classes: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> np.ndarray:
    """[classes, names] a number for each value, -1 where it is unknown."""
    codes = np.full((len(classes), len(names)), -1, dtype=np.int32)
    for column, name in enumerate(names):
        known: dict[str, int] = {}
        for row, attributes in enumerate(classes):
            if value := attributes.get(name):
                codes[row, column] = known.setdefault(value, len(known))
    return codes


def _nearest(own: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """[B, count] places in `codes` that share the most values with each of `own`, those that differ in none last."""
    shared = np.zeros((len(own), len(codes)), dtype=np.int64)
    differs = np.zeros(shared.shape, dtype=bool)
    for mine, column in zip(own.T[:, :, None], codes.T, strict=True):
        shared += (mine == column) & (column >= 0)
        differs |= _differ(mine, column)
    shared[~differs] = -1  # itself among them
    order = len(codes) * shared - np.arange(len(codes))  # no two are equal: one result, however it is found
    return np.argpartition(-order, count - 1, axis=1)[:, :count]


def _differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where both values are known and not the same."""
    return (one != other) & (one >= 0) & (other >= 0)
