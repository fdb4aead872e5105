"""Photos for the report: queries with what they found, the worst first, and classes that are taken for each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from PIL import Image

from fieldmark.data.photos import open_photo
from fieldmark.evaluation.confusions import hardest_class_pairs
from fieldmark.evaluation.retrieval import PerQuery

WORST, FOUND = "Worst queries", "Queries that found their class"
BETTER, WORSE = "Better", "Worse"
_SIDE = 256


class Thumbnails:
    """Photos of a catalogue by row, small and in their own shape; each is decoded once."""

    def __init__(self, catalog: datasets.Dataset) -> None:
        self._photos = catalog["image"]
        self._made: dict[int, Image.Image] = {}

    def __getitem__(self, row: int) -> Image.Image:
        if row not in self._made:
            photo = open_photo(self._photos[int(row)]).copy()
            photo.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            self._made[row] = photo
        return self._made[row]


def galleries(
    found: PerQuery, labels: Sequence[Any], photos: Thumbnails, *, worst: int = 18, good: int = 6
) -> list[dict[str, Any]]:
    """Queries with their nearest photos, for `write_report`.

    The worst come first: those whose class comes at the lowest rank, of equal ones that whose wrong neighbour scores
    highest. Then some that found their class, by average precision. Classes take turns in both.

    Args:
        found: with neighbours kept.
        labels: of the catalogue's rows.
        photos: of the same rows.
        worst: queries at most whose nearest photo is wrong.
        good: queries at most whose nearest photo is right.
    """
    names = [str(label) for label in labels]
    wrong = np.flatnonzero(found.counted & ~found.hit_at_1)
    right = np.flatnonzero(found.hit_at_1)
    wrong = wrong[np.lexsort((-found.nearest_wrong_score[wrong], -found.first_hit[wrong]))]
    right = right[np.argsort(-found.average_precision[right], kind="stable")]
    shown = []
    for group, order, count in ((WORST, wrong, worst), (FOUND, right, good)):
        for position in take_turns(order, [names[found.query[i]] for i in order], count):
            query = int(found.query[position])
            shown.append(
                {
                    "group": group,
                    "query": photos[query],
                    "query_label": names[query],
                    "results": results(found, position, names, photos),
                    "note": _rank_note(int(found.first_hit[position])),
                }
            )
    return shown


def differing_galleries(
    found: Mapping[str, PerQuery], labels: Sequence[Any], photos: Thumbnails, *, count: int = 10
) -> list[dict[str, Any]]:
    """Queries on which two models differ, the neighbours of both side by side, for `write_report`.

    Args:
        found: two models by name on the same rows, neighbours kept; the second is better or worse than the first.
        labels: of the catalogue's rows.
        photos: of the same rows.
        count: queries at most in which the second is better, and in which it is worse.
    """
    names = [str(label) for label in labels]
    (first_name, first), (second_name, second) = found.items()
    gain = np.log(np.maximum(first.first_hit, 1)) - np.log(np.maximum(second.first_hit, 1))
    shown = []
    for group, sign in ((BETTER, 1), (WORSE, -1)):
        differ = np.flatnonzero(first.counted & (sign * gain > 0) & (first.hit_at_1 != second.hit_at_1))
        order = differ[np.argsort(-sign * gain[differ], kind="stable")]
        for position in take_turns(order, [names[first.query[i]] for i in order], count):
            query = int(first.query[position])
            ranks = [int(one.first_hit[position]) for one in (first, second)]
            shown.append(
                {
                    "group": f"{group} with {second_name} than with {first_name}: {len(differ):,} queries",
                    "query": photos[query],
                    "query_label": names[query],
                    "results": {name: results(one, position, names, photos) for name, one in found.items()},
                    "note": f"its class at rank {ranks[0]:,}, then {ranks[1]:,}",
                }
            )
    return shown


def confusions(
    found: PerQuery,
    labels: Sequence[Any],
    attributes: Sequence[Any] | None,
    embeddings: np.ndarray,
    photos: Thumbnails,
    *,
    count: int = 8,
) -> list[dict[str, Any]]:
    """The classes most often taken for each other, with two examples each, for `write_report`.

    Args:
        found: what each query found.
        labels: of the catalogue's rows.
        attributes: of the same rows, None where there are none.
        embeddings: [N, D], of the same rows.
        photos: of the same rows.
        count: pairs of classes at most.
    """
    names = [str(label) for label in labels]
    shown = []
    for pair in hardest_class_pairs(found, labels, attributes, count=count):
        examples = []
        for query, wrong in _both_directions(pair.examples, names):
            missed = _nearest_right(query, names, embeddings)
            examples.append(
                {
                    "query": (photos[query], names[query]),
                    "wrong": (photos[wrong], names[wrong]),
                    "missed": None if missed is None else (photos[missed], names[missed]),
                }
            )
        shown.append(
            {
                "classes": pair.classes,
                "count": pair.count,
                "queries": pair.queries,
                "differing": pair.differing,
                "examples": examples,
            }
        )
    return shown


def results(
    found: PerQuery, position: int, names: Sequence[str], photos: Thumbnails
) -> list[tuple[Image.Image, str, float, bool]]:
    """The nearest photos of one query: photo, label, cosine, whether it is right."""
    kept = zip(found.neighbours[position], found.scores[position], found.correct[position], strict=True)
    return [(photos[int(row)], names[row], float(score), bool(right)) for row, score, right in kept if row >= 0]


def take_turns(order: Sequence[Any] | np.ndarray, groups: Sequence[str], count: int) -> list[Any]:
    """The first `count` of `order` where no group comes a second time before every other has come once; in order."""
    seen: Counter[str] = Counter()
    turns = []
    for place, (item, group) in enumerate(zip(order, groups, strict=True)):
        turns.append((seen[group], place, item))
        seen[group] += 1
    return [item for _, _, item in sorted(sorted(turns)[:count], key=lambda turn: turn[1])]


def _rank_note(first_hit: int) -> str:
    return "" if first_hit == 1 else f"its class at rank {first_hit:,}"


def _both_directions(examples: Sequence[tuple[int, int]], names: Sequence[str]) -> list[tuple[int, int]]:
    """Two examples, with a query of either class where there is one."""
    return take_turns(list(examples), [names[query] for query, _ in examples], 2)


def _nearest_right(query: int, names: Sequence[str], embeddings: np.ndarray) -> int | None:
    """The row of the query's class, itself left out, that is nearest to it."""
    rows = [row for row, name in enumerate(names) if name == names[query] and row != query]
    if not rows:
        return None
    vectors = embeddings[rows].astype(np.float64)
    cosines = vectors @ embeddings[query] / np.linalg.norm(vectors, axis=1)
    return rows[int(cosines.argmax())]
