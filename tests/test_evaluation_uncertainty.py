"""Intervals and paired tests against slow references written from their definitions."""

from __future__ import annotations

import math
import random
import tracemalloc

import numpy as np
import pytest

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.uncertainty import bootstrap_interval, bootstrap_intervals, paired_test


def slow_interval(values, level, samples=20_000):
    """Draws with replacement one by one, sorts the means, cuts both ends off."""
    rng = random.Random(1)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(samples))
    cut = (1 - level) / 2
    return means[int(cut * samples)], means[int((1 - cut) * samples) - 1]


RNG = np.random.default_rng(0)
VALUES = {
    "hits": (RNG.random(60) < 0.7).tolist(),
    "few hits": [True] * 3 + [False] * 4,
    "fractions": RNG.random(50).tolist(),
    "few different values": RNG.choice([0, 1 / 3, 0.5, 1], size=80).tolist(),
    "negative": RNG.normal(size=30).tolist(),
}


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("name", VALUES)
def test_interval_is_that_of_resampled_means(name, level):
    values = [float(value) for value in VALUES[name]]
    found = bootstrap_interval(VALUES[name], level=level, samples=10_000)
    error = np.std(values) / math.sqrt(len(values))  # of the mean; the ends of the interval differ by far less
    assert found == pytest.approx(slow_interval(values, level), abs=max(0.1 * error, 1 / len(values) / 2))


def test_both_ways_to_draw_have_the_same_distribution():
    values = np.repeat([0.0, 0.2, 0.7, 1.0], 250)
    few = bootstrap_interval(values, samples=20_000)
    # The same values told apart: drawn query by query.
    apart = bootstrap_interval(values + np.arange(1000) * 1e-12, samples=20_000)
    assert few != apart
    assert few == pytest.approx(apart, abs=0.001)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.random(200) < 0.6, samples=300)
        hits += low <= 0.6 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_an_interval_repeats_and_a_seed_changes_it():
    values = np.random.default_rng(1).random(500)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval([True] * 20) == (1.0, 1.0)
    found = bootstrap_intervals({"a": values, "b": values > 0.5})
    assert found == {"a": bootstrap_interval(values), "b": bootstrap_interval(values > 0.5)}


@pytest.mark.parametrize("kind", ["hits", "all different"])
def test_memory_does_not_grow_with_queries_times_samples(kind):
    values = np.random.default_rng(2).random(60_000)
    tracemalloc.start()
    bootstrap_interval(values < 0.5 if kind == "hits" else values, samples=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 90 * 2**20, "200 x 60,000 draws are 96 MB of row numbers and 96 MB of values"


def slow_sign_test(better, worse):
    """Twice the smaller tail of a fair coin, in whole numbers."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


@pytest.mark.parametrize(("better", "worse", "same"), [(143, 88, 1209), (3, 3, 0), (0, 5, 2), (1, 0, 0), (0, 0, 4)])
def test_paired_hits(better, worse, same):
    first = [True] * better + [False] * worse + [True, False] * (same // 2) + [True] * (same % 2)
    second = [False] * better + [True] * worse + [True, False] * (same // 2) + [True] * (same % 2)
    found = paired_test(first, second)
    assert (found.better, found.worse, found.same) == (better, worse, same)
    assert found.p_value == pytest.approx(slow_sign_test(better, worse), rel=1e-9)
    assert found.difference == pytest.approx((better - worse) / (better + worse + same))
    assert found.interval[0] <= found.difference <= found.interval[1]
    swapped = paired_test(second, first)
    assert (swapped.better, swapped.worse, swapped.p_value) == (worse, better, found.p_value)


def test_paired_fractions():
    first, second = np.array([0.2, 0.5, 0.1, 1.0, 0.3]), np.array([0.1, 0.5, 0.4, 0.2, 0.1 + 0.2])
    found = paired_test(first, second)
    assert (found.better, found.worse, found.same) == (2, 1, 2), "0.1 + 0.2 is 0.3: the order of a sum is no difference"
    assert found.difference == pytest.approx((0.1 - 0.3 + 0.8) / 5)
    assert found.p_value == 1.0
    assert found.interval == bootstrap_interval(np.array([0.2 - 0.1, 0, 0.1 - 0.4, 0.8, 0]))


def test_a_test_in_words():
    first = np.repeat([1, 0, 1], [143, 88, 1209])
    second = np.repeat([0, 1, 1], [143, 88, 1209])
    assert paired_test(first, second).sentence("SAGA", "Proxy Anchor") == (
        "Against Proxy Anchor, SAGA is better on 143 queries, worse on 88, equal on 1,209 (p = 0.0004)"
    )
    assert paired_test([1, 1], [1, 1]).sentence("a", "b").endswith("equal on 2 (p = 1.00)")
    assert paired_test(np.ones(50), np.zeros(50)).sentence("a", "b").endswith("(p < 0.0001)")


BAD = {
    "none": (lambda: bootstrap_interval([]), "at least one"),
    "table": (lambda: bootstrap_interval([[1.0]]), r"shape \(1, 1\)"),
    "NaN": (lambda: bootstrap_interval([1.0, math.nan]), "NaN"),
    "words": (lambda: bootstrap_interval(["a"]), "no numbers"),
    "level": (lambda: bootstrap_interval([1.0], level=95), "level is 95"),
    "samples": (lambda: bootstrap_interval([1.0], samples=0), "samples is 0"),
    "lengths": (lambda: paired_test([1, 0], [1]), "2 queries and the second 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_a_sentence(name):
    call, message = BAD[name]
    with pytest.raises(FieldmarkError, match=message):
        call()
