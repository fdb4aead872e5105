"""Any source becomes one table: the catalogue, a `datasets.Dataset` with the columns of `COLUMNS`.

Paths travel, pixels come last: `image` is an absolute path, an `aviary://` uri or the bytes of an image file, and is
decoded by `photos.open_photo`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from fieldmark.data.readers import COLUMNS, SPLIT_NAMES, TABLE_SUFFIXES, Row, read_folder, read_table
from fieldmark.errors import FieldmarkError

PARTS = ("student", "teacher")
ROLES = ("query", "gallery", "both")
PHOTOS_PER_SPECIES = 20
_SOURCES = "aviary, aviary:PHOTOS_PER_SPECIES, grocery:DIR, a folder, or a .csv, .jsonl or .parquet file"


def load_catalog(source: str, *, part: str = "student") -> Dataset:
    """Read a source.

    Args:
        source: `aviary` or `aviary:PHOTOS_PER_SPECIES` (drawn birds), `grocery:DIR` (see `grocery`), a folder with one
            directory a class (also below `train`, `val`, `test`), or a CSV, JSONL or Parquet file with a column
            `image` and any of the other columns.
        part: `student` for the rows that a student is trained and measured on, `teacher` for those that a teacher may
            be built from: classes of their own (aviary, grocery), else the rows that the source itself calls `train`.

    Returns:
        Columns `item_id` (unique str), `image` (str or bytes), `label`, `title` (str or None), `attributes` (dict of
        str or None), `split` (train, val, test or None), `role` (query, gallery or both). Where a source has no splits,
        its classes are split zero-shot: the first half of the sorted labels is train, the second test. The catalogue's
        attributes share their names: one that a row does not have is None there.

    Raises:
        FieldmarkError: unknown source, missing file, empty catalogue, repeated item_id, wrong split or role.
    """
    if part not in PARTS:
        raise FieldmarkError(f"part {part!r} was given; expected one of {', '.join(PARTS)}")
    rows, has_parts = _read(source, part)
    if not rows:
        raise FieldmarkError(f"{source} holds no photo; expected {_SOURCES}")
    _check_ids(rows, source)
    for row in rows:
        row["split"], row["role"] = _split(row.get("split"), row, source), _role(row.get("role"), row, source)
    has_splits = any(row["split"] is not None for row in rows)
    if part == "teacher" and not has_parts:
        rows = [row for row in rows if row["split"] == "train"]
        if not rows:
            raise FieldmarkError(
                f"{source} has no rows for a teacher: a teacher may not be built from what its student is measured on; "
                "give a source with a split column or folders that say train"
            )
    elif not has_splits:
        _split_zero_shot(rows)
    return _dataset(rows, source)


def select_split(catalog: Dataset, split: str) -> Dataset:
    """The rows of one split, in the catalogue's order.

    Raises:
        FieldmarkError: the catalogue has no row of that split.
    """
    splits = catalog["split"][:]
    chosen = [index for index, value in enumerate(splits) if value == split]
    if not chosen:
        counts = ", ".join(f"{value}: {count} rows" for value, count in Counter(map(str, splits)).items())
        raise FieldmarkError(f"the catalogue has no row of split {split!r} ({counts}); expected a split that it has")
    return catalog.select(chosen)


def _read(source: str, part: str) -> tuple[list[Row], bool]:
    """Rows of a source, and whether the source itself keeps teacher and student apart."""
    prefix, colon, rest = source.partition(":")
    if prefix == "aviary":
        return _read_aviary(rest if colon else str(PHOTOS_PER_SPECIES), part), True
    if prefix == "grocery" and colon:
        from fieldmark.data.grocery import read_grocery

        return read_grocery(Path(rest), part), True
    path = Path(source)
    if colon and re.fullmatch(r"[A-Za-z][\w-]+", prefix) and not path.exists():
        raise FieldmarkError(f"the source {source!r} has the unknown prefix {prefix!r}; expected {_SOURCES}")
    if not source or not path.exists():
        raise FieldmarkError(f"the source {source!r} does not exist; expected {_SOURCES}")
    if path.is_dir():
        return read_folder(path.absolute()), False
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise FieldmarkError(f"the source {source!r} ends in {path.suffix!r}; expected {_SOURCES}")
    return read_table(path.absolute()), False


def _read_aviary(photos_per_species: str, part: str) -> list[Row]:
    from fieldmark.data.aviary import aviary_rows

    if not photos_per_species.isascii() or not photos_per_species.isdigit() or int(photos_per_species) < 1:
        raise FieldmarkError(f"aviary:{photos_per_species} was given; expected a number of photos, such as aviary:20")
    parts = ("teacher",) if part == "teacher" else ("train", "test")
    return [row for name in parts for row in aviary_rows(name, int(photos_per_species))]


def _check_ids(rows: list[Row], source: str) -> None:
    item, count = Counter(row["item_id"] for row in rows).most_common(1)[0]
    if count > 1:
        raise FieldmarkError(f"{source} has {count} rows with the item_id {item!r}; every row needs its own")


def _split(value: str | None, row: Row, source: str) -> str | None:
    if value is None:
        return None
    if value.strip().lower() not in SPLIT_NAMES:
        raise FieldmarkError(
            f"{source}: item {row['item_id']!r} has split {value!r}; expected train, val, test or none"
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


def _dataset(rows: list[Row], source: str) -> Dataset:
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
    return Dataset.from_dict(columns, features=Features(types))
