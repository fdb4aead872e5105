"""iNaturalist 2021, `train_mini`, birds only: 1,486 species of 50 photos; species directories sorted by name (they
start with a number), the first 743 train, the last 743 test (SAGA section 4.1).

Photos are those of `train_mini.json` where it is there, else those below `NUMBER_Animalia_Chordata_Aves_*`.
The set `val` is not part of the protocol.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fieldmark.data.benchmarks.published import Published, split_in_halves
from fieldmark.data.readers import FolderPhotos, Row, subdirectories
from fieldmark.errors import FieldmarkError

INAT_AVES = Published(
    prefix="inat-aves",
    place="the iNaturalist 2021 competition page (inat_comp on GitHub: Train Mini images and annotations)",
    counts={"photos": 74300, "classes": 1486, "train photos": 37150, "test photos": 37150},
)
_AVES = re.compile(r"\d+_Animalia_Chordata_Aves_")


def read_inat_aves(folder: Path, published: Published = INAT_AVES) -> list[Row]:
    """Rows by species, then by file name.

    Raises:
        FieldmarkError: no such photos, or counts are not the published ones.
    """
    root = published.root(folder, ["train_mini", "train_mini.json"], ["2021"])
    listing = None if root is None else root / "train_mini.json"
    if root is not None and listing is not None and listing.is_file():
        rows = _listed_rows(listing, root, published)
    else:
        rows = _folder_rows((folder if root is None else root / "train_mini").absolute())
    if not rows:
        raise published.missing(folder, "birds (directories such as train_mini/03111_Animalia_Chordata_Aves_...)")
    return published.checked(split_in_halves(rows, sorted({row["label"] for row in rows})), folder)


def _folder_rows(photos: Path) -> list[Row]:
    found = FolderPhotos(photos.parent)
    birds = [path for path in subdirectories(photos) if _AVES.match(path.name)]
    rows = [found.row(photo, path.name) for path in birds for photo in found.below(path)]
    found.say_what_is_left_out()
    return rows


def _listed_rows(listing: Path, root: Path, published: Published) -> list[Row]:
    """Photos are named as `train_mini/DIRECTORY/NAME.jpg`."""
    try:
        names = [image["file_name"] for image in json.loads(listing.read_text(encoding="utf-8"))["images"]]
        parts = {name: Path(name).parts for name in sorted(names)}
        birds = {name: part[-2] for name, part in parts.items() if _AVES.match(part[-2])}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FieldmarkError(f"{listing} is not the JSON of iNaturalist ({error!r}); {published.get()}") from error
    return [
        {"item_id": name, "image": str((root / name).absolute()), "label": species} for name, species in birds.items()
    ]
