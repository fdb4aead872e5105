"""What is published of a data set, and the checks that a folder holds all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldmark.data.readers import SPLIT_NAMES, FolderPhotos, Row, subdirectories
from fieldmark.errors import FieldmarkError


@dataclass(frozen=True)
class Published:
    """A data set and its published counts.

    Attributes:
        prefix: what stands before the colon of the source.
        place: where to get it: the name of a page, not an address that may die.
        counts: any of `photos`, `classes`, and `train photos`, `train classes`, ... by split or role.
    """

    prefix: str
    place: str
    counts: Mapping[str, int]

    def root(self, folder: Path, markers: Sequence[str], inside: Sequence[str] = ()) -> Path | None:
        """The folder itself, or one of `inside` it, that holds one of the `markers`.

        Raises:
            FieldmarkError: the folder is not there.
        """
        if not folder.is_dir():
            raise FieldmarkError(f"{self.prefix}:{folder} is no folder; {self.get()}")
        roots = [folder, *(folder / name for name in inside)]
        return next((root for root in roots if any((root / marker).exists() for marker in markers)), None)

    def lines(self, path: Path, fields: int, *, skip: int = 0) -> list[list[str]]:
        """Lines of a listing behind the first `skip`, split at blanks into `fields` parts; empty ones are left out.

        Raises:
            FieldmarkError: the listing is missing, or a line has too few parts.
        """
        if not path.is_file():
            raise FieldmarkError(f"{path} is missing; {self.get()}")
        found = []
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines()[skip:], start=skip + 1
        ):
            parts = line.split(maxsplit=fields - 1)
            if parts and len(parts) < fields:
                raise FieldmarkError(f"{path}: line {number} is {line!r}; expected {fields} parts; {self.get()}")
            found += [[part.strip() for part in parts]] if parts else []
        return found

    def missing(self, folder: Path, expected: str) -> FieldmarkError:
        """The error for a folder in which nothing of the data set was found."""
        return FieldmarkError(f"{self.prefix}:{folder} holds no {expected}; {self.get()}")

    def get(self) -> str:
        """Where the data set is."""
        return f"get the whole data set from {self.place}"

    def checked(self, rows: list[Row], folder: Path) -> list[Row]:
        """The rows, if their counts are the published ones and every photo is there.

        Raises:
            FieldmarkError: says all that differs.
        """
        found = counts_of(rows)
        wrong = [
            f"{found[name]:,} {name} instead of {count:,}"
            for name, count in self.counts.items()
            if found[name] != count
        ]
        absent = [str(row["image"]) for row in rows if not Path(row["image"]).is_file()]
        wrong += [f"{len(absent):,} listed photos that are not there ({absent[0]}, ...)"] if absent else []
        if wrong:
            raise FieldmarkError(f"{self.prefix}:{folder} has {', '.join(wrong)}; {self.get()}")
        return rows


def counts_of(rows: Sequence[Row]) -> Counter[str]:
    """Photos and classes, in all and by split and by role (query and gallery)."""
    classes: dict[str, set[str]] = {}
    photos: Counter[str] = Counter()
    for row in rows:
        kinds = ["", f"{row.get('split')} "]
        kinds += [f"{row['role']} "] if row.get("role") in ("query", "gallery") else []
        for kind in kinds:
            photos[f"{kind}photos"] += 1
            classes.setdefault(f"{kind}classes", set()).add(row["label"])
    return photos + Counter({name: len(labels) for name, labels in classes.items()})


def split_in_halves(rows: list[Row], order: Sequence[str]) -> list[Row]:
    """Rows with the first half of the classes, in the order given, as train and the second as test."""
    train = set(order[: len(order) // 2])
    return [row | {"split": "train" if row["label"] in train else "test"} for row in rows]


def class_folder_rows(folder: Path, n_classes: int) -> list[Row]:
    """Rows of a re-layout by class folder: `n_classes` directories, or train and test directories that hold them.

    The split directories are not the zero-shot split and are not kept. Empty where there is no such level.
    """
    for level in _levels(folder):
        inside = subdirectories(level)
        splits = bool(inside) and all(path.name.lower() in SPLIT_NAMES for path in inside)
        classes = [path for split in inside for path in subdirectories(split)] if splits else inside
        if len({path.name for path in classes}) == n_classes:
            found = FolderPhotos(folder)
            rows = [found.row(photo, path.name) for path in classes for photo in found.below(path)]
            found.say_what_is_left_out()
            return rows
    return []


def _levels(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The folder and those below it, the nearest first; folders of many folders are not entered."""
    level = [folder]
    for _ in range(depth):
        yield from level
        few = [subdirectories(path) for path in level]
        level = [path for paths in few if len(paths) <= 10 for path in paths]
