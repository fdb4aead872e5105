"""De-duplication and hard negatives against loops and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fieldmark.data import mining
from fieldmark.data.mining import (
    cluster_rows,
    drop_duplicates,
    few_others,
    folded,
    hard_negatives,
    semdedup,
    shared_titles,
)
from fieldmark.errors import FieldmarkError


def features_with_twins(count=400, dim=16, seed=0):
    """Random directions, a third of them near one another in chains."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    for row in range(0, count - 3, 9):
        for step in (1, 2, 3):
            rows[row + step] = rows[row + step - 1] + 0.12 * rng.standard_normal(dim)
    return rows


def slow_semdedup(features, assignment, distance, epsilon, keep):
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    kept = []
    for cluster in set(assignment.tolist()):
        members = [row for row in range(len(unit)) if assignment[row] == cluster]
        order = sorted(members, key=lambda row: (-distance[row] if keep == "hard" else distance[row], row))
        for place, row in enumerate(order):
            if not any(unit[row] @ unit[earlier] > 1 - epsilon for earlier in order[:place]):
                kept.append(row)
    return sorted(kept)


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize("tile", [(512, 8192), (7, 11)])
def test_semdedup_equals_the_rule(monkeypatch, keep, tile):
    monkeypatch.setattr(mining, "_ROWS", tile[0])
    monkeypatch.setattr(mining, "_COLUMNS", tile[1])
    features = features_with_twins()
    assignment, distance = cluster_rows(features, 6, seed=3)
    kept = drop_duplicates(features, assignment, distance, 0.05, keep)
    assert kept.tolist() == slow_semdedup(features, assignment, distance, 0.05, keep)
    assert 250 < len(kept) < 400
    assert semdedup(features, clusters=6, epsilon=0.05, seed=3, keep=keep).tolist() == kept.tolist()


def test_the_farthest_of_duplicates_stays_unless_easy_ones_are_wanted():
    angles = np.deg2rad([0, 5, 10, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    distance = 1 - np.cos(angles)  # the centroid points along the first axis
    one = np.zeros(4, dtype=np.int64)
    # 0 and 10 degrees: cosine 0.985; 5 degrees lies within 0.997 of both
    assert drop_duplicates(features, one, distance, 0.01, "hard").tolist() == [2, 3]
    assert drop_duplicates(features, one, distance, 0.01, "easy").tolist() == [0, 3]
    assert drop_duplicates(features, one, distance, 0.005, "hard").tolist() == [2, 3], "dropped ones drop others too"
    assert drop_duplicates(features, np.arange(4), distance, 0.01).tolist() == [0, 1, 2, 3]
    assert drop_duplicates(features[[0, 0, 0]], one[:3], np.zeros(3), 0.01).tolist() == [0]


def test_clusters_are_nearest_centroids_found_again_by_the_seed():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 32)) * 4
    truth = rng.integers(5, size=3000)
    features = (centres[truth] + rng.standard_normal((3000, 32))).astype(np.float32)
    assignment, distance = cluster_rows(features, 20, seed=1)
    again, same = cluster_rows(features, 20, seed=1)
    assert np.array_equal(assignment, again)
    assert np.array_equal(distance, same)
    for cluster in np.unique(assignment):  # no cluster mixes the blobs
        assert len(np.unique(truth[assignment == cluster])) == 1
    assert not np.array_equal(assignment, cluster_rows(features, 20, seed=2)[0])


def test_kept_rows_do_not_depend_on_type_or_scale():
    features = features_with_twins()
    expected = semdedup(features, clusters=4)
    assert semdedup(torch.from_numpy(features), clusters=4).tolist() == expected.tolist()
    assert semdedup(features * 3, clusters=4).tolist() == expected.tolist()
    done = []
    semdedup(features, clusters=4, progress=done.append)
    assert done[-1] == len(features)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clusters": 0}, "0 clusters"),
        ({"clusters": 401}, "1 to 400"),
        ({"epsilon": 1.5}, r"epsilon is 1\.5"),
        ({"keep": "all"}, "expected hard or easy"),
        ({"features": np.zeros((3, 4))}, "item 0 are zero"),
        ({"features": np.array([[1.0, 2], [np.nan, 0]])}, "item 1 are zero, NaN"),
        ({"features": np.zeros(3)}, r"shape \(3,\)"),
    ],
)
def test_mistakes_are_said(change, words):
    given = {"features": features_with_twins(), "clusters": 2} | change
    with pytest.raises(FieldmarkError, match=words):
        semdedup(given.pop("features"), **given)


def brute_force(features, k, labels, titles, rows):
    """All others by (score, number), row by row, less those that may not be drawn."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    words = [(title or "").lower().split() for title in titles]
    found = []
    for row in rows:
        order = np.argsort(-(unit @ unit[row]).round(12), kind="stable").tolist()
        allowed = [
            other
            for other in order
            if other != row
            and not (labels[row] is not None and labels[row] == labels[other])
            and not (words[row] and words[row] == words[other])
        ]
        found.append((allowed + [-1] * k)[:k])
    return np.array(found)


@pytest.mark.parametrize("tile", [(512, 8192), (16, 64)])
def test_hard_negatives_equal_brute_force(monkeypatch, tile):
    monkeypatch.setattr(mining, "_ROWS", tile[0])
    monkeypatch.setattr(mining, "_COLUMNS", tile[1])
    rng = np.random.default_rng(1)
    features = rng.standard_normal((300, 8)).astype(np.float32)
    features[50:60] = features[7]  # equal scores
    features[200] = 2 * features[7]
    labels = [None if value == 0 else f"kind {value}" for value in rng.integers(12, size=300)]
    titles = [(None, "Red  bird", "red BIRD", " ", "Blue bird")[value] for value in rng.integers(5, size=300)]
    found = hard_negatives(features, 5, labels=labels, titles=titles)
    assert np.array_equal(found, brute_force(features, 5, labels, titles, range(300)))
    picked = np.array([299, 7, 50])
    assert np.array_equal(hard_negatives(features, 5, labels=labels, titles=titles, rows=picked), found[picked])
    numbers = torch.from_numpy(rng.integers(3, size=300))
    assert np.array_equal(
        hard_negatives(features, 4, labels=numbers),
        brute_force(features, 4, numbers.tolist(), [None] * 300, range(300)),
    )


def test_hard_negatives_of_20000_items_on_a_subset():
    rng = np.random.default_rng(2)
    features = rng.standard_normal((20_000, 24)).astype(np.float32)
    labels = rng.integers(2000, size=20_000)
    rows = rng.permutation(20_000)[:25]
    done = []
    found = hard_negatives(features, 3, labels=labels, rows=rows, progress=done.append)
    assert np.array_equal(found, brute_force(features, 3, labels.tolist(), [None] * 20_000, rows))
    assert done == [25]


def test_too_few_candidates_leave_places_empty():
    features = np.eye(4)
    assert hard_negatives(features, 5)[0].tolist() == [1, 2, 3, -1, -1]
    assert hard_negatives(features, 2, labels=["a", "a", "a", "b"]).tolist() == [[3, -1], [3, -1], [3, -1], [0, 1]]
    assert hard_negatives(features, 1, titles=["x", "X", " x ", "x"]).tolist() == [[-1]] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "0 negatives"),
        ({"labels": ["a"]}, "1 labels were given for 4 items"),
        ({"titles": ["a"] * 5}, "5 titles were given for 4 items"),
        ({"rows": np.array([0, 4])}, "rows hold 0 to 4"),
    ],
)
def test_mistakes_of_hard_negatives_are_said(change, words):
    with pytest.raises(FieldmarkError, match=words):
        hard_negatives(np.eye(4), **({"k": 1} | change))


def test_items_that_share_a_title_get_the_same_one():
    found = shared_titles([["a", "b"], ["c"], ["B ", "d"], [], ["  "], ["D"], ["e", "c"]])
    assert found[0] == found[2] == found[5], "linked by b and d"
    assert found[1] == found[6]
    assert len({found[0], found[1]}) == 2
    assert found[3] is None
    assert found[4] is None


def test_titles_are_folded():
    assert folded("  Rote\tBIRNE ") == folded("rote birne")
    assert folded("Cafe\u0301") == folded("CAF\u00c9")
    assert folded(" \n") is None
    assert folded(None) is None


@pytest.mark.parametrize("count", [0, 1, 4, 7, 11, 12])
def test_items_with_few_others_are_those_without_enough_negatives(count):
    rng = np.random.default_rng(5)
    labels = [("a", "b", "c", None)[i] for i in rng.integers(0, 4, 12)]
    titles = [("one", "two", None)[i] for i in rng.integers(0, 3, 12)]
    slow = 0
    for i in range(12):
        others = [
            j
            for j in range(12)
            if j != i
            and (labels[i] is None or labels[i] != labels[j])
            and (titles[i] is None or titles[i] != titles[j])
        ]
        slow += len(others) < count
    assert few_others(labels, titles, count) == slow
    if count:
        found = hard_negatives(rng.standard_normal((12, 4)).astype(np.float32), count, labels=labels, titles=titles)
        assert int((found < 0).any(axis=1).sum()) == slow
