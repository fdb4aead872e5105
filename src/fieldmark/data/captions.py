"""Photos with several captions (MS-COCO, Flickr30K in Karpathy's splits), and groups of two photos and two captions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldmark.data.columns import URI_SCHEMES
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
KARPATHY = "the page 'Deep Visual-Semantic Alignments for Generating Image Descriptions' (caption_datasets.zip)"


@dataclass(frozen=True)
class Captioned:
    """A data set as Karpathy's JSON lists it.

    Attributes:
        prefix: what stands before the colon of the source.
        listing: the name of his JSON.
        folders: where photos lie, from the data set's folder, tried in this order.
        place: where to get the photos.
        test: published numbers of test photos and test captions.
    """

    prefix: str
    listing: str
    folders: Sequence[str]
    place: str
    test: tuple[int, int]


COCO = Captioned(
    "coco", "dataset_coco.json", (".", "images", "coco", "coco/images"),
    "the COCO download page (2014 train and val images, unpacked as train2014 and val2014)", (5000, 25010),
)  # fmt: skip
FLICKR30K = Captioned(
    "flickr30k", "dataset_flickr30k.json",
    ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", "Images", "."),
    "the Flickr30K page of the University of Illinois (flickr30k-images)", (1000, 5000),
)  # fmt: skip


def read_coco(folder: Path) -> list[Row]:
    """MS-COCO 2014: 5,000 test and 5,000 val photos, 113,287 to train on (train and restval); see `read_captioned`."""
    return read_captioned(folder, COCO)


def read_flickr30k(folder: Path) -> list[Row]:
    """Flickr30K: 1,000 test, 1,014 val and 29,000 train photos with five captions each; see `read_captioned`."""
    return read_captioned(folder, FLICKR30K)


def read_captioned(folder: Path, captioned: Captioned) -> list[Row]:
    """One row a caption: photo and label are those of its image, title is the caption, item_id is `IMGID-SENTID`.

    The JSON lies in the folder or beside its image folders; the restval photos count as train. Where no photo of the
    train split is there, as with a download for evaluation alone, that split is left out with a warning; any other
    missing photo is refused. A test split of another size than the published one is warned of.

    Raises:
        FieldmarkError: the folder, the listing or photos are missing, or the listing is not Karpathy's.
    """
    listing = _listing(folder, captioned)
    folders = [path.absolute() for path in (folder / name for name in captioned.folders) if path.is_dir()]
    rows = _without_missing(_rows(listing, folders), folder, captioned)
    test = [row for row in rows if row["split"] == "test"]
    found = (len({row["label"] for row in test}), len(test))
    if found != captioned.test:
        logger.warning(
            "%s has %d test photos with %d captions where %d with %d are published: results do not compare",
            listing, *found, *captioned.test,
        )  # fmt: skip
    return rows


# prefix of a source -> its reader
READERS: dict[str, Callable[[Path], list[Row]]] = {"coco": read_coco, "flickr30k": read_flickr30k}


def _listing(folder: Path, captioned: Captioned) -> Path:
    if not folder.is_dir():
        raise FieldmarkError(
            f"{captioned.prefix}:{folder} is no folder; give the one that holds {captioned.listing} and the photos of "
            f"{captioned.place}"
        )
    places = [folder, folder / "annotations", folder / "karpathy", folder.parent]
    found = next((place / captioned.listing for place in places if (place / captioned.listing).is_file()), None)
    if found is None:
        raise FieldmarkError(
            f"{captioned.prefix}:{folder} holds no {captioned.listing}; get Karpathy's splits from {KARPATHY}"
        )
    return found


def _rows(listing: Path, folders: list[Path]) -> list[Row]:
    """Rows by the JSON, with its own name of the split (`part`) and file; `image` is None where that is not there."""
    files: dict[Path, set[str]] = {}
    rows, empty = [], 0
    try:
        # The word lists are most of the file and are not needed.
        images = json.loads(listing.read_text(encoding="utf-8"), object_hook=_without_words)["images"]
        for image in images:
            path = _find(image.get("filepath", ""), image["filename"], folders, files)
            split = SPLITS[image["split"]]
            for sentence in image["sentences"]:
                caption = " ".join(sentence["raw"].split())
                empty += not caption
                if caption:
                    item = f"{image['imgid']}-{sentence['sentid']}"
                    row = {"item_id": item, "image": path, "label": str(image["imgid"]), "title": caption}
                    rows.append(row | {"split": split, "part": image["split"], "file": image["filename"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FieldmarkError(
            f"{listing} is not Karpathy's listing ({type(error).__name__}: {error}); get it from {KARPATHY}"
        ) from error
    if empty:
        logger.warning("%s: %d empty captions are left out", listing, empty)
    return rows


def _without_words(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("tokens", None)
    return record


def _find(subfolder: str, name: str, folders: list[Path], files: dict[Path, set[str]]) -> str | None:
    """The photo in the first folder that has it; each folder is listed once, for a look at every file is slow."""
    for folder in folders:
        for place in dict.fromkeys((folder / subfolder, folder)):
            if place not in files:
                files[place] = {path.name for path in place.iterdir()} if place.is_dir() else set()
            if name in files[place]:
                return str(place / name)
    return None


def _without_missing(rows: list[Row], folder: Path, captioned: Captioned) -> list[Row]:
    train = [row["image"] is None for row in rows if row["part"] == "train"]
    if train and all(train) and any(row["image"] for row in rows):
        logger.warning(
            "%s:%s has none of the photos listed as train: there is no train split; get it from %s",
            captioned.prefix, folder, captioned.place,
        )  # fmt: skip
        rows = [row for row in rows if row["split"] != "train"]
    missing = {row["label"]: row["file"] for row in rows if row["image"] is None}
    if missing:
        raise FieldmarkError(
            f"{captioned.prefix}:{folder} lacks {len(missing):,} of {len({row['label'] for row in rows}):,} listed "
            f"photos ({next(iter(missing.values()))}, ...); get them from {captioned.place}"
        )
    return [{name: value for name, value in row.items() if name not in ("part", "file")} for row in rows]


@dataclass(frozen=True)
class Group:
    """Two photos and two captions: photo 0 goes with caption 0, photo 1 with caption 1.

    A photo is an absolute path or a uri that `open_photo` reads; the category says what differs, where that is known.
    """

    image_0: str
    image_1: str
    caption_0: str
    caption_1: str
    category: str | None = None

    @property
    def images(self) -> tuple[str, str]:
        """Both photos."""
        return self.image_0, self.image_1

    @property
    def captions(self) -> tuple[str, str]:
        """Both captions."""
        return self.caption_0, self.caption_1


GROUP_FIELDS = ("image_0", "image_1", "caption_0", "caption_1")


def read_groups(path: Path) -> list[Group]:
    """Groups of a JSONL file: one object a line with `image_0`, `image_1`, `caption_0`, `caption_1`, maybe `category`.

    Relative photos start at the file's own folder; other fields are left out. This is how Winoground names its fields,
    and NaturalBench, MMVP and BiVLC are easily written so.

    Raises:
        FieldmarkError: no such file, no group in it, or a line (named by its number) that is no such object, whose
            photo is not there or whose captions are the same.
    """
    if not path.is_file():
        raise FieldmarkError(f"{path} is no file; expected groups as JSON lines with {', '.join(GROUP_FIELDS)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FieldmarkError(f"{path} is no UTF-8 text ({error}); expected groups as JSON lines") from error
    groups = [
        _group(line, f"{path}: line {number}", path.parent) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not groups:
        raise FieldmarkError(f"{path} holds no group; expected one JSON object a line with {', '.join(GROUP_FIELDS)}")
    return groups


def _group(line: str, where: str, folder: Path) -> Group:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise FieldmarkError(
            f"{where} is no JSON ({error}); expected an object with {', '.join(GROUP_FIELDS)}"
        ) from error
    if not isinstance(record, Mapping):
        raise FieldmarkError(f"{where} is a {type(record).__name__}; expected an object with {', '.join(GROUP_FIELDS)}")
    for name in GROUP_FIELDS:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise FieldmarkError(f"{where} has {name} {value!r}; expected text that is not empty")
    category = record.get("category")
    if category is not None and not isinstance(category, str):
        raise FieldmarkError(f"{where} has category {category!r}; expected text or nothing")
    if record["caption_0"].strip() == record["caption_1"].strip():
        raise FieldmarkError(f"{where} has twice the caption {record['caption_0']!r}; expected one a photo")
    images = [_photo(record[name], name, where, folder) for name in GROUP_FIELDS[:2]]
    return Group(images[0], images[1], record["caption_0"].strip(), record["caption_1"].strip(), category)


def _photo(given: str, name: str, where: str, folder: Path) -> str:
    if given.startswith(URI_SCHEMES):
        return given
    path = (folder / given).absolute()
    if not path.is_file():
        raise FieldmarkError(f"{where} has {name} {given!r}, which is not there; expected a photo, from {folder} on")
    return str(path)
