"""What a catalogue holds, as one report: counts, photos, duplicates, leaks, and what it can be used for."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from fieldmark.data.catalog import fingerprint
from fieldmark.data.checks import MAX_THREADS, PHOTOS_AT_ONCE, BadPhoto, find_bad_photos
from fieldmark.data.duplicates import MAX_BITS, MAX_GREY, Look, groups_of_equal, look_of, near_pairs
from fieldmark.data.photos import FORMATS, load_square, open_photo, photo_file
from fieldmark.data.uses import uses_of
from fieldmark.progress import JobProgress

LISTED = 100  # duplicates that the report names
LOOK_SIDE = 64  # pixels; a photo's look is taken from this many


class Measured(NamedTuple):
    """A photo as its file is: width and height before rotation, colour mode, digest of the file, look."""

    width: int
    height: int
    mode: str
    digest: bytes
    look: Look


def measure(ref: str | bytes) -> Measured:
    """Reads and decodes one photo; of a drawn one the pixels stand for the file."""
    if isinstance(ref, str) and ref.startswith("aviary://"):
        drawn = open_photo(ref)
        return Measured(*drawn.size, drawn.mode, hashlib.sha256(drawn.tobytes()).digest(), look_of(drawn))
    with photo_file(ref) as file:
        content = file.read()
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height, mode = *image.size, image.mode
    look = look_of(load_square(content, LOOK_SIDE, fast=True))
    return Measured(width, height, mode, hashlib.sha256(content).digest(), look)


def measure_all(catalog: Dataset, progress: Callable[[int], None]) -> list[Measured]:
    """Every photo of a catalogue, all of which can be read, in its order."""
    found: list[Measured] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(catalog), PHOTOS_AT_ONCE):
            found += pool.map(measure, catalog[start : start + PHOTOS_AT_ONCE]["image"])
            progress(len(found))
    return found


def inspect_catalog(
    catalog: Dataset, *, max_photos: int | None = None
) -> tuple[dict[str, Any], Dataset, list[BadPhoto]]:
    """Everything that `fieldmark inspect` says. Shows its progress.

    Args:
        catalog: rows with the columns of a catalogue.
        max_photos: look at the pixels of that many photos only, evenly spread over the catalogue.

    Returns:
        The report (plain values, ready for JSON), the photos that were looked at and can be read, and the others.
    """
    looked_at = _spread(catalog, max_photos)
    with JobProgress("checking photos", len(looked_at)) as job:
        bad = find_bad_photos(looked_at, progress=job.update)
    unreadable = {one.item_id for one in bad}
    good = looked_at.select([row for row, item in enumerate(looked_at["item_id"][:]) if item not in unreadable])
    with JobProgress("measuring photos", len(good)) as job:
        measured = measure_all(good, job.update)
    with JobProgress("comparing photos", len(good)) as job:
        twice = _duplicates(good, measured, job.update)
    report = {
        "fingerprint": fingerprint(catalog),
        **_counts(catalog),
        "photos": _photos(measured, n_bad=len(bad)),
        **twice,
        "uses": uses_of(catalog),
    }
    return report, good, bad


def _spread(catalog: Dataset, most: int | None) -> Dataset:
    if most is None or most >= len(catalog):
        return catalog
    return catalog.select(np.linspace(0, len(catalog) - 1, most).round().astype(int).tolist())


def _counts(catalog: Dataset) -> dict[str, Any]:
    """What is known without looking at a photo."""
    known: list[dict[str, Any]] = catalog.remove_columns(["image"]).to_list()
    per_class = Counter(row["label"] for row in known if row["label"] is not None)
    by_split: dict[str, set[str]] = {}
    for row in known:
        by_split.setdefault(row["split"] or "none", set()).update([row["label"]] if row["label"] is not None else [])
    photos = Counter(row["split"] or "none" for row in known)
    return {
        "n_photos": len(known),
        "classes": {
            "n": len(per_class),
            "photos_per_class": _range(list(per_class.values())),
            "n_with_one_photo": sum(count == 1 for count in per_class.values()),
            "n_photos_without_label": len(known) - per_class.total(),
            "n_in_train_and_test": len(by_split.get("train", set()) & by_split.get("test", set())),
        },
        "splits": {name: {"n_photos": photos[name], "n_classes": len(labels)} for name, labels in by_split.items()},
        "roles": dict(Counter(row["role"] for row in known)),
        "titles": {
            "coverage": _share(sum(row["title"] is not None for row in known), len(known)),
            "n_different": len({row["title"] for row in known} - {None}),
        },
        "attributes": _attributes(known),
    }


def _attributes(known: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    values: dict[str, Counter[str]] = {}
    for row in known:
        for name, value in (row["attributes"] or {}).items():
            counted = values.setdefault(name, Counter())
            if value is not None:
                counted[value] += 1
    return {
        name: {"coverage": _share(counted.total(), len(known)), "n_values": len(counted)}
        for name, counted in values.items()
    }


def _photos(measured: list[Measured], *, n_bad: int) -> dict[str, Any]:
    return {
        "n_looked_at": len(measured) + n_bad,
        "n_bad": n_bad,
        "width": _range([one.width for one in measured]),
        "height": _range([one.height for one in measured]),
        "modes": dict(Counter(one.mode for one in measured).most_common()),
    }


def _duplicates(catalog: Dataset, measured: list[Measured], progress: Callable[[int], None]) -> dict[str, Any]:
    items, splits = catalog["item_id"][:], catalog["split"][:]
    digests = [one.digest for one in measured]
    groups = groups_of_equal(digests)
    pairs, ended_early = near_pairs([one.look for one in measured], digests, progress=progress)

    def leaks(places: Sequence[int]) -> bool:
        return {"train", "test"} <= {splits[place] for place in places}

    def listed(found: Sequence[Sequence[int]]) -> list[list[str]]:
        leaks_first = sorted(found, key=lambda places: not leaks(places))
        return [[items[place] for place in places] for places in leaks_first[:LISTED]]

    return {
        "exact_duplicates": {
            "n_groups": len(groups),
            "n_photos": sum(map(len, groups)),
            "n_groups_across_train_and_test": sum(map(leaks, groups)),
            "item_ids": listed(groups),
        },
        "near_duplicates": {
            "max_bits_of_64": MAX_BITS,
            "max_grey_of_255": MAX_GREY,
            "n_pairs": len(pairs),
            "n_photos": len({place for pair in pairs for place in pair}),
            "n_pairs_across_train_and_test": sum(map(leaks, pairs)),
            "ended_early": ended_early,
            "item_ids": listed(pairs),
        },
    }


def _range(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0
