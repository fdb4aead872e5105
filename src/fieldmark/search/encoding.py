"""Queries to vectors, and where the student looked: what the service's batches are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from fieldmark.errors import FieldmarkError
from fieldmark.search.embedding import PhotoReader
from fieldmark.students.items import is_multimodal, tokenize_items
from fieldmark.students.pooling import AttentionPooling


@dataclass(frozen=True)
class Query:
    """A photo as the student sees it, a text, or both."""

    square: Image.Image | None = None
    text: str | None = None


@dataclass(frozen=True)
class Encoded:
    """What the student made of a query.

    Attributes:
        vector: [D] float32.
        attention: [N] weights of the photo's tokens that sum to 1; None without an attention pooler.
        tokens: of text, prompt included, or of the photo where the student counts it in them; 0 for a tower.
    """

    vector: np.ndarray
    attention: np.ndarray | None
    tokens: int


class Encoder:
    """Runs a student, in one thread.

    Args:
        student: in eval mode.
    """

    def __init__(self, student: SentenceTransformer) -> None:
        self.student, self.texts = student, is_multimodal(student)
        self.reader = PhotoReader(student)
        self.has_attention = not self.texts and _looks_in_a_grid(student)
        special: list[str] = student.tokenizer.all_special_tokens if self.texts else []
        self._reserved = [token for token in special if len(token) > 1]  # some CLIP checkpoints pad with "!"

    def check(self, text: str | None) -> None:
        """Refuses a text that the student does not take.

        Raises:
            FieldmarkError: it takes none, or the text holds what the tokenizer keeps for itself, such as the mark of a
                photo.
        """
        if text is None:
            return
        if not self.texts:
            raise FieldmarkError(
                "A text was given to a student that embeds photos only; give a photo, and words with it by hybrid."
            )
        reserved = next((token for token in self._reserved if token in text), None)
        if reserved is not None:
            raise FieldmarkError(
                f"The text holds {reserved}, which the student's tokenizer keeps for itself; leave it out."
            )

    def __call__(self, queries: Sequence[Query]) -> list[Encoded]:
        """Encodes queries, those of a kind together."""
        found: dict[int, Encoded] = {}
        for kind in {(query.square is None, query.text is None) for query in queries}:
            places = [n for n, query in enumerate(queries) if (query.square is None, query.text is None) == kind]
            found |= zip(places, self._encode([queries[place] for place in places]), strict=True)
        return [found[place] for place in range(len(queries))]

    @torch.inference_mode()
    def _encode(self, queries: Sequence[Query]) -> list[Encoded]:
        """Encodes queries of one kind."""
        squares = [query.square for query in queries if query.square is not None]
        texts = [query.text for query in queries if query.text is not None]
        if texts:
            features = tokenize_items(self.student, images=squares or None, texts=texts)
        else:
            features = self.reader.features(squares)
        tokens = _tokens(features, len(queries))
        out = self.student(batch_to_device(features, self.student.device))
        vectors = out["sentence_embedding"].float().cpu().numpy()
        attention = out["pooling_attention"].float().cpu().numpy() if self.has_attention else [None] * len(queries)
        return [Encoded(*one) for one in zip(vectors, attention, tokens, strict=True)]


def _looks_in_a_grid(student: SentenceTransformer) -> bool:
    """Whether its pooler's weights can be laid over the photo."""
    tower: Any = student[0]
    pooler = student[1]
    return isinstance(pooler, AttentionPooling) and math.isqrt(tower.tokens_per_image) ** 2 == tower.tokens_per_image


def _tokens(features: dict[str, torch.Tensor], count: int) -> list[int]:
    if "attention_mask" in features:
        return features["attention_mask"].sum(1).tolist()
    return [features["input_ids"].shape[1] if "input_ids" in features else 0] * count
