"""Attributes join the text of a query: title first, then what a generator says tells the item from its look-alikes.

AFMRL (arXiv 2604.20135, figure 2c): image, title and attributes go through the embedder together. Gallery items stay as
they are (papers.md 2.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def enriched_text(title: str | None, attributes: Mapping[str, str | Sequence[str]] | None) -> str:
    """The text that is embedded with an item's photo.

    Args:
        title: the item's title, if it has one.
        attributes: names and values, in the order they are written; a value may be a list. None where there are none.

    Returns:
        `TITLE Key attributes: NAME: VALUE; NAME: VALUE, VALUE`, without what is not there; empty where nothing is, and
        then the photo is embedded alone.
    """
    parts = [title] if title else []
    if attributes:
        written = (f"{name}: {one if isinstance(one, str) else ', '.join(one)}" for name, one in attributes.items())
        parts.append(f"Key attributes: {'; '.join(written)}")
    return " ".join(parts)
