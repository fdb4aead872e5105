"""Writes contact sheets of the aviary, to be looked at: can a person see every mark, and nothing but the marks?

    uv run python benchmarks/aviary_sheets.py --out sheets/

Sheets: every value of each attribute on one bird; several photos of some species; look-alikes that differ in one mark;
the part masks; and the drawing speed on the way.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fieldmark.data import aviary


def values_of(attribute: str, photos: int) -> Image.Image:
    """One row for each of several birds and light, one column a value: all else on the bird is equal."""
    items = []
    for photo in range(photos):
        base = aviary.species("train")[photo * 13]
        for value in aviary.ATTRIBUTES[attribute]:
            bird = replace(base, attributes={**base.attributes, attribute: value})
            image = aviary.draw_photo(bird, photo, split="test", nuisance_key="values")
            items.append((image, f"{attribute}: {value}"))
    return aviary.contact_sheet(items, len(aviary.ATTRIBUTES[attribute]))


def photos_of(part: str, count: int, photos: int) -> Image.Image:
    """One row a species."""
    split = "train" if part == "train" else "test"
    members = aviary.species(part)[:: max(1, len(aviary.species(part)) // count)][:count]
    items = [
        (aviary.draw_photo(one, k, split=split), f"{one.name} ({one.habitat})")
        for one in members
        for k in range(photos)
    ]
    return aviary.contact_sheet(items, photos)


def lookalikes(part: str, count: int) -> Image.Image:
    """Pairs that differ in one mark, each in two photos of its own."""
    pairs = aviary.one_mark_pairs(part)
    items = []
    for a, b, mark in pairs[:: max(1, len(pairs) // count)][:count]:
        for one, seed in ((a, 0), (b, 1)):
            caption = f"{mark}: {one.attributes[mark]} - {one.name}"
            items.append((aviary.draw_photo(one, seed, split="test"), caption))
    return aviary.contact_sheet(items, 6)


def masks_of(seed: int) -> Image.Image:
    """A photo and, for each attribute, the photo dimmed outside the attribute's mask."""
    items = []
    for one in aviary.species("test")[seed::40]:
        drawing = aviary.draw(one, seed, split="test")
        pixels = np.asarray(drawing.image)
        items.append((drawing.image, one.name))
        for name, mask in drawing.masks.items():
            lit = np.where(mask[:, :, None], pixels, pixels // 5)
            items.append((Image.fromarray(lit.astype(np.uint8)), f"{name}: {one.attributes[name]}"))
    return aviary.contact_sheet(items, 1 + len(aviary.ATTRIBUTES), cell=160)


def photos_per_second(count: int = 300) -> tuple[float, float]:
    """(without masks, with masks) per second of processor time, so that a busy machine does not change the number."""
    members = aviary.species("train")
    speeds = []
    for function in (aviary.draw_photo, aviary.draw):
        function(members[0], 0)
        start = time.process_time()
        for k in range(count):
            function(members[k % len(members)], k)
        speeds.append(count / (time.process_time() - start))
    return speeds[0], speeds[1]


def main() -> None:
    """Writes all sheets and prints the speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for attribute in aviary.ATTRIBUTES:
        values_of(attribute, 3).save(out / f"values_{attribute}.png")
    for part in aviary.PARTS:
        photos_of(part, 5, 7).save(out / f"photos_{part}.png")
        lookalikes(part, 15).save(out / f"lookalikes_{part}.png")
    masks_of(3).save(out / "masks.png")
    plain, masked = photos_per_second()
    print(f"{plain:.0f} photos/s without masks, {masked:.0f} with masks, one core")


if __name__ == "__main__":
    main()
