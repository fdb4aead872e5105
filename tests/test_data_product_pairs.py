"""Pairs of products as a pure function of (seed, step)."""

from __future__ import annotations

import pytest

from fieldmark.data.product_pairs import TASKS, ProductPairs, sample_products
from fieldmark.errors import FieldmarkError

LABELS = ["a", "a", "a", "b", "b", "c", None, "d", "d", "d"]


def pairs(tasks=TASKS, count=3, labels=LABELS, **changes) -> ProductPairs:
    return ProductPairs(labels, tasks, count, **{"seed": 1, "steps": 12, **changes})


def test_tasks_take_turns_and_each_has_its_own_epochs():
    steps = pairs()
    assert [steps.task(step) for step in range(4)] == ["image-text", "text-image", "product", "image-text"]
    for task, start in (("image-text", 0), ("text-image", 1)):
        queries = [query for step in (start, start + 3, start + 6) for query, _ in steps.global_batch(step)]
        assert len(set(queries)) == 9, task  # of 10 items: three batches of an epoch, none twice
    assert all(query == candidate for step in (0, 1) for query, candidate in steps.global_batch(step))
    assert [q for q, _ in steps.global_batch(0)] != [q for q, _ in steps.global_batch(1)]
    assert steps.global_batch(0) != pairs(seed=2).global_batch(0)


def test_a_product_query_gets_another_item_of_its_product():
    steps = pairs(["product"])
    partners: dict[int, set[int]] = {}
    for step in range(200):
        for query, candidate in steps.global_batch(step):
            assert query != candidate
            assert LABELS[query] == LABELS[candidate] is not None
            partners.setdefault(query, set()).add(candidate)
    assert partners[0] == {1, 2}
    assert partners[7] == {8, 9}
    assert set(partners) == {0, 1, 2, 3, 4, 7, 8, 9}, "the only item of its product is no query"


def test_the_table_holds_the_batches_and_ranks_share_them():
    one = pairs(steps=4)
    rows = one.table()
    expected = [(*pair, step) for step in range(4) for pair in one.global_batch(step)]
    assert list(zip(rows["query"], rows["candidate"], rows["step"], strict=True)) == expected
    shared = pairs(count=4, steps=4, world_size=2)
    assert list(shared)[:2] == [[0, 1], [2, 3]]
    assert len(list(shared)) == len(shared) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["image-title"]}, "tasks .*image-title.* expected one or more of image-text"),
        ({"tasks": []}, "expected one or more of"),
        ({"labels": ["a", "b", None, None]}, "no product has two items"),
        ({"count": 11}, "11 pairs a batch were asked for; there are 10 queries"),
        ({"count": 9, "tasks": ["product"]}, "there are 8 queries for the task product"),
        ({"world_size": 2}, "cannot be shared by 2 processes"),
    ],
)
def test_what_cannot_be_paired_is_said_in_a_sentence(changes, words):
    with pytest.raises(FieldmarkError, match=words):
        pairs(**changes)


def test_samples_are_whole_products():
    labels = [f"p{i // 3}" for i in range(30)] + [None, None]
    chosen = sample_products(labels, 11, seed=1)
    counts = {label: sum(labels[i] == label for i in chosen) for label in labels if label}
    assert set(counts.values()) == {0, 3}
    assert len(chosen) == 11, "three products, and the two items that are products of their own"
    assert sample_products(labels, 100, seed=1) == list(range(32))
    assert sample_products(labels, 11, seed=1) == chosen
