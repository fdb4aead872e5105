"""Which classes are taken for each other, and in how many attributes they differ.

A query's nearest wrong class is that of the best item of another class (`PerQuery.nearest_wrong`). The query is
confused with it where that item comes first. Rows are those of one catalogue: `retrieval_per_query` with `roles`, or
without a gallery of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.evaluation.retrieval import PerQuery

EXAMPLES = 4


@dataclass(frozen=True)
class ClassPair:
    """Two classes and how often one is found in place of the other.

    Attributes:
        classes: their names, in alphabetical order.
        count: queries of one whose nearest item is of the other, both directions together.
        queries: counted queries of both classes.
        examples: (row of the query, row of its nearest item), closest first, four at most.
        differing: (attribute, value of the first, value of the second) where the values differ; None where one of the
            classes has no attributes.
    """

    classes: tuple[str, str]
    count: int
    queries: int
    examples: list[tuple[int, int]]
    differing: list[tuple[str, str, str]] | None


def hardest_class_pairs(
    found: PerQuery, labels: Sequence[Any], attributes: Sequence[Any] | None = None, count: int = 10
) -> list[ClassPair]:
    """The pairs of classes with most confused queries.

    Args:
        found: what each query found.
        labels: label of each row.
        attributes: attributes of each row, as in a catalogue (a mapping or None); None leaves them out.
        count: pairs at most.

    Returns:
        Most confused first; of equally many the pair with the larger share of its queries, then by name. Only queries
        that have a positive count.

    Raises:
        FieldmarkError: another number of labels or attributes than rows, or a count below 1.
    """
    if count < 1:
        raise FieldmarkError(f"count is {count}; give at least 1 pair")
    names = _names(found, labels)
    known = {str(label): marks for label, marks in class_attributes(labels, attributes).items()}
    counted = Counter(names[row] for row in found.query[found.counted])
    confused: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for position in np.flatnonzero(found.counted & (found.first_hit != 1)):
        first, second = sorted((names[found.query[position]], names[found.nearest_wrong[position]]))
        confused[first, second].append(int(position))

    def queries(pair: tuple[str, str]) -> int:
        return counted[pair[0]] + counted[pair[1]]

    hardest = sorted(confused, key=lambda pair: (-len(confused[pair]), queries(pair), pair))[:count]
    return [
        ClassPair(
            classes=pair,
            count=len(confused[pair]),
            queries=queries(pair),
            examples=_closest(found, confused[pair]),
            differing=_differing(known[pair[0]], known[pair[1]]) if known.keys() >= set(pair) else None,
        )
        for pair in hardest
    ]


def recall_by_differing_attributes(
    found: PerQuery, labels: Sequence[Any], attributes: Sequence[Any] | None
) -> list[dict[str, Any]]:
    """Recall@1 of queries whose nearest wrong class differs from their own in 1, 2, ... attributes.

    Args:
        found: what each query found.
        labels: label of each row.
        attributes: attributes of each row, as in a catalogue (a mapping or None).

    Returns:
        Rows `{"differing": n, "recall@1": x, "n_queries": q}` by rising n. Queries without a positive, without a wrong
        item, or with a class that has no attributes are left out; no row is left where nothing has attributes.

    Raises:
        FieldmarkError: another number of labels or attributes than rows.
    """
    names = _names(found, labels)
    known = {str(label): marks for label, marks in class_attributes(labels, attributes).items()}
    hits: defaultdict[int, list[bool]] = defaultdict(list)
    differing: dict[tuple[str, str], int] = {}
    for position in np.flatnonzero(found.counted & (found.nearest_wrong >= 0)):
        pair = names[found.query[position]], names[found.nearest_wrong[position]]
        if not known.keys() >= set(pair):
            continue
        if pair not in differing:
            differing[pair] = len(_differing(known[pair[0]], known[pair[1]]))
        hits[differing[pair]].append(bool(found.first_hit[position] == 1))
    return [
        {"differing": number, "recall@1": float(np.mean(hits[number])), "n_queries": len(hits[number])}
        for number in sorted(hits)
    ]


def class_attributes(labels: Sequence[Any], attributes: Sequence[Any] | None) -> dict[Any, dict[str, str]]:
    """The attributes of each class: of every attribute the commonest value among its rows, of equals the first by name.

    Args:
        labels: label of each row.
        attributes: a mapping or None for each row; values may be None.

    Returns:
        Label -> attribute -> value. Attributes of which no row knows a value are left out, and so are classes of which
        nothing is known.

    Raises:
        FieldmarkError: another number of attributes than labels.
    """
    if attributes is None:
        return {}
    if len(attributes) != len(labels):
        raise FieldmarkError(f"{len(attributes)} attributes were given for {len(labels)} labels; give one per row")
    values: defaultdict[Any, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for label, row in zip(labels, attributes, strict=True):
        for name, value in (row or {}).items():
            if value is not None:
                values[label][name][str(value)] += 1
    return {
        label: {name: min(counts, key=lambda value: (-counts[value], value)) for name, counts in marks.items()}
        for label, marks in values.items()
    }


def _names(found: PerQuery, labels: Sequence[Any]) -> list[str]:
    """Labels as text, checked to reach to every row that was found."""
    last = int(max(found.query.max(), found.nearest_wrong.max()))
    if last >= len(labels):
        raise FieldmarkError(f"{len(labels)} labels were given and row {last} was found; give one per row")
    return [str(label) for label in labels]


def _closest(found: PerQuery, positions: Sequence[int]) -> list[tuple[int, int]]:
    order = sorted(positions, key=lambda position: (-found.nearest_wrong_score[position], position))
    return [(int(found.query[position]), int(found.nearest_wrong[position])) for position in order[:EXAMPLES]]


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Attributes known of both whose values differ."""
    return [(name, value, second[name]) for name, value in first.items() if name in second and second[name] != value]
