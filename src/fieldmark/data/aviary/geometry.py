"""The outlines of a bird, part by part, in a frame of its own: it looks right, x to the right, y down, length about 1.

Each function returns polygons as float arrays ``[n, 2]``; none of them knows colours, pixels or poses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

Outline = np.ndarray
_Vector = tuple[float, float] | np.ndarray

FEET_Y = 0.40
TAIL_ROOT = (-0.19, 0.05)
TAIL_ANGLE = 165.0  # degrees, clockwise on the picture from "right": back and a little up
EYE_RADIUS = 0.032
RING_RADIUS = 0.072
EYE_OFFSET = (0.02, -0.005)


@dataclass(frozen=True)
class Build:
    """The proportions that the mark ``body_shape`` names: ellipse of the body, circle of the head."""

    body: tuple[float, float]
    radii: tuple[float, float]
    head: tuple[float, float]
    head_radius: float


BUILDS = {
    "slim": Build((0.0, 0.06), (0.25, 0.15), (0.205, -0.13), 0.125),
    "round": Build((0.0, 0.045), (0.245, 0.225), (0.175, -0.19), 0.13),
    "long-necked": Build((-0.02, 0.08), (0.235, 0.16), (0.215, -0.315), 0.12),
    "large-headed": Build((-0.01, 0.075), (0.22, 0.165), (0.165, -0.165), 0.19),
}


def ellipse(centre: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0, points: int = 36) -> Outline:
    """An ellipse, turned clockwise on the picture by ``degrees``."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    shape = np.stack([np.cos(angle) * radii[0], np.sin(angle) * radii[1]], 1)
    return turn(shape, degrees) + np.asarray(centre)


def turn(points: Outline, degrees: float) -> Outline:
    """Rotates points about the origin, clockwise on the picture (y points down)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


def cut(polygon: Outline, point: _Vector, normal: _Vector) -> Outline:
    """The side of a polygon to which ``normal`` points, cut along the line through ``point`` (Sutherland-Hodgman)."""
    height = (polygon - np.asarray(point)) @ np.asarray(normal)
    kept = []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if height[i] >= 0:
            kept.append(polygon[i])
        if (height[i] >= 0) != (height[j] >= 0):
            kept.append(polygon[i] + (polygon[j] - polygon[i]) * (height[i] / (height[i] - height[j])))
    return np.asarray(kept).reshape(-1, 2)


def smooth(corners: list[tuple[float, float]], samples: int = 6) -> Outline:
    """A closed Catmull-Rom curve through the corners."""
    p1 = np.asarray(corners, float)
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, samples, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (p0, p1, p2, p3))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.reshape(-1, 2)


@cache
def body(build: str) -> Outline:
    """The egg of the trunk."""
    shape = BUILDS[build]
    return ellipse(shape.body, shape.radii, -8)


@cache
def back(build: str) -> Outline:
    """The upper half of the trunk, from the nape to the root of the tail."""
    _, bottom, across = _neck_axis(build)
    return cut(cut(body(build), *_back_line(build)), bottom, across)


def _back_line(build: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Point and normal of the line between back and breast."""
    shape = BUILDS[build]
    return (shape.body[0], shape.body[1] - 0.2 * shape.radii[1]), (-0.25, -1)


def _neck_axis(build: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neck's upper end, its lower end, and the unit vector across it that points to the nape."""
    shape = BUILDS[build]
    top, bottom = np.asarray(shape.head), np.array([shape.body[0] + 0.45 * shape.radii[0], shape.body[1]])
    along = (bottom - top) / np.linalg.norm(bottom - top)
    return top, bottom, np.array([-along[1], along[0]])


def _neck_tube(build: str, from_: float, to: float) -> Outline:
    """The neck between two fractions of its half width: -1 is the throat's edge, 1 the nape's."""
    shape = BUILDS[build]
    top, bottom, across = _neck_axis(build)
    wide_top, wide_bottom = 0.7 * shape.head_radius, min(0.78 * shape.radii[1], 0.5 * shape.radii[0])
    corners = [(top, from_ * wide_top), (bottom, from_ * wide_bottom), (bottom, to * wide_bottom), (top, to * wide_top)]
    return np.array([end + across * out for end, out in corners])


@cache
def neck(build: str) -> Outline:
    """The tube between head and trunk."""
    return _neck_tube(build, -1, 1)


@cache
def nape(build: str) -> Outline:
    """The hind half of the neck, down to the back."""
    return cut(_neck_tube(build, 0, 1), *_back_line(build))


@cache
def head(build: str) -> Outline:
    """The round head."""
    shape = BUILDS[build]
    return ellipse(shape.head, (shape.head_radius, shape.head_radius))


@cache
def crown(build: str) -> Outline:
    """The cap: the part of the head above the eye, a little proud of it."""
    shape = BUILDS[build]
    x, y = shape.head
    r = shape.head_radius
    return cut(ellipse((x, y - 0.06 * r), (1.06 * r, 1.06 * r)), (x, y - 0.16 * r), (-0.3, -1))


@cache
def eye(build: str, radius: float) -> Outline:
    """A disc around the eye."""
    x, y = BUILDS[build].head
    return ellipse((x + EYE_OFFSET[0], y + EYE_OFFSET[1]), (radius, radius), points=24)


@cache
def bill(build: str, shape: str) -> Outline:
    """The bill, its root tucked under the head."""
    x, y = BUILDS[build].head
    root = np.array([x + BUILDS[build].head_radius * 0.82, y + 0.02])
    return _bill(shape) + root


def _bill(shape: str) -> Outline:
    if shape == "conical":
        return np.array([(-0.04, -0.085), (0.04, -0.07), (0.15, 0.012), (0.04, 0.075), (-0.04, 0.08)])
    if shape == "straight":
        return np.array([(-0.04, -0.05), (0.225, -0.008), (0.225, 0.012), (-0.04, 0.055)])
    if shape == "hooked":
        corners = [(-0.04, -0.06), (0.07, -0.065), (0.15, -0.03), (0.165, 0.04), (0.14, 0.11), (0.115, 0.05)]
        return smooth([*corners, (0.06, 0.045), (-0.04, 0.06)])
    if shape == "curved":
        corners = [(-0.04, -0.05), (0.06, -0.045), (0.15, 0.0), (0.205, 0.08), (0.215, 0.17)]
        return smooth([*corners, (0.165, 0.1), (0.11, 0.05), (0.04, 0.03), (-0.04, 0.04)])
    # spoon: a thin stalk with a disc at its end
    corners = [(-0.04, -0.03), (0.09, -0.024), (0.135, -0.055), (0.195, -0.065), (0.235, 0.0)]
    return smooth([*corners, (0.195, 0.065), (0.135, 0.055), (0.09, 0.024), (-0.04, 0.03)])


@cache
def tail(shape: str) -> tuple[Outline, Outline]:
    """(tail, tip), from the root of the tail at the origin along +x; the tip is the far end of the same outline."""
    tip_length = 0.12
    if shape == "square":
        outline = np.array([(-0.06, -0.055), (0.27, -0.075), (0.27, 0.075), (-0.06, 0.055)])
    elif shape == "forked":
        outline = np.array([(-0.06, -0.05), (0.33, -0.15), (0.17, 0.0), (0.33, 0.15), (-0.06, 0.05)])
        tip_length = 0.13
    elif shape == "round":
        angle = np.radians(np.linspace(-90, 90, 15))
        arc = np.stack([0.17 + 0.12 * np.cos(angle), 0.125 * np.sin(angle)], 1)
        outline = np.concatenate([[(-0.06, -0.045)], arc, [(-0.06, 0.045)]])
        tip_length = 0.13
    elif shape == "pointed":
        outline = np.array([(-0.06, -0.06), (0.10, -0.09), (0.34, 0.0), (0.10, 0.09), (-0.06, 0.06)])
        tip_length = 0.17
    else:  # long: a ribbon
        outline = np.array([(-0.06, -0.04), (0.40, -0.034), (0.40, 0.034), (-0.06, 0.04)])
        tip_length = 0.16
    return outline, cut(outline, (outline[:, 0].max() - tip_length, 0.0), (1, 0))


@cache
def wing(build: str) -> Outline:
    """The folded wing, from the shoulder to a point over the tail."""
    bx, by = BUILDS[build].body
    rx, ry = BUILDS[build].radii
    corners = [(0.36, -0.28), (0.1, -0.56), (-0.5, -0.5), (-1.14, 0.1), (-0.6, 0.36), (0.0, 0.36), (0.32, 0.1)]
    return smooth([(bx + rx * x, by + ry * y) for x, y in corners])


@cache
def wing_marks(build: str, kind: str) -> tuple[Outline, ...]:
    """The bars across the folded wing, or the patch on it, kept inside the wing."""
    bx, by = BUILDS[build].body
    rx, ry = BUILDS[build].radii
    if kind == "patch":
        return (ellipse((bx - 0.22 * rx, by - 0.02 * ry), (0.085, 0.32 * ry), -8),)
    at = {"none": (), "one": (-0.18,), "two": (0.09, -0.47)}[kind]
    bars = []
    for x in at:
        strip = cut(wing(build), (bx + (x - 0.12) * rx, by), (1, 0.18))
        bars.append(cut(strip, (bx + (x + 0.12) * rx, by), (-1, -0.18)))
    return tuple(bars)


@cache
def legs(build: str) -> tuple[Outline, ...]:
    """Two legs and their feet; the feet stand at ``FEET_Y`` whatever the build."""
    shape = BUILDS[build]
    top = shape.body[1] + 0.7 * shape.radii[1]
    parts: list[Outline] = []
    for x in (-0.045, 0.075):
        parts.append(np.array([(x - 0.026, top), (x + 0.026, top), (x + 0.024, FEET_Y), (x - 0.024, FEET_Y)]))
        toes = [(-0.045, 0.0), (-0.02, -0.035), (0.03, -0.035), (0.085, 0.0), (0.08, 0.022), (-0.04, 0.022)]
        parts.append(np.array([(x + u, FEET_Y + v) for u, v in toes]))
    return tuple(parts)


@cache
def breast_marks(build: str, pattern: str) -> tuple[Outline, ...]:
    """The dark or light figures on the breast; empty for a plain one."""
    bx, by = BUILDS[build].body
    rx, ry = BUILDS[build].radii
    if pattern == "spotted":
        at = [
            (0.8, -0.14),
            (0.5, 0.14),
            (0.75, 0.3),
            (0.5, 0.6),
            (0.22, 0.42),
            (0.16, 0.8),
            (-0.14, 0.6),
            (-0.45, 0.66),
        ]
        return tuple(ellipse((bx + rx * x, by + ry * y), (0.029, 0.029), points=14) for x, y in at)
    if pattern == "streaked":
        at = [(0.68, -0.16), (0.7, 0.14), (0.6, 0.44), (0.14, 0.5), (-0.34, 0.52), (0.34, 0.74), (-0.1, 0.79)]
        return tuple(ellipse((bx + rx * x, by + ry * y), (0.052, 0.014), -14, 14) for x, y in at)
    if pattern == "banded":
        bands = []
        for x in (0.74, 0.28, -0.18):
            strip = cut(body(build), (bx + (x - 0.13) * rx, by), (1, 0.12))
            bands.append(cut(strip, (bx + (x + 0.11) * rx, by), (-1, -0.12)))
        return tuple(bands)
    if pattern == "bib":
        return (cut(body(build), (bx + 0.36 * rx, by), (1, -0.15)), _neck_tube(build, -1, 0.2))
    return ()
