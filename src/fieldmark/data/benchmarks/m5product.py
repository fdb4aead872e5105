"""M5Product (Dong et al. 2022): 5,760,482 products of Chinese shops with photo, title, category and attributes, in the
authors' own parts: 4,418,550 train, 1,341,932 test.

Read are `product1m_product5m_train_id_label.json` and `..._test_id_label.json` (one object each: product to `title`,
`label`, `pv`, ...) and the main photos `images/PRODUCT.jpg`; videos and sound are not.

A product has one photo. Its `label` there is the attribute `category`; the property-value pairs of `pv` are the one
attribute `properties`, since a column for each of 5,679 properties would be empty nearly everywhere. No list of equal
products is published. To AFMRL (section 4) products are the same if their attributes match exactly; so here those of a
category and the same pairs have one label, the name of the first of them, and a product without pairs stands alone. The
authors' parts share categories, and may share products.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fieldmark.data.benchmarks.published import Published
from fieldmark.data.readers import Row
from fieldmark.errors import FieldmarkError

M5PRODUCT = Published(
    prefix="m5product",
    place="the M5Product page of its authors (Xiao Dong et al.), who ask for an application",
    counts={"photos": 5760482, "train photos": 4418550, "test photos": 1341932},
)
LISTING = "product1m_product5m_{}_id_label.json"
PAIRS, VALUES = "#;#", "#:#"  # between two pairs, and between a property and its value


def read_m5product(folder: Path, published: Published = M5PRODUCT) -> list[Row]:
    """Rows of the train listing, then of the test listing; about 5.5 kB of memory a product until the catalogue stands.

    Raises:
        FieldmarkError: a listing or photos are missing, or counts are not the published ones.
    """
    root = published.root(folder, [LISTING.format(split) for split in ("train", "test")], ["product5m_v2"])
    if root is None:
        raise published.missing(folder, LISTING.format("train"))
    photos = next((path / "images" for path in (root, root.parent) if (path / "images").is_dir()), root / "images")
    first: dict[tuple[str, str], str] = {}
    rows = []
    for split in ("train", "test"):
        for product, (title, category, properties) in _products(root / LISTING.format(split), published).items():
            label = first.setdefault((category, properties), product) if properties else product
            rows.append(
                {
                    "item_id": product,
                    "image": str((photos / f"{product}.jpg").absolute()),
                    "label": label,
                    "title": title or None,
                    "attributes": {"category": category, "properties": properties or None},
                    "split": split,
                }
            )
    return published.checked(rows, folder)


def _products(path: Path, published: Published) -> dict[str, tuple[str, str, str]]:
    """Product -> its title, category and properties."""
    if not path.is_file():
        raise FieldmarkError(f"{path} is missing; {published.get()}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_product)
        return {str(product): (title, category, properties) for product, (title, category, properties) in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FieldmarkError(
            f"{path} is no listing of M5Product ({type(error).__name__}: {error}); {published.get()}"
        ) from error


def _product(record: dict[str, Any]) -> Any:
    """What is read of a product's record, as soon as it is parsed; the listing itself stays as it is."""
    if "title" not in record:
        return record
    pairs = {pair.strip().replace(VALUES, ": ") for pair in record["pv"].split(PAIRS) if VALUES in pair}
    return record["title"].strip(), record["label"].strip(), "; ".join(sorted(pairs))
