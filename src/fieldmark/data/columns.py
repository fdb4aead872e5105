"""What the columns of a table, a hub data set or a shard's JSON are called, and a record of one as a row."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fieldmark.data.readers import COLUMNS, Row
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

ATTRIBUTE_PREFIX = "attr_"
TEXT_COLUMNS = ("item_id", "label", "title", "split", "role")
URI_SCHEMES = ("aviary://", "tar://")  # what `photos.open_photo` resolves


@dataclass(frozen=True)
class ColumnMap:
    """Names of columns in a source.

    Attributes:
        columns: catalogue column -> name in the source, of those that are called otherwise there.
        attributes: columns that are attributes, beside `attributes` and `attr_NAME`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    attributes: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.columns or self.attributes)

    def flags(self) -> str:
        """The flags that were given, for a sentence."""
        given = [f"--{name}_column" for name in self.columns]
        return ", ".join(given + ["--attribute_columns"] * bool(self.attributes))

    def source_name(self, column: str) -> str:
        """What a catalogue column is called in the source."""
        return self.columns.get(column, column)

    def check(self, names: Sequence[str], where: str) -> None:
        """Every column that was named is there, and the photos' too; what is left out is said in one line.

        Raises:
            FieldmarkError: names the flag, the nearest column and all columns.
        """
        wanted = [(f"--{column}_column", name) for column, name in self.columns.items()]
        wanted += [("--attribute_columns", name) for name in self.attributes]
        listed = ", ".join(names) or "no column"
        for flag, name in wanted:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r} of {listed}?" if near else f"choose one of {listed}"
                raise FieldmarkError(f"{where} has no column {name!r}, which {flag} names; {hint}")
        if self.source_name("image") not in names:
            raise FieldmarkError(
                f"{where} has the columns {listed}; expected a column 'image' with the photos, "
                "or the name of theirs by --image_column"
            )
        used = {self.source_name(column) for column in COLUMNS} | set(self.attributes)
        unknown = [name for name in names if name not in used and not name.startswith(ATTRIBUTE_PREFIX)]
        if unknown:
            logger.warning(
                "%s: the columns %s are left out (name those that you want by --label_column, --title_column, ... "
                "or --attribute_columns)",
                where,
                ", ".join(unknown),
            )

    def texts(self, record: Mapping[str, Any]) -> Row:
        """item_id, label, title, split and role of a record; empty ones are None."""
        return {name: text_of(record.get(self.source_name(name))) for name in TEXT_COLUMNS}

    def attributes_of(self, record: Mapping[str, Any], where: str) -> dict[str, str] | None:
        """Attributes of a record: the column `attributes`, columns `attr_NAME`, and those that were named."""
        found = _mapping(record.get("attributes"), where)
        for name, value in record.items():
            if name in self.attributes or name.startswith(ATTRIBUTE_PREFIX):
                found[name.removeprefix(ATTRIBUTE_PREFIX)] = value
        texts = {str(name): _attribute(value, where) for name, value in found.items()}
        return {name: text for name, text in texts.items() if text is not None} or None


def rows_of(records: Sequence[Row], names: Sequence[str], mapping: ColumnMap, folder: Path, where: str) -> list[Row]:
    """Rows of a catalogue from records that carry their photo; relative paths start at `folder`.

    The item_id is, where the record has none, the image path as written, or `row-NUMBER`.
    """
    if not records:
        return []
    mapping.check(names, where)
    rows = []
    for number, record in enumerate(records, start=1):
        place = f"{where}: row {number}"
        image, written = _image_of(record.get(mapping.source_name("image")), folder, place)
        row = mapping.texts(record)
        row["item_id"] = row["item_id"] or written or f"row-{number}"
        rows.append(row | {"image": image, "attributes": mapping.attributes_of(record, place)})
    return rows


def text_of(value: Any) -> str | None:
    """A cell as text; None where it is empty, blank or NaN."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN differs from itself
        return None
    return str(value)


def _image_of(value: Any, folder: Path, where: str) -> tuple[str | bytes, str | None]:
    """The image as the catalogue holds it, and as it was written (None where it is bytes without a name)."""
    if isinstance(value, dict):  # the image column of a Hugging Face data set
        stored, name = value.get("bytes"), value.get("path")
        if stored:
            return stored, name
        value = name
    if isinstance(value, bytes) and value:
        return value, None
    if not isinstance(value, str) or not value.strip():
        raise FieldmarkError(f"{where} has the image {value!r}; expected the path of a photo")
    if value.startswith(URI_SCHEMES):
        return value, value
    if value.startswith("file://"):
        return unquote(urlsplit(value).path), value
    if "://" in value:
        raise FieldmarkError(f"{where} has the image {value!r}; expected a path, so download the photo first")
    return str((folder / value).absolute()), value


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise FieldmarkError(f"{where}: attributes are no JSON ({error}); expected a JSON object") from error
    if given is None or given != given:
        return {}
    if not isinstance(given, dict):
        raise FieldmarkError(f"{where}: attributes are a {type(given).__name__}; expected a mapping of names to values")
    return dict(given)


def _attribute(value: Any, where: str) -> str | None:
    if isinstance(value, dict):
        raise FieldmarkError(f"{where}: the value of an attribute is a mapping; expected text or a list of texts")
    return ", ".join(str(part) for part in value) or None if isinstance(value, list) else text_of(value)
