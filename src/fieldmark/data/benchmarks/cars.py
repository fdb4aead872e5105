"""Stanford Cars (Krause et al. 2013): 16,185 photos of 196 models; the first 98 classes train, the last 98 test.

Read are the two layouts of the authors (`cars_annos.mat` with `car_ims/`; `devkit/` with `cars_train/`, `cars_test/`
and `cars_test_annos_withlabels.mat`) and re-layouts by class folder. Classes follow the authors' numbers; a re-layout
has only names, whose order is the authors' but for a few neighbours inside a half, as the counts of both halves show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldmark.data.benchmarks.published import Published, class_folder_rows, split_in_halves
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

CARS = Published(
    prefix="cars",
    place="the Cars Dataset page of Stanford's AI lab (devkit, photos and the labels of the test photos)",
    counts={"photos": 16185, "classes": 196, "train photos": 8054, "test photos": 8131},
)
TEST_LABELS = "cars_test_annos_withlabels.mat"


def read_cars(folder: Path, published: Published = CARS) -> list[Row]:
    """Rows in the authors' order.

    Raises:
        FieldmarkError: no layout is there, a file of it is missing, or counts are not the published ones.
    """
    if root := published.root(folder, ["cars_annos.mat"]):
        names = _names(root / "cars_annos.mat")
        rows = _rows(root / "cars_annos.mat", root, "relative_im_path", names)
    elif root := published.root(folder, ["devkit/cars_meta.mat"], ["stanford_cars", "cars"]):
        names = _names(root / "devkit" / "cars_meta.mat")
        rows = _rows(root / "devkit" / "cars_train_annos.mat", root / "cars_train", "fname", names)
        places = [root / TEST_LABELS, root / "devkit" / TEST_LABELS]
        labels = next((path for path in places if path.is_file()), places[0])
        rows += _rows(labels, root / "cars_test", "fname", names)
    else:
        rows = class_folder_rows(folder.absolute(), published.counts["classes"])
        names = sorted({row["label"] for row in rows})
    if not rows:
        raise published.missing(folder, "cars_annos.mat, no devkit/cars_meta.mat and no folder a class")
    return published.checked(split_in_halves(rows, names), folder)


def _rows(path: Path, photos: Path, field: str, names: list[str]) -> list[Row]:
    records = _load(path).get("annotations")
    if records is None or records.dtype.names is None or not {field, "class"} <= set(records.dtype.names):
        raise FieldmarkError(f"{path} has no annotations with {field} and class; {CARS.get()}")
    rows = []
    for record in records.ravel():
        number = int(record["class"])
        if not 1 <= number <= len(names):
            raise FieldmarkError(f"{path} has the class {number} of {len(names)}; {CARS.get()}")
        name = str(record[field])
        item = name if field == "relative_im_path" else f"{photos.name}/{name}"
        rows.append({"item_id": item, "image": str((photos / name).absolute()), "label": names[number - 1]})
    return rows


def _names(path: Path) -> list[str]:
    found = _load(path).get("class_names")
    if found is None:
        raise FieldmarkError(f"{path} has no class_names; {CARS.get()}")
    return [str(name) for name in found.ravel()]


def _load(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise FieldmarkError(f"{path} is missing; {CARS.get()}")
    try:
        return loadmat(path, squeeze_me=True)
    except (MatReadError, ValueError, TypeError, NotImplementedError, OSError) as error:
        raise FieldmarkError(f"cannot read {path}: {' '.join(str(error).split())}; {CARS.get()}") from error
