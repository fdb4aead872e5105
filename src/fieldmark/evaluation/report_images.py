"""Pictures of the report as data URIs: thumbnails, attention as heat maps, outlines of parts."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.errors import FieldmarkError

# Heat from little to much: dark violet, magenta, orange, pale yellow. Lightness rises, so it reads without colour too.
_RAMP = np.array([[40, 11, 84], [159, 42, 99], [232, 93, 38], [252, 180, 50], [252, 255, 190]], dtype=np.float64)
_HEAT_SIDE = 42


def photo_uri(photo: Image.Image, side: int, quality: int) -> str:
    """A JPEG data URI of the photo, its longer side at most `side` pixels."""
    small = photo.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_uri(weights: Any) -> str:
    """A transparent PNG data URI of attention over a photo; the largest weight is brightest.

    Args:
        weights: [h, w], or [n] for a square grid of n tokens; not negative.

    Raises:
        FieldmarkError: another shape, NaN, or a negative weight.
    """
    grid = _as_grid(weights, "attention")
    if not np.isfinite(grid).all() or (grid < 0).any():
        raise FieldmarkError("attention holds NaN or negative weights; give weights from 0")
    peak = grid.max()
    scaled = Image.fromarray((grid / peak if peak > 0 else grid).astype(np.float32))
    smooth = np.clip(np.asarray(scaled.resize((_HEAT_SIDE, _HEAT_SIDE), Image.Resampling.BICUBIC)), 0, 1)
    place = smooth * (len(_RAMP) - 1)
    colours = np.stack([np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)], axis=-1)
    opacity = 255 * (0.30 + 0.50 * smooth)
    return _png_uri(np.concatenate([colours, opacity[..., None]], axis=-1))


def outline_uri(mask: Any, side: int = 224) -> str:
    """A transparent PNG data URI with the border of a part: a light line on a dark one, seen on any photo.

    Args:
        mask: [h, w], true inside the part.
        side: pixels of the square PNG.
    """
    inside = Image.fromarray((_as_grid(mask, "mask") > 0).astype(np.uint8) * 255)
    filled = np.asarray(inside.resize((side, side), Image.Resampling.NEAREST)) > 0
    dark = _grown(filled, 3) & ~_grown(filled, -1)
    light = _grown(filled, 2) & ~filled
    pixels = np.zeros((side, side, 4))
    pixels[dark] = (16, 20, 24, 200)
    pixels[light] = (120, 240, 255, 255)
    return _png_uri(pixels)


def _grown(filled: np.ndarray, steps: int) -> np.ndarray:
    """The region grown (or shrunk, below zero) by whole pixels."""
    if steps < 0:
        return ~_grown(~filled, -steps)
    for _ in range(steps):
        padded = np.pad(filled, 1)
        filled = filled | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return filled


def _as_grid(values: Any, name: str) -> np.ndarray:
    grid = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if grid.ndim == 1 and math.isqrt(grid.size) ** 2 == grid.size:
        grid = grid.reshape(math.isqrt(grid.size), -1)
    if grid.ndim != 2 or grid.size == 0:
        raise FieldmarkError(f"{name} has shape {grid.shape}; give [height, width] or a square number of tokens")
    return grid


def _png_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
