"""Pictures of the report as data URIs: thumbnails, attention as heat maps, outlines of parts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.errors import FieldmarkError

# Heat from an even share to the peak, violet to pale yellow. Lightness rises, so it reads without colour too.
RAMP = ((110, 30, 110), (203, 65, 73), (240, 117, 35), (252, 190, 60), (252, 250, 190))
_OPACITY = (0.0, 0.55, 0.75, 0.82, 0.85)
_HEAT_SIDE = 56
# Times the even share: a map whose peak is lower than this is not stretched to the full ramp.
_LEAST_PEAK = 3.0


def photo_uri(photo: Image.Image, side: int, quality: int) -> str:
    """A JPEG data URI of the photo, its longer side at most `side` pixels."""
    small = photo.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_uri(weights: Any) -> str:
    """A transparent PNG data URI of attention to lay over a grey photo.

    Clear where a token gets its even share or less, brightest at the largest weight; nearly even attention stays
    nearly clear.

    Args:
        weights: [h, w], or [n] for a square grid of n tokens; not negative.

    Raises:
        FieldmarkError: another shape, NaN, or a negative weight.
    """
    grid = _as_weights(weights)
    even = grid.mean()
    times = grid / even if even > 0 else np.ones_like(grid)
    above = Image.fromarray(((times - 1) / (max(times.max(), _LEAST_PEAK) - 1)).astype(np.float32))
    smooth = np.clip(np.asarray(above.resize((_HEAT_SIDE, _HEAT_SIDE), Image.Resampling.BICUBIC)), 0, 1)
    place, stops = smooth * (len(RAMP) - 1), np.arange(len(RAMP))
    channels = [np.interp(place, stops, [colour[c] for colour in RAMP]) for c in range(3)]
    opacity = 255 * np.interp(place, stops, _OPACITY)
    return _png_uri(np.stack([*channels, opacity], axis=-1))


def mass_inside(weights: Any, mask: Any) -> float:
    """Share of attention that falls on a part, 0..1.

    Attention is even within a token; a token at the border counts by the share of it that the part covers.

    Args:
        weights: [h, w], or [n] for a square grid of n tokens; None is even attention, so the share is the part's area.
        mask: [H, W], true inside the part.

    Raises:
        FieldmarkError: another shape, NaN, a negative weight, or no attention at all.
    """
    inside = (_as_grid(mask, "mask") > 0).astype(np.float64)
    if weights is None:
        return float(inside.mean())
    grid = _as_weights(weights)
    if grid.sum() <= 0:
        raise FieldmarkError("attention is zero everywhere; give weights of which one at least is above 0")
    covered = _cell_means(_cell_means(inside, grid.shape[0]).T, grid.shape[1]).T
    return float((grid * covered).sum() / grid.sum())


def mean_inside(seen: Sequence[tuple[Any, Any]]) -> float:
    """The mean of `mass_inside` over (weights, mask) of several photos."""
    return float(np.mean([mass_inside(weights, mask) for weights, mask in seen]))


def _cell_means(rows: np.ndarray, count: int) -> np.ndarray:
    """[H, W] to [count, W]: means over equal strips, a row that two strips share counted in part."""
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    edges = np.linspace(0, len(rows), count + 1)
    low = np.floor(edges).astype(int).clip(max=len(rows) - 1)
    at_edges = sums[low] + (edges - low)[:, None] * rows[low]
    return np.diff(at_edges, axis=0) * count / len(rows)


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


def _as_weights(weights: Any) -> np.ndarray:
    grid = _as_grid(weights, "attention")
    if not np.isfinite(grid).all() or (grid < 0).any():
        raise FieldmarkError("attention holds NaN or negative weights; give weights from 0")
    return grid


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
