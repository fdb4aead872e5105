"""Winoground-type groups of the aviary: two birds that differ in one mark, and the two captions that say so."""

from __future__ import annotations

import numpy as np

from fieldmark.data.aviary.catalogue import describe, uri_of
from fieldmark.data.aviary.species import ATTRIBUTES, Species, one_mark_pairs, stable_generator
from fieldmark.data.captions import Group
from fieldmark.errors import FieldmarkError

_FORMS = 5
# Catalogues number a species' photos from 0: from here on none of them is shown again.
_FIRST_PHOTO = 1_000_000


def aviary_groups(part: str, count: int, seed: int = 0) -> list[Group]:
    """Groups of two species that differ in exactly one mark, a photo of each, and a caption of each.

    Both captions name that mark and two or three others, which the two birds share, in the same form of words; the
    category is the mark's name. The marks take turns, so none has two groups more than another, and so do the pairs of
    a mark. All photos are drawn as test photos are, with a background that does not depend on the species, and none of
    them is in a catalogue.

    Args:
        part: ``"teacher"``, ``"train"`` or ``"test"``: whose species are shown.
        count: groups.
        seed: chooses pairs, photos and words; of one seed, fewer groups are the first ones of more.

    Raises:
        FieldmarkError: an unknown part, or a count below 1.
    """
    if count < 1:
        raise FieldmarkError(f"{count} aviary groups were asked for; expected at least 1")
    rng = stable_generator("aviary", "groups", part, seed)
    pairs: dict[str, list[tuple[Species, Species]]] = {}
    for one, other, mark in one_mark_pairs(part):
        pairs.setdefault(mark, []).append((one, other))
    marks = [name for name in ATTRIBUTES if name in pairs]
    marks = [marks[place] for place in rng.permutation(len(marks))]
    pairs = {mark: [pairs[mark][place] for place in rng.permutation(len(pairs[mark]))] for mark in marks}
    groups = []
    for number in range(count):
        turn, place = divmod(number, len(marks))
        mark = marks[place]
        groups.append(_group(pairs[mark][turn % len(pairs[mark])], mark, _FIRST_PHOTO + 2 * number, rng))
    return groups


def _group(pair: tuple[Species, Species], mark: str, photo: int, rng: np.random.Generator) -> Group:
    one, other = pair if rng.random() < 0.5 else pair[::-1]
    shared = [name for name in ATTRIBUTES if name != mark]
    named = [mark, *(shared[place] for place in rng.permutation(len(shared))[: rng.integers(2, 4)])]
    form = int(rng.integers(_FORMS))
    return Group(
        uri_of(one, photo, "test"),
        uri_of(other, photo + 1, "test"),
        describe(one.attributes, named, form),
        describe(other.attributes, named, form),
        mark,
    )
