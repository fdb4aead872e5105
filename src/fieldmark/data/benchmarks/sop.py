"""Stanford Online Products (Song et al. 2016): 120,053 photos of 22,634 products, the authors' own split.

The label is the product (`class_id`); the kind of product (bicycle, cabinet, ...) is an attribute.
"""

from __future__ import annotations

from pathlib import Path

from fieldmark.data.benchmarks.published import Published
from fieldmark.data.readers import Row

SOP = Published(
    prefix="sop",
    place="the Stanford Online Products page of Stanford's Computational Vision and Geometry Lab",
    counts={
        "photos": 120053, "train photos": 59551, "train classes": 11318, "test photos": 60502, "test classes": 11316,
    },
)  # fmt: skip


def read_sop(folder: Path, published: Published = SOP) -> list[Row]:
    """Rows of `Ebay_train.txt`, then of `Ebay_test.txt`: lines `image_id class_id super_class_id path`.

    Raises:
        FieldmarkError: the listings are not there, or counts are not the published ones.
    """
    root = published.root(folder, ["Ebay_train.txt", "Ebay_test.txt"], ["Stanford_Online_Products"])
    if root is None:
        raise published.missing(folder, "Ebay_train.txt")
    rows = []
    for split in ("train", "test"):
        for _, product, _, name in published.lines(root / f"Ebay_{split}.txt", 4, skip=1):
            kind = Path(name).parent.name.removesuffix("_final").replace("_", " ")
            rows.append(
                {
                    "item_id": name,
                    "image": str((root / name).absolute()),
                    "label": product,
                    "split": split,
                    "attributes": {"kind": kind},
                }
            )
    return published.checked(rows, folder)
