"""Photos that cannot be read: found before anything else starts, left out and listed."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from fieldmark.data.photos import PhotoRef, photo_fault
from fieldmark.errors import FieldmarkError
from fieldmark.progress import JobProgress

logger = logging.getLogger(__name__)

COLUMNS = ("item_id", "image", "label", "split", "reason")
PHOTOS_AT_ONCE = 256  # rows of the catalogue in memory, which for a catalogue of bytes are the photos themselves
MAX_THREADS = 8  # a photo of MAX_PIXELS takes 300 MB while it is decoded
NAMED_CLASSES = 5


@dataclass(frozen=True)
class BadPhoto:
    """A row of the catalogue whose photo cannot be read, and why. `image` is a path or uri, or `<N bytes>`."""

    item_id: str
    image: str
    label: str | None
    split: str | None
    reason: str


def find_bad_photos(catalog: Dataset, *, progress: Callable[[int], None] | None = None) -> list[BadPhoto]:
    """Decodes every photo of a catalogue once and returns those that `open_photo` would refuse, in its order.

    A JPEG is decoded at an eighth of its size, which reads its whole stream in less time. Decoding releases Python's
    lock, so threads share the work.

    Args:
        catalog: rows with the columns of a catalogue.
        progress: called with the number of photos done.
    """
    bad: list[BadPhoto] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(catalog), PHOTOS_AT_ONCE):
            rows = catalog[start : start + PHOTOS_AT_ONCE]
            found = pool.map(photo_fault, rows["image"])
            columns = (rows[name] for name in ("item_id", "image", "label", "split"))
            bad += [
                BadPhoto(item_id, _shown(image), label, split, reason)
                for item_id, image, label, split, reason in zip(*columns, found, strict=True)
                if reason is not None
            ]
            if progress is not None:
                progress(min(start + PHOTOS_AT_ONCE, len(catalog)))
    return bad


def this_process() -> Any:
    """Rank and number of the processes that share a run; without an accelerator they talk through the CPU."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def leave_out_bad_photos(catalog: Dataset) -> tuple[Dataset, list[BadPhoto]]:
    """The catalogue without the photos that cannot be read, and those photos.

    Says how many are left out, and by name the classes that lose all their photos, or all of one split. Several
    processes share the work and have the same result; the first one speaks.

    Raises:
        FieldmarkError: no photo is left.
    """
    from accelerate.utils import gather_object

    processes = this_process()
    part = catalog.select(range(processes.process_index, len(catalog), processes.num_processes))
    if processes.is_main_process:
        with JobProgress("checking photos", len(part)) as job:
            own = find_bad_photos(part, progress=job.update)
    else:
        own = find_bad_photos(part)
    found = {one.item_id: one for one in gather_object(own)}
    items = catalog["item_id"][:]
    bad = [found[item] for item in items if item in found]
    if len(bad) == len(catalog):
        raise FieldmarkError(
            f"None of the {len(catalog)} photos can be read, the first because {bad[0].image}: {bad[0].reason}; "
            "check where the catalogue's paths point."
        )
    if processes.is_main_process:
        for line in _what_is_lost(catalog, bad):
            logger.warning(line)
    if not bad:
        return catalog, []
    return catalog.select([row for row, item in enumerate(items) if item not in found]), bad


def write_bad_photos(bad: Sequence[BadPhoto], path: Path) -> None:
    """Writes a CSV with the columns item_id, image, label, split and reason; of no bad photos its header alone."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(asdict(one) for one in bad)
    unfinished.replace(path)


def read_bad_photos(path: Path) -> list[BadPhoto]:
    """What :func:`write_bad_photos` wrote; an empty label or split is None."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        BadPhoto(row["item_id"], row["image"], row["label"] or None, row["split"] or None, row["reason"])
        for row in rows
    ]


def _shown(image: PhotoRef) -> str:
    return f"<{len(image)} bytes>" if isinstance(image, bytes) else str(image)


def _what_is_lost(catalog: Dataset, bad: Sequence[BadPhoto]) -> list[str]:
    """One line on the number of bad photos, and one each on classes lost altogether or from a split."""
    if not bad:
        return []
    share = 100 * len(bad) / len(catalog)
    lines = [f"{len(bad)} of {len(catalog)} photos cannot be read and are left out ({share:.1f} %)"]
    lost = Counter(one.label for one in bad if one.label is not None)
    had = Counter(catalog["label"][:])
    gone = [label for label, count in lost.items() if count == had[label]]
    if gone:
        lines.append(f"no photo can be read of {_classes(gone)}")
    lost_parts = Counter((one.label, one.split) for one in bad if one.label is not None and one.label not in gone)
    had_parts = Counter(zip(catalog["label"][:], catalog["split"][:], strict=True))
    splits: dict[str, list[str]] = {}
    for (label, split), count in lost_parts.items():
        if count == had_parts[label, split]:
            splits.setdefault(split or "no split", []).append(label)
    return lines + [
        f"no photo of the split {split} can be read of {_classes(labels)}" for split, labels in splits.items()
    ]


def _classes(labels: Sequence[str]) -> str:
    named = ", ".join(labels[:NAMED_CLASSES])
    more = f" and {len(labels) - NAMED_CLASSES} more" if len(labels) > NAMED_CLASSES else ""
    return f"{len(labels)} {'class' if len(labels) == 1 else 'classes'}: {named}{more}"
