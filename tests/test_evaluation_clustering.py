"""Clustering metrics against slow formulas, and k-means against what it must find."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import assign_clusters, clustering_metrics, clustering_scores


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Products this small take longer to share than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slow_nmi(found, truth):
    """2 I(found; truth) / (H(found) + H(truth)); 1 where both have no entropy."""
    n = len(found)

    def entropy(values):
        return -sum(c / n * math.log(c / n) for c in Counter(values).values())

    both = entropy(list(zip(found, truth)))
    total = entropy(found) + entropy(truth)
    return 1.0 if total == 0 else 2 * (total - both) / total


def slow_ari(found, truth):
    """Pairs, one by one: (agreements - expected) / (largest - expected)."""
    pairs = list(combinations(range(len(found)), 2))
    a = sum(found[i] == found[j] for i, j in pairs)
    b = sum(truth[i] == truth[j] for i, j in pairs)
    both = sum(found[i] == found[j] and truth[i] == truth[j] for i, j in pairs)
    expected = a * b / len(pairs)
    largest = (a + b) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def slow_purity(found, truth):
    return sum(max(Counter(t for f, t in zip(found, truth) if f == c).values()) for c in set(found)) / len(found)


def random_case(seed, clusters, labels, count=40):
    rng = np.random.default_rng(seed)
    return rng.integers(0, clusters, count).tolist(), rng.integers(0, labels, count).tolist()


CASES = {
    "random": random_case(0, 5, 4),
    "more clusters than labels": random_case(1, 12, 3),
    "fewer clusters than labels": random_case(2, 2, 9),
    "perfect under other names": ([2, 2, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2]),
    "one cluster": ([0] * 6, [0, 1, 2, 0, 1, 2]),
    "one label": ([0, 1, 2, 0, 1, 2], [5] * 6),
    "one cluster and one label": ([0] * 4, [3] * 4),
    "every item alone": (list(range(5)), [0, 0, 1, 1, 1]),
    "labels above 2^24": ([0, 0, 1, 1, 0], [2**24, 2**24, 2**24 + 1, 2**24 + 1, 2**24 + 1]),
    "strings": ([0, 1, 1, 0, 1], ["a", "b", "b", "b", "a"]),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_formulas(name):
    found, truth = CASES[name]
    expected = {"nmi": slow_nmi(found, truth), "ari": slow_ari(found, truth), "purity": slow_purity(found, truth)}
    assert clustering_scores(found, truth) == pytest.approx(expected, abs=1e-9)


def blobs(classes, items, dim, noise, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    labels = np.tile(np.arange(classes), items)
    return centres[labels] + noise * rng.normal(size=(len(labels), dim)), labels


def test_separate_classes_are_found():
    rows, labels = blobs(8, 12, 16, noise=0.02)
    metrics = clustering_metrics(rows * np.linspace(0.1, 9, len(rows))[:, None], [f"species {x}" for x in labels])
    assert metrics == pytest.approx(
        {"nmi": 1, "ari": 1, "purity": 1, "nmi_std": 0, "ari_std": 0, "purity_std": 0}, abs=1e-9
    )


def test_mean_and_spread_are_over_the_seeds():
    rows, labels = blobs(10, 10, 8, noise=1.5)
    rows = rows.astype(np.float32)
    unit = torch.nn.functional.normalize(torch.from_numpy(rows)).numpy()
    runs = [clustering_scores(assign_clusters(unit, 10, seed), labels) for seed in (3, 4, 5)]
    metrics = clustering_metrics(torch.from_numpy(rows), torch.from_numpy(labels), seeds=(3, 4, 5))
    for key in ("nmi", "ari", "purity"):
        values = [run[key] for run in runs]
        mean = sum(values) / 3
        assert metrics[key] == pytest.approx(mean, abs=1e-6)
        assert metrics[f"{key}_std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3), abs=1e-6)
    assert metrics["ari_std"] > 0
    assert metrics == clustering_metrics(torch.from_numpy(rows), torch.from_numpy(labels), seeds=(3, 4, 5))


def test_seeds_may_be_an_array_and_embeddings_of_the_other_byte_order():
    rows, labels = blobs(4, 5, 6, noise=1.0)
    expected = clustering_metrics(rows, labels, seeds=(0, 1))
    assert clustering_metrics(rows.astype(">f8"), labels.astype(">i8"), seeds=np.arange(2)) == expected


def test_starting_centres_are_as_good_as_those_of_scikit_learn():
    rows, _ = blobs(20, 15, 12, noise=0.4, seed=1)
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def inertia(assigned):
        return sum(((unit[assigned == c] - unit[assigned == c].mean(axis=0)) ** 2).sum() for c in set(assigned))

    def mean_of_scikit_learn(init):
        return np.mean([KMeans(20, n_init=1, init=init, random_state=seed).fit(unit).inertia_ for seed in range(8)])

    ours = np.mean([inertia(assign_clusters(unit, 20, seed)) for seed in range(8)])
    with threadpool_limits(limits=1):
        theirs, random = mean_of_scikit_learn("k-means++"), mean_of_scikit_learn("random")
    assert ours < theirs + 0.3 * (random - theirs)


@pytest.mark.parametrize(
    ("rows", "labels", "purity"),
    [
        (np.ones((6, 3)), [0, 0, 0, 1, 1, 2], 0.5),  # a collapsed model: one point, whatever the clusters
        (np.eye(4), [0, 1, 2, 3], 1.0),
        (np.eye(3), [7, 7, 7], 1.0),
        (np.ones((1, 2)), ["wren"], 1.0),
    ],
)
def test_degenerate_embeddings(rows, labels, purity):
    metrics = clustering_metrics(rows, labels)
    assert metrics["purity"] == pytest.approx(purity)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("rows", "labels", "seeds", "message"),
    [
        (np.zeros((2, 2)), [0, 1], (0,), "length 0"),
        (np.full((2, 2), np.nan), [0, 1], (0,), "NaN"),
        (np.zeros((0, 2)), [], (0,), "shape"),
        (np.eye(3), [0, 1], (0,), "2 given for 3"),
        (np.eye(2), [0, None], (0,), "label None"),
        (np.eye(2), [0, 1], (), "seeds is empty"),
        (np.eye(2), [0, 1], (-1,), "seeds are .*give a list of integers"),
        (np.eye(2), [0, 1], (2**32,), "seeds are .*give a list of integers"),
        (np.eye(2), [0, 1], (0.5,), "seeds are .*give a list of integers"),
        (np.eye(2), [0, 1], 3, "seeds are 3; give a list of integers"),
    ],
)
def test_bad_input_is_said_in_a_sentence(rows, labels, seeds, message):
    with pytest.raises(FieldmarkError, match=message) as raised:
        clustering_metrics(rows, labels, seeds=seeds)
    assert "\n" not in str(raised.value)
