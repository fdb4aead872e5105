"""FGVC-Aircraft (Maji et al. 2013): 10,000 photos of 100 variants; trainval and test pooled, variants sorted by name,
the first 50 train, the last 50 test.

Photos keep the banner with the photographer's name, 20 pixels at the bottom, as in SAGA (which crops nothing).
"""

from __future__ import annotations

from pathlib import Path

from fieldmark.data.benchmarks.published import Published, split_in_halves
from fieldmark.data.readers import Row

AIRCRAFT = Published(
    prefix="aircraft",
    place="the FGVC-Aircraft page of Oxford's Visual Geometry Group",
    counts={"photos": 10000, "classes": 100, "train classes": 50, "test classes": 50},
)


def read_aircraft(folder: Path, published: Published = AIRCRAFT) -> list[Row]:
    """Rows of `images_variant_trainval.txt`, then of `images_variant_test.txt`: lines `1025794 707-320`.

    Raises:
        FieldmarkError: the listings are not there, or counts are not the published ones.
    """
    root = published.root(
        folder, ["images_variant_trainval.txt", "images_variant_test.txt"], ["data", "fgvc-aircraft-2013b/data"]
    )
    if root is None:
        raise published.missing(folder, "images_variant_trainval.txt")
    rows = []
    for listing in ("trainval", "test"):
        for number, variant in published.lines(root / f"images_variant_{listing}.txt", 2):
            photo = (root / "images" / f"{number}.jpg").absolute()
            rows.append({"item_id": f"images/{number}.jpg", "image": str(photo), "label": variant})
    return published.checked(split_in_halves(rows, sorted({row["label"] for row in rows})), folder)
