"""Settings of every command that reads a catalogue: where it lies, what its columns are called, bad photos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import datasets

    from fieldmark.data.checks import BadPhoto


@dataclass(kw_only=True)
class CatalogOptions:
    """A catalogue and how to read it.

    Attributes:
        data: source of the catalogue: aviary, a folder with one directory a class, a CSV, JSONL or Parquet file, a hub
            id OWNER/NAME[@REVISION], a folder of save_to_disk, webdataset shards (wds:PATTERN or a .tar file),
            products:FILE (a table with several photos a row), or a public data set: grocery:DIR, cub:DIR, cars:DIR,
            aircraft:DIR, inat-aves:DIR, sop:DIR, inshop:DIR, fashion:DIR, abo:DIR, m5product:DIR.
        image_column: column of a table or hub data set that holds the photos, where it is not `image`.
        label_column: column of the class, where it is not `label`.
        title_column: column of the title, where it is not `title`.
        item_id_column: column of the item's own name, where it is not `item_id`.
        split_column: column of train, val and test, where it is not `split`.
        role_column: column of query, gallery and both, where it is not `role`.
        attribute_columns: further columns that are attributes, e.g. [colour, material].
        bad_photos: raise stops at a photo that cannot be read and names it; skip leaves such photos out, counts them
            and lists them in bad_files.csv.
    """

    data: str
    image_column: str | None = None
    label_column: str | None = None
    title_column: str | None = None
    item_id_column: str | None = None
    split_column: str | None = None
    role_column: str | None = None
    attribute_columns: list[str] = field(default_factory=list)
    bad_photos: Literal["raise", "skip"] = "raise"

    def columns(self) -> dict[str, str]:
        """Catalogue column -> name in the source, of those that were named."""
        names = ("image", "label", "title", "item_id", "split", "role")
        given = {name: getattr(self, f"{name}_column") for name in names}
        return {name: value for name, value in given.items() if value is not None}


def read_catalog(options: CatalogOptions, *, part: str = "student") -> tuple[datasets.Dataset, list[BadPhoto]]:
    """The catalogue as its options say, and the photos that were left out of it (none under the policy `raise`).

    Raises:
        FieldmarkError: see `load_catalog`; or, under `skip`, no photo is left.
    """
    from fieldmark.data.catalog import load_catalog
    from fieldmark.data.checks import leave_out_bad_photos

    columns, attributes = options.columns(), options.attribute_columns
    catalog = load_catalog(options.data, part=part, columns=columns, attribute_columns=attributes)
    return leave_out_bad_photos(catalog) if options.bad_photos == "skip" else (catalog, [])
