"""Finds and loads the student that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_model(name: str) -> SentenceTransformer:
    """A student from a run folder (its `model/`), a model folder or a hub id.

    Raises:
        FieldmarkError: a folder without a student, an unfinished run, a hub id that cannot be had.
    """
    from fieldmark.students.build import load_student

    folder = Path(name).expanduser()
    if (folder / "model" / "modules.json").is_file():
        return load_student(folder / "model")
    if (folder / "checkpoints").is_dir():
        raise FieldmarkError(
            f"{name} is a run without a model: its training has not ended; go on with it by --resume true."
        )
    # A mistyped path must not become a question to the hub.
    if not folder.exists() and (name.count("/") != 1 or folder.parent.is_dir()):
        raise FieldmarkError(
            f"The model {name} does not exist; give a run folder, a model folder or a hub id (OWNER/NAME)."
        )
    return load_student(name)
