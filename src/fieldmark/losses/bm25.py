"""BM25 between the attributes of items: how many rare words two of them share (AFMRL, arXiv 2604.20135, Eq. 1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from fieldmark.errors import FieldmarkError

Attributes = Mapping[str, Any] | None

_WORD = re.compile(r"\d+\.\d+\w*|\w+")  # "1.5l" is one word: "2.5l" shares nothing with it
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+)")  # scripts without spaces between words


def attribute_words(attributes: Attributes) -> list[str]:
    """The words of the values, lower-cased, as often as they stand there.

    A value is a text, a number, or a list of them; None, as a value or for all of them, has no words. Names are no
    words, nor are those in a text of several properties ("brand: Hipp; size: 1.5l"). Chinese and Japanese have no
    spaces: each two neighbouring characters are a word there.

    Raises:
        FieldmarkError: the attributes are no mapping, or a value is something else.
    """
    if attributes is None:
        return []
    if not isinstance(attributes, Mapping):
        raise FieldmarkError(f"attributes are {attributes!r:.60}; expected names with values, such as a dict")
    texts: list[str] = []
    for name, value in attributes.items():
        if isinstance(value, str):  # nearly always, and a batch has thousands
            texts.append(_values(value) if "; " in value else value)
            continue
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, str | int | float):
                texts.append(str(one))
            elif one is not None:
                raise FieldmarkError(f"the attribute {name!r} is {value!r:.60}; expected a text, a number or a list")
    text = "\n".join(texts).lower()
    words = _WORD.findall(text)
    return words if text.isascii() else [part for word in words for part in _parts(word)]


def _values(text: str) -> str:
    """The values of several properties in one text; any other text as it is."""
    pairs = [pair.partition(": ") for pair in text.split("; ")]
    return "\n".join(value for _, _, value in pairs) if all(found for _, found, _ in pairs) else text


def _parts(word: str) -> list[str]:
    """A word, its longer runs of unspaced script as pairs of characters."""
    parts: list[str] = []
    for run in filter(None, _UNSPACED.split(word)):
        longer = len(run) > 2 and _UNSPACED.fullmatch(run)
        parts += [run[i : i + 2] for i in range(len(run) - 1)] if longer else [run]
    return parts


@dataclass(frozen=True)
class EncodedAttributes:
    """Attributes of N items over a vocabulary of V words, for :func:`bm25_scores`; `[rows]` selects items.

    Attributes:
        counts: ``[N, V]`` how often each item has each word.
        weights: ``[N, V]`` what the item scores for each word of a query.
    """

    counts: csr_array
    weights: csr_array

    def __getitem__(self, rows: np.ndarray) -> EncodedAttributes:
        return EncodedAttributes(self.counts[rows], self.weights[rows])


@dataclass(frozen=True)
class BM25:
    """BM25 in Lucene's form, its statistics fixed from a catalogue, so that a score does not depend on the batch.

    For a query q, a candidate p of ``|p|`` words, and ``tf`` the times that p has the word t:

        ``B(q, p) = sum over the words t of q of idf(t) * tf / (tf + k1 * (1 - b + b * |p| / average length))``

    with ``idf(t) = ln(1 + (n - n_t + 0.5) / (n_t + 0.5))``, where ``n_t`` of the catalogue's n items have t. A word
    that q has twice counts twice. It is what bm25s calls "lucene". rank_bm25's Okapi multiplies this by ``k1 + 1`` and
    has no "1 +" in its idf, which so falls below zero for a word that more than half of the items have (Okapi then
    takes a quarter of the mean idf); Lucene's is always above zero.

    A word that no item of the catalogue has is unknown: it scores nothing, and no length counts it. So a query of
    unknown words, or of none, scores 0 with every candidate.

    Attributes:
        vocabulary: the column of each word.
        idf: ``[V]``.
        average_length: words an item.
        k1: how slowly a repeated word saturates, 0 or more.
        b: how much a long candidate is discounted, 0..1.
    """

    vocabulary: dict[str, int]
    idf: np.ndarray
    average_length: float
    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise FieldmarkError(f"k1 is {self.k1} and b is {self.b}; expected k1 of 0 or more, and b in 0..1")

    @classmethod
    def fit(cls, catalog: Sequence[Attributes], *, k1: float = 1.5, b: float = 0.75) -> BM25:
        """Statistics of a catalogue's attributes; an item without any counts as an item of no words.

        Raises:
            FieldmarkError: no item has a word, or ``k1`` or ``b`` is out of range.
        """
        words = [attribute_words(item) for item in catalog]
        vocabulary = {word: column for column, word in enumerate(dict.fromkeys(chain.from_iterable(words)))}
        if not vocabulary:
            raise FieldmarkError(
                f"no attribute of the {len(catalog)} items given has a word; BM25 compares attributes, so use a "
                "catalogue that has some, or label it first"
            )
        counts = _counts(words, vocabulary)
        having = np.bincount(counts.indices, minlength=len(vocabulary))
        idf = np.log1p((len(catalog) - having + 0.5) / (having + 0.5))
        return cls(vocabulary, idf, sum(map(len, words)) / len(catalog), k1, b)

    def encode(self, items: Sequence[Attributes]) -> EncodedAttributes:
        """Attributes of items, to be queries and candidates."""
        counts = _counts([attribute_words(item) for item in items], self.vocabulary)
        damping = self.k1 * (1 - self.b + self.b * counts.sum(axis=1) / self.average_length)
        damping = np.repeat(damping, np.diff(counts.indptr))
        weights = self.idf[counts.indices] * counts.data / (counts.data + damping)
        parts = (weights.astype(np.float32), counts.indices, counts.indptr)
        return EncodedAttributes(counts, csr_array(parts, shape=counts.shape))


def bm25_scores(queries: EncodedAttributes, candidates: EncodedAttributes) -> Tensor:
    """``B [N, M]`` float32, of each query with each candidate of the same :class:`BM25`; memory ``M * (N + U)``.

    U is the number of words that both a query and a candidate have. A dense product over them takes a sixth of the
    time of a sparse one: items of a catalogue share colours and kinds, so few scores are zero.
    """
    shared = np.intersect1d(queries.counts.indices, candidates.weights.indices)
    return torch.from_numpy(queries.counts[:, shared] @ candidates.weights[:, shared].T.toarray())


def _counts(words: list[list[str]], vocabulary: Mapping[str, int]) -> csr_array:
    """``[N, V]`` float32 how often each item has each word of the vocabulary."""
    total = sum(map(len, words))
    columns = np.fromiter(map(vocabulary.get, chain.from_iterable(words), repeat(-1)), np.int32, total)
    rows = np.repeat(np.arange(len(words), dtype=np.int32), list(map(len, words)))
    known = columns >= 0
    places = (rows[known], columns[known])
    return csr_array((np.ones(len(places[0]), np.float32), places), shape=(len(words), len(vocabulary)))
