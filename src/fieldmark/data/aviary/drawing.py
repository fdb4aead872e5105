"""Draws a photo of a species, and on request the mask of every part that carries a field mark.

A photo is a function of (species, seed, split). All that does not belong to the species (pose, light, background,
twigs, blur, noise, JPEG) is rolled before the species is looked at: two species drawn with the same ``nuisance_key``
differ by their marks and by nothing else.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fieldmark.data.aviary import geometry
from fieldmark.data.aviary.habitats import Colour, background
from fieldmark.data.aviary.species import ATTRIBUTES, HABITATS, Species, stable_generator
from fieldmark.errors import FieldmarkError

SIZE = 224
_SUPERSAMPLING = 2
_LARGEST = 448
_BANK = 640  # side of the stored noise
_HABITAT_FOLLOWS_SPECIES = 0.9

_COLOURS: dict[str, Colour] = {
    "black": (30, 28, 32),
    "white": (246, 244, 238),
    "red": (208, 36, 40),
    "yellow": (248, 208, 38),
    "blue": (40, 92, 212),
    "green": (46, 146, 62),
    "brown": (124, 76, 40),
    "grey": (122, 130, 140),
}
_FACE: Colour = (176, 156, 132)
_INK: Colour = (36, 30, 30)
_PALE: Colour = (248, 244, 232)
_DARK_BREASTS = ("red", "blue", "green", "brown")

# parts as they stand in the label map; 0 is everything that is not bird
_PARTS = (
    "bill",
    "crown",
    "ring",
    "face",
    "breast",
    "breast_marks",
    "back",
    "wing",
    "wing_marks",
    "tail",
    "tip",
    "legs",
)
_LABEL = {part: index + 1 for index, part in enumerate(_PARTS)}
# a missing ring lets the crown through: these pixels carry both marks
_LABEL["crown_where_ring_would_be"] = len(_PARTS) + 1
_CARRIERS: dict[str, tuple[str, ...]] = {
    "body_shape": tuple(_LABEL),
    "bill_shape": ("bill",),
    "bill_colour": ("bill",),
    "crown_colour": ("crown", "crown_where_ring_would_be"),
    "eye_ring": ("ring", "crown_where_ring_would_be"),
    "breast_pattern": ("breast", "breast_marks"),
    "breast_colour": ("breast", "breast_marks"),
    "back_colour": ("back", "wing", "tail"),
    "wing_bars": ("wing", "wing_marks"),
    "tail_shape": ("tail", "tip"),
    "tail_tip": ("tip",),
    "leg_colour": ("legs",),
}


@dataclass(frozen=True)
class Drawing:
    """A photo and its truth.

    Attributes:
        image: RGB, ``size`` x ``size``.
        masks: attribute name -> bool array ``[size, size]``: visible pixels of the part that carries the attribute
            (the place where a ring or bar would be when its value is "none"); ``body_shape`` is carried by all parts.
        habitat: where the photo was taken.
    """

    image: Image.Image
    masks: dict[str, np.ndarray]
    habitat: str


@dataclass(frozen=True)
class _Nuisance:
    """Everything about a photo that does not tell the species."""

    habitat: str | None  # None: the habitat of the species
    scene: np.random.Generator
    frame: np.ndarray  # [2, 3]: bird frame -> fractions of the picture
    head_degrees: float
    tail_degrees: float
    tones: np.ndarray  # [parts, 3]: how the colours of this individual deviate
    perch: tuple[float, float, Colour]
    twigs: np.ndarray
    blur: float
    light: np.ndarray  # [2, 2, 3] of uint8: light times tint in the four corners, 255 leaves colours as they are
    noise: int
    noise_at: tuple[int, int]
    quality: int


def draw(
    species: Species, seed: int, *, split: str = "train", size: int = SIZE, nuisance_key: str | None = None
) -> Drawing:
    """Draws one photo with its part masks.

    Args:
        species: what to draw.
        seed: which photo of it.
        split: ``"train"``: nine photos of ten show the species' own habitat; ``"test"`` or ``"teacher"``: any habitat.
        size: width and height in pixels, 32 to 448.
        nuisance_key: takes the species' place in the seed of pose, light, background and the rest: photos of different
            species with equal key, seed and split are taken alike.

    Raises:
        FieldmarkError: the split is unknown or the size out of range.
    """
    nuisance = _roll(species, seed, split, size, nuisance_key)
    labels = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING), 0)
    image = _photo(species, nuisance, size, labels)
    painted = np.asarray(labels)[1::_SUPERSAMPLING, 1::_SUPERSAMPLING]
    masks = {name: carries[painted] for name, carries in _carriers_by_label().items()}
    return Drawing(image, masks, nuisance.habitat or species.habitat)


def draw_photo(
    species: Species, seed: int, *, split: str = "train", size: int = SIZE, nuisance_key: str | None = None
) -> Image.Image:
    """The image of ``draw`` without its masks, in less time."""
    return _photo(species, _roll(species, seed, split, size, nuisance_key), size, None)


@cache
def _carriers_by_label() -> dict[str, np.ndarray]:
    """For each attribute, whether a label of the map belongs to it."""
    return {name: np.array([False, *(part in _CARRIERS[name] for part in _LABEL)]) for name in ATTRIBUTES}


def _roll(species: Species, seed: int, split: str, size: int, key: str | None) -> _Nuisance:
    if split not in ("train", "test", "teacher"):
        raise FieldmarkError(f"The aviary draws no split {split!r}; splits are train, test and teacher.")
    if not 32 <= size <= _LARGEST:
        raise FieldmarkError(f"The aviary cannot draw photos of {size} px; sizes lie between 32 and {_LARGEST} px.")
    rng = stable_generator("aviary", "photo", key or species.name, int(seed), split)
    follows = rng.random() < _HABITAT_FOLLOWS_SPECIES
    habitat = HABITATS[rng.integers(len(HABITATS))]
    scene = np.random.Generator(np.random.PCG64(int(rng.integers(2**62))))
    scale = rng.uniform(0.75, 0.86)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    turned = geometry.turn(np.eye(2), rng.normal(0, 4)).T
    linear = turned @ np.diag([flip, 1.0]) * scale
    centre = 0.5 + rng.uniform(-1, 1, 2) * (0.035, 0.035)
    perch = (rng.uniform(-0.05, 0.05), rng.uniform(0.02, 0.04), _brownish(rng))
    light = rng.uniform(0.76, 1.04) * (1 + rng.normal(0, 0.025, 3)) * (1 + rng.uniform(-0.12, 0.12, (2, 2, 1)))
    return _Nuisance(
        habitat=None if split == "train" and follows else habitat,
        scene=scene,
        frame=np.concatenate([linear, centre[:, None]], 1),
        head_degrees=rng.uniform(-11, 11),
        tail_degrees=rng.uniform(-11, 11),
        tones=rng.normal(0, 6, (len(_PARTS), 3)),
        perch=perch,
        twigs=rng.random((int(rng.integers(0, 4)), 7)),
        blur=max(0.0, rng.uniform(-0.5, 1.0)),
        light=np.clip(light * 255, 0, 255).astype(np.uint8),
        noise=int(rng.integers(1, 9)),
        noise_at=(int(rng.integers(_BANK - _LARGEST)), int(rng.integers(_BANK - _LARGEST))),
        quality=int(rng.integers(55, 96)),
    )


def _brownish(rng: np.random.Generator) -> Colour:
    r, g, b = (np.array([96, 78, 62]) * rng.uniform(0.7, 1.3) + rng.normal(0, 6, 3)).astype(int).tolist()
    return (r, g, b)


class _Brush:
    """Paints polygons of the bird's frame into the picture and, if there is one, into the label map."""

    def __init__(self, image: Image.Image, labels: Image.Image | None, nuisance: _Nuisance) -> None:
        self.image = ImageDraw.Draw(image)
        self.label_map = labels
        self.labels = None if labels is None else ImageDraw.Draw(labels)
        self.pixels = image.width
        self.tones = nuisance.tones
        self.frame = nuisance.frame
        self.line = max(1, round(0.013 * float(np.linalg.norm(nuisance.frame[:, 1])) * self.pixels))

    def hinged(self, at: tuple[float, float], degrees: float, origin: tuple[float, float] | None = None) -> np.ndarray:
        """The frame for a part that turns about ``at``; ``origin``: where its own (0, 0) lies, ``at`` by default."""
        linear = geometry.turn(np.eye(2), degrees).T
        offset = np.asarray(at) - (linear @ np.asarray(at) if origin is None else 0.0)
        return np.column_stack([self.frame[:, :2] @ linear, self.frame[:, :2] @ offset + self.frame[:, 2]])

    def paint(
        self,
        part: str,
        colour: Colour,
        *outlines: np.ndarray,
        frame: np.ndarray | None = None,
        edge: bool = True,
    ) -> None:
        """Fills outlines with the colour, with a dark edge below the fill."""
        frame = self.frame if frame is None else frame
        label = _LABEL.get(part, 0)
        tone = _toned(colour, self.tones[label - 1] if label else None)
        for outline in outlines:
            if len(outline) < 3:
                continue
            points = outline @ frame[:, :2].T + frame[:, 2]
            flat = (points * self.pixels).ravel().tolist()
            if edge:
                self.image.line([*flat, *flat[:4]], fill=_INK, width=2 * self.line)
            self.image.polygon(flat, fill=tone)
            if self.labels is not None:
                self.labels.polygon(flat, fill=label)

    def leave_bare(self, outline: np.ndarray, frame: np.ndarray) -> None:
        """Labels the place of a missing eye ring, crown and face staying as they are."""
        if self.label_map is None:
            return
        place = Image.new("L", self.label_map.size, 0)
        points = outline @ frame[:, :2].T + frame[:, 2]
        ImageDraw.Draw(place).polygon((points * self.pixels).ravel().tolist(), fill=255)
        shared = [_LABEL["ring"]] * 256
        shared[_LABEL["crown"]] = _LABEL["crown_where_ring_would_be"]
        self.label_map.paste(self.label_map.point(shared), mask=place)


def _toned(colour: Colour, tone: np.ndarray | None) -> Colour:
    if tone is None:
        return colour
    r, g, b = (min(255, max(0, int(c + t))) for c, t in zip(colour, tone.tolist()))
    return (r, g, b)


def _photo(species: Species, nuisance: _Nuisance, size: int, labels: Image.Image | None) -> Image.Image:
    image = background(nuisance.habitat or species.habitat, nuisance.scene, size * _SUPERSAMPLING)
    brush = _Brush(image, labels, nuisance)
    _perch(brush, nuisance)
    _bird(brush, species.attributes, nuisance)
    _twigs(brush, nuisance)
    return _camera(image.reduce(_SUPERSAMPLING), nuisance)


def _perch(brush: _Brush, nuisance: _Nuisance) -> None:
    slant, thickness, colour = nuisance.perch
    y = geometry.FEET_Y + 0.01
    outline = np.array(
        [(-2, y - slant), (2, y + slant), (2, y + slant + 2 * thickness), (-2, y - slant + 2 * thickness)]
    )
    brush.paint("perch", colour, outline)


def _bird(brush: _Brush, marks: dict[str, str], nuisance: _Nuisance) -> None:
    """The bird from back to front."""
    build = marks["body_shape"]
    back = _COLOURS[marks["back_colour"]]
    breast = _COLOURS[marks["breast_colour"]]
    breast_ink = _PALE if marks["breast_colour"] in _DARK_BREASTS else _INK
    neck = geometry.neck(build)
    root = geometry.BUILDS[build].head

    tail_frame = brush.hinged(geometry.TAIL_ROOT, geometry.TAIL_ANGLE + nuisance.tail_degrees, geometry.TAIL_ROOT)
    tail, tip = geometry.tail(marks["tail_shape"])
    brush.paint("tail", back, tail, frame=tail_frame)
    brush.paint("tip", _COLOURS[marks["tail_tip"]], tip, frame=tail_frame)
    brush.paint("legs", _COLOURS[marks["leg_colour"]], *geometry.legs(build))

    head_frame = brush.hinged(root, nuisance.head_degrees)
    bill = geometry.bill(build, marks["bill_shape"])
    brush.paint("bill", _COLOURS[marks["bill_colour"]], bill, frame=head_frame)
    # edges of trunk, neck and head first, fills after them: no lines inside the bird
    brush.paint("face", _FACE, geometry.head(build), frame=head_frame)
    brush.paint("breast", breast, geometry.body(build), neck)
    brush.paint("breast", breast, geometry.body(build), neck, edge=False)
    brush.paint("breast_marks", breast_ink, *geometry.breast_marks(build, marks["breast_pattern"]), edge=False)
    brush.paint("back", back, geometry.back(build), geometry.nape(build), edge=False)
    brush.paint("wing", back, geometry.wing(build))
    brush.paint("wing_marks", _PALE, *geometry.wing_marks(build, marks["wing_bars"]), edge=False)

    brush.paint("face", _FACE, geometry.head(build), frame=head_frame, edge=False)
    brush.paint("crown", _COLOURS[marks["crown_colour"]], geometry.crown(build), frame=head_frame)
    ring = geometry.eye(build, geometry.RING_RADIUS)
    if marks["eye_ring"] == "none":
        brush.leave_bare(ring, head_frame)
    else:
        brush.paint("ring", _COLOURS[marks["eye_ring"]], ring, frame=head_frame)
    brush.paint("ring", _INK, geometry.eye(build, geometry.EYE_RADIUS), frame=head_frame, edge=False)


def _twigs(brush: _Brush, nuisance: _Nuisance) -> None:
    """Thin stalks between camera and bird, over the whole picture."""
    whole = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    for x, y, lean, thick, shade, leaf, hue in nuisance.twigs.tolist():
        foot, top = np.array([x, 1.02]), np.array([x + 0.7 * (lean - 0.5), 0.1 + 0.6 * y])
        across = np.array([0.006 + 0.006 * thick, 0.0])
        dark = 60 + 60 * shade
        colour = (int(dark), int(dark * (0.85 + 0.4 * hue)), int(dark * 0.55))
        brush.paint("twig", colour, np.array([foot - across, foot + across, top]), frame=whole, edge=False)
        leaf_shape = geometry.ellipse((0.0, 0.0), (0.03, 0.011), 360 * leaf, 12) + foot + (top - foot) * 0.8
        brush.paint("twig", colour, leaf_shape, frame=whole, edge=False)


@cache
def _noise_bank(level: int) -> Image.Image:
    """Grain around mid grey; a photo takes a window of it, which is cheaper than new noise."""
    return Image.fromarray(np.clip(np.rint(_unit_noise() * level + 128), 0, 255).astype(np.uint8))


@cache
def _unit_noise() -> np.ndarray:
    return stable_generator("aviary", "noise").standard_normal((_BANK, _BANK, 3), np.float32)


def _camera(image: Image.Image, nuisance: _Nuisance) -> Image.Image:
    """Lens, light, sensor and file format, in whole-picture operations of Pillow (numpy takes three times as long)."""
    size = image.width
    if nuisance.blur > 0.2:
        image = image.filter(ImageFilter.BoxBlur(nuisance.blur))
    light = Image.fromarray(nuisance.light).resize((size, size), Image.Resampling.BILINEAR)
    image = ImageChops.multiply(image, light)
    x, y = nuisance.noise_at
    grain = _noise_bank(nuisance.noise).crop((x, y, x + size, y + size))
    image = ImageChops.add(image, grain, 1.0, -128)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=nuisance.quality)
    return Image.open(file).convert("RGB")
