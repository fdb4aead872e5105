"""Decoded photos kept between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldmark.data.photos import PhotoRef, load_square


class Squares:
    """Photos as squares, decoded when asked for; the first ones that fit into the memory stay.

    Args:
        photos: N photo references.
        side: pixels of the square.
        memory_mb: room for decoded photos.
    """

    def __init__(self, photos: Sequence[PhotoRef], side: int, memory_mb: int) -> None:
        self.photos, self.side = photos, side
        self.room = memory_mb * 2**20 // (3 * side**2)
        self.kept: dict[int, Any] = {}

    def __getitem__(self, item: int) -> Any:
        if item in self.kept:
            return self.kept[item]
        square = load_square(self.photos[item], self.side)
        if len(self.kept) < self.room:
            self.kept[item] = square
        return square
