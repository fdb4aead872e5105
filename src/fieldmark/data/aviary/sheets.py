"""Contact sheets: many small pictures with captions on one page, for eyes and for reports."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fieldmark.errors import FieldmarkError


def contact_sheet(
    items: Sequence[tuple[Image.Image, str]], columns: int, *, cell: int = 224, gap: int = 6, font_size: int = 13
) -> Image.Image:
    """Lays pictures out row by row, a caption under each.

    Args:
        items: (picture, caption) pairs; pictures are scaled to ``cell`` x ``cell`` pixels, captions cut to its width.
        columns: pictures in a row.
        cell: width and height of a picture on the sheet, in pixels.
        gap: white space between pictures.
        font_size: size of the captions in pixels; 0 leaves them out.

    Raises:
        FieldmarkError: nothing to lay out, or no columns.
    """
    if not items or columns < 1:
        raise FieldmarkError(f"A contact sheet of {len(items)} pictures in {columns} columns is empty; give 1 or more.")
    line = font_size + 5 if font_size else 0
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + rows * (cell + line + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(font_size) if font_size else None
    for index, (picture, caption) in enumerate(items):
        x = gap + index % columns * (cell + gap)
        y = gap + index // columns * (cell + line + gap)
        sheet.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        if font is not None:
            text = caption
            while text and pen.textlength(text, font=font) > cell:
                text = text[:-1]
            pen.text((x, y + cell + 1), text, fill="black", font=font)
    return sheet
