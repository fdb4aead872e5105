"""Readers of tables: CSV (also with semicolons, tabs or bars), JSON lines and Parquet, and the CSV files of OML."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from fieldmark.data.columns import ColumnMap, rows_of
from fieldmark.data.readers import COLUMNS, Row
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = (",", ";", "\t", "|")
OML_COLUMNS = ("label", "path", "split", "is_query", "is_gallery")
OML_BOX = ("x_1", "y_1", "x_2", "y_2")


def read_table(path: Path, mapping: ColumnMap) -> list[Row]:
    """Rows of a CSV, JSONL or Parquet file; relative image paths start at the file's own folder.

    Attributes come from a column `attributes` (a mapping or JSON text), from columns `attr_NAME` and from those that
    are named. Other unknown columns are left out with a warning. The item_id is, where the column is missing, the
    image path as written. A table with OML's columns is read as OML means it (see `_oml_records`), unless columns
    are named.
    """
    records = read_records(path, mapping)
    names = names_in(records)
    if not mapping and "image" not in names and set(OML_COLUMNS) <= set(names):
        records = _oml_records(records, path)
        names = names_in(records)
    return rows_of(records, names, mapping, path.parent, str(path))


def read_records(path: Path, mapping: ColumnMap) -> list[Row]:
    """Records of a CSV, JSONL or Parquet file under the names that it gives its columns.

    Raises:
        FieldmarkError: no such file, another suffix, or a file that is not of its kind.
    """
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in TABLE_SUFFIXES:
        raise FieldmarkError(f"{path} is no file that ends in {', '.join(TABLE_SUFFIXES)}; expected a catalogue in one")
    if suffix in (".csv", ".tsv"):
        return read_csv(path, known=(*COLUMNS, *mapping.columns.values(), *mapping.attributes))
    return _read_jsonl(path) if suffix == ".jsonl" else _read_parquet(path)


def names_in(records: list[Row]) -> list[str]:
    """The columns of records, in the order in which they first appear."""
    return list(dict.fromkeys(name for record in records for name in record))


def read_csv(path: Path, *, known: Collection[str] = COLUMNS) -> list[Row]:
    """Records of a CSV file with a header; empty cells are None.

    The separator is the one of comma, semicolon, tab and bar that finds most of the `known` names in the header,
    then the one that finds most cells.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = _separator(file.readline(), known)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            records = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FieldmarkError(f"cannot read {path}: {error}; expected a CSV file in UTF-8") from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FieldmarkError(f"{path} has several columns {twice[0]!r}; give each its own name")
    for number, record in enumerate(records, start=1):
        if None in record:
            raise FieldmarkError(f"{path}: row {number} has more cells than the header; quote cells that hold commas")
    return [{name: value or None for name, value in record.items()} for record in records]


def _separator(header: str, known: Collection[str]) -> str:
    def found(separator: str) -> tuple[int, int]:
        cells = [cell.strip() for cell in next(csv.reader([header], delimiter=separator), [])]
        return len(set(cells) & set(known)), len(cells)

    return max(SEPARATORS, key=found)  # of equals the first


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


def _oml_records(records: list[Row], path: Path) -> list[Row]:
    """OML's columns as ours: `validation` is what is measured (our test), `is_query` and `is_gallery` are the role.

    `category` becomes an attribute. Boxes are not cut out: photos are used whole and that is said; a photo with
    several boxes is refused.
    """
    boxed = any(record.get(name) for record in records for name in OML_BOX)
    if boxed:
        photo, count = Counter(record["path"] for record in records).most_common(1)[0]
        if count > 1:
            raise FieldmarkError(
                f"{path} has {count} boxes (x_1, ...) in the photo {photo!r}; boxes are not cut out here, so save each "
                "as a photo of its own"
            )
        logger.warning("%s: the boxes x_1, y_1, x_2, y_2 are not cut out, photos are used whole", path)
    taken = {*OML_COLUMNS, *OML_BOX, "category"}
    converted = []
    for number, record in enumerate(records, start=1):
        evaluated = str(record["split"]).strip().lower() == "validation"
        found = {
            "image": record["path"],
            "label": record["label"],
            "split": "test" if evaluated else record["split"],
            "role": _oml_role(record, f"{path}: row {number}") if evaluated else "both",
            "attr_category": record.get("category"),
        }
        converted.append(found | {name: value for name, value in record.items() if name not in taken})
    return converted


def _oml_role(record: Row, where: str) -> str:
    query, gallery = (str(record[name]).strip().lower() in ("true", "1", "1.0") for name in ("is_query", "is_gallery"))
    if not query and not gallery:
        raise FieldmarkError(f"{where} is validation but neither query nor gallery; set is_query or is_gallery to True")
    return "both" if query and gallery else "query" if query else "gallery"
