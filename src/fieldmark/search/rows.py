"""Items as rows of the store's table, and back."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fieldmark.errors import FieldmarkError

FACTS = ("item_id", "title", "label", "attributes", "image")  # what a result shows
FILTERS = ("item_id", "title", "label")  # beside the attributes
KEY = "item_id"


@dataclass(frozen=True, kw_only=True)
class Item:
    """An item of the store.

    Attributes:
        item_id: its name, unique in the store.
        title: its text, if it has one.
        label: its class, if it has one.
        attributes: names and values, those it has.
        image: path or uri of its photo; None where the photo itself lies in the store (see `Store.photo`).
        row: its number in the store; another one after the store has changed.
    """

    item_id: str
    title: str | None
    label: str | None
    attributes: dict[str, str]
    image: str | None
    row: int


@dataclass(frozen=True, kw_only=True)
class Hit(Item):
    """An item that was found.

    Attributes:
        score: cosine of its vector and the query's.
        margin: `score` less that of the next item in order; None for the store's last one. Below zero where words put
            an item before one with a greater cosine.
    """

    score: float
    margin: float | None


def table_schema(dim: int) -> pa.Schema:
    """Columns of a store without attributes; photos are kept only where they have no place of their own."""
    texts = ("title", "label", "attributes", "image", "words", "photo_hash", "facts_hash")
    return pa.schema([
        pa.field(KEY, pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in texts),
        pa.field("photo", pa.large_binary()),
        pa.field("vector", pa.list_(pa.float32(), dim)),
    ])  # fmt: skip


def attribute_columns(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Attribute -> column: lower case, letters, digits and underscores, no two alike; those of `known` stay."""
    columns, own = dict(known), table_schema(1).names
    taken = {*own, *columns.values()}
    for name in names:
        if name in columns:
            continue
        plain = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name).lower()).strip("_")
        if not plain or plain[0].isdigit() or plain in own:
            plain = f"attribute_{plain}".rstrip("_")
        column, number = plain, 2
        while column in taken:
            column, number = f"{plain}_{number}", number + 1
        columns[name] = column
        taken.add(column)
    return columns


def given_attributes(row: Mapping[str, Any]) -> dict[str, str]:
    """The attributes that a catalogue's row has."""
    return {name: str(value) for name, value in (row.get("attributes") or {}).items() if value is not None}


def facts_hash(row: Mapping[str, Any]) -> str:
    """A short name of all that is stored of a catalogue's row beside its photo's pixels."""
    image = None if isinstance(row["image"], bytes) else str(row["image"])
    facts = [row.get("title"), row.get("label"), sorted(given_attributes(row).items()), image]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def to_table(
    rows: Sequence[Mapping[str, Any]],
    vectors: np.ndarray,
    photo_hashes: Sequence[str],
    columns: Mapping[str, str],
    schema: pa.Schema,
) -> pa.Table:
    """Rows of a catalogue with their vectors [N, D] as rows of the store."""
    own = [given_attributes(row) for row in rows]
    found: dict[str, Any] = {
        KEY: [row[KEY] for row in rows],
        "title": [row.get("title") for row in rows],
        "label": [row.get("label") for row in rows],
        "attributes": [json.dumps(one, ensure_ascii=False) for one in own],
        "image": [None if isinstance(row["image"], bytes) else str(row["image"]) for row in rows],
        "words": [" ".join([row.get("title") or "", *one.values()]).strip() for row, one in zip(rows, own)],
        "photo_hash": list(photo_hashes),
        "facts_hash": [facts_hash(row) for row in rows],
        "photo": [row["image"] if isinstance(row["image"], bytes) else None for row in rows],
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1)), vectors.shape[1]
        ),
    }
    found |= {column: [one.get(name) for one in own] for name, column in columns.items()}
    return pa.table([pa.array(found[name], schema.field(name).type) for name in schema.names], schema=schema)


def unit_rows(vectors: Any, dim: int, ids: Sequence[str] | None = None) -> np.ndarray:
    """[N, D] float32 rows of length one.

    Args:
        vectors: [N, D] numbers.
        dim: D.
        ids: N names of the rows, for errors.

    Raises:
        FieldmarkError: they are of another size, hold NaN or infinity, or one has length zero.
    """
    table = np.asarray(vectors, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != dim:
        given = table.shape[-1] if table.ndim else 1
        raise FieldmarkError(f"A vector of {given} numbers was given; expected {dim}, as in the store.")
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        whose = "" if ids is None else f" for the item {ids[wrong[0]]!r}"
        raise FieldmarkError(
            f"A vector of length zero, or with NaN or infinity, was given{whose}; expected one with a direction."
        )
    return (table / lengths).astype(np.float32)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: one with half a character (a lone surrogate) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_one_of(ids: Sequence[str]) -> str:
    """SQL condition that an item is one of these."""
    listed = ", ".join("'{}'".format(item.replace("'", "''")) for item in ids)
    return f"{KEY} IN ({listed or 'NULL'})"


def vectors_of(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """[N, D] float32 of the column `vector`."""
    column = table.column("vector")
    parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    dim = column.type.list_size
    if not parts:
        return np.empty((0, dim), np.float32)
    return np.concatenate([part.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) for part in parts])


def facts_of(table: pa.Table) -> list[dict[str, Any]]:
    """What is known of each item, as arguments of `Item`."""
    return [
        {name: one[name] for name in FACTS} | {"attributes": json.loads(one["attributes"]), "row": one["_rowid"]}
        for one in table.select([*FACTS, "_rowid"]).to_pylist()
    ]
