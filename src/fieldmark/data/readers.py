"""Readers of folders and tables: rows of a catalogue as dicts, not yet checked (see `catalog`)."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

COLUMNS = ("item_id", "image", "label", "title", "attributes", "split", "role")
ATTRIBUTE_PREFIX = "attr_"
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}

Row = dict[str, Any]


def read_folder(folder: Path) -> list[Row]:
    """A folder with one directory a class, or with `train`, `val`, `test` directories that hold one a class.

    The label is the name of the class directory (photos may lie deeper), the item_id the path inside the folder.
    Photos without a class directory have no label, where the folder has no class directories at all.
    """
    directories = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if directories and all(entry.name.lower() in SPLIT_NAMES for entry in directories):
        rows = []
        for directory in directories:
            classes = sorted(entry for entry in directory.iterdir() if entry.is_dir())
            rows += [row | {"split": directory.name} for row in _class_rows(folder, classes)]
        return rows
    rows = _class_rows(folder, directories)
    loose = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in PHOTO_SUFFIXES]
    if rows and loose:
        logger.warning("%s: %d photos outside the class directories are left out", folder, len(loose))
    return rows or [{"item_id": path.name, "image": str(path), "label": None} for path in loose]


def _class_rows(folder: Path, classes: list[Path]) -> list[Row]:
    rows, others = [], 0
    for directory in classes:
        for path in _files_below(directory):
            if path.suffix.lower() not in PHOTO_SUFFIXES:
                others += 1
                continue
            rows.append({"item_id": path.relative_to(folder).as_posix(), "image": str(path), "label": directory.name})
    if others:
        logger.warning("%s: %d files that are no photos are left out", folder, others)
    return rows


def _files_below(directory: Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def read_table(path: Path) -> list[Row]:
    """Rows of a CSV, JSONL or Parquet file; relative image paths start at the file's own folder.

    Attributes come from a column `attributes` (a mapping or JSON text) or from columns `attr_NAME`. Other unknown
    columns are left out with a warning. The item_id is, where the column is missing, the image path as written.
    """
    if not path.is_file():
        raise FieldmarkError(f"{path} is no file; expected a catalogue in CSV, JSONL or Parquet")
    reader = {".csv": read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix.lower()]
    records = reader(path)
    names = list(dict.fromkeys(name for record in records for name in record))
    if "image" not in names and records:
        raise FieldmarkError(
            f"{path} has the columns {', '.join(names)}; expected a column 'image' with paths of photos"
        )
    unknown = [name for name in names if name not in COLUMNS and not name.startswith(ATTRIBUTE_PREFIX)]
    if unknown:
        logger.warning("%s: the columns %s are left out (attributes: name them attr_...)", path, ", ".join(unknown))
    return [_table_row(record, path, number) for number, record in enumerate(records, start=1)]


def read_csv(path: Path) -> list[Row]:
    """Records of a CSV file with a header; empty cells are None."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FieldmarkError(f"cannot read {path}: {error}; expected a CSV file in UTF-8") from error
    for number, record in enumerate(records, start=1):
        if None in record:
            raise FieldmarkError(f"{path}: row {number} has more cells than the header; quote cells that hold commas")
    return [{name: value or None for name, value in record.items()} for record in records]


def _read_jsonl(path: Path) -> list[Row]:
    records = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FieldmarkError(f"cannot read {path}: {error}; expected JSON lines in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FieldmarkError(f"{path}: line {number} is no JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise FieldmarkError(f"{path}: line {number} is a {type(record).__name__}; expected one object a line")
        records.append(record)
    return records


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise FieldmarkError(f"cannot read {path}: {reason}; expected a Parquet file") from error


def _table_row(record: Row, path: Path, number: int) -> Row:
    where = f"{path}: row {number}"
    image, written = _image_of(record.get("image"), path.parent, where)
    row = {name: _text(record.get(name)) for name in ("item_id", "label", "title", "split", "role")}
    row["item_id"] = row["item_id"] or written or f"row-{number}"
    return row | {"image": image, "attributes": _attributes(record, where)}


def _image_of(value: Any, folder: Path, where: str) -> tuple[str | bytes, str | None]:
    """The image as the catalogue holds it, and as it was written (None where it is bytes without a name)."""
    if isinstance(value, dict):  # the image column of a Hugging Face data set
        stored, name = value.get("bytes"), value.get("path")
        if stored:
            return stored, name
        value = name
    if isinstance(value, bytes) and value:
        return value, None
    if not isinstance(value, str) or not value:
        raise FieldmarkError(f"{where} has the image {value!r}; expected the path of a photo")
    if value.startswith("aviary://"):
        return value, value
    if "://" in value:
        raise FieldmarkError(f"{where} has the image {value!r}; expected a path, so download the photo first")
    return str((folder / value).absolute()), value


def _text(value: Any) -> str | None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN differs from itself
        return None
    return str(value)


def _attributes(record: Row, where: str) -> dict[str, str] | None:
    given = record.get("attributes")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise FieldmarkError(f"{where}: attributes are no JSON ({error}); expected a JSON object") from error
    if given is not None and given == given and not isinstance(given, dict):
        raise FieldmarkError(f"{where}: attributes are a {type(given).__name__}; expected a mapping of names to values")
    found = dict(given) if isinstance(given, dict) else {}
    found |= {
        name.removeprefix(ATTRIBUTE_PREFIX): value
        for name, value in record.items()
        if name.startswith(ATTRIBUTE_PREFIX)
    }
    return {str(name): text for name, value in found.items() if (text := _attribute(value, where)) is not None} or None


def _attribute(value: Any, where: str) -> str | None:
    if isinstance(value, dict):
        raise FieldmarkError(f"{where}: the value of an attribute is a mapping; expected text or a list of texts")
    return ", ".join(str(part) for part in value) or None if isinstance(value, list) else _text(value)
