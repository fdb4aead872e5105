"""Photos that are there twice: the same file, or nearly the same picture; and those that leak from train into test.

Two pictures count as nearly the same where their 64-bit difference hashes (is each of 9 x 8 greys clearly darker than
its right neighbour?) differ in at most `MAX_BITS` bits, and none of their 16 x 16 greys by more than `MAX_GREY` of 255.
That finds a photo that was saved again at half the size and a JPEG quality of 30. The second question leaves out what
the hash alone mixes up: flat pictures, and products of one outline on white. A photo that was cropped, turned or
recoloured is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fieldmark.errors import FieldmarkError

MAX_BITS = 5
MAX_GREY = 12
CLEARLY = 2  # greys; less is the noise of a flat background
MAX_PAIRS = 100_000
_CASCADE = (np.array([136]), np.array([51, 60, 195, 204]), np.arange(256))  # the middle, the corners, all
BLOCK = 128  # rows compared at once: 60,000 photos take 0.07 GB, 0.5 GB if all are flat


@dataclass(frozen=True)
class Look:
    """How a picture looks, in little.

    Attributes:
        hash: 64-bit difference hash.
        greys: 16 x 16 greys, flat, uint8.
    """

    hash: int
    greys: np.ndarray


def look_of(photo: Image.Image) -> Look:
    """The hash and the greys of an upright RGB photo."""
    grey = photo.convert("L")
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(cells[:, :-1] + CLEARLY < cells[:, 1:])
    greys = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), dtype=np.uint8).reshape(-1)
    return Look(int.from_bytes(bits.tobytes(), "big"), greys)


def groups_of_equal(digests: Sequence[bytes]) -> list[list[int]]:
    """Positions that share a digest, two or more, in the order of their first."""
    places: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        places.setdefault(digest, []).append(place)
    return [group for group in places.values() if len(group) > 1]


def near_pairs(
    looks: Sequence[Look],
    digests: Sequence[bytes],
    *,
    max_pairs: int = MAX_PAIRS,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[tuple[int, int]], bool]:
    """Pairs of positions whose pictures are nearly the same, but not the same file.

    Every pair is compared, `BLOCK` rows at a time: time grows with the square of the photos (about 15 s for 60,000
    on one core), memory in proportion.

    Args:
        looks: one a photo.
        digests: of the files; pairs that share one are left out.
        max_pairs: the search ends there.
        progress: called with the number of photos compared.

    Returns:
        Pairs (i, j) with i < j in order, and whether the search ended early.
    """
    if len(looks) != len(digests):
        raise FieldmarkError(f"{len(looks)} looks and {len(digests)} digests were given; expected as many of both")
    if not looks:
        return [], False
    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    greys = np.stack([look.greys for look in looks])
    same = np.unique(np.array(digests), return_inverse=True)[1]
    found: list[tuple[int, int]] = []
    for start in range(0, len(looks), BLOCK):
        rows = hashes[start : start + BLOCK, None]
        near = np.bitwise_count(rows ^ hashes[None, start:]) <= MAX_BITS
        first, second = (part + start for part in np.nonzero(near))
        wanted = (first < second) & (same[first] != same[second])
        for i, j in _alike(first[wanted], second[wanted], greys):
            found.append((int(i), int(j)))
            if len(found) >= max_pairs:
                return found, True
        if progress is not None:
            progress(min(start + BLOCK, len(looks)))
    return found, False


def _alike(first: np.ndarray, second: np.ndarray, greys: np.ndarray) -> np.ndarray:
    """Of candidate pairs those whose greys are alike, [N, 2]; a few of the greys settle most of them."""
    for cells in _CASCADE:
        kept = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(first), 65536):
            i, j = first[start : start + 65536, None], second[start : start + 65536, None]
            difference = np.abs(greys[i, cells].astype(np.int16) - greys[j, cells]).max(axis=1)
            kept.append(start + np.flatnonzero(difference <= MAX_GREY))
        chosen = np.concatenate(kept)
        first, second = first[chosen], second[chosen]
    return np.stack([first, second], axis=1)
