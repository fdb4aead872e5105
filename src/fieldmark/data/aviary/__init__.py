"""The aviary: drawn birds whose species differ in field marks, a catalogue whose truth is exact.

A photo is a function of (species, seed, split); the truth is the attributes of each species and a mask of the part that
carries each attribute.
"""

from __future__ import annotations

from fieldmark.data.aviary.catalogue import (
    aviary_rows,
    describe,
    draw_uri,
    draw_with_masks_uri,
    species_of_uri,
    title_of,
    uri_of,
)
from fieldmark.data.aviary.drawing import Drawing, draw, draw_photo
from fieldmark.data.aviary.sheets import contact_sheet
from fieldmark.data.aviary.species import (
    ATTRIBUTES,
    HABITATS,
    PARTS,
    Species,
    marks_that_differ,
    one_mark_pairs,
    species,
    species_named,
)

__all__ = [
    "ATTRIBUTES",
    "HABITATS",
    "PARTS",
    "Drawing",
    "Species",
    "aviary_rows",
    "contact_sheet",
    "describe",
    "draw",
    "draw_photo",
    "draw_uri",
    "draw_with_masks_uri",
    "marks_that_differ",
    "one_mark_pairs",
    "species",
    "species_named",
    "species_of_uri",
    "title_of",
    "uri_of",
]
