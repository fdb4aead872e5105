"""9,583 product photos with titles and shop attributes, drawn from Fashion Product Images: `catalog.csv` and `photos/`.

Every product has one photo, so what a text can tell apart decides what is relevant: the label is the title (products
of the same title are one class of 1 to 25 photos, the others have one each). Image to image, a photo whose title has no
second photo is no query; image to text, its own title is the answer. The kind of product (Shirts) is an attribute.

The titles are dealt in turn to teacher, train and test, those of a kind side by side: no title is in two parts, and
every kind with three titles or more is in all three. Some shops use one picture for two titles; where those are in
different parts, test keeps it, else train, and the other products are left out: no file is in two parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fieldmark.data.benchmarks.published import Published
from fieldmark.data.readers import Row
from fieldmark.data.tables import read_csv
from fieldmark.errors import FieldmarkError

PARTS = ("teacher", "train", "test")
FASHION = Published(
    prefix="fashion",
    place="whoever gave you its catalog.csv (a part of Fashion Product Images by Param Aggarwal, on Kaggle)",
    counts={"photos": 9583, "classes": 7109},
)
ITEMS = "8a523c2f7fed7ad2717e4fec600a8efbf054523235c3705445056e30b54df7dc"  # known of the whole catalogue
# shop column -> attribute
ATTRIBUTES = {
    "articleType": "kind", "baseColour": "colour", "gender": "gender", "usage": "usage", "season": "season",
}  # fmt: skip
# products whose photo is, byte for byte, one of test (or of train, where these are the teacher's)
LEFT_OUT = frozenset({
    "10186", "15040", "10188", "11089", "13336", "12209", "13515", "13516", "11081", "11048", "12469", "11042",
    "10641", "11165", "11113", "13332", "11055", "13300", "12170", "11091", "11085", "11088", "13294", "11106",
})  # fmt: skip
_SPLIT_SEED = 0


def read_fashion(folder: Path, part: str, published: Published = FASHION, items: str = ITEMS) -> list[Row]:
    """Rows of the `student` part (train and test titles) or of the `teacher` part.

    Args:
        folder: holds `catalog.csv`, `photos/`.
        part: `student` or `teacher`.
        published: counts of the whole catalogue to check.
        items: SHA-256 over the sorted item ids, one a line.

    Raises:
        FieldmarkError: the catalogue or photos are missing, or they are not those of the data set.
    """
    root = published.root(folder, ["catalog.csv"])
    if root is None:
        raise published.missing(folder, "catalog.csv")
    rows = published.checked(_rows(root), folder)
    found = hashlib.sha256("\n".join(sorted(row["item_id"] for row in rows)).encode()).hexdigest()
    if found != items:
        raise FieldmarkError(f"fashion:{folder} has other products ({found[:12]} for {items[:12]}); {published.get()}")
    kinds = {row["label"]: row["attributes"]["kind"] for row in reversed(rows)}
    parts = title_parts(kinds)
    wanted = ("teacher",) if part == "teacher" else ("train", "test")
    return [
        row | {"split": "test" if parts[row["label"]] == "test" else "train"}
        for row in rows
        if parts[row["label"]] in wanted and row["item_id"] not in LEFT_OUT
    ]


def title_parts(kinds: Mapping[str, str]) -> dict[str, str]:
    """Title to `teacher`, `train` or `test`, from title to kind; independent of any random library."""

    def shuffled(title: str) -> str:
        return hashlib.sha256(f"{_SPLIT_SEED}/{title}".encode()).hexdigest()

    order = sorted(kinds, key=lambda title: (kinds[title], shuffled(title), title))
    return {title: PARTS[place % len(PARTS)] for place, title in enumerate(order)}


def _rows(root: Path) -> list[Row]:
    path = root / "catalog.csv"
    try:
        return [
            {
                "item_id": record["item_id"],
                "image": str((root / record["image"]).absolute()),
                "label": record["title"].strip(),
                "title": record["title"].strip(),
                "attributes": {name: record[column] for column, name in ATTRIBUTES.items()},
            }
            for record in read_csv(path)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise FieldmarkError(
            f"{path} is not as expected: item_id, image, title and {', '.join(ATTRIBUTES)} must be in every row"
        ) from error
