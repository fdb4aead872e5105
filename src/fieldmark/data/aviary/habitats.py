"""Where a bird is photographed: cheap out-of-focus backgrounds, a perch, twigs in front.

Nothing here knows the species; a background depends on the habitat's name and its own generator.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
_SMALL = 56  # backgrounds are drawn at this size: growing them is the lens's blur

# top and bottom of the vertical gradient
_GRADIENTS: dict[str, tuple[Colour, Colour]] = {
    "sky": ((120, 170, 222), (196, 216, 232)),
    "forest": ((52, 84, 56), (88, 104, 62)),
    "water": ((120, 158, 176), (66, 112, 142)),
    "reeds": ((196, 186, 142), (150, 132, 84)),
    "snow": ((206, 214, 224), (232, 236, 240)),
    "meadow": ((172, 196, 128), (112, 156, 76)),
    "desert": ((216, 196, 162), (202, 164, 116)),
}


def background(habitat: str, rng: np.random.Generator, size: int) -> Image.Image:
    """An out-of-focus RGB background of ``size`` x ``size`` pixels."""
    top, bottom = (np.asarray(c, float) + rng.normal(0, 9, 3) for c in _GRADIENTS[habitat])
    ramp = np.linspace(0, 1, _SMALL)[:, None, None]
    column = np.clip(top + (bottom - top) * ramp, 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (_SMALL, _SMALL, 3))))
    _things(habitat, ImageDraw.Draw(image), rng, (top + bottom) / 2)
    image = image.filter(ImageFilter.BoxBlur(0.7))
    half = image.resize((size // 2, size // 2), Image.Resampling.BICUBIC)
    return half.resize((size, size), Image.Resampling.NEAREST)  # four times cheaper, and later halved again


def _shade(colour: np.ndarray, by: float) -> Colour:
    r, g, b = np.clip(colour * by, 0, 255).astype(int).tolist()
    return (r, g, b)


def _things(habitat: str, draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: np.ndarray) -> None:
    """Clouds, trunks, ripples, stalks, drifts, flowers, dunes."""
    n = _SMALL
    at = rng.random((14, 4)).tolist()
    if habitat == "sky":
        for x, y, w, _ in at[:4]:
            draw.ellipse((x * n - 12 * w - 5, y * n - 4, x * n + 12 * w + 5, y * n + 4), fill=_shade(colour, 1.17))
    elif habitat == "forest":
        for x, _, w, shade in at[:6]:
            draw.rectangle((x * n, 0, x * n + 1 + 5 * w, n), fill=_shade(colour, 0.62 + 0.3 * shade))
        for x, y, w, _ in at[6:]:
            draw.ellipse((x * n, y * n, x * n + 2 + 6 * w, y * n + 2 + 6 * w), fill=_shade(colour, 1.3))
    elif habitat == "water":
        for x, y, w, shade in at:
            draw.line((x * n - 14 * w, y * n, x * n + 14 * w, y * n), fill=_shade(colour, 0.86 + 0.32 * shade), width=2)
    elif habitat == "reeds":
        for x, y, w, shade in at:
            draw.line((x * n, n, x * n + 14 * w - 7, y * n * 0.5), fill=_shade(colour, 0.66 + 0.5 * shade), width=2)
    elif habitat == "snow":
        for x, y, w, shade in at[:6]:
            y = 0.5 + y / 2
            draw.ellipse((x * n - 20 * w, y * n, x * n + 20 * w, y * n + 14), fill=_shade(colour, 0.9 + 0.14 * shade))
    elif habitat == "meadow":
        for x, y, w, shade in at:
            box = (x * n, y * n, x * n + 2 + 2 * w, y * n + 2 + 2 * w)
            draw.ellipse(box, fill=_shade(colour, 0.8) if shade < 0.6 else (232, 214, 148))
    else:  # desert
        for x, y, w, shade in at[:5]:
            y = 0.35 + 0.65 * y
            draw.ellipse(
                (x * n - 28 * w - 8, y * n, x * n + 28 * w + 8, y * n + 26), fill=_shade(colour, 0.86 + 0.22 * shade)
            )
