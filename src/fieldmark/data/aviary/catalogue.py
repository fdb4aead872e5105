"""The aviary as a catalogue: uris, titles, rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.data.aviary.drawing import SIZE, Drawing, draw, draw_photo
from fieldmark.data.aviary.species import ATTRIBUTES, PARTS, Species, species, species_named, stable_generator
from fieldmark.errors import FieldmarkError

_URI = re.compile(r"aviary://([a-z]+)/([a-z-]+)/(\d+)")

# the order in which a title names marks
_ORDER = (
    "body_shape", "crown_colour", "eye_ring", "bill_shape", "bill_colour", "breast_pattern", "breast_colour",
    "back_colour", "wing_bars", "tail_shape", "tail_tip", "leg_colour",
)  # fmt: skip
# the words of a title; {} is the attribute's value
_PHRASES = {
    "body_shape": "{} body",
    "crown_colour": "{} crown",
    "bill_shape": "{} bill",
    "bill_colour": "{} bill",
    "breast_colour": "{} breast",
    "breast_pattern": "{} breast",
    "back_colour": "{} back",
    "tail_shape": "{} tail",
    "tail_tip": "{} tail tip",
    "leg_colour": "{} legs",
}
_WING_BARS = {"none": "plain wings", "one": "one wing bar", "two": "two wing bars", "patch": "a wing patch"}
_ADJECTIVES = {"bib": "bibbed", "spoon": "spoon-shaped"}
_TOGETHER = (("bill_shape", "bill_colour"), ("breast_pattern", "breast_colour"))
_FORMS = ("Bird with {}", "Small bird, {}", "Photo of a bird with {}", "A perched bird: {}", "Wild bird showing {}")


def uri_of(species: Species, seed: int, split: str) -> str:
    """``aviary://<split>/<slug>/<seed>``, which ``draw_uri`` draws."""
    return f"aviary://{split}/{species.slug}/{seed}"


def draw_uri(uri: str, size: int = SIZE) -> Image.Image:
    """The photo that an ``aviary://<split>/<slug>/<seed>`` uri names: RGB, ``size`` x ``size``.

    Any species may be drawn under any split: the split decides whether the background follows the species' habitat.

    Raises:
        FieldmarkError: the uri has another form, or names an unknown split or species.
    """
    one, seed, split = _parse(uri)
    return draw_photo(one, seed, split=split, size=size)


def draw_with_masks_uri(uri: str, size: int = SIZE) -> Drawing:
    """As ``draw_uri``, with the masks of the parts that carry each attribute."""
    one, seed, split = _parse(uri)
    return draw(one, seed, split=split, size=size)


def species_of_uri(uri: str) -> Species:
    """The species that a uri shows."""
    return _parse(uri)[0]


def _parse(uri: str) -> tuple[Species, int, str]:
    match = _URI.fullmatch(uri)
    if match is None or match[1] not in PARTS:
        raise FieldmarkError(
            f"{uri!r} is no aviary photo; expected aviary://SPLIT/SPECIES/NUMBER, SPLIT one of {', '.join(PARTS)}."
        )
    return species_named(match[2]), int(match[3]), match[1]


def aviary_rows(part: str, photos_per_species: int) -> list[dict[str, Any]]:
    """Rows of the catalogue, species by species.

    Args:
        part: ``"teacher"``, ``"train"`` or ``"test"``. Rows of the teacher have the split "train".
        photos_per_species: photos 0 to this number of each species.

    Returns:
        Dicts with the catalogue's columns; ``image`` is an ``aviary://`` uri, ``attributes`` names all marks, ``title``
        only three to five of them.
    """
    if photos_per_species < 1:
        raise FieldmarkError(f"The aviary was asked for {photos_per_species} photos a species; ask for 1 or more.")
    return [_row(one, part, seed) for one in species(part) for seed in range(photos_per_species)]


def _row(one: Species, part: str, seed: int) -> dict[str, Any]:
    return {
        "item_id": f"aviary-{part}-{one.slug}-{seed:04d}",
        "image": uri_of(one, seed, part),
        "label": one.name,
        "title": title_of(one, stable_generator("aviary", "title", one.name, seed, part)),
        "attributes": dict(one.attributes),
        "split": "test" if part == "test" else "train",
        "role": "both",
    }


def title_of(one: Species, rng: np.random.Generator) -> str:
    """A seller's title: three to five marks of the species in words, the others left out."""
    count = int(rng.integers(3, 6))
    names = list(ATTRIBUTES)
    return describe(
        one.attributes, [names[i] for i in rng.permutation(len(names))[:count]], int(rng.integers(len(_FORMS)))
    )


def describe(attributes: dict[str, str], names: list[str], form: int = 0) -> str:
    """Puts the named marks into words, "Bird with red crown, hooked black bill and two wing bars"."""
    named = [name for name in _ORDER if name in names]
    phrases = []
    for name in named:
        pair = next((pair for pair in _TOGETHER if name in pair and set(pair) <= set(named)), None)
        if pair is None:
            phrases.append(_phrase(name, attributes[name]))
        elif name == pair[0]:
            phrases.append(
                f"{_ADJECTIVES.get(attributes[name], attributes[name])} {_phrase(pair[1], attributes[pair[1]])}"
            )
    words = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return _FORMS[form].format(words)


def _phrase(name: str, value: str) -> str:
    if name == "eye_ring":
        return "no eye ring" if value == "none" else f"{value} eye ring"
    if name == "wing_bars":
        return _WING_BARS[value]
    return _PHRASES[name].format(_ADJECTIVES.get(value, value))
