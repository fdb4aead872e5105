"""A catalogue into a store: what is new or changed is embedded, photos decoded by threads while the student works.

A killed run loses what was embedded since the last write (10 seconds, 2,048 items, or 256 MiB of photos given as
bytes); the next one embeds what is missing. No item is lost or doubled: a write is whole or not at all, and one process
writes at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import datasets
import numpy as np
from sentence_transformers import SentenceTransformer

from fieldmark.data.checks import BadPhoto
from fieldmark.data.photos import photo_fault, photo_file
from fieldmark.errors import FieldmarkError
from fieldmark.machine import usable_cores
from fieldmark.progress import JobProgress
from fieldmark.search.embedding import PhotoReader, embed
from fieldmark.search.rows import KEY, facts_hash
from fieldmark.search.store import Store
from fieldmark.students.items import embeds_both

ROWS_A_WRITE = 2048
SECONDS_A_WRITE = 10.0
BYTES_A_WRITE = 2**28  # of photos given as bytes, which wait in memory
ROWS_AT_ONCE = 256  # of a catalogue in memory, which for a catalogue of bytes are the photos themselves

Row = dict[str, Any]


@dataclass(frozen=True)
class Indexed:
    """What became of a catalogue's items.

    Attributes:
        new: items that were not in the store.
        changed: items whose photo, title, label or attributes changed.
        unchanged: items that were left as they were.
        deleted: items of the store that are not in the catalogue, where they were to be deleted.
        bad: photos that cannot be read, where they were to be left out.
        photos_per_second: speed of embedding, writing included; 0 where nothing was embedded.
    """

    new: int
    changed: int
    unchanged: int
    deleted: int
    bad: list[BadPhoto]
    photos_per_second: float


@dataclass(frozen=True)
class Changes:
    """Rows of a catalogue by what a store knows of them.

    Attributes:
        embed: rows whose item is new or whose photo changed.
        update: rows whose photo is the same, but not its place, title, label or attributes.
        gone: items of the store that the catalogue does not have.
    """

    embed: list[int]
    update: list[int]
    gone: list[str]


def index_catalog(
    store: Store,
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    *,
    batch_size: int = 64,
    skip_bad: bool = False,
    prune: bool = False,
) -> Indexed:
    """Brings a store up to date with a catalogue, with a progress bar; call `store.finish()` afterwards.

    A store that says so (`store.card.with_titles`) gets vectors of photos together with their titles.

    Args:
        store: of this student's vectors.
        student: the student, in eval mode.
        catalog: the items.
        batch_size: photos embedded at once.
        skip_bad: leave out photos that cannot be read, instead of stopping at the first. If the store has the item, it
            stays as it was.
        prune: delete what the catalogue does not have.

    Raises:
        FieldmarkError: the catalogue is empty, a photo cannot be read (none, if they are to be skipped), see
            `check_titles`, the store cannot be written, or another process writes to it.
    """
    if not len(catalog):
        raise FieldmarkError("The catalogue has no photos to index; check its split and role columns.")
    if store.card.with_titles:
        check_titles(student, catalog)
    with store.writing():
        known = store.hashes()
        changes = find_changes(catalog, known, with_titles=store.card.with_titles)
        started = time.monotonic()
        bad = _embed(store, student, catalog, changes.embed, batch_size, skip_bad)
        seconds = time.monotonic() - started
        if len(bad) == len(catalog):
            raise FieldmarkError(
                f"None of the {len(catalog)} photos can be read, the first because {bad[0].image}: {bad[0].reason}; "
                "check where the catalogue's paths point."
            )
        for start in range(0, len(changes.update), ROWS_AT_ONCE):
            rows = rows_of(catalog, changes.update[start : start + ROWS_AT_ONCE])
            ids = [row[KEY] for row in rows]
            store.add(rows, store.vectors(ids), [known[item][0] for item in ids])
        if prune:
            store.delete(changes.gone)
    ids, left_out = catalog[KEY][:], {one.item_id for one in bad}
    embedded = [ids[row] for row in changes.embed if ids[row] not in left_out]
    new = sum(item not in known for item in embedded)
    return Indexed(
        new=new,
        changed=len(embedded) - new + len(changes.update),
        unchanged=len(catalog) - len(changes.embed) - len(changes.update),
        deleted=len(changes.gone) if prune else 0,
        bad=bad,
        photos_per_second=len(embedded) / seconds if embedded else 0.0,
    )


def check_titles(student: SentenceTransformer, catalog: datasets.Dataset) -> None:
    """Refuses what cannot be embedded as photos together with their titles.

    Raises:
        FieldmarkError: the student does not take a photo together with a text, or an item has no title.
    """
    if not embeds_both(student):
        raise FieldmarkError(
            "--with_titles was given for a student that does not embed a photo together with a text; leave it out, or "
            "give a student made of a multimodal LLM."
        )
    titles = catalog["title"][:]
    without = [row for row, title in enumerate(titles) if not (title or "").strip()]
    if without:
        raise FieldmarkError(
            f"--with_titles was given, and {len(without)} of {len(titles)} items have no title, the first "
            f"{catalog[KEY][without[0]]!r}; give them one, or leave --with_titles out."
        )


def find_changes(
    catalog: datasets.Dataset, known: Mapping[str, tuple[str, str]], *, with_titles: bool = False
) -> Changes:
    """Compares a catalogue with a store; reads the files of the photos that the store knows, not their pixels.

    Args:
        catalog: the items.
        known: item -> hashes, see `Store.hashes`.
        with_titles: whether a title is embedded with its photo, so that another title is another photo.
    """
    ids = catalog[KEY][:]
    embed = [row for row, item in enumerate(ids) if item not in known]
    old = [row for row, item in enumerate(ids) if item in known]
    update: list[int] = []
    if old:
        with ThreadPoolExecutor(usable_cores()) as pool, JobProgress("looking for changes", len(old)) as job:
            for start in range(0, len(old), ROWS_AT_ONCE):
                chosen = old[start : start + ROWS_AT_ONCE]
                rows = rows_of(catalog, chosen)
                hashes = pool.map(lambda row: embedded_hash(row, with_titles), rows)
                for place, row, photo in zip(chosen, rows, hashes, strict=True):
                    photo_before, facts_before = known[row[KEY]]
                    if photo != photo_before:
                        embed.append(place)
                    elif facts_hash(row) != facts_before:
                        update.append(place)
                job.update(start + len(chosen))
    there = set(ids)
    return Changes(sorted(embed), update, [item for item in known if item not in there])


def photo_hash(ref: str | bytes) -> str | None:
    """What tells a photo from a changed one: SHA-256 of its file, or of the uri that it is drawn from; None if there is
    no file.
    """
    if isinstance(ref, str) and ref.startswith("aviary://"):
        return hashlib.sha256(ref.encode()).hexdigest()
    try:
        with photo_file(ref) as opened:
            file: Any = opened
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FieldmarkError:
        return None


def embedded_hash(row: Row, with_titles: bool) -> str | None:
    """What tells that which is embedded of a row from a changed one; None if its photo has no file."""
    photo = photo_hash(row["image"])
    if photo is None or not with_titles:
        return photo
    return hashlib.sha256(f"{photo}\0{row['title']}".encode()).hexdigest()


def rows_of(catalog: datasets.Dataset, places: Sequence[int]) -> list[Row]:
    """Rows of a catalogue as dicts."""
    columns = catalog[list(places)]
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class _Batch:
    """Rows whose photos can be read, their hashes and what the student takes; and the photos that cannot."""

    rows: list[Row]
    hashes: list[str]
    features: dict[str, Any] | None
    bad: list[BadPhoto]


def _embed(
    store: Store,
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    places: Sequence[int],
    batch_size: int,
    skip_bad: bool,
) -> list[BadPhoto]:
    """Embeds rows and adds them; returns those that cannot be read."""
    bad: list[BadPhoto] = []
    done, started = 0, time.monotonic()
    if not places:
        return bad
    read = partial(_read, PhotoReader(student), skip_bad=skip_bad, with_titles=store.card.with_titles)
    with JobProgress("photos", len(places)) as job, _Writer(store) as writer:
        for batch in _read_ahead(read, catalog, places, batch_size):
            bad += batch.bad
            if batch.features is not None:
                writer.add(batch.rows, embed(student, batch.features), batch.hashes)
            done += len(batch.rows) + len(batch.bad)
            job.update(done, f"{done / (time.monotonic() - started):.1f}/s")
    return bad


def _read_ahead(
    read: Callable[[Sequence[Row]], _Batch], catalog: datasets.Dataset, places: Sequence[int], batch_size: int
) -> Iterator[_Batch]:
    """Batches in order; while one is used, threads read those that follow."""
    threads = usable_cores()
    waiting: deque[Future[_Batch]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(places), batch_size):
            rows = rows_of(catalog, places[start : start + batch_size])
            waiting.append(pool.submit(read, rows))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(reader: PhotoReader, rows: Sequence[Row], *, skip_bad: bool, with_titles: bool) -> _Batch:
    """Hashes and decodes photos; in this order, so that one that changes in between is embedded anew the next time."""
    good, hashes, squares, bad = [], [], [], []
    for row in rows:
        photo = embedded_hash(row, with_titles)
        try:
            square = reader.square(row["image"])
        except FieldmarkError as error:
            if not skip_bad:
                raise
            bad.append(_bad_photo(row, error))
            continue
        good.append(row)
        hashes.append(photo or "")
        squares.append(square)
    titles = [row["title"] for row in good] if with_titles else None
    return _Batch(good, hashes, reader.features(squares, titles) if squares else None, bad)


def _bad_photo(row: Row, error: FieldmarkError) -> BadPhoto:
    image = row["image"]
    shown = f"<{len(image)} bytes>" if isinstance(image, bytes) else str(image)
    return BadPhoto(row[KEY], shown, row["label"], row["split"], photo_fault(image) or str(error))


class _Writer:
    """Collects rows and writes them some thousand at a time, or every few seconds; what is left at the end too."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._clear()

    def _clear(self) -> None:
        self.rows: list[Row] = []
        self.vectors: list[np.ndarray] = []
        self.hashes: list[str] = []
        self.bytes, self.written = 0, time.monotonic()

    def add(self, rows: Sequence[Row], vectors: np.ndarray, hashes: Sequence[str]) -> None:
        self.rows += rows
        self.vectors.append(vectors)
        self.hashes += hashes
        self.bytes += sum(len(row["image"]) for row in rows if isinstance(row["image"], bytes))
        full = len(self.rows) >= ROWS_A_WRITE or self.bytes >= BYTES_A_WRITE
        if full or time.monotonic() - self.written > SECONDS_A_WRITE:
            self.write()

    def write(self) -> None:
        rows, vectors, hashes = self.rows, self.vectors, self.hashes
        self._clear()  # what cannot be written is not tried again at the end
        if rows:
            self.store.add(rows, np.concatenate(vectors), hashes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error too: what was embedded until then need not be embedded again."""
        self.write()
