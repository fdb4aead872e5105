"""The Grocery Store Dataset (Klasson et al., WACV 2019): shop photos of 81 look-alike groceries.

Two layouts are read: `catalog.csv` with `classes.csv` and a `photos` folder, and the data set as its authors publish
it (`dataset/train.txt`, `val.txt`, `test.txt`, `classes.csv`). Titles and attributes were written by hand for this
project and ship with it (`grocery_attributes.csv`).

Protocol: the 81 classes are split by a fixed seed into teacher, train and test, 27 each, coarse classes and kinds
spread over the three. The student is measured across sessions: queries are photos of the authors' `test` session, the
gallery those of `train` and `val` (other shops, other days). Leave-one-out over bursts of one shelf would tell nothing.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fieldmark.data.readers import Row
from fieldmark.data.tables import read_csv
from fieldmark.errors import FieldmarkError

PARTS = ("teacher", "train", "test")
SOURCE = "github.com/marcusklasson/GroceryStoreDataset"
SESSION_COUNTS = {"train": 2640, "val": 296, "test": 2485}
N_CLASSES = 81
ATTRIBUTES = ("colour", "secondary_colour", "shape", "surface", "package", "print_motif", "brand", "size")
_SPLIT_SEED = 0


class _Photo(NamedTuple):
    item_id: str
    path: Path
    session: str
    class_name: str


def read_grocery(folder: Path, part: str) -> list[Row]:
    """Rows of the `student` part (train and test classes) or of the `teacher` part (teacher classes).

    Raises:
        FieldmarkError: a listing is missing, the counts are not those of the data set, or photos are missing.
    """
    photos = _listing(folder)
    _check(photos, folder)
    classes, parts = grocery_classes(), grocery_parts()
    wanted = ("teacher",) if part == "teacher" else ("train", "test")
    rows = []
    for photo in photos:
        class_part = parts[photo.class_name]
        if class_part not in wanted:
            continue
        query = "query" if photo.session == "test" else "gallery"
        rows.append(
            {
                "item_id": photo.item_id,
                "image": str(photo.path),
                "label": photo.class_name,
                "title": classes[photo.class_name]["title"],
                "attributes": {name: classes[photo.class_name][name] for name in ATTRIBUTES},
                "split": "test" if class_part == "test" else "train",
                "role": query if class_part == "test" else "both",
            }
        )
    return rows


def grocery_classes() -> dict[str, dict[str, str]]:
    """The packaged table: class name to class_id, coarse class, kind, title and attributes."""
    source = importlib.resources.files("fieldmark.data").joinpath("grocery_attributes.csv")
    records = csv.DictReader(io.StringIO(source.read_text(encoding="utf-8")))
    return {record["class_name"]: record for record in records}


def grocery_parts() -> dict[str, str]:
    """Class name to `teacher`, `train` or `test`: dealt in turn, look-alikes (coarse class, then kind) side by side.

    The counts of every coarse class and kind in two parts differ by one at most. Independent of any random library.
    """

    def shuffled(name: str) -> str:
        return hashlib.sha256(f"{_SPLIT_SEED}/{name}".encode()).hexdigest()

    classes = grocery_classes()
    order = sorted(
        classes, key=lambda name: (classes[name]["kind"], shuffled(classes[name]["coarse"]), shuffled(name), name)
    )
    return {name: PARTS[place % len(PARTS)] for place, name in enumerate(order)}


def _listing(folder: Path) -> list[_Photo]:
    if not folder.is_dir():
        raise FieldmarkError(f"grocery:{folder} is no folder; expected the Grocery Store Dataset, get it from {SOURCE}")
    if (folder / "catalog.csv").is_file():
        return _own_listing(folder)
    for root in (folder / "dataset", folder):
        if (root / "classes.csv").is_file():
            return _authors_listing(root)
    raise FieldmarkError(
        f"grocery:{folder} holds neither catalog.csv nor dataset/classes.csv; "
        f"expected the Grocery Store Dataset, get it from {SOURCE}"
    )


def _own_listing(folder: Path) -> list[_Photo]:
    path = folder / "catalog.csv"
    try:
        return [
            _Photo(record["image"], (folder / record["image"]).absolute(), record["split"], record["class_name"])
            for record in read_csv(path)
        ]
    except (KeyError, TypeError) as error:
        raise FieldmarkError(f"{path} is not as expected: image, split and class_name must be in every row") from error


def _authors_listing(root: Path) -> list[_Photo]:
    """Lines such as `train/Fruit/Apple/Pink-Lady/Pink-Lady_001.jpg, 2, 0`: path, class id, coarse class id."""
    photos = []
    names = {record.get("Class ID (int)"): record.get("Class Name (str)") for record in read_csv(root / "classes.csv")}
    for session in SESSION_COUNTS:
        listing = root / f"{session}.txt"
        if not listing.is_file():
            raise FieldmarkError(f"{root} has no {listing.name}; get the whole data set from {SOURCE}")
        for line in listing.read_text(encoding="utf-8").splitlines():
            cells: list[Any] = [cell.strip() for cell in line.split(",")]
            if line.strip():
                class_name = names.get(cells[1]) if len(cells) == 3 else None
                if class_name is None:
                    raise FieldmarkError(f"{listing} has the line {line!r}; expected 'path, class id, coarse class id'")
                photos.append(_Photo(cells[0], (root / cells[0]).absolute(), session, class_name))
    return photos


def _check(photos: list[_Photo], folder: Path) -> None:
    found = Counter(photo.session for photo in photos)
    wrong = [
        f"{found[name]} of {count} {name} photos" for name, count in SESSION_COUNTS.items() if found[name] != count
    ]
    wrong += [f"the unknown session {name!r}" for name in sorted(set(found) - set(SESSION_COUNTS))]
    missing = sorted(set(grocery_classes()) - {photo.class_name for photo in photos})
    unknown = sorted({photo.class_name for photo in photos} - set(grocery_classes()))
    wrong += [f"no photo of {len(missing)} of {N_CLASSES} classes ({missing[0]}, ...)"] if missing else []
    wrong += [f"{len(unknown)} unknown classes ({unknown[0]}, ...)"] if unknown else []
    absent = [photo.path for photo in photos if not photo.path.is_file()]
    wrong += [f"{len(absent)} listed photos that are not there ({absent[0]}, ...)"] if absent else []
    if wrong:
        raise FieldmarkError(f"grocery:{folder} has {', '.join(wrong)}; get the whole data set from {SOURCE}")
