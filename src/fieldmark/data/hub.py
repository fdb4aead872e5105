"""Data sets of the Hugging Face hub, and folders made by `save_to_disk`: photos stay on disk, undecoded."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from fieldmark.data.columns import ATTRIBUTE_PREFIX, ColumnMap
from fieldmark.data.readers import COLUMNS, SPLIT_NAMES, Row
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.data.sources import Source

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
SAVED_FILES = ("dataset_dict.json", "dataset_info.json")


def read_hub(source: str, mapping: ColumnMap) -> Source:
    """A data set of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION` (a branch, a tag or a commit).

    Raises:
        FieldmarkError: no such data set, no network, several configurations, or what `_source_of` says.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise FieldmarkError(f"{source!r} was given; expected a hub id OWNER/NAME or OWNER/NAME@REVISION")
    try:
        found = datasets.load_dataset(match["name"], revision=match["revision"])
    # the hub, the network and the data set's own files fail with errors of many libraries
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
        raise FieldmarkError(
            f"{source!r} is nothing on this machine and cannot be read as a data set of the hub ({reason}); check the "
            "name, the network and `hf auth login`, or give a folder or table"
        ) from error
    return _source_of(found, mapping, source)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` made this folder."""
    return (folder / SAVED_FILES[0]).is_file() or all(
        (folder / name).is_file() for name in ("state.json", SAVED_FILES[1])
    )


def read_saved(folder: Path, mapping: ColumnMap) -> Source:
    """A folder made by `save_to_disk`.

    Raises:
        FieldmarkError: files of it are missing or broken, or what `_source_of` says.
    """
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # missing parts and broken Arrow files fail with errors of several libraries
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
        raise FieldmarkError(f"cannot read {folder} as a data set saved to disk: {reason}; save it again") from error
    return _source_of(found, mapping, str(folder))


def _source_of(found: Any, mapping: ColumnMap, where: str) -> Source:
    """Rows of a data set; stored photos stay in its own files.

    Raises:
        FieldmarkError: unknown splits, a named column that is missing, or photos that are neither files nor bytes.
    """
    from fieldmark.data.sources import Source

    parts = _known_splits(found if isinstance(found, dict) else {"": found}, where)
    first = next(iter(parts.values()))
    mapping.check(first.column_names, where)
    image = mapping.source_name("image")
    rows: list[Row] = []
    images = []
    for split, part in parts.items():
        if part.features != first.features:
            raise FieldmarkError(
                f"{where} has other columns in the split {split!r}; give its splits one by one as tables"
            )
        for number, record in enumerate(_records(part, mapping)):
            row = mapping.texts(record)
            row["item_id"] = row["item_id"] or f"{split or 'row'}-{number}"
            row["split"] = row["split"] or (split if len(parts) > 1 else None)
            attributes = mapping.attributes_of(record, f"{where}: {row['item_id']}")
            rows.append(row | {"image": len(rows), "attributes": attributes})
        images.append(_undecoded(part.select_columns([image]), image, where))
    if any(one.features != images[0].features for one in images):
        raise FieldmarkError(f"{where} mixes image paths and image bytes; expected one of both in all splits")
    return Source(rows, images=datasets.concatenate_datasets(images))


def _known_splits(found: dict[str, datasets.Dataset], where: str) -> dict[str, datasets.Dataset]:
    """The splits whose names say what they are for; one split alone says nothing and is left to be split by class."""
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    known = {name: part for name, part in found.items() if name.lower() in SPLIT_NAMES}
    if not known:
        raise FieldmarkError(f"{where} has the splits {', '.join(found)}; expected train, val, test or teacher")
    others = [name for name in found if name not in known]
    if others:
        logger.warning("%s: the splits %s are left out", where, ", ".join(others))
    return known


def _records(part: datasets.Dataset, mapping: ColumnMap) -> list[Row]:
    """What is known of the photos, class numbers as names; columns that are not needed are not read."""
    image = mapping.source_name("image")
    needed = {mapping.source_name(column) for column in COLUMNS} | set(mapping.attributes)
    wanted = [
        name for name in part.column_names if name != image and (name in needed or name.startswith(ATTRIBUTE_PREFIX))
    ]
    if not wanted:
        return [{} for _ in range(len(part))]
    records = part.select_columns(wanted).to_list()
    for name in wanted:
        feature = part.features[name]
        if isinstance(feature, datasets.ClassLabel):
            for record in records:
                number = record[name]
                record[name] = None if number is None or number < 0 else feature.int2str(number)
    return records


def _undecoded(photos: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """A column `image` of bytes or of paths."""
    feature = photos.features[column]
    if isinstance(feature, datasets.Image):
        photos = photos.cast_column(column, datasets.Image(decode=False)).flatten()
        stored, named = f"{column}.bytes", f"{column}.path"
        missing = photos.data.column(stored).null_count
        if missing == 0:
            photos, column = photos.select_columns([stored]), stored
        elif missing == photos.data.num_rows and photos.data.column(named).null_count == 0:
            photos, column = photos.select_columns([named]), named
        else:
            raise FieldmarkError(
                f"{where} has rows without a photo, or mixes paths and bytes; expected one in all rows"
            )
    elif getattr(feature, "dtype", None) not in ("binary", "large_binary", "string"):
        raise FieldmarkError(f"{where} has the column {column!r} of {feature}; expected one photo a row")
    if photos.features[column].dtype == "large_binary":
        photos = photos.cast(datasets.Features({column: datasets.Value("binary")}))
    return photos if column == "image" else photos.rename_column(column, "image")
