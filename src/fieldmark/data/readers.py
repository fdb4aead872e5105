"""Rows of a catalogue as dicts, not yet checked (see `catalog`), and the reader of folders."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

COLUMNS = ("item_id", "image", "label", "title", "attributes", "split", "role")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEACHER = "teacher"  # a split of the source: photos for a teacher alone
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", TEACHER: TEACHER,
}  # fmt: skip
STRAYS = (".ds_store", "thumbs.db", "desktop.ini", "__macosx")

Row = dict[str, Any]


def read_folder(folder: Path) -> list[Row]:
    """A folder with one directory a class, or with `train`, `val`, `test`, `teacher` directories that hold one a class.

    The label is the name of the class directory (photos may lie deeper), the item_id the path inside the folder, both
    in Unicode's composed form. Photos without a class directory have no label, where the folder has no class
    directories at all. A directory called `train` is a class where it stands among directories of other names.

    Raises:
        FieldmarkError: split directories beside others that hold photos.
    """
    found = FolderPhotos(folder)
    directories = found.directories_in(folder)
    splits = [path for path in directories if path.name.lower() in SPLIT_NAMES]
    others = [path for path in directories if path not in splits]
    if len({SPLIT_NAMES[path.name.lower()] for path in splits}) > 1 and any(subdirectories(path) for path in splits):
        beside = next((path.name for path in others if next(found.below(path), None)), None)
        if beside is not None:
            raise FieldmarkError(
                f"{folder} has {splits[0].name} and {splits[1].name} beside {beside!r}, which holds photos too; keep "
                "either split directories or class directories on this level"
            )
        others, found = [], FolderPhotos(folder)
    if splits and not others:
        rows = [row | {"split": path.name} for path in splits for row in _split_rows(found, path)]
    else:
        rows = _class_rows(found, directories)
        loose = found.directly_in(folder)
        if rows and loose:
            logger.warning("%s: %d photos outside the class directories are left out", folder, len(loose))
        rows = rows or [found.row(path, None) for path in loose]
    found.say_what_is_left_out()
    return rows


def _split_rows(found: FolderPhotos, directory: Path) -> list[Row]:
    """Photos of one split: by class directory, or without labels where it has none."""
    rows, loose = _class_rows(found, found.directories_in(directory)), found.directly_in(directory)
    if rows and loose:
        logger.warning("%s: %d photos outside the class directories are left out", directory, len(loose))
    return rows or [found.row(path, None) for path in loose]


def _class_rows(found: FolderPhotos, classes: list[Path]) -> list[Row]:
    rows, empty = [], []
    for directory in classes:
        photos = [found.row(path, directory.name) for path in found.below(directory)]
        rows += photos
        if not photos:
            empty.append(directory.name)
    if rows and empty:
        logger.warning("%s: %d directories hold no photo (%s)", found.folder, len(empty), shortened(empty))
    return rows


class FolderPhotos:
    """The photos of a folder, and a count of everything else that lies there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: Counter[str] = Counter()

    def below(self, directory: Path) -> Iterator[Path]:
        """Photos at any depth in the order of their names; links are followed, but never in a circle."""
        entered = {os.path.realpath(directory), *(str(path) for path in Path(os.path.realpath(directory)).parents)}
        for parent, directories, files in os.walk(directory, followlinks=True, onerror=_refuse):
            kept = []
            for name in sorted(directories):
                place = os.path.realpath(os.path.join(parent, name))
                if is_stray(name):
                    self.left_out["stray"] += 1
                elif os.path.islink(os.path.join(parent, name)) and place in entered:
                    self.left_out["circle"] += 1
                elif not name.startswith("."):
                    entered.add(place)
                    kept.append(name)
            directories[:] = kept
            yield from (Path(parent, name) for name in sorted(files) if self._is_photo(name))

    def directories_in(self, directory: Path) -> list[Path]:
        """The directories in a directory that are neither hidden nor strays."""
        self.left_out["stray"] += sum(is_stray(path.name) for path in directory.iterdir() if path.is_dir())
        return subdirectories(directory)

    def directly_in(self, directory: Path) -> list[Path]:
        """Photos that lie in a directory itself."""
        files = sorted(path for path in directory.iterdir() if not path.is_dir())
        return [path for path in files if self._is_photo(path.name, count_others=False)]

    def row(self, path: Path, label: str | None) -> Row:
        """A photo as a row.

        Raises:
            FieldmarkError: its name is not text in UTF-8.
        """
        item_id = unicodedata.normalize("NFC", path.relative_to(self.folder).as_posix())
        if not str(path).isascii() and os.fsencode(path) != str(path).encode("utf-8", "replace"):
            raise FieldmarkError(f"the name of the photo {str(path)!r} is not UTF-8; rename the file")
        return {"item_id": item_id, "image": str(path), "label": label}

    def say_what_is_left_out(self) -> None:
        """One line for each kind of thing that is no photo."""
        texts = {
            "stray": "stray files of other systems (._*, .DS_Store, Thumbs.db, __MACOSX) are ignored",
            "other": "files that are no photos are left out",
            "circle": "links that lead in a circle are left out",
        }
        for kind, text in texts.items():
            if self.left_out[kind]:
                logger.warning("%s: %d %s", self.folder, self.left_out[kind], text)

    def _is_photo(self, name: str, *, count_others: bool = True) -> bool:
        if is_stray(name):
            self.left_out["stray"] += 1
            return False
        if name.startswith("."):
            return False
        photo = name.lower().endswith(PHOTO_SUFFIXES)
        self.left_out["other"] += count_others and not photo
        return photo


def subdirectories(folder: Path) -> list[Path]:
    """The directories in a folder that are neither hidden nor strays, in the order of their names."""
    names = (path for path in folder.iterdir() if not path.name.startswith(".") and not is_stray(path.name))
    return sorted(path for path in names if path.is_dir())


def is_stray(name: str) -> bool:
    """Whether macOS or Windows left this file or directory behind: `._x`, `.DS_Store`, `Thumbs.db`, `__MACOSX`."""
    return name.startswith("._") or name.lower() in STRAYS


def _refuse(error: OSError) -> None:
    """A directory that cannot be read is an error: `os.walk` would leave it out without a word."""
    raise error


def shortened(names: list[str], most: int = 5) -> str:
    """Names for a sentence: the first few."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
