"""What an embedder trained by AGCL makes of its negatives: the hard ones with their weights, and the masked ones."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from fieldmark.data.batches import stable_random
from fieldmark.data.candidates import match_keys
from fieldmark.data.product_pairs import sample_products
from fieldmark.evaluation.examples import Thumbnails, take_turns
from fieldmark.evaluation.report_attributes import HardQuery, MaskedPair, Negative, Negatives
from fieldmark.losses.bm25 import BM25, attribute_words, bm25_scores
from fieldmark.losses.contrastive import false_negatives, relative_to_positive
from fieldmark.losses.expanded import matches
from fieldmark.methods.agcl import AgclConfig, ProductTask
from fieldmark.progress import JobProgress
from fieldmark.students.items import encode_items

MOST_ITEMS = 1000  # looked at: all pairs of them are held at once
_QUERIES, _NEGATIVES, _MASKED, _WORDS = 6, 6, 8, 6
_PARTNER = 21  # its random stream


def look_at_negatives(student: SentenceTransformer, task: ProductTask, settings: AgclConfig) -> Negatives | None:
    """Hard and masked negatives among a sample of the training items, in whole products.

    Queries and candidates show what they do in training: photo with title where a product has two items, and the match
    of a query is another one of them, drawn by the seed; else the first of the run's tasks. Queries are not enriched.

    Args:
        student: trained.
        task: what it was trained on.
        settings: of that training.

    Returns:
        None where negatives have no weights (`weights` is not bm25), or no query of the sample has a negative.
    """
    if settings.weights != "bm25":
        return None
    items = sample_products(task.train["label"][:], MOST_ITEMS, seed=settings.seed)
    seen = _Sample(student, task, settings, items) if items else None
    if seen is None or not seen.queries or bool(seen.same.all()):
        return None
    products = [str(seen.labels[query]) for query in seen.queries]
    hardest = seen.above.amax(dim=1).argsort(descending=True, stable=True).tolist()
    masked = seen.masked.nonzero().tolist()
    masked.sort(key=lambda at: -float(seen.above[at[0], at[1]]))
    return Negatives(
        items=len(items),
        queries=len(seen.queries),
        delta=settings.delta,
        hard=[seen.hard(row) for row in take_turns(hardest, [products[row] for row in hardest], _QUERIES)],
        masked=[seen.pair(*at) for at in take_turns(masked, [products[row] for row, _ in masked], _MASKED)],
        n_masked=len(masked),
        n_pairs=int((~seen.same).sum()),
        margin=float(seen.above.max()),
    )


class _Sample:
    """Some items as queries (rows) and candidates (columns): their cosines, and what AGCL makes of them.

    Attributes:
        queries: [Q] places of those that have a match.
        positive: [Q] places of the matches.
        same: [Q, N] bool, no negatives: of the query's product or title.
        masked: [Q, N] bool, negatives taken for the same product.
        above: [Q, N] by how much each negative is nearer than the match; minus infinity for the others.
        raised: [Q, N] what AGCL raises the logits by.
    """

    def __init__(
        self, student: SentenceTransformer, task: ProductTask, settings: AgclConfig, items: Sequence[int]
    ) -> None:
        rows = task.train.select(items)
        self.labels, self.titles, self.photos = list(rows["label"]), list(rows["title"]), Thumbnails(rows)
        self.attributes = [task.attributes[item] or {} for item in items]
        kind = "product" if "product" in task.tasks else task.tasks[0]
        everyone = list(range(len(items)))
        self.queries, self.positive = (
            partners(self.labels, settings.seed) if kind == "product" else (everyone, everyone)
        )
        keys = match_keys(self.labels, self.titles)
        self.same = matches(keys[self.queries], keys)
        self.similarity = cosines(student, rows, kind)[self.queries]
        places = torch.tensor(self.positive, dtype=torch.long)
        self.masked = false_negatives(self.similarity, places, settings.delta) & ~self.same
        self.above = (self.similarity - self.similarity.gather(1, places[:, None])).masked_fill(self.same, -torch.inf)
        self.bm25 = BM25.fit(task.attributes)
        encoded = self.bm25.encode(self.attributes)
        scores = bm25_scores(encoded[np.array(self.queries, dtype=np.int64)], encoded)
        self.raised = torch.tanh(relative_to_positive(scores, places) if settings.bm25_scale == "self" else scores)

    def hard(self, row: int) -> HardQuery:
        """A query and the negatives nearest to it."""
        query = self.queries[row]
        near = self.above[row].argsort(descending=True, stable=True).tolist()
        negatives = [
            Negative(
                photo=self.photos[other],
                title=self.titles[other],
                cosine=float(self.similarity[row, other]),
                raised=float(self.raised[row, other]),
                shared=self.shared(query, other),
            )
            for other in near[:_NEGATIVES]
            if not self.same[row, other]
        ]
        own = float(self.similarity[row, self.positive[row]])
        return HardQuery(self.photos[query], self.titles[query], self.attributes[query], own, negatives)

    def pair(self, row: int, other: int) -> MaskedPair:
        """A query, its match, and what was left out."""
        query, match = self.queries[row], self.positive[row]
        return MaskedPair(
            titles=(self.titles[query], self.titles[match], self.titles[other]),
            photos=(self.photos[query], self.photos[match], self.photos[other]),
            own=float(self.similarity[row, match]),
            other=float(self.similarity[row, other]),
        )

    def shared(self, one: int, other: int) -> list[str]:
        """Words that the attributes of two items share, the rarest first."""
        both = set(attribute_words(self.attributes[one])) & set(attribute_words(self.attributes[other]))
        known = self.bm25.vocabulary
        return sorted(both & known.keys(), key=lambda word: (-self.bm25.idf[known[word]], word))[:_WORDS]


def partners(labels: Sequence[str | None], seed: int) -> tuple[list[int], list[int]]:
    """The items that have another one of their product, and which of these is each one's match."""
    items_of: dict[str, list[int]] = {}
    for item, label in enumerate(labels):
        if label is not None:
            items_of.setdefault(label, []).append(item)
    queries, positive = [], []
    for item, label in enumerate(labels):
        others = [other for other in items_of.get(label or "", []) if other != item]
        if others:
            queries.append(item)
            positive.append(others[int(stable_random(seed, _PARTNER, item).integers(len(others)))])
    return queries, positive


def cosines(student: SentenceTransformer, rows: datasets.Dataset, kind: str) -> Tensor:
    """[N, N] cosines of the rows as queries and as candidates of a task."""
    sides = ("both", "both") if kind == "product" else tuple(kind.split("-"))
    vectors = {}
    for side in dict.fromkeys(sides):
        with JobProgress("training items for the report", len(rows)) as job:
            vectors[side] = encode_items(
                student,
                images=None if side == "text" else rows["image"][:],
                texts=None if side == "image" else rows["title"][:],
                progress=job.update,
            )
    return torch.from_numpy(vectors[sides[0]] @ vectors[sides[1]].T)
