"""From a photo to what an exported network takes, with Pillow and numpy alone, and the same in words for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from fieldmark.data.photos import PhotoRef, load_square
from fieldmark.students.checkpoints import fold_rescaling
from fieldmark.students.items import is_multimodal, photo_side

RESIZE = "the whole photo to the square, proportions not kept, no crop"
FILTER = (
    "Pillow's BICUBIC: Keys kernel with a = -0.5, its support scaled by the reduction (antialiased); a horizontal "
    "pass, then a vertical one, each rounded to 8 bits"
)
FORMULA = "(pixel / 255 - mean) / std"


@dataclass(frozen=True)
class Preprocessing:
    """How a student sees a photo.

    Attributes:
        side: pixels of the square.
        mean: of the channels red, green and blue, for pixels in 0..1.
        std: likewise.
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, student: SentenceTransformer) -> Preprocessing:
        """That of a student with a vision tower, or of a dual encoder."""
        first: Any = student[0]
        if not is_multimodal(student):
            return cls(first.resolution, tuple(first.image_mean), tuple(first.image_std))
        statistics = fold_rescaling(first.processor.image_processor.to_dict())
        return cls(photo_side(student), statistics.mean, statistics.std)

    def pixels(self, photos: Sequence[PhotoRef]) -> np.ndarray:
        """[B, 3, side, side] float32 of photos.

        Raises:
            FieldmarkError: a photo cannot be read.
        """
        squares: list[Image.Image] = [load_square(photo, self.side) for photo in photos]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (np.stack([np.asarray(square, np.float32) for square in squares]) / 255 - mean) / std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    def describe(self) -> dict[str, Any]:
        """The same as a part of `export.json`."""
        return {
            "width": self.side,
            "height": self.side,
            "resize": RESIZE,
            "filter": FILTER,
            "colour_order": "RGB",
            "layout": "batch, channel, row, column",
            "normalise": FORMULA,
            "mean": list(self.mean),
            "std": list(self.std),
        }
