"""Which reader a source belongs to: `load_catalog` gives the name, the readers give rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from fieldmark.data.columns import ColumnMap
from fieldmark.data.hub import HUB_ID, is_saved_dataset, read_hub, read_saved
from fieldmark.data.readers import Row, read_folder, subdirectories
from fieldmark.data.tables import TABLE_SUFFIXES, read_table
from fieldmark.data.webdataset import read_shards, shards_of, tar_files
from fieldmark.errors import FieldmarkError

PHOTOS_PER_SPECIES = 20
BENCHMARKS = ("cub", "cars", "aircraft", "inat-aves", "sop", "inshop", "fashion", "abo", "m5product")
CAPTIONED = ("coco", "flickr30k")
SOURCES = (
    "aviary, a folder with one directory a class, a .csv, .tsv, .jsonl or .parquet file, a hub id OWNER/NAME, "
    f"products:FILE, wds:PATTERN or NAME:DIR with one of grocery, {', '.join((*BENCHMARKS, *CAPTIONED))}"
)


class Source(NamedTuple):
    """What a reader found.

    Attributes:
        rows: one a photo.
        has_parts: whether the source itself keeps a teacher's classes and a student's apart.
        images: the photos as a one-column data set that stays on disk; a row's `image` is then an index into it.
    """

    rows: list[Row]
    has_parts: bool = False
    images: Dataset | None = None


def read_source(source: str, part: str, mapping: ColumnMap) -> Source:
    """Rows of a source, not yet checked.

    Raises:
        FieldmarkError: an unknown or missing source, columns named for a source without columns, or what its reader
            says.
    """
    prefix, colon, rest = source.partition(":")
    if prefix == "aviary":
        _no_columns(source, mapping)
        return Source(_read_aviary(rest if colon else str(PHOTOS_PER_SPECIES), part), has_parts=True)
    if prefix == "grocery" and colon:
        from fieldmark.data.grocery import read_grocery

        _no_columns(source, mapping)
        return Source(read_grocery(Path(rest), part), has_parts=True)
    if prefix in BENCHMARKS and colon:
        from fieldmark.data.benchmarks import READERS, read_fashion

        _no_columns(source, mapping)
        if prefix == "fashion":
            return Source(read_fashion(Path(rest), part), has_parts=True)
        return Source(READERS[prefix](Path(rest)))
    if prefix in CAPTIONED and colon:
        from fieldmark.data import captions

        _no_columns(source, mapping)
        return Source(captions.READERS[prefix](Path(rest)))
    if prefix == "products" and colon:
        from fieldmark.data.products import read_products

        return Source(read_products(Path(rest).absolute(), mapping))
    if prefix == "wds" and colon:
        return Source(read_shards(shards_of(rest), mapping, source))
    return _read_path(source, mapping)


def _read_path(source: str, mapping: ColumnMap) -> Source:
    """A folder, file or, where nothing of that name is on this machine, a data set of the hub."""
    path = Path(source)
    prefix, colon, _ = source.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][\w-]+", prefix) and not path.exists():
        raise FieldmarkError(f"the source {source!r} has the unknown prefix {prefix!r}; expected {SOURCES}")
    if not source or not path.exists():
        # inside a folder that is here a name is a mistyped path, which the network should not be asked for
        is_hub_id = HUB_ID.fullmatch(source) and not path.parent.exists()
        if is_hub_id and path.suffix.lower() not in (*TABLE_SUFFIXES, ".tar"):
            return read_hub(source, mapping)
        raise FieldmarkError(f"the source {source!r} does not exist; expected {SOURCES}")
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved(path, mapping)
        shards = tar_files(path)
        if shards and not subdirectories(path):
            return Source(read_shards([shard.absolute() for shard in shards], mapping, source))
        _no_columns(source, mapping)
        return Source(read_folder(path.absolute()))
    if path.suffix.lower() == ".tar":
        return Source(read_shards([path.absolute()], mapping, source))
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise FieldmarkError(f"the source {source!r} ends in {path.suffix!r}; expected {SOURCES}")
    return Source(read_table(path.absolute(), mapping))


def _no_columns(source: str, mapping: ColumnMap) -> None:
    if mapping:
        raise FieldmarkError(
            f"{mapping.flags()} was given, but the source {source!r} has no columns; leave it out, or give a table or "
            "a hub id"
        )


def _read_aviary(photos_per_species: str, part: str) -> list[Row]:
    from fieldmark.data.aviary import aviary_rows

    if not photos_per_species.isascii() or not photos_per_species.isdigit() or int(photos_per_species) < 1:
        raise FieldmarkError(f"aviary:{photos_per_species} was given; expected a number of photos, such as aviary:20")
    parts = ("teacher",) if part == "teacher" else ("train", "test")
    return [row for name in parts for row in aviary_rows(name, int(photos_per_species))]
