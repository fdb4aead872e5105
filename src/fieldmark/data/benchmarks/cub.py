"""CUB-200-2011 (Wah et al. 2011): 11,788 photos of 200 birds; the first 100 classes train, the last 100 test.

Read are the authors' layout (`images.txt`, `image_class_labels.txt`, `classes.txt`, `images/`) and re-layouts by class
folder. Where the authors' attributes lie beside it, a class gets of each of the 28 groups (bill shape, wing colour,
...) the value that most annotators saw.
"""

from __future__ import annotations

from pathlib import Path

from fieldmark.data.benchmarks.published import Published, class_folder_rows, split_in_halves
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

CUB = Published(
    prefix="cub",
    place="the CUB-200-2011 page of Caltech Vision",
    counts={"photos": 11788, "classes": 200, "train photos": 5864, "test photos": 5924},
)


def read_cub(folder: Path, published: Published = CUB) -> list[Row]:
    """Rows in the authors' order.

    Raises:
        FieldmarkError: neither layout is there, or counts are not the published ones.
    """
    root = published.root(folder, ["images.txt"], ["CUB_200_2011"])
    if root is not None:
        rows = _listed_rows(root, published)
    else:
        rows = class_folder_rows(folder.absolute(), published.counts["classes"])
    if not rows:
        raise published.missing(folder, "images.txt and no folder a class")
    order = sorted({row["label"] for row in rows})  # directories start with the class number: 001.Black_footed_...
    attributes = class_attributes(root, published) if root is not None else {}
    rows = [row | {"attributes": attributes.get(row["label"])} for row in split_in_halves(rows, order)]
    return published.checked(rows, folder)


def class_attributes(root: Path, published: Published = CUB) -> dict[str, dict[str, str]]:
    """Class to the value of each attribute group; empty where the authors' attribute files are not there."""
    names = next(
        (path for path in (root / "attributes", root, root.parent) if (path / "attributes.txt").is_file()), None
    )
    shares = root / "attributes" / "class_attribute_labels_continuous.txt"
    if names is None or not shares.is_file():
        return {}
    columns = [name.partition("::") for _, name in published.lines(names / "attributes.txt", 2)]
    classes = [name for _, name in published.lines(root / "classes.txt", 2)]
    lines = shares.read_text(encoding="utf-8").split("\n")
    found: dict[str, dict[str, str]] = {}
    for class_name, line in zip(classes, (line for line in lines if line.strip())):
        numbers = [float(number) for number in line.split()]
        if len(numbers) != len(columns):
            raise FieldmarkError(f"{shares} has {len(numbers)} numbers a class; expected {len(columns)}")
        best: dict[str, tuple[float, str]] = {}
        for (group, _, value), share in zip(columns, numbers):
            if share > best.get(group, (0.0, ""))[0]:
                best[group] = (share, value)
        found[class_name] = {
            group.removeprefix("has_"): value.replace("_", " ").strip() for group, (_, value) in best.items()
        }
    return found


def _listed_rows(root: Path, published: Published) -> list[Row]:
    classes = dict(published.lines(root / "classes.txt", 2))
    labels = dict(published.lines(root / "image_class_labels.txt", 2))
    rows = []
    for number, name in published.lines(root / "images.txt", 2):
        if labels.get(number) not in classes:
            raise FieldmarkError(f"{root / 'image_class_labels.txt'} gives photo {number} no class; {published.get()}")
        photo = (root / "images" / name).absolute()
        rows.append({"item_id": f"images/{name}", "image": str(photo), "label": classes[labels[number]]})
    return rows
