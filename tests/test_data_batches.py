"""Samplers: distribution, purity, ranks, and pairs against the nearest class found by a plain loop."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fieldmark.data.batches import class_balanced_batch, class_centroids, sample_pairs
from fieldmark.errors import FieldmarkError
from fieldmark.methods.trainer import ClassBalancedSteps

KEY: dict[str, Any] = {"seed": 3, "epoch": 1}


def labels_of(sizes):
    """Labels of classes with these sizes, shuffled once."""
    labels = [f"class {number}" for number, size in enumerate(sizes) for _ in range(size)]
    return [labels[place] for place in np.random.default_rng(0).permutation(len(labels))]


def batches(labels, classes, items, steps, **key):
    return [class_balanced_batch(labels, classes, items, step=step, **(KEY | key)) for step in range(steps)]


@pytest.mark.parametrize(
    ("n_classes", "size", "classes", "items"),
    [(10, 8, 3, 4), (7, 6, 4, 4), (5, 5, 5, 5), (9, 3, 4, 2), (12, 20, 1, 1), (23, 11, 8, 5), (3, 9, 2, 8)],
)
def test_no_class_or_item_returns_before_all_others_came(n_classes, size, classes, items):
    labels = labels_of([size] * n_classes)
    steps = 4 * math.ceil(n_classes * size / (classes * items))
    visits: Counter[str] = Counter()
    taken: Counter[int] = Counter()
    for batch in batches(labels, classes, items, steps):
        assert len(batch) == classes * items
        assert len(set(batch)) == len(batch)
        counts = Counter(labels[index] for index in batch)
        assert set(counts.values()) == {items}
        assert len(counts) == classes
        visits.update(counts.keys())
        taken.update(batch)
        seen = [visits[f"class {number}"] for number in range(n_classes)]
        assert max(seen) - min(seen) <= 1
        for label in visits:
            times = [taken[index] for index, one in enumerate(labels) if one == label]
            assert max(times) - min(times) <= 1


@pytest.mark.parametrize(("n_classes", "classes"), [(10, 3), (8, 4), (11, 5), (7, 7), (7, 4)])
def test_rounds_of_classes_are_complete(n_classes, classes):
    labels = labels_of([4] * n_classes)
    order = [labels[index] for batch in batches(labels, classes, 2, 5 * n_classes) for index in batch[::2]]
    for start in range(0, len(order) - n_classes + 1, n_classes):
        assert len(set(order[start : start + n_classes])) == n_classes


def test_rounds_within_an_epoch_bring_other_classes_together():
    labels = labels_of([40] * 8)
    together = {frozenset(labels[index] for index in batch) for batch in batches(labels, 2, 2, 32)}
    assert len(together) > 8


def test_small_classes_repeat_items_as_evenly_as_possible():
    labels = labels_of([1, 2, 3, 9])
    for batch in batches(labels, 4, 5, 20):
        for label, times in Counter(labels[index] for index in batch).items():
            assert times == 5
            counts = Counter(index for index in batch if labels[index] == label)
            assert len(counts) == min(5, labels.count(label))
            assert max(counts.values()) - min(counts.values()) <= 1


def test_batch_is_a_function_of_seed_epoch_and_step():
    labels = labels_of([6] * 9)
    listed = batches(labels, 4, 3, 12)
    assert class_balanced_batch(labels, 4, 3, step=7, **KEY) == listed[7]
    assert class_balanced_batch(torch.tensor([int(one[6:]) for one in labels]), 4, 3, step=7, **KEY) == listed[7]
    assert batches(labels, 4, 3, 12, epoch=2) != listed
    assert batches(labels, 4, 3, 12, seed=4) != listed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_in_a_row_are_the_batch_of_one_process(world_size):
    labels = labels_of([7] * 11)
    whole = batches(labels, 4, 3, 6)
    ranks = [batches(labels, 4, 3, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for together, *parts in zip(whole, *ranks, strict=True):
        assert together == [index for part in parts for index in part]
        assert len({len(part) for part in parts}) == 1


def test_a_run_visits_epoch_after_epoch_rank_by_rank():
    labels = [number % 9 for number in range(54)]
    steps = ClassBalancedSteps(labels, 4, 3, seed=3, steps=6, world_size=2)
    assert len(steps) == 12
    slices = list(steps)
    for step in range(6):  # 4 steps an epoch
        whole = class_balanced_batch(labels, 4, 3, seed=3, epoch=step // 4, step=step % 4)
        assert slices[2 * step] + slices[2 * step + 1] == whole == steps.global_batch(step)
        assert steps.global_batch(step, stream=1) != whole


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"classes_per_batch": 5}, "lower classes_per_batch"),
        ({"items_per_class": 0}, "1 or more"),
        ({"world_size": 5}, "cannot be shared"),
        ({"world_size": 2, "rank": 2}, "cannot be shared"),
        ({"epoch": -1}, "from 0"),
        ({"labels": ["a", None, "b", "c"]}, "item 1 has no label"),
        ({"labels": []}, "have 0"),
    ],
)
def test_wrong_batches_are_one_sentence(change, word):
    given = {"labels": list("aabbcc"), "classes_per_batch": 2, "items_per_class": 2, "step": 0, **KEY}
    with pytest.raises(FieldmarkError, match=word):
        class_balanced_batch(**(given | change))


CENTRES = {"class 0": [1, 0.0], "class 1": [0.9, 0.1], "class 2": [-1, 0.2], "class 3": [-3, 0.0]}
NEAREST = {"class 0": "class 1", "class 1": "class 0", "class 2": "class 3", "class 3": "class 2"}


@pytest.mark.parametrize("kind", ["same", "lookalike", "random", "balanced"])
def test_pairs_are_distinct_flagged_right_and_of_their_kind(kind):
    labels = labels_of([6] * 4)
    for step in range(20):
        pairs = sample_pairs(labels, 12, step=step, kind=kind, centroids=CENTRES, **KEY)
        assert len({frozenset(pair[:2]) for pair in pairs}) == 12
        for first, second, same in pairs:
            assert first != second
            assert same is (labels[first] == labels[second])
            if not same and kind != "random":
                assert NEAREST[labels[first]] == labels[second]
        n_same = sum(same for _, _, same in pairs)
        assert n_same == {"same": 12, "lookalike": 0, "random": n_same, "balanced": 6}[kind]


def test_balanced_pairs_alternate_the_odd_one_and_mix_the_order():
    labels = labels_of([6] * 4)
    flags = [[same for *_, same in sample_pairs(labels, 5, step=step, **KEY)] for step in range(20)]
    assert [sum(row) for row in flags] == [2, 3] * 10
    assert len({tuple(row) for row in flags}) > 5


def test_both_items_of_a_pair_come_first_and_all_items_come():
    labels = labels_of([6] * 4)
    pairs = [pair for step in range(40) for pair in sample_pairs(labels, 8, step=step, centroids=CENTRES, **KEY)]
    ascending = sum(first < second for first, second, _ in pairs)
    assert 0.4 * len(pairs) < ascending < 0.6 * len(pairs)
    assert {index for pair in pairs for index in pair[:2]} == set(range(24))


def test_pairs_are_a_function_of_seed_epoch_and_step_and_ranks_share_them():
    labels = labels_of([6] * 4)
    whole = [sample_pairs(labels, 6, step=step, **KEY) for step in range(5)]
    assert sample_pairs(labels, 6, step=3, **KEY) == whole[3]
    assert len({str(pairs) for pairs in whole}) == 5
    assert sample_pairs(labels, 6, step=3, seed=3, epoch=2) != whole[3]
    assert sample_pairs(labels, 6, step=3, seed=4, epoch=1) != whole[3]
    for size in (2, 3):
        ranks = [sample_pairs(labels, 6, step=3, rank=rank, world_size=size, **KEY) for rank in range(size)]
        assert [pair for part in ranks for pair in part] == whole[3]


def test_explicit_neighbours():
    labels = labels_of([5] * 4)
    near = {"class 2": ["class 0", "absent"], "class 3": ["absent", "class 3"]}
    pairs = sample_pairs(labels, 8, step=0, kind="lookalike", neighbours=near, **KEY)
    assert {frozenset((labels[a], labels[b])) for a, b, _ in pairs} == {frozenset(("class 0", "class 2"))}
    fallback = sample_pairs(labels, 8, step=0, neighbours={"class 3": ["absent"]}, **KEY)
    assert sum(same for *_, same in fallback) == 4
    with pytest.raises(FieldmarkError, match="give centroids"):
        sample_pairs(labels, 8, step=0, kind="lookalike", neighbours={"class 3": ["absent"]}, **KEY)


def test_pairs_repeat_only_when_none_is_left():
    pairs = sample_pairs(["a", "a", "b"], 5, step=0, kind="random", **KEY)
    assert len({frozenset(pair[:2]) for pair in pairs[:3]}) == 3
    assert len(pairs) == 5


@pytest.mark.parametrize(
    ("labels", "arguments", "word"),
    [
        (["a", "b"], {"kind": "same"}, "no pair of kind 'same'"),
        (["a", "a"], {"kind": "balanced"}, "no pair of kind 'different'"),
        (["a"], {"kind": "random"}, "no pair of kind 'random'"),
        ([], {"kind": "random"}, "no pair"),
        (["a", "b"], {"kind": "near"}, "expected one of"),
        (["a", "b"], {"kind": "lookalike"}, "give centroids"),
        (["a", "b"], {"kind": "lookalike", "centroids": {"a": [1.0]}}, "no centroid for class 'b'"),
        (["a", "b"], {"kind": "random", "world_size": 3}, "multiple of the 3"),
    ],
)
def test_wrong_pairs_are_one_sentence(labels, arguments, word):
    with pytest.raises(FieldmarkError, match=word):
        sample_pairs(labels, 4, step=0, **KEY, **arguments)


def test_class_centroids_are_means():
    vectors = torch.arange(8.0).reshape(4, 2)
    centres = class_centroids(["a", "b", "a", "a"], vectors)
    np.testing.assert_allclose(centres["a"], np.mean([[0, 1], [4, 5], [6, 7]], axis=0))
    np.testing.assert_allclose(centres["b"], [2, 3])
    with pytest.raises(FieldmarkError, match="one row a label"):
        class_centroids(["a"], vectors)
