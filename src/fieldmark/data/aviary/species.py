"""Which birds live in the aviary: their field marks, names and habitats.

Species come in families of look-alikes: a founder and five relatives that differ from it in one or two marks, so that
telling relatives apart takes the marks and not the general impression. Everything here is a pure function of constants.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from fieldmark.errors import FieldmarkError

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body_shape": ("slim", "round", "long-necked", "large-headed"),
    "bill_shape": ("conical", "straight", "hooked", "curved", "spoon"),
    "bill_colour": ("black", "red", "yellow", "blue", "white"),
    "crown_colour": ("black", "white", "red", "yellow", "blue", "green", "brown"),
    "eye_ring": ("none", "white", "yellow", "red", "blue"),
    "breast_pattern": ("plain", "spotted", "streaked", "banded", "bib"),
    "breast_colour": ("white", "yellow", "red", "blue", "green", "brown"),
    "back_colour": ("black", "brown", "green", "blue", "red", "grey"),
    "wing_bars": ("none", "one", "two", "patch"),
    "tail_shape": ("square", "forked", "round", "pointed", "long"),
    "tail_tip": ("black", "white", "red", "yellow", "blue"),
    "leg_colour": ("black", "red", "yellow", "blue", "green"),
}
HABITATS = ("sky", "forest", "water", "reeds", "snow", "meadow", "desert")
PARTS = ("teacher", "train", "test")

# Six species each. The teacher's world is wide, as a public model's is: from 40 families a small model learned the
# species by heart and read nothing off birds it had not seen.
_FAMILIES = {"train": 20, "test": 20, "teacher": 400}
_MARKS_BETWEEN_FOUNDERS = 7  # of different parts, and inside the student's parts
_MARKS_BETWEEN_TEACHER_FOUNDERS = 5

_ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "h", "k", "l", "m", "n", "p", "qu", "r", "s", "st", "t", "tr", "v", "w")
_VOWELS = ("a", "e", "i", "o", "u")
_PLACE_ENDINGS = ("dal", "mar", "len", "ros", "vik", "nor", "sted", "ham", "by", "lund", "fell", "wick")
_BIRD_ENDINGS = ("rin", "let", "pit", "wing", "ler", "skip", "bin", "chat", "quill", "del", "per", "link")


@dataclass(frozen=True)
class Species:
    """One made-up kind of bird: its marks decide the drawing, its habitat only where training photos were taken."""

    name: str
    attributes: dict[str, str]
    habitat: str

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def slug(self) -> str:
        """The name as it stands in an ``aviary://`` uri."""
        return self.name.lower().replace(" ", "-")


def stable_generator(*key: object) -> np.random.Generator:
    """A generator that depends on the printed form of ``key`` alone, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def species(part: str) -> list[Species]:
    """The species of one part, relatives side by side.

    Args:
        part: ``"train"`` or ``"test"`` (the student's classes, disjoint) or ``"teacher"`` (in neither of them).

    Raises:
        FieldmarkError: the part is unknown.
    """
    if part not in PARTS:
        raise FieldmarkError(f"The aviary has no part {part!r}; the parts are {', '.join(PARTS)}.")
    return list(_all_species()[part])


def species_named(slug: str) -> Species:
    """The species with this slug (``"tardal-wopit"``), whatever its part."""
    found = _by_slug().get(slug)
    if found is None:
        example = next(iter(_by_slug()))
        raise FieldmarkError(f"The aviary has no species {slug!r}; a slug looks like {example!r}, see species(part).")
    return found


def marks_that_differ(a: Species, b: Species) -> list[str]:
    """Names of the attributes in which two species differ, in the order of ``ATTRIBUTES``."""
    return [name for name in ATTRIBUTES if a.attributes[name] != b.attributes[name]]


def one_mark_pairs(part: str) -> list[tuple[Species, Species, str]]:
    """All pairs of one part that differ in exactly one mark, with that mark's name."""
    members = species(part)
    columns = [np.array([one.attributes[name] for one in members]) for name in ATTRIBUTES]
    pairs = []
    for i, one in enumerate(members):
        differ = np.stack([column[i] != column[i + 1 :] for column in columns])
        for j in np.flatnonzero(differ.sum(axis=0) == 1):
            pairs.append((one, members[i + 1 + j], list(ATTRIBUTES)[int(differ[:, j].argmax())]))
    return pairs


@cache
def _by_slug() -> dict[str, Species]:
    return {one.slug: one for part in PARTS for one in _all_species()[part]}


@cache
def _all_species() -> dict[str, tuple[Species, ...]]:
    """Families are drawn in one stream for all parts, so that none of them can resemble a family of another part."""
    rng = stable_generator("aviary", "species", 1)
    founders: list[tuple[dict[str, str], int]] = []
    families_used: set[str] = set()
    places_used: set[str] = set()
    parts: dict[str, tuple[Species, ...]] = {}
    for part, count in _FAMILIES.items():
        members: list[Species] = []
        for index in range(count):
            founder = _founder(rng, founders)
            founders.append(
                (founder, _MARKS_BETWEEN_FOUNDERS if part != "teacher" else _MARKS_BETWEEN_TEACHER_FOUNDERS)
            )
            family_name = _new_word(rng, _BIRD_ENDINGS, families_used)
            if part == "teacher":
                places_used = set()  # there are fewer place names than the teacher's species
            for marks in _family(rng, founder, index):
                name = f"{_new_word(rng, _PLACE_ENDINGS, places_used)} {family_name}"
                members.append(Species(name, marks, HABITATS[rng.integers(len(HABITATS))]))
        parts[part] = tuple(members)
    return parts


def _founder(rng: np.random.Generator, others: list[tuple[dict[str, str], int]]) -> dict[str, str]:
    # Relatives lie at most two marks from their founder: three marks remain between families of different parts.
    for _ in range(100_000):
        marks = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        if all(sum(marks[name] != other[name] for name in ATTRIBUTES) >= least for other, least in others):
            return marks
    raise AssertionError("the attribute table is too small for the number of families")


def _family(rng: np.random.Generator, founder: dict[str, str], index: int) -> list[dict[str, str]]:
    """Six look-alikes with seven pairs at exactly one mark.

    a, b, c rotate through the attributes with the family's index, so that every mark separates some pairs of each part.
    """
    names = list(ATTRIBUTES)
    a, b, c = (names[(index * 3 + step) % len(names)] for step in range(3))
    first, second = _other_values(rng, founder, a, 2)
    (other_b,) = _other_values(rng, founder, b, 1)
    (other_c,) = _other_values(rng, founder, c, 1)
    return [
        founder,
        founder | {a: first},
        founder | {a: second},
        founder | {b: other_b},
        founder | {c: other_c},
        founder | {a: first, b: other_b},
    ]


def _other_values(rng: np.random.Generator, marks: dict[str, str], name: str, count: int) -> list[str]:
    values = [value for value in ATTRIBUTES[name] if value != marks[name]]
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _new_word(rng: np.random.Generator, endings: tuple[str, ...], used: set[str]) -> str:
    while True:
        syllables = (parts[rng.integers(len(parts))] for parts in (_ONSETS, _VOWELS, endings))
        word = "".join(syllables).capitalize()
        if word not in used:
            used.add(word)
            return word
