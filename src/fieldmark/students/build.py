"""Students: a vision tower and a pooler as one ``SentenceTransformer``."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.multimodal import load_saved
from fieldmark.students.pooling import AttentionPooling, MeanPooling, TokenPooling
from fieldmark.students.tower import CLASS_NAME, VisionTower, is_student, module_types

POOLERS: dict[str, type[TokenPooling]] = {"attention": AttentionPooling, "mean": MeanPooling}
TRUSTED = {CLASS_NAME, *(f"{kind.__module__}.{kind.__qualname__}" for kind in POOLERS.values())}


def build_student(
    model_id: str | Path,
    *,
    pooling: str | None = None,
    embedding_dim: int | None = None,
    resolution: int | None = None,
) -> SentenceTransformer:
    """A student: the vision tower of a checkpoint and a pooler.

    A folder that already is a student is loaded as it is; a pooler or resolution that is asked for and differs
    replaces its own (a new pooler starts from initial values).

    Args:
        model_id: Folder or hub id of a checkpoint with a vision tower, or a student folder.
        pooling: ``attention`` or ``mean``; None means the student's own, ``attention`` for a new one.
        embedding_dim: Width of the embedding; None means the student's own, the token width for a new one.
        resolution: Side of the square photo in pixels; None means the student's own, 224 for a new one.

    Raises:
        FieldmarkError: If the checkpoint cannot be used (see ``VisionTower.from_pretrained``) or the pooling is
            unknown.
    """
    if pooling is not None and pooling not in POOLERS:
        raise FieldmarkError(f"pooling {pooling!r} was given; expected one of {', '.join(POOLERS)}")
    if embedding_dim is not None and embedding_dim < 1:
        raise FieldmarkError(f"embedding_dim {embedding_dim} was given; expected a positive number")
    checkpoint = Checkpoint(model_id)
    if is_student(checkpoint):
        return _adapt(load_student(model_id), pooling, embedding_dim, resolution)
    if checkpoint.file("modules.json") is not None:
        raise FieldmarkError(
            f"{model_id} is a sentence-transformers model without a fieldmark vision tower; give a vision model"
        )
    tower = VisionTower.from_pretrained(model_id, 224 if resolution is None else resolution)
    return SentenceTransformer(modules=[tower, POOLERS[pooling or "attention"](tower.token_dim, embedding_dim)])


def load_student(path: str | Path, device: str | None = None) -> SentenceTransformer:
    """Load a saved student without having to trust its folder.

    Before sentence-transformers (6.0 and later) imports a module class from outside its own package, installed or
    not, it asks for ``trust_remote_code=True``: ``SentenceTransformer(path, trust_remote_code=True)`` loads a student
    too. The flag trusts whatever the folder names; here it is set only for a folder that names nothing but fieldmark's
    own classes, which run no code of the folder. An image-text student (``fieldmark.students.multimodal``) is made of
    stock modules and needs no trust.

    Args:
        path: Folder or hub id of a student.
        device: Where to put it; None lets sentence-transformers choose.

    Raises:
        FieldmarkError: If this is not a student, its ``modules.json`` names a class of another package, or one of its
            files is missing or broken.
    """
    checkpoint = Checkpoint(path)
    kinds = module_types(checkpoint)
    if kinds and all(kind.startswith("sentence_transformers.") for kind in kinds):
        return load_saved(checkpoint, device)
    if not is_student(checkpoint):
        raise FieldmarkError(
            f"{path} is not a trained student (its modules.json does not start with a fieldmark tower)"
        )
    foreign = [kind for kind in module_types(checkpoint) if kind not in TRUSTED]
    if foreign:
        raise FieldmarkError(
            f"{path} wants to run {foreign[0]}, which is not part of fieldmark; load it yourself if you trust it"
        )
    try:
        return SentenceTransformer(str(path), device=device, trust_remote_code=True)
    # Weights cut short; JSON cut short or weights missing; a setting missing in a config.json.
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FieldmarkError(
            f"{path} is a student with a missing or broken file ({error}); copy or download it again"
        ) from error


def _adapt(
    student: SentenceTransformer, pooling: str | None, embedding_dim: int | None, resolution: int | None
) -> SentenceTransformer:
    """The student with another resolution or pooler where one is asked for."""
    tower, pooler = student[0], student[1]
    if not isinstance(tower, VisionTower) or not isinstance(pooler, TokenPooling):
        raise FieldmarkError(
            f"a student of {type(tower).__name__} and {type(pooler).__name__} was given; "
            "expected a vision tower and one of fieldmark's poolers"
        )
    kind = next((name for name, pooler_class in POOLERS.items() if type(pooler) is pooler_class), None)
    same_pooler = pooling in (None, kind) and embedding_dim in (None, pooler.get_embedding_dimension())
    if same_pooler and resolution in (None, tower.resolution):
        return student
    if resolution is not None and resolution != tower.resolution:
        tower = tower.at_resolution(resolution)
    if not same_pooler:
        pooler = POOLERS[pooling or kind or "attention"](tower.token_dim, embedding_dim)
    return SentenceTransformer(modules=[tower, pooler, *list(student)[2:]])
