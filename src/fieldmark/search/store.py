"""The store: a folder with a student's vectors of a catalogue and what is known of its items, in LanceDB.

Up to `exact_up_to` items the vectors are held in memory and search is exact. Above, LanceDB's approximate index
answers; what it finds of an exact search is measured when it is made. Under a filter search is exact at any size.

LanceDB keeps versions: a write adds one, whole or not at all, and who reads keeps the one he has. A `Store` looks for a
newer one at most once a second. Any number of threads may use it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from lancedb.index import FTS, BTree
from lancedb.table import Table

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.search.card import NAME, UNFINISHED, StoreCard, StoredModel, check_model, check_titles_agree
from fieldmark.search.nearest import renew_index
from fieldmark.search.rows import (
    FACTS,
    KEY,
    Hit,
    Item,
    attribute_columns,
    facts_of,
    given_attributes,
    is_one_of,
    is_unicode,
    table_schema,
    to_table,
    unit_rows,
    vectors_of,
)
from fieldmark.search.view import IDS_AT_ONCE, View

__all__ = ["EXACT_UP_TO", "Hit", "Item", "Store"]

EXACT_UP_TO = 100_000
TABLE = "items"
LOCK = "writer.lock"
LEFTOVERS = {LOCK, UNFINISHED}  # of a store whose making was killed at once
SECONDS_BETWEEN_LOOKS = 1.0
KEPT_VERSIONS = timedelta(hours=1)  # for who reads meanwhile


class Store:
    """Items, their vectors, and how to find them. Made by `Store.open` or `Store.create`.

    Attributes:
        folder: where it lies.
        card: what it says of itself: its model, its columns, its index.
    """

    def __init__(self, folder: Path, card: StoreCard, table: Table) -> None:
        self.folder, self.card = folder, card
        self._table = table
        self._view: View | None = None
        self._looked = 0.0
        self._reading, self._writing = threading.RLock(), threading.RLock()
        self._lock = FileLock(folder / LOCK, thread_local=False)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """A store that is there.

        Raises:
            FieldmarkError: the folder is no store, a damaged one or one without items, or a newer fieldmark made it.
        """
        folder = Path(folder)
        card = StoreCard.read(folder)
        table = _open_table(folder)
        if table is None:
            raise FieldmarkError(f"{folder} is a store without items; run `fieldmark index` again.")
        return cls(folder, card, table)

    @classmethod
    def create(
        cls, folder: str | Path, model: StoredModel, *, exact_up_to: int | None = None, with_titles: bool = False
    ) -> Self:
        """A new store, or the one that is there if it holds vectors of the same model.

        Args:
            folder: where it is to lie.
            model: whose vectors it is to hold.
            exact_up_to: items up to which search is exact; None means 100,000, or the store's own.
            with_titles: whether its vectors are of photos together with their titles.

        Raises:
            FieldmarkError: the folder holds something else, the vectors of another model, of photos with titles where
                these are without or the other way round, or a damaged store; it cannot be written; or another process
                writes to it.
        """
        folder = Path(folder)
        if not (folder / NAME).is_file() and folder.exists() and not _is_empty(folder):
            raise FieldmarkError(f"{folder} exists and is not a store; give another name, or delete it first.")
        folder.mkdir(parents=True, exist_ok=True)
        with _sole_writer(FileLock(folder / LOCK), folder), _write_trouble(folder):
            card = StoreCard.read(folder) if (folder / NAME).is_file() else StoreCard(model, EXACT_UP_TO, with_titles)
            check_model(card, model, folder)
            check_titles_agree(card, with_titles, folder)
            bound = card.exact_up_to if exact_up_to is None else exact_up_to
            card = replace(card, exact_up_to=bound, model=replace(card.model, source=model.source))
            card.write(folder)
            table = _open_table(folder)
            if table is None:
                table = lancedb.connect(folder).create_table(TABLE, schema=table_schema(model.dim))
            indexed = {column for index in table.list_indices() for column in index.columns}
            if KEY not in indexed:
                table.create_index(KEY, config=BTree())
            if "words" not in indexed:  # words as they are written, in any language
                table.create_index("words", config=FTS(base_tokenizer="icu", stem=False, remove_stop_words=False))
        return cls(folder, card, table)

    # -- asking

    def count(self) -> int:
        """Number of items."""
        return self._now().count

    def search(self, vector: Any, k: int = 10, where: str | None = None, text: str | None = None) -> list[Hit]:
        """The items nearest to a query.

        Args:
            vector: [D] numbers; its length does not matter.
            k: items wanted.
            where: SQL condition on item_id, title, label and the attributes' columns (see `columns`).
            text: words to look for in titles and attributes as well; the two orders are joined by reciprocal rank
                fusion.

        Returns:
            At most k items, best first; equal cosines are ordered by item_id where the vectors are in memory.

        Raises:
            FieldmarkError: the vector is of another size or no direction, the filter is wrong, or the store is empty.
        """
        view, query = self._now(), unit_rows([vector], self.card.model.dim)[0]
        if not view.count:
            raise FieldmarkError(f"The store {self.folder} has no items; index a catalogue into it first.")
        depth = _checked(k) + 1  # the next one, for the last one's margin
        found = view.nearest(query, depth, where) if text is None else view.fused(query, depth, where, text)
        return _hits(*found, k)

    def similar(self, item_id: str, k: int = 10, where: str | None = None) -> list[Hit]:
        """The items nearest to an item, itself left out.

        Raises:
            FieldmarkError: there is no such item, or the filter is wrong.
        """
        view = self._now()
        query = vectors_of(self._known(view, [item_id], ["vector"]))[0]
        facts, scores = view.nearest(query, _checked(k) + 2, where)
        others = np.flatnonzero(facts[KEY].to_numpy(zero_copy_only=False) != item_id)
        return _hits(facts.take(others), scores[others], k)

    def items(self, ids: Sequence[str]) -> list[Item]:
        """What is known of items, in the order given.

        Raises:
            FieldmarkError: there is no such item.
        """
        return [Item(**facts) for facts in facts_of(self._known(self._now(), ids, FACTS))]

    def photo(self, item_id: str) -> PhotoRef:
        """An item's photo: path, uri, or the bytes of an image file that the store holds itself.

        Raises:
            FieldmarkError: there is no such item.
        """
        row = self._known(self._now(), [item_id], ["image", "photo"]).to_pylist()[0]
        return row["image"] if row["photo"] is None else row["photo"]

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        """[N, D] float32 vectors of items, of unit length, in the order given.

        Raises:
            FieldmarkError: there is no such item.
        """
        return vectors_of(self._known(self._now(), ids, ["vector"]))

    def hashes(self) -> dict[str, tuple[str, str]]:
        """Item -> hash of its photo and hash of all else that is stored of it."""
        table = self._now().table.search().select([KEY, "photo_hash", "facts_hash"]).limit(None).to_arrow()
        columns = (table[name].to_pylist() for name in (KEY, "photo_hash", "facts_hash"))
        return {item: (photo, facts) for item, photo, facts in zip(*columns, strict=True)}

    def columns(self) -> dict[str, str]:
        """Attribute -> its column, for filters."""
        return dict(self._now().card.columns)

    def facets(self) -> dict[str, dict[str, int]]:
        """Attribute's column -> its values and how many items have each, the most frequent first."""
        return self._now().facets()

    # -- changing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out; threads of this process take turns. The system frees the lock of a killed process.

        Raises:
            FieldmarkError: another process writes.
        """
        with self._writing, _sole_writer(self._lock, self.folder):
            self._table.checkout_latest()
            self._look()
            yield

    def add(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray, photo_hashes: Sequence[str]) -> None:
        """Adds items; those that are there are replaced. A kill leaves each as it was or as it is to be.

        Args:
            rows: rows of a catalogue.
            vectors: [N, D], of any length but zero.
            photo_hashes: what tells each photo from a changed one.

        Raises:
            FieldmarkError: a vector is of another size or no direction, an item is given twice, the store cannot
                be written, or another process writes.
        """
        ids = [row[KEY] for row in rows]
        if len(set(ids)) < len(ids):
            raise FieldmarkError("An item was given twice; give each item_id once.")
        if not ids:
            return
        if not len(vectors) == len(ids) == len(photo_hashes):
            raise FieldmarkError(
                f"{len(ids)} items, {len(vectors)} vectors and {len(photo_hashes)} photo hashes were given; give one "
                "each."
            )
        unit = unit_rows(vectors, self.card.model.dim, ids)
        with self.writing(), _write_trouble(self.folder):
            self._add_columns(rows)
            table = to_table(rows, unit, photo_hashes, self.card.columns, self._table.schema)
            there = pa.array(self._look().by_id(ids, [KEY])[KEY].to_pylist(), pa.string())
            known = pc.is_in(table[KEY], there)
            new, changed = table.filter(pc.invert(known)), table.filter(known)
            if len(new):  # to add is several times faster than to merge
                self._table.add(new)
            if len(changed):
                self._table.merge_insert(KEY).when_matched_update_all().execute(changed)
            self._look()

    def delete(self, ids: Sequence[str]) -> None:
        """Deletes items.

        Raises:
            FieldmarkError: there is no such item (nothing is deleted then), the store cannot be written, or another
                process writes.
        """
        with self.writing(), _write_trouble(self.folder):
            self._known(self._look(), ids, [KEY])
            for start in range(0, len(ids), IDS_AT_ONCE):
                self._table.delete(is_one_of(ids[start : start + IDS_AT_ONCE]))
            self._look()

    def finish(self) -> StoreCard:
        """After adding and deleting: fewer, larger files, full indexes, and above `exact_up_to` the approximate index.

        Returns:
            The store's card, with the measured recall of the approximate index.

        Raises:
            FieldmarkError: the store cannot be written, or another process writes.
        """
        with self.writing(), _write_trouble(self.folder):
            self._table.optimize(cleanup_older_than=KEPT_VERSIONS)
            large = self._table.count_rows() > self.card.exact_up_to
            index = renew_index(self._table, self.card.index) if large else None
            replace(self.card, index=index).write(self.folder)
            self._look()
        return self.card

    # -- within

    def _now(self) -> View:
        """The version that is searched, looked for anew after a second."""
        with self._reading:
            if self._view is None or time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
                return self._look()
            return self._view

    def _look(self) -> View:
        """The newest version."""
        with self._reading:
            table, card = _open_table(self.folder), StoreCard.read(self.folder)
            if table is None:
                raise FieldmarkError(f"The items of {self.folder} are gone; index the catalogue anew.")
            self._looked = time.monotonic()
            if self._view is None or (self._view.version, self._view.card) != (table.version, card):
                self._view, self.card = View(table, card), card
            return self._view

    def _known(self, view: View, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Rows of items, in the order given."""
        wanted = [item for item in ids if is_unicode(item)]  # no other can be in the store, nor be asked for
        found = view.by_id(wanted, [KEY, *(name for name in columns if name != KEY)])
        places = {item: place for place, item in enumerate(found[KEY].to_pylist())}
        missing = next((item for item in ids if item not in places), None)
        if missing is not None:
            raise FieldmarkError(f"The store has no item {missing!r}; give the item_id of one that was indexed.")
        return found.take(pa.array([places[item] for item in ids], pa.int64()))

    def _add_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A column for each attribute that is new."""
        names = dict.fromkeys(name for row in rows for name in given_attributes(row))
        columns = attribute_columns(names, self.card.columns)
        if columns != self.card.columns:
            replace(self.card, columns=columns).write(self.folder)
            self._look()
        # Asked of the table, since a kill may come between the two.
        missing = [column for column in columns.values() if column not in self._table.schema.names]
        if missing:
            self._table.add_columns(pa.schema([pa.field(column, pa.string()) for column in missing]))


def _is_empty(folder: Path) -> bool:
    """Whether a store may be made there."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= LEFTOVERS


def _open_table(folder: Path) -> Table | None:
    """A handle of its own on the newest version of the table; None if there is no table, or a kill left none.

    Raises:
        FieldmarkError: it is damaged.
    """
    try:
        return lancedb.connect(folder).open_table(TABLE)
    except ValueError:  # LanceDB's word for a table that is not there
        return None
    except RuntimeError as error:
        reason = " ".join(str(error).partition(", /")[0].split())
        raise FieldmarkError(
            f"The items of {folder} cannot be read ({reason}); index the catalogue into another folder."
        ) from error


@contextmanager
def _sole_writer(lock: FileLock, folder: Path) -> Iterator[None]:
    try:
        held = lock.acquire(timeout=0)
    except Timeout as error:
        raise FieldmarkError(f"Another process is writing to {folder}; wait until it has ended.") from error
    with held:
        yield


@contextmanager
def _write_trouble(folder: Path) -> Iterator[None]:
    """What the system says of a write becomes a sentence, such as of a full disk: what was written before is whole."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # LanceDB's are RuntimeErrors
        reason = " ".join(str(error).partition(", /")[0].split())
        raise FieldmarkError(
            f"The store {folder} cannot be written ({reason}); what it held before is whole: mend this and run the "
            "same command again."
        ) from error


def _checked(k: int) -> int:
    if k < 1:
        raise FieldmarkError(f"k {k} was given; expected 1 or more.")
    return k


def _hits(facts: pa.Table, scores: np.ndarray, k: int) -> list[Hit]:
    """The first k; `facts` and `scores` hold one more if the store does."""
    margins = [*(scores[:-1] - scores[1:]).tolist(), None]
    found = zip(facts_of(facts.slice(0, k)), scores.tolist(), margins)
    return [Hit(**one, score=score, margin=margin) for one, score, margin in found]
