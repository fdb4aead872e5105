"""A contact sheet of a catalogue: the photos of a class side by side, its label above them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fieldmark.data.photos import open_photo

LINES, COLUMNS = 20, 8
CELL, GAP, TEXT, LETTERS = 112, 8, 32, 12  # pixels
MAX_BYTES = 4_000_000
INK, PAPER, FRAME = "#1c2024", "#ffffff", "#e3e5e8"


class _Block(NamedTuple):
    """A class on the sheet: where it starts, what it is called, its photos."""

    line: int
    column: int
    heading: str
    places: list[int]


def write_sheet(catalog: Dataset, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
    """Writes a PNG of at most 4 MB: classes evenly spread over the sorted labels, up to 8 photos of each.

    Args:
        catalog: rows whose photos can be read, at least one.
        path: file to write.
        progress: called with the number of classes that are drawn.
    """
    blocks = _blocks(catalog)
    height = TEXT + CELL + 2 * GAP
    sheet = Image.new("RGB", (GAP + COLUMNS * (CELL + GAP), GAP + (blocks[-1].line + 1) * height), PAPER)
    pen, font = ImageDraw.Draw(sheet), _font(LETTERS)
    for number, block in enumerate(blocks, start=1):
        left, top = GAP + block.column * (CELL + GAP), GAP + block.line * height
        width = len(block.places) * (CELL + GAP) - GAP
        pen.text((left, top + TEXT - 3), _two_lines(block.heading, width, pen, font), INK, font, anchor="ld", spacing=1)
        for place in block.places:
            photo = ImageOps.pad(open_photo(catalog[place]["image"]), (CELL, CELL), color=PAPER)
            sheet.paste(photo, (left, top + TEXT))
            pen.rectangle((left, top + TEXT, left + CELL - 1, top + TEXT + CELL - 1), outline=FRAME)
            left += CELL + GAP
        if progress is not None:
            progress(number)
    sheet.save(path)
    if path.stat().st_size > MAX_BYTES:
        sheet.quantize(256, Image.Quantize.FASTOCTREE).save(path)


def sheet_classes(catalog: Dataset) -> int:
    """How many classes the sheet of a catalogue shows."""
    return len(_blocks(catalog))


def _blocks(catalog: Dataset) -> list[_Block]:
    """As many classes as fit into `LINES` lines."""
    places: dict[str | None, list[int]] = {}
    for place, label in enumerate(catalog["label"][:]):
        places.setdefault(label, []).append(place)
    labels = sorted(places, key=lambda label: (label is None, label or ""))
    splits = catalog["split"][:]
    for count in range(min(len(labels), LINES * COLUMNS), 0, -1):
        blocks, line, column = [], 0, 0
        for label in (labels[number] for number in _spread(len(labels), count)):
            own = places[label]
            chosen = [own[number] for number in _spread(len(own), COLUMNS)]
            if column + len(chosen) > COLUMNS:
                line, column = line + 1, 0
            blocks.append(_Block(line, column, _heading(label, [splits[place] for place in own]), chosen))
            column += len(chosen)
        if line < LINES:
            break
    return blocks


def _heading(label: str | None, splits: Sequence[str | None]) -> str:
    counts = Counter(split or "no split" for split in splits)
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"{'no label' if label is None else label} ({parts})"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, most)).round()})


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of matplotlib, which has the letters of most alphabets."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _two_lines(text: str, width: int, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """Text broken at a blank into two lines of `width` pixels; what does not fit is cut."""
    words, first = text.split(), ""
    while words and pen.textlength(f"{first} {words[0]}".strip(), font=font) <= width:
        first = f"{first} {words.pop(0)}".strip()
    if not first:
        return _cut(" ".join(words), width, pen, font)
    return f"{first}\n{_cut(' '.join(words), width, pen, font)}".strip()


def _cut(text: str, width: int, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"
