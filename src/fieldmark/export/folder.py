"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fieldmark.errors import FieldmarkError


def check_free(out: Path) -> None:
    """Refuses a place where something lies already.

    Raises:
        FieldmarkError: `out` is a file, or a folder that is not empty.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "is a folder that is not empty" if out.is_dir() else "is not a folder"
        raise FieldmarkError(f"--out {out} {what}; give another name, or delete it first.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is renamed to `out` at the end of the block.

    After an error nothing of it is left. A kill leaves the folder beside `out` (its name ends in `.unfinished`), and
    never a part of it at `out`.

    Raises:
        FieldmarkError: as `check_free`, or `out` cannot lie where it is asked for.
    """
    out = out.absolute()
    check_free(out)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FieldmarkError(f"--out {out} does not lie in a folder; give another name.") from error
    unfinished.mkdir()
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
