"""`fieldmark index MODEL` and `fieldmark index --delete`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, quiet_libraries
from fieldmark.data.options import CatalogOptions

if TYPE_CHECKING:
    import datasets

    from fieldmark.search.card import StoreCard
    from fieldmark.search.indexing import Indexed

BAD_FILES = "bad_files.csv"


@dataclass
class IndexOptions(CatalogOptions):
    """Arguments of `index`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        out: folder of the store; one that is there is brought up to date. Photos that were skipped are listed in its
            bad_files.csv.
        split: part of the catalogue; null indexes all of it. Photos with the role query are left out in any case.
        batch_size: photos embedded at once.
        with_titles: embed each photo together with its title, for a student made of a multimodal LLM. A store is of one
            kind: later runs must say the same.
        prune: delete items of the store that the catalogue does not have.
        exact_up_to: items up to which search is exact; above, an approximate index is built and measured. Null means
            100,000, or what the store has.
    """

    model: str
    out: str
    split: Literal["train", "val", "test"] | None = None
    batch_size: int = 64
    with_titles: bool = False
    prune: bool = False
    exact_up_to: int | None = None


IndexOptions.__doc__ = f"{CatalogOptions.__doc__}\n{IndexOptions.__doc__}"


@dataclass
class DeleteOptions:
    """Arguments of `index --delete`.

    Attributes:
        out: folder of the store.
        delete: item_ids, each a word of its own; one that begins with a dash is written --delete=ID.
    """

    out: str
    delete: list[str]


def run(argv: list[str]) -> None:
    """Brings a store up to date with a catalogue, or deletes items."""
    if any(word.partition("=")[0] == "--delete" for word in argv):
        _delete(argv)
        return
    options = parse(
        IndexOptions,
        argv,
        prog="fieldmark index",
        description="Embeds a catalogue into a store that is searched: what is new or changed, the rest is there. "
        "`fieldmark index --out DB --delete ID ID ...` deletes items.",
        positional=("model",),
        switches=("prune", "with_titles"),
    )
    positive("batch_size", options.batch_size)
    if options.exact_up_to is not None:
        positive("exact_up_to", options.exact_up_to)
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.search.embedding import describe_model
    from fieldmark.search.indexing import check_titles, index_catalog
    from fieldmark.search.store import Store

    catalog = _read(options)
    student = load_model(options.model).eval()
    if options.with_titles:
        check_titles(student, catalog)
    model = describe_model(options.model, student)
    store = Store.create(options.out, model, exact_up_to=options.exact_up_to, with_titles=options.with_titles)
    skip = options.bad_photos == "skip"
    with store.writing():  # no other process comes between the items and their index
        done = index_catalog(store, student, catalog, batch_size=options.batch_size, skip_bad=skip, prune=options.prune)
        if skip:
            write_bad_photos(done.bad, Path(options.out) / BAD_FILES)
        count = store.count()
        if count > store.card.exact_up_to:
            print(f"building the approximate index of {count:,} items", file=sys.stderr)
        card = store.finish()
    _print(done, card, count, Path(options.out))


def _read(options: IndexOptions) -> datasets.Dataset:
    """The catalogue's items that are searched; bad photos are met while it is embedded."""
    from fieldmark.data.catalog import load_catalog, select_split

    columns, attributes = options.columns(), options.attribute_columns
    catalog = load_catalog(options.data, columns=columns, attribute_columns=attributes)
    if options.split is not None:
        catalog = select_split(catalog, options.split)
    roles = catalog["role"][:]
    chosen = [row for row, role in enumerate(roles) if role != "query"]
    if len(chosen) < len(roles):
        _say(f"{len(roles) - len(chosen)} photos with the role query are left out: they ask, the others are searched")
    return catalog.select(chosen)


def _delete(argv: list[str]) -> None:
    options = parse(
        DeleteOptions,
        argv,
        prog="fieldmark index --out DB --delete ID ID ...",
        description="Deletes items of a store.",
        several=("delete",),
    )
    ids = list(dict.fromkeys(options.delete))
    from fieldmark.search.store import Store

    store = Store.open(options.out)
    with store.writing():
        store.delete(ids)
        card = store.finish()
    _say(f"{len(ids)} items deleted, {store.count():,} left in {options.out}; {_how(card)}")


def _print(done: Indexed, card: StoreCard, count: int, out: Path) -> None:
    speed = f", {done.photos_per_second:.1f} photos/s" if done.photos_per_second else ""
    _say(
        f"{count:,} items in {out}: {done.new:,} new, {done.changed:,} changed, {done.unchanged:,} unchanged, "
        f"{done.deleted:,} deleted{speed}"
    )
    if done.bad:
        _say(f"{len(done.bad)} photos left out: {out / BAD_FILES}")
    _say(_how(card))


def _how(card: StoreCard) -> str:
    """How the store is searched."""
    if card.index is None:
        return f"search is exact (up to {card.exact_up_to:,} items)"
    return (
        f"search is approximate ({card.index.kind}): recall@10 against exact search {card.index.recall_at_10:.3f}, "
        f"measured on {card.index.queries} items"
    )


def _say(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)
