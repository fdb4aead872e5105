"""Photos and texts to vectors: what a store's items and its queries share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from fieldmark.data.photos import PhotoRef, load_square
from fieldmark.errors import FieldmarkError
from fieldmark.search.card import StoredModel, check_model, model_fingerprint
from fieldmark.students.build import load_student
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.items import is_multimodal, photo_side, tokenize_items

if TYPE_CHECKING:
    from fieldmark.search.store import Store


def describe_model(source: str | Path, student: SentenceTransformer) -> StoredModel:
    """What a store keeps of the model that makes its vectors.

    Args:
        source: run folder, model folder or hub id that the student was loaded from.
        student: the student.
    """
    folder = Path(source).expanduser()
    if (folder / "model" / "modules.json").is_file():
        folder = folder / "model"
    name = str(folder.resolve()) if folder.is_dir() else str(source)
    dim = student.get_embedding_dimension()
    assert dim is not None
    return StoredModel(name, model_fingerprint(Checkpoint(name).config_folder), dim, is_multimodal(student))


def load_stored_student(store: Store, source: str | None = None) -> SentenceTransformer:
    """The student that made a store.

    Args:
        store: the store.
        source: run folder, model folder or hub id where it lies now; None takes what the store remembers.

    Raises:
        FieldmarkError: it is no longer there, cannot be loaded, or is another one.
    """
    name = source or store.card.model.source
    folder = Path(name).expanduser()
    if folder.is_absolute() and not folder.exists():
        raise FieldmarkError(f"The model {name} is not there; give the folder where it lies now by --model.")
    student = load_student(folder / "model" if (folder / "model" / "modules.json").is_file() else name)
    check_model(store.card, describe_model(name, student), store.folder)
    return student.eval()


class PhotoReader:
    """Photos to what a student's forward takes, from any thread.

    Args:
        student: of photos, or of photos and texts.
    """

    def __init__(self, student: SentenceTransformer) -> None:
        self.student, self.multimodal = student, is_multimodal(student)
        tower: Any = student[0]
        self.side = photo_side(student) if self.multimodal else tower.resolution
        self._tokenizing = threading.Lock()  # a tokenizer serves one thread at a time

    def square(self, photo: PhotoRef) -> Any:
        """The photo as the student sees it.

        Raises:
            FieldmarkError: it cannot be read.
        """
        return load_square(photo, self.side)

    def features(self, squares: Sequence[Any], texts: Sequence[str] | None = None) -> dict[str, Any]:
        """Features of a batch, on the CPU; with texts, of each photo together with its text.

        Raises:
            FieldmarkError: the student does not take a photo together with a text, or a text is too long for it.
        """
        if not self.multimodal and texts is None:
            return self.student.preprocess(list(squares))
        with self._tokenizing:
            return tokenize_items(self.student, images=squares, texts=texts)


@torch.inference_mode()
def embed(student: SentenceTransformer, features: dict[str, Any]) -> np.ndarray:
    """[N, D] float32 of a batch of features."""
    return student(batch_to_device(features, student.device))["sentence_embedding"].float().cpu().numpy()


def query_vector(student: SentenceTransformer, *, image: PhotoRef | None = None, text: str | None = None) -> np.ndarray:
    """[D] float32 of a photo, of a text, or of a photo together with a text.

    Raises:
        FieldmarkError: neither was given, the student does not take what was given, or the photo cannot be read.
    """
    if text is None:
        if image is None:
            raise FieldmarkError("There is nothing to search with; give a photo, a text or both.")
        reader = PhotoReader(student)
        return embed(student, reader.features([reader.square(image)]))[0]
    if not is_multimodal(student):
        raise FieldmarkError(
            "A text was given to a student that embeds photos only; give a photo, and words with it by hybrid search."
        )
    return embed(student, tokenize_items(student, images=None if image is None else [image], texts=[text]))[0]
