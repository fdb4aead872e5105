"""Any source becomes one table: the catalogue, a `datasets.Dataset` with the columns of `COLUMNS`.

Paths travel, pixels come last: `image` is an absolute path, an `aviary://` or `tar://` uri or the bytes of an image
file, and is decoded by `photos.open_photo`.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from fieldmark.data.columns import ColumnMap
from fieldmark.data.readers import COLUMNS, PHOTO_SUFFIXES, SPLIT_NAMES, TEACHER, Row, shortened
from fieldmark.data.sources import read_source
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

PARTS = ("student", "teacher")
ROLES = ("query", "gallery", "both")


def load_catalog(
    source: str,
    *,
    part: str = "student",
    columns: Mapping[str, str] | None = None,
    attribute_columns: Sequence[str] = (),
) -> Dataset:
    """Read a source.

    Args:
        source: `aviary` or `aviary:PHOTOS_PER_SPECIES` (drawn birds), NAME:DIR of a public data set (see
            `benchmarks`), a folder with one directory a class (also below `train`, `val`, `test`, `teacher`), a CSV,
            JSONL or Parquet file with a column `image` and any of the other columns, a hub id `OWNER/NAME` or
            `OWNER/NAME@REVISION`, a folder made by `save_to_disk`, or webdataset shards (`wds:PATTERN`, a .tar file, a
            folder of them).
        part: `student` for the rows that a student is trained and measured on, `teacher` for those that a teacher may
            be built from: photos of their own (aviary, grocery, fashion, the split `teacher` of a table or folder),
            else the rows that the source itself calls `train`, with a warning.
        columns: catalogue column -> what it is called in a table, hub data set or shard.
        attribute_columns: columns there that are attributes.

    Returns:
        Columns `item_id` (unique str), `image` (str or bytes), `label`, `title` (str or None), `attributes` (dict of
        str or None), `split` (train, val, test or None), `role` (query, gallery or both). Where a source has no splits,
        its classes are split zero-shot: the first half of the sorted labels is train, the second test. The catalogue's
        attributes share their names: one that a row does not have is None there.

    Raises:
        FieldmarkError: unknown source, missing file or column, empty catalogue, repeated item_id, wrong split or role,
            or text that is not Unicode.
    """
    if part not in PARTS:
        raise FieldmarkError(f"part {part!r} was given; expected one of {', '.join(PARTS)}")
    found = read_source(source, part, ColumnMap(columns or {}, attribute_columns))
    if not found.rows:
        raise FieldmarkError(
            f"{source} holds no photo; expected one directory of photos a class ({', '.join(PHOTO_SUFFIXES)}), or rows"
        )
    _check_ids(found.rows, source)
    for row in found.rows:
        row["split"], row["role"] = _split(row.get("split"), row, source), _role(row.get("role"), row, source)
        if row.get("label") is not None:
            row["label"] = unicodedata.normalize("NFC", row["label"])  # macOS writes names decomposed
    rows = found.rows if found.has_parts else _rows_of_part(found.rows, part, source)
    if not any(row["split"] is not None for row in rows):
        _split_zero_shot(rows)
    try:
        return _dataset(rows, source, found.images)
    except UnicodeEncodeError as error:
        raise FieldmarkError(
            f"{source} holds {error.object[:40]!r}, which has half a character (a lone surrogate); write whole ones"
        ) from error


def select_split(catalog: Dataset, split: str) -> Dataset:
    """The rows of one split, in the catalogue's order.

    Raises:
        FieldmarkError: the catalogue has no row of that split.
    """
    splits = catalog["split"][:]
    chosen = [index for index, value in enumerate(splits) if value == split]
    if not chosen:
        counts = ", ".join(f"{value or 'without split'}: {count} rows" for value, count in Counter(splits).items())
        raise FieldmarkError(
            f"the catalogue has no row of split {split!r} ({counts}); expected a split that it has, or photos of "
            "several classes, of which the first half is train and the second test"
        )
    return catalog.select(chosen)


def fingerprint(catalog: Dataset) -> str:
    """SHA-256 over the sorted lines `item_id, label, split, role`: two people with the same one measure the same.

    The photos' pixels are not part of it.
    """
    columns = [catalog[name][:] for name in ("item_id", "label", "split", "role")]
    lines = sorted("\t".join(str(value) for value in line) for line in zip(*columns, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rows_of_part(rows: list[Row], part: str, source: str) -> list[Row]:
    """Rows of the split `teacher` are the teacher's alone; without any, a teacher is built from those of `train`."""
    own = [row for row in rows if row["split"] == TEACHER]
    others = [row for row in rows if row["split"] != TEACHER]
    if part == "student":
        if not others:
            raise FieldmarkError(f"{source} has only rows of the split {TEACHER!r}; add rows of train and test")
        return others
    if own:
        shared = sorted({row["label"] for row in own if row.get("label")} & {row.get("label") for row in others})
        if shared:
            logger.warning(
                "%s: %d classes of the teacher are the student's too (%s): it judges them as if it knew them",
                source, len(shared), shortened(shared),
            )  # fmt: skip
        return [row | {"split": "train"} for row in own]
    train = [row for row in others if row["split"] == "train"]
    if not train:
        raise FieldmarkError(
            f"{source} has no rows for a teacher: a teacher may not be built from what its student is measured on; "
            "give a source with a split column or folders that say teacher or train"
        )
    logger.warning(
        "%s has no rows of the split %r: the teacher is built from the student's own training photos, which it will "
        "judge as if it knew them",
        source,
        TEACHER,
    )
    return train


def _check_ids(rows: list[Row], source: str) -> None:
    item, count = Counter(row["item_id"] for row in rows).most_common(1)[0]
    if count > 1:
        raise FieldmarkError(f"{source} has {count} rows with the item_id {item!r}; every row needs its own")


def _split(value: str | None, row: Row, source: str) -> str | None:
    if value is None:
        return None
    if value.strip().lower() not in SPLIT_NAMES:
        raise FieldmarkError(
            f"{source}: item {row['item_id']!r} has split {value!r}; expected train, val, test, teacher or none"
        )
    return SPLIT_NAMES[value.strip().lower()]


def _role(value: str | None, row: Row, source: str) -> str:
    role = "both" if value is None else value.strip().lower()
    if role not in ROLES:
        raise FieldmarkError(
            f"{source}: item {row['item_id']!r} has role {value!r}; expected one of {', '.join(ROLES)}"
        )
    return role


def _split_zero_shot(rows: list[Row]) -> None:
    labels = sorted({row["label"] for row in rows if row.get("label") is not None})
    train = set(labels[: len(labels) // 2])
    for row in rows:
        if row.get("label") is not None:
            row["split"] = "train" if row["label"] in train else "test"


def _dataset(rows: list[Row], source: str, images: Dataset | None) -> Dataset:
    kinds = {type(row["image"]) for row in rows}
    if len(kinds) > 1:
        raise FieldmarkError(f"{source} mixes image paths and image bytes; expected one of both in all rows")
    names = list(dict.fromkeys(name for row in rows for name in row.get("attributes") or {}))
    attributes: Any = {name: Value("string") for name in names} if names else Value("null")
    types: dict[str, Any] = {name: Value("string") for name in COLUMNS}
    types |= {"image": Value("binary" if kinds == {bytes} else "string"), "attributes": attributes}
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in COLUMNS}
    columns["attributes"] = [
        {name: given.get(name) for name in names} if given else None for given in columns["attributes"]
    ]
    if images is None:
        return Dataset.from_dict(columns, features=Features(types))
    stored = images.select(columns.pop("image"))
    types.pop("image")
    known = Dataset.from_dict(columns, features=Features(types))
    return concatenate_datasets([known, stored], axis=1).select_columns(list(COLUMNS))
