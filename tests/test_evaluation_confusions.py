"""Confused classes against loops over queries, written from the definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.confusions import class_attributes, hardest_class_pairs, recall_by_differing_attributes
from fieldmark.evaluation.retrieval import retrieval_per_query

MARKS = {
    "auk": {"bill": "deep", "crown": "black", "size": "large"},
    "bee-eater": {"bill": "thin", "crown": "red", "size": "small"},
    "crake": {"bill": "deep", "crown": "red", "size": "large"},
    "dunlin": {"bill": "thin", "crown": "black", "size": "small"},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Products this small take longer to share than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def catalogue(seed, count=60, roles=False):
    """Rows of five classes; the fifth has one photo, so that its query is not counted."""
    rng = np.random.default_rng(seed)
    labels = [list(MARKS)[i] for i in rng.integers(0, 4, count - 1)] + ["egret"]
    given = [("both", "query", "gallery")[i] for i in rng.integers(0, 3, count)] if roles else ["both"] * count
    return rng.normal(size=(count, 3)), labels, given


def slow_wrong(rows, labels, roles):
    """query -> (nearest item, nearest item of another class), in float64 from the definition."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = {}
    for query in range(len(rows)):
        others = [i for i in range(len(rows)) if i != query and roles[i] != "query"]
        if roles[query] == "gallery" or not any(labels[i] == labels[query] for i in others):
            continue
        ranked = sorted(others, key=lambda i: -float(unit[i] @ unit[query]))
        found[query] = ranked[0], next(i for i in ranked if labels[i] != labels[query])
    return unit, found


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hardest_pairs_are_those_of_a_slow_count(seed, roles):
    rows, labels, given = catalogue(seed, roles=roles)
    attributes = [MARKS.get(label) for label in labels]
    found = retrieval_per_query(rows, labels, roles=given, k=1)
    pairs = hardest_class_pairs(found, labels, attributes, count=100)

    unit, wrong = slow_wrong(rows, labels, given)
    counts = Counter(frozenset((labels[q], labels[first])) for q, (first, other) in wrong.items() if first == other)
    assert {frozenset(pair.classes): pair.count for pair in pairs} == dict(counts)
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    for pair in pairs:
        a, b = pair.classes
        assert a < b
        assert pair.queries == sum(labels[query] in pair.classes for query in wrong)
        confused = [q for q, (first, other) in wrong.items() if {labels[q], labels[first]} == {a, b}]
        closest = sorted(confused, key=lambda q: -float(unit[q] @ unit[wrong[q][0]]))[:4]
        assert pair.examples == [(q, wrong[q][0]) for q in closest]
        if "egret" in pair.classes:
            assert pair.differing is None
        else:
            assert pair.differing == [
                (name, value, MARKS[b][name]) for name, value in MARKS[a].items() if MARKS[b][name] != value
            ]
    assert hardest_class_pairs(found, labels, attributes, count=2) == pairs[:2]
    assert all(pair.differing is None for pair in hardest_class_pairs(found, labels))


@pytest.mark.parametrize("roles", [False, True])
def test_recall_by_differing_attributes_is_that_of_a_slow_count(roles):
    rows, labels, given = catalogue(3, roles=roles)
    attributes = [MARKS.get(label) for label in labels]
    found = retrieval_per_query(rows, labels, roles=given, k=0)
    expected: dict[int, list[bool]] = {}
    _, wrong = slow_wrong(rows, labels, given)
    for query, (first, other) in wrong.items():
        if "egret" not in (labels[query], labels[other]):
            ours, theirs = MARKS[labels[query]], MARKS[labels[other]]
            differing = sum(ours[name] != theirs[name] for name in ours)
            expected.setdefault(differing, []).append(first != other)
    assert recall_by_differing_attributes(found, labels, attributes) == [
        {"differing": n, "recall@1": pytest.approx(np.mean(expected[n])), "n_queries": len(expected[n])}
        for n in sorted(expected)
    ]
    assert len(expected) > 1
    assert recall_by_differing_attributes(found, labels, None) == []
    assert recall_by_differing_attributes(found, labels, [None] * len(labels)) == []


def test_a_perfect_student_confuses_nothing():
    rows = np.repeat(np.eye(3), 2, axis=0)
    assert hardest_class_pairs(retrieval_per_query(rows, [0, 0, 1, 1, 2, 2]), [0, 0, 1, 1, 2, 2]) == []


def test_of_equally_many_the_larger_share_comes_first_then_the_name():
    # Two pairs of classes, all four photos of each confused; c and d have two further photos that find each other.
    rows = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0.1, 0, 0], [0.1, 1, 0, 0]] + [[0, 0, 1, 0], [0, 0, 0, 1]] * 2)
    more = np.vstack([rows[4:], [[0, 0, 1, 1], [0, 0, 1, 1.01]], rows[:4]])
    labels = ["c", "d", "d", "c", "c", "c", "x", "y", "y", "x"]
    pairs = hardest_class_pairs(retrieval_per_query(more, labels), labels)
    assert [(pair.classes, pair.count, pair.queries) for pair in pairs] == [(("x", "y"), 4, 4), (("c", "d"), 4, 6)]
    labels = ["x", "y", "y", "x", "c", "d", "d", "c"]
    pairs = hardest_class_pairs(retrieval_per_query(rows, labels), labels)
    assert [(pair.classes, pair.count) for pair in pairs] == [(("c", "d"), 4), (("x", "y"), 4)]


def test_class_attributes_are_the_commonest_values():
    labels = ["a", "a", "a", "b", "b", "c", "d"]
    rows = [
        {"bill": "deep", "crown": None},
        {"bill": "thin", "crown": None},
        {"bill": "deep", "crown": None},
        {"bill": "thin", "crown": "red"},
        {"bill": "deep", "crown": None},
        None,
        {"bill": None, "crown": None},
    ]
    assert class_attributes(labels, rows) == {"a": {"bill": "deep"}, "b": {"bill": "deep", "crown": "red"}}
    assert class_attributes(labels, None) == {}


def test_an_attribute_that_one_class_lacks_is_no_difference():
    rows = np.array([[1, 0], [1, 0.1], [0.9, 0.5], [0, 1.0]])
    labels = ["a", "b", "a", "b"]
    marks = {"a": {"bill": "deep", "crown": "red"}, "b": {"bill": "thin", "crown": None}}
    (pair,) = hardest_class_pairs(retrieval_per_query(rows, labels), labels, [marks[label] for label in labels])
    assert pair.differing == [("bill", "deep", "thin")]


def test_bad_input_is_said_in_a_sentence():
    found = retrieval_per_query(np.eye(4), [0, 0, 1, 1])
    with pytest.raises(FieldmarkError, match="2 labels were given and row 3"):
        hardest_class_pairs(found, [0, 0])
    with pytest.raises(FieldmarkError, match="1 attributes were given for 4"):
        recall_by_differing_attributes(found, [0, 0, 1, 1], [{"bill": "deep"}])
    with pytest.raises(FieldmarkError, match="count is 0"):
        hardest_class_pairs(found, [0, 0, 1, 1], count=0)
