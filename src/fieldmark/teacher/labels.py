"""Alignment scores of a catalogue's photos and texts, through the cache: what `fieldmark label align` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fieldmark.data.photos import PhotoRef, open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import ANSWERS, QUESTION, Aligner, answer_words
from fieldmark.teacher.cache import AnswerCache, answer_key, photo_hash, teacher_fingerprint
from fieldmark.teacher.model import Teacher

SCHEMA = pa.schema([("photo", pa.string()), ("text", pa.string()), ("score", pa.float32())])


def alignment_cache(path: Path, teacher: Teacher, resolution: int | None = None) -> AnswerCache:
    """The cache of a teacher's alignment scores.

    Raises:
        FieldmarkError: the file is of another teacher, prompt or resolution, or holds a score that is no number.
    """
    made_by: dict[str, Any] = {
        "answers": "alignment",
        "teacher": teacher_fingerprint(teacher),
        "precision": str(teacher.dtype).removeprefix("torch."),
        "question": QUESTION,
        "resolution": resolution,
    }
    words = answer_words(teacher)
    if words != ANSWERS:  # named where they are others, so that all other files stay good
        made_by["answer_words"] = list(words)
    cache = AnswerCache(path, SCHEMA, made_by)
    for row in cache.rows.values():
        if row["score"] is None or not 0 <= row["score"] <= 1:
            raise FieldmarkError(
                f"the alignment scores in {path} hold {row['score']} for the text {row['text'][:40]!r}; scores lie in "
                "0 to 1, delete the file to ask anew"
            )
    return cache


def candidate_texts(texts: Sequence[Sequence[str]], negatives: np.ndarray) -> list[list[str]]:
    """Texts that can stand beside each photo in a candidate set, its own first, each once.

    Args:
        texts: own texts of each of N items.
        negatives: [N, K] hard negatives; a text meets the photos of its item's negatives, and of those whose negative
            its item is.
    """
    asked: list[dict[str, None]] = [dict.fromkeys(own) for own in texts]
    for item, others in enumerate(negatives.tolist()):
        for other in others:
            asked[item] |= dict.fromkeys(texts[other])
            asked[other] |= dict.fromkeys(texts[item])
    return [list(own) for own in asked]


def tower_features(
    teacher: Teacher,
    photos: Sequence[PhotoRef],
    *,
    resolution: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """[N, D] float32 means of the visual tokens that the teacher's own tower gives of each photo."""
    rows = []
    for start in range(0, len(photos), batch_size):
        chunk = [open_photo(ref) for ref in photos[start : start + batch_size]]
        rows.append(teacher.visual_tokens(chunk, resolution).tokens.float().mean(1).cpu().numpy())
        progress(start + len(chunk))
    return np.concatenate(rows)


def check_alignment(
    path: Path, teacher: Teacher, photo: PhotoRef, texts: Iterable[str], *, resolution: int | None = None
) -> None:
    """Refuses, before hours of work, a file that cannot be gone on with and texts that cannot be asked about.

    Texts that the file knows have been asked about; a photo is looked at where there are others.

    Raises:
        FieldmarkError: see `alignment_cache` and `check_texts`.
    """
    known = {row["text"] for row in alignment_cache(path, teacher, resolution).rows.values()}
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        check_texts(teacher, photo, new, resolution=resolution)


def check_texts(
    teacher: Teacher, photo: PhotoRef, texts: Iterable[str], *, resolution: int | None = None
) -> dict[str, int]:
    """Refuses what cannot be asked about; one photo is looked at.

    Returns:
        The teacher's Yes and No with their token ids (`Aligner.answers`).

    Raises:
        FieldmarkError: the teacher cannot answer Yes or No, or a text cannot be asked about (see `Aligner`).
    """
    visual = teacher.visual_tokens([open_photo(photo)], resolution)
    aligner = Aligner(teacher, visual.tokens.shape[1])
    _check_texts(aligner, texts)
    return aligner.answers


def label_alignment(
    teacher: Teacher,
    photos: Sequence[PhotoRef],
    texts: Sequence[Sequence[str]],
    cache: AnswerCache,
    *,
    resolution: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Scores of each photo's texts; what the cache knows is not asked again.

    Args:
        teacher: the frozen teacher; its own tower sees the photos.
        photos: P photos.
        texts: for each of them any number of texts.
        cache: of `alignment_cache`, opened by the caller's `with`.
        resolution: side in pixels the photos are resized to, None for the teacher's usual one.
        batch_size: photos asked about at once.
        progress: called with the number of photos done.

    Returns:
        For each photo its texts' scores.

    Raises:
        FieldmarkError: a photo cannot be read, a text cannot be asked about, or a score is no number.
    """
    hashes = [photo_hash(ref) for ref in photos]
    keys = [[answer_key(own, text) for text in row] for own, row in zip(hashes, texts, strict=True)]
    asked: dict[int, list[int]] = {}  # photo -> its texts that nobody knows yet, each once
    seen: set[str] = set()
    for photo, row in enumerate(keys):
        for place, key in enumerate(row):
            if key not in cache and key not in seen:
                seen.add(key)
                asked.setdefault(photo, []).append(place)
    # Photos with equally many texts of like length run together: shorter lists would be filled up with texts asked for
    # nothing, shorter texts with padding.
    order = sorted(asked, key=lambda photo: (len(asked[photo]), max(len(texts[photo][k]) for k in asked[photo])))
    done = len(photos) - len(order)
    progress(done)
    aligner: Aligner | None = None
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        visual = teacher.visual_tokens([open_photo(photos[photo]) for photo in chunk], resolution)
        if aligner is None:
            aligner = Aligner(teacher, visual.tokens.shape[1])
            _check_texts(aligner, (texts[photo][place] for photo in order for place in asked[photo]))
        width = max(len(asked[photo]) for photo in chunk)
        wanted = [[texts[photo][place] for place in asked[photo]] for photo in chunk]
        scores = aligner.scores(visual, [row + row[:1] * (width - len(row)) for row in wanted]).tolist()
        cache.add(
            _row(hashes[photo], keys[photo][place], texts[photo][place], scores[i][k])
            for i, photo in enumerate(chunk)
            for k, place in enumerate(asked[photo])
        )
        done += len(chunk)
        progress(done)
    return [[cache[key]["score"] for key in row] for row in keys]


def _check_texts(aligner: Aligner, texts: Iterable[str]) -> None:
    """Before hours of work, not after them."""
    for text in dict.fromkeys(texts):
        aligner.tail(text)


def _row(photo: str, key: str, text: str, score: float) -> dict[str, Any]:
    if not math.isfinite(score):
        raise FieldmarkError(
            f"the teacher's score of the text {text[:40]!r} is {score}; load it with --teacher_dtype float32"
        )
    return {"key": key, "photo": photo, "text": text, "score": score}
