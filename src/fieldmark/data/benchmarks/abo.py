"""Amazon Berkeley Objects (Collins et al. 2022): 147,702 listings of products and 398,212 catalogue photos.

Read are `listings/metadata/listings_*.json.gz` and `images/metadata/images.csv.gz`, with the photos of `images/small`
(at most 256 pixels a side, quick to decode), or of `images/original` where only those are there.

An item is a photo; its label is the product (`item_id` of the listings), title and attributes are those of a listing in
English where there is one, and the type of product is the attribute `category`. Variants that differ in what no photo
shows (their size) have the same main photo: they are one product, called as the first of them. A photo that several
products show all the same (a table of sizes) cannot tell them apart and is left out, so no photo is in two parts.
Products by their names: the first half train, the second test.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from fieldmark.data.benchmarks.published import Published, split_in_halves
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

ABO = Published(
    prefix="abo",
    place="the Amazon Berkeley Objects page (abo-listings.tar and abo-images-small.tar)",
    counts={"listings": 147702, "images": 398212},
)
LISTINGS, IMAGES = "listings/metadata", "images/metadata/images.csv.gz"
PHOTOS = ("images/small", "images/original")
# field of a listing -> attribute
ATTRIBUTES = {
    "product_type": "category", "brand": "brand", "color": "color", "material": "material", "pattern": "pattern",
    "style": "style", "item_shape": "shape", "finish_type": "finish", "fabric_type": "fabric",
}  # fmt: skip
_READ = ("item_name", "main_image_id", "other_image_id", *ATTRIBUTES)
# a truncated or damaged archive, and what is in it
_DAMAGES = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, csv.Error)


def read_abo(folder: Path, published: Published = ABO) -> list[Row]:
    """Rows product by product, the main photo first.

    Raises:
        FieldmarkError: listings or photos are missing, are not as many as published, or cannot be read.
    """
    root = published.root(folder, [LISTINGS])
    if root is None:
        raise published.missing(folder, f"{LISTINGS}/listings_*.json.gz")
    photos = next((root / name for name in PHOTOS if (root / name).is_dir()), None)
    if photos is None:
        raise published.missing(folder, " and no ".join(PHOTOS))
    listings, paths = _listings(root, published), _paths(root, published)
    found = {"listings": len(listings), "images": len(paths)}
    expected = published.counts
    wrong = [f"{found[name]:,} {name} instead of {expected[name]:,}" for name in found if found[name] != expected[name]]
    if wrong:
        raise FieldmarkError(f"{published.prefix}:{folder} has {', '.join(wrong)}; {published.get()}")
    products = _products(listings)
    shown = Counter(image for images, _ in products.values() for image in images)
    if unknown := sorted(shown.keys() - paths.keys()):
        raise FieldmarkError(
            f"{root / IMAGES} lacks {len(unknown):,} photos of the listings ({unknown[0]}, ...); {published.get()}"
        )
    rows = [
        known | {"item_id": f"{product}/{image}", "image": str((photos / paths[image]).absolute()), "label": product}
        for product, (images, known) in products.items()
        for image in images
        if shown[image] == 1
    ]
    shared = len(shown) - len(rows)
    if shared:
        logger.warning("%s:%s: %d photos that several products show are left out", published.prefix, folder, shared)
    rows = split_in_halves(rows, sorted({row["label"] for row in rows}))
    return replace(published, counts={}).checked(rows, folder)


def _listings(root: Path, published: Published) -> list[Row]:
    """The fields that are read, of every listing."""
    listings = []
    for path in sorted((root / LISTINGS).glob("listings_*.json.gz")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    listing = json.loads(line)
                    known = {name: listing[name] for name in _READ if name in listing}
                    listings.append({"item_id": listing["item_id"]} | known)
        except _DAMAGES as error:
            raise FieldmarkError(f"cannot read {path} ({type(error).__name__}: {error}); {published.get()}") from error
    return listings


def _paths(root: Path, published: Published) -> dict[str, str]:
    """Photo -> its path in the folder of photos."""
    path = root / IMAGES
    if not path.is_file():
        raise FieldmarkError(f"{path} is missing; {published.get()}")
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            return {record["image_id"]: record["path"] for record in csv.DictReader(file)}
    except _DAMAGES as error:
        raise FieldmarkError(f"cannot read {path} ({type(error).__name__}: {error}); {published.get()}") from error


def _products(listings: list[Row]) -> dict[str, tuple[list[str], Row]]:
    """Product -> its photos, each once, and its title and attributes.

    Listings of one item (in several countries), and items of one main photo, are one product.
    """
    of_item: dict[str, str] = {}
    of_photo: dict[str, str] = {}
    products: dict[str, tuple[list[str], Row]] = {}
    # of an item the listing in English comes first: it names the product
    for listing in sorted(listings, key=lambda one: (one["item_id"], _rank(one.get("item_name")))):
        listed = [listing.get("main_image_id"), *listing.get("other_image_id", [])]
        images: list[str] = [image for image in dict.fromkeys(listed) if image]
        if images:
            item: str = listing["item_id"]
            product = of_item.setdefault(item, of_photo.get(images[0], item))
            of_photo.setdefault(images[0], product)
            attributes = {name: _text(listing.get(field)) for field, name in ATTRIBUTES.items()}
            known = {"title": _text(listing.get("item_name")), "attributes": attributes}
            photos, _ = products.setdefault(product, ([], known))
            photos += [image for image in images if image not in photos]
    return products


def _text(value: Any) -> str | None:
    """A field as text: it is text itself, or a list of values, some with a language."""
    chosen = min(value, key=_language).get("value") if isinstance(value, list) and value else value
    return str(chosen).strip() or None if chosen else None


def _rank(value: Any) -> int:
    return min((_language(one) for one in value), default=3) if isinstance(value, list) else 3


def _language(value: Row) -> int:
    """American English first, then other English, then the rest."""
    tag = value.get("language_tag") or ""
    return 0 if tag == "en_US" else 1 if tag.startswith("en_") else 2
