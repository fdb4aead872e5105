"""Whether an export computes what the student computes: the largest absolute difference of two embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import datasets
import numpy as np
from sentence_transformers import SentenceTransformer

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import embed_photos
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.export.texts import context_of
from fieldmark.students.items import embeds_both, encode_items

Runner = Callable[[Mapping[str, np.ndarray]], np.ndarray]
T = TypeVar("T")
CHECKED = 32
BATCHES = (1, 3, 7)
# What a catalogue without titles is checked with: cases, accents, another script, punctuation, a long text.
TEXTS = (
    "a small bird with a red bill",
    "Bufo bufo, the COMMON TOAD!",
    "Blåmes på en gren – 12 cm (½ size)",
    "青い鳥",
    "a",
    "a bird with a long decurved bill, white eye ring, streaked breast, two wing bars and a forked tail " * 2,
)


def spread_over(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def photos_of(catalog: datasets.Dataset) -> list[PhotoRef]:
    """Photos to check with, spread over a catalogue, which need not have labels."""
    rows = spread_over(range(len(catalog)), CHECKED)
    return list(catalog.select(rows)["image"])


def texts_of(student: SentenceTransformer, catalog: datasets.Dataset) -> list[str]:
    """Texts to check with: titles that fit into the student's context, or a few of our own."""
    titles = [title for title in dict.fromkeys(catalog["title"][:]) if title]
    known = [text for text in spread_over(titles, CHECKED) if text] or list(TEXTS)
    return [text for text in known if _fits(student, text)] or ["a"]


def _fits(student: SentenceTransformer, text: str) -> bool:
    """Whether a text is no longer than the student's context, nor holds control tokens of a multimodal LLM, which the
    student reads as plain text and a `tokenizer.json` does not."""
    first: Any = student[0]
    limit = context_of(student)
    if not embeds_both(student):
        return len(first.tokenizer(text)["input_ids"]) <= limit
    if any(token in text for token in first.tokenizer.added_tokens_encoder):
        return False
    return student.preprocess([{"text": text}])["input_ids"].shape[1] <= limit


def in_batches(items: Sequence[T]) -> Iterator[list[T]]:
    """Batches of 1, 3 and 7 items, and one of the rest, as far as there are items."""
    start = 0
    for size in (*BATCHES, len(items)):
        if start < len(items):
            yield list(items[start : start + size])
        start += size


def photo_difference(
    student: SentenceTransformer, run: Runner, preprocessing: Preprocessing, photos: Sequence[PhotoRef]
) -> float:
    """Largest absolute difference of an embedding's numbers, photos prepared without PyTorch for the export."""
    batches = [run({"pixel_values": preprocessing.pixels(batch)}) for batch in in_batches(photos)]
    return difference(embed_photos(student, photos), np.concatenate(batches))


def text_difference(
    student: SentenceTransformer,
    run: Runner,
    read: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    texts: Sequence[str],
) -> float:
    """Largest absolute difference of an embedding's numbers, texts tokenized without PyTorch for the export."""
    return difference(
        encode_items(student, texts=texts), np.concatenate([run(read(batch)) for batch in in_batches(texts)])
    )


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest absolute difference; infinite where a number is none, or a shape is another one."""
    if expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(expected - found).max(initial=0.0))


def refuse_difference(largest: float, tolerance: float, what: str) -> None:
    """Ends an export that is not the student.

    Raises:
        FieldmarkError: the difference is above the tolerance.
    """
    if not largest <= tolerance:
        raise FieldmarkError(
            f"The exported {what} differs from the student by up to {largest:.1e}, more than --tolerance "
            f"{tolerance:g}; nothing was written (a larger --tolerance lets it pass)."
        )
