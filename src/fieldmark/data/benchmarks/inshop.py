"""In-Shop Clothes Retrieval of DeepFashion (Liu et al. 2016): 52,712 photos of 7,982 products, the authors' own split
and roles: queries search the gallery, both of products that were not trained on.

The label is the product (`id_00000002`); whom it is for and its kind (WOMEN, Dresses) are attributes.
"""

from __future__ import annotations

from pathlib import Path

from fieldmark.data.benchmarks.published import Published
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

INSHOP = Published(
    prefix="inshop",
    place="the In-shop Clothes Retrieval page of DeepFashion (CUHK Multimedia Lab)",
    counts={
        "photos": 52712, "classes": 7982, "train photos": 25882, "train classes": 3997, "test classes": 3985,
        "query photos": 14218, "gallery photos": 12612,
    },
)  # fmt: skip
LISTING = "list_eval_partition.txt"


def read_inshop(folder: Path, published: Published = INSHOP) -> list[Row]:
    """Rows of `list_eval_partition.txt` (also below `Eval/`): lines `image_name item_id evaluation_status`
    behind a count and a header.

    Raises:
        FieldmarkError: the listing is not there, or counts are not the published ones.
    """
    root = published.root(folder, [LISTING, f"Eval/{LISTING}"], ["In-shop Clothes Retrieval Benchmark"])
    if root is None:
        raise published.missing(folder, f"{LISTING} (or Eval/{LISTING})")
    listing = root / LISTING if (root / LISTING).is_file() else root / "Eval" / LISTING
    photos = next((path for path in (root, root / "Img") if (path / "img").is_dir()), root)
    rows = []
    for name, product, status in published.lines(listing, 3, skip=2):
        if status not in ("train", "query", "gallery"):
            raise FieldmarkError(f"{listing} gives {name} the status {status!r}; expected train, query or gallery")
        parts = Path(name).parts  # img/WOMEN/Dresses/id_00000002/02_1_front.jpg
        rows.append(
            {
                "item_id": name,
                "image": str((photos / name).absolute()),
                "label": product,
                "split": "train" if status == "train" else "test",
                "role": "both" if status == "train" else status,
                "attributes": {"for": parts[1], "kind": parts[2].replace("_", " ")} if len(parts) > 3 else None,
            }
        )
    return published.checked(rows, folder)
