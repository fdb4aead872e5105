"""Tables with a row a product and several photos in it: one item a photo, all of a product under one label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldmark.data.columns import ColumnMap, rows_of, text_of
from fieldmark.data.readers import Row
from fieldmark.data.tables import names_in, read_records
from fieldmark.errors import FieldmarkError

SEPARATOR = "|"


def read_products(path: Path, mapping: ColumnMap) -> list[Row]:
    """Rows of a CSV, JSONL or Parquet file of products; relative image paths start at the file's own folder.

    The image column holds a list (JSONL, Parquet) or paths with `|` between them. Photo n of a product is the item
    `PRODUCT/n`; its label is the product's, where the table has labels, else the product's own `item_id`. Everything
    else is the product's. A table with one photo a row is read by `read_table` as it is.

    Raises:
        FieldmarkError: no such file, a column that is not there, or a product (named by its row) without name or photo.
    """
    records = read_records(path, mapping)
    names = names_in(records)
    image, item_id = mapping.source_name("image"), mapping.source_name("item_id")
    if image not in names:
        return rows_of(records, names, mapping, path.parent, str(path))  # says which columns there are
    photos: list[Row] = []
    labels: list[str] = []
    for number, record in enumerate(records, start=1):
        product = text_of(record.get(item_id))
        if product is None:
            raise FieldmarkError(
                f"{path}: row {number} has no {item_id!r}; expected the product's own name in every row, or the column "
                "that holds it by --item_id_column"
            )
        found = _photos(record.get(image), f"{path}: row {number}")
        photos += [record | {item_id: f"{product}/{place}", image: one} for place, one in enumerate(found, start=1)]
        labels += [text_of(record.get(mapping.source_name("label"))) or product] * len(found)
    rows = rows_of(photos, names, mapping, path.parent, str(path))
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def _photos(value: Any, where: str) -> list[Any]:
    """The photos of a cell, each as a table of photos would hold it."""
    given = value.split(SEPARATOR) if isinstance(value, str) else value if isinstance(value, list) else [value]
    photos = [one.strip() if isinstance(one, str) else one for one in given]
    if not photos or not all(photos):
        raise FieldmarkError(f"{where} has the images {value!r}; expected a list of photos, or paths with | between")
    return photos
