"""Retrieval metrics against double loops written from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows
from fieldmark.evaluation.neighbours import Scores, top_k
from fieldmark.evaluation.retrieval import evaluate_retrieval, retrieval_metrics, retrieval_per_query

KS = (1, 2, 4, 8, 100)
FIELDS = (
    "first_hit",
    "average_precision",
    "r_precision",
    "neighbours",
    "scores",
    "nearest_wrong",
    "nearest_wrong_score",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Products this small take longer to share than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cosine(a, b):
    """Same input, same output: equal vectors tie exactly here too."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b))
    return dot / math.sqrt(math.fsum(float(x) ** 2 for x in a) * math.fsum(float(y) ** 2 for y in b))


def slow_ranking(query, gallery, own):
    scored = [(-cosine(query, item), index) for index, item in enumerate(gallery) if index != own]
    return [index for _, index in sorted(scored)]


def slow_metrics(queries, labels, gallery, gallery_labels, own, ks=KS):
    """The definitions, one query at a time."""
    sums = dict.fromkeys([*(f"recall@{k}" for k in ks), "map@r", "r_precision", "mrr"], 0.0)
    counted = 0
    for query, label, self_index in zip(queries, labels, own):
        hits = [gallery_labels[index] == label for index in slow_ranking(query, gallery, self_index)]
        relevant = sum(hits)
        if relevant == 0:
            continue
        counted += 1
        for k in ks:
            sums[f"recall@{k}"] += any(hits[:k])
        sums["mrr"] += 1 / (hits.index(True) + 1)
        sums["r_precision"] += sum(hits[:relevant]) / relevant
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]]
        sums["map@r"] += sum(precisions) / relevant
    means = {key: value / counted for key, value in sums.items()}
    return means | {"n_queries": counted, "n_gallery": len(gallery), "n_skipped": len(queries) - counted}


def random_rows(count, dim, seed, distinct=None):
    """Rows on a coarse grid, exact in float16; with `distinct` many of them are duplicates of each other."""
    rng = np.random.default_rng(seed)
    table = rng.integers(-512, 513, size=(distinct or count, dim)) / 256
    table[np.abs(table).sum(axis=1) == 0] = 1
    return table[rng.integers(0, distinct, size=count)] if distinct else table


SELF_CASES: dict[str, tuple[np.ndarray, Any]] = {
    "plain": (random_rows(40, 6, 0), [i % 5 for i in range(40)]),
    "duplicates": (random_rows(40, 6, 1, distinct=5), [i % 4 for i in range(40)]),
    "all the same vector": (np.ones((12, 3)), [0, 1, 2] * 4),
    "singletons": (random_rows(20, 4, 2), [0, 0, 0, 1, 1, *range(2, 17)]),
    "one class": (random_rows(15, 4, 3), ["wren"] * 15),
    "two items": (random_rows(2, 4, 4), [7, 7]),
    "opposite vectors": (np.array([[1, 0], [-1, 0], [1, 0], [-1, 0], [0, 1]]), [0, 0, 1, 1, 0]),
    "one dimension": (np.array([[1], [2], [-4], [8], [-1]]), [0, 1, 0, 1, 1]),
    "large class beside small ones": (random_rows(40, 5, 5), [0] * 30 + [1] * 6 + [2, 2, 3, 4]),
    "above 2^24": (random_rows(12, 4, 6), [2**24, 2**24 + 1, 2**24 + 2] * 4),
    "above 2^53": (random_rows(12, 4, 7), [2**53, 2**53 + 1] * 6),
    "above 2^64": (random_rows(12, 4, 8), [2**70, 2**70 + 1] * 6),
    "uint64": (random_rows(12, 4, 9), np.array([2**63, 2**63 + 1, 2**64 - 1] * 4, dtype=np.uint64)),
    "negative int8": (random_rows(12, 4, 10), np.array([-1, 0, 1] * 4, dtype=np.int8)),
    "strings": (random_rows(12, 4, 11), ["wren", "robin", "1"] * 4),
    "numpy strings": (random_rows(12, 4, 12), np.array(["wren", "robin", "dunnock"] * 4)),
    "torch labels": (random_rows(12, 4, 13), torch.tensor([2**24, 2**24 + 1] * 6)),
}


@pytest.mark.parametrize("name", SELF_CASES)
def test_metrics_equal_the_definitions(name):
    embeddings, labels = SELF_CASES[name]
    plain = [int(x) if not isinstance(x, str) else str(x) for x in labels]
    expected = slow_metrics(embeddings, plain, embeddings, plain, range(len(plain)))
    assert retrieval_metrics(embeddings, labels, ks=KS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("n_queries", "n_gallery", "distinct"), [(10, 30, None), (30, 3, None), (5, 1, None), (20, 40, 6)]
)
def test_query_and_gallery(n_queries, n_gallery, distinct):
    rows = random_rows(n_queries + n_gallery, 5, n_gallery, distinct)
    labels = [i % 4 for i in range(n_queries)]
    gallery_labels = [(i * 7) % 5 for i in range(n_gallery)]
    queries, gallery = rows[:n_queries], rows[n_queries:]
    expected = slow_metrics(queries, labels, gallery, gallery_labels, [-1] * n_queries)
    found = retrieval_metrics(queries, labels, gallery=gallery, gallery_labels=gallery_labels, ks=KS)
    assert found == pytest.approx(expected, abs=1e-12)


def test_roles_leave_out_the_item_itself_by_its_id():
    rows = random_rows(36, 4, 0, distinct=7)
    labels = [i % 5 for i in range(36)]
    roles = [("query", "both", "gallery", "both")[i % 4] for i in range(36)]
    asking = [i for i in range(36) if roles[i] != "gallery"]
    searched = [i for i in range(36) if roles[i] != "query"]
    own = [searched.index(i) if i in searched else -1 for i in asking]
    expected = slow_metrics(
        rows[asking], [labels[i] for i in asking], rows[searched], [labels[i] for i in searched], own
    )
    assert evaluate_retrieval(rows, labels, roles=roles, ks=KS) == pytest.approx(expected, abs=1e-12)

    found = retrieval_per_query(rows, labels, roles=roles, k=6)
    assert found.query.tolist() == asking
    for row, query in enumerate(asking):
        ranking = [searched[j] for j in slow_ranking(rows[query], rows[searched], own[row])][:6]
        assert found.neighbours[row].tolist() == ranking
        assert found.correct[row].tolist() == [labels[j] == labels[query] for j in ranking]
        assert found.nearest_wrong[row] == slow_wrong(rows, labels, query, searched)


def test_queries_may_be_asked_with_other_vectors_than_they_are_found_by():
    rows, asked = random_rows(36, 4, 0, distinct=7), random_rows(36, 4, 1)
    labels = [i % 5 for i in range(36)]
    roles = [("query", "both", "gallery", "both")[i % 4] for i in range(36)]
    asking = [i for i in range(36) if roles[i] != "gallery"]
    searched = [i for i in range(36) if roles[i] != "query"]
    own = [searched.index(i) if i in searched else -1 for i in asking]
    expected = slow_metrics(
        asked[asking], [labels[i] for i in asking], rows[searched], [labels[i] for i in searched], own
    )
    found = retrieval_per_query(rows, labels, roles=roles, asked_with=asked)
    assert found.metrics(KS) == pytest.approx(expected, abs=1e-12)
    itself = retrieval_per_query(rows, labels, roles=roles, asked_with=rows)
    assert itself.metrics(KS) == evaluate_retrieval(rows, labels, roles=roles, ks=KS)


def slow_wrong(rows, labels, query, searched):
    """Row of the best item of another label, -1 where there is none."""
    own = searched.index(query) if query in searched else -1
    ranking = (searched[j] for j in slow_ranking(rows[query], rows[searched], own))
    return next((row for row in ranking if labels[row] != labels[query]), -1)


@pytest.mark.parametrize("name", SELF_CASES)
def test_the_nearest_wrong_item_is_that_of_a_slow_ranking(name):
    embeddings, labels = SELF_CASES[name]
    plain = [int(x) if not isinstance(x, str) else str(x) for x in labels]
    everyone = list(range(len(plain)))
    found = retrieval_per_query(embeddings, labels, k=0)
    expected = [slow_wrong(embeddings, plain, query, everyone) for query in everyone]
    assert found.nearest_wrong.tolist() == expected
    for query, wrong in enumerate(expected):
        score = cosine(embeddings[query], embeddings[wrong]) if wrong >= 0 else -math.inf
        assert found.nearest_wrong_score[query] == pytest.approx(score, abs=1e-6)


def test_the_nearest_wrong_item_behind_many_right_ones():
    # 400 of one label lie nearer to each other than the 20 others: deeper than any fixed depth of the search.
    rng = np.random.default_rng(9)
    rows = np.concatenate([[1.0, 0, 0] + 0.01 * rng.normal(size=(400, 3)), [0, 1.0, 0] + rng.normal(size=(20, 3)) / 4])
    labels = [0] * 400 + [1] * 20
    found = retrieval_per_query(rows, labels, k=0)
    assert (found.nearest_wrong[:400] >= 400).all()
    for query in (0, 399):
        assert found.nearest_wrong[query] == slow_wrong(rows, labels, query, list(range(420)))


def test_values_per_query_have_the_metrics_as_their_means():
    rows, labels = random_rows(40, 5, 2), [i % 7 for i in range(39)] + [99]
    found = retrieval_per_query(rows, labels, k=0)
    values = found.values((1, 3))
    assert [*values] == ["recall@1", "recall@3", "map@r", "r_precision", "mrr"]
    assert all(len(one) == 39 for one in values.values())
    expected = retrieval_metrics(rows, labels, ks=(1, 3))
    assert {name: one.mean() for name, one in values.items()} == pytest.approx({k: expected[k] for k in values})
    assert found.metrics((1, 3)) == expected


def test_a_twin_of_the_query_is_a_neighbour_and_the_query_is_not():
    # Item 1 equals item 0 in everything but its label; dropping "rank 1" instead of "myself" would hide one of them.
    rows = np.array([[1.0, 0], [1, 0], [0.9, 0.1], [0, 1]])
    found = retrieval_per_query(rows, [0, 1, 0, 1], k=3)
    assert found.neighbours.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [2, 0, 1]]
    assert found.first_hit.tolist() == [2, 3, 1, 3]
    assert found.hit_at_1.tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", ["float64", "float16", "float32 torch", "bfloat16 torch", "strided", "list", "map"])
def test_every_input_type_gives_the_same(kind, tmp_path):
    rows = np.round(random_rows(30, 8, 3) * 4) / 4 + 0.25  # few bits: exact in bfloat16
    labels = [i % 6 for i in range(30)]
    expected = retrieval_metrics(rows.astype(np.float32), labels, ks=KS)
    if kind == "map":
        np.save(tmp_path / "rows.npy", rows.astype(np.float32))
        given = np.load(tmp_path / "rows.npy", mmap_mode="r")
    else:
        given = {
            "float64": rows,
            "float16": rows.astype(np.float16),
            "float32 torch": torch.tensor(rows, dtype=torch.float32, requires_grad=True),
            "bfloat16 torch": torch.tensor(rows, dtype=torch.bfloat16),
            "strided": np.repeat(rows, 2, axis=1)[::-1, ::2][::-1],
            "list": rows.tolist(),
        }[kind]
    assert retrieval_metrics(given, labels, ks=KS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e35])
def test_length_does_not_matter(scale):
    rows = random_rows(30, 8, 4).astype(np.float32)
    labels = [i % 6 for i in range(30)]
    stretched = rows * (scale * 10.0 ** (np.arange(30) % 3))[:, None].astype(np.float32)
    assert retrieval_metrics(stretched, labels) == pytest.approx(retrieval_metrics(rows, labels), abs=1e-12)


@pytest.mark.parametrize("distinct", [None, 20])
def test_the_block_changes_nothing(distinct):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(distinct or 140, 37)).astype(np.float32)
    if distinct:
        rows = rows[rng.integers(0, distinct, size=140)]
    labels = rng.integers(0, 40, size=140)
    whole = retrieval_per_query(rows, labels, k=50, block_rows=10_000)
    for block_rows in (1, 7, 64, 100):
        part = retrieval_per_query(rows, labels, k=50, block_rows=block_rows)
        for name in FIELDS:
            assert np.array_equal(getattr(part, name), getattr(whole, name)), (block_rows, name)


@pytest.mark.parametrize("distinct", [None, 300])
def test_a_gallery_in_several_pieces_changes_nothing(distinct):
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(distinct or 9000, 3)).astype(np.float32)
    if distinct:
        rows = rows[rng.integers(0, distinct, size=9000)]
    labels = rng.integers(0, 3000, size=9000)  # about three of a label: most first positives lie deeper than 256
    queries, query_labels = rows[:80], labels[:80]
    task: dict[str, Any] = {"gallery": rows[80:], "gallery_labels": labels[80:], "k": 300}
    whole = retrieval_per_query(queries, query_labels, **task)
    assert (whole.first_hit > 300).sum() > 10
    for block_rows, block_bytes in ((64, 1), (7, 1), (80, 4 * 128 * 6000)):
        pieces = retrieval_per_query(queries, query_labels, **task, block_rows=block_rows, block_bytes=block_bytes)
        for name in FIELDS:
            assert np.array_equal(getattr(pieces, name), getattr(whole, name)), name
    for query in range(0, 80, 16):
        order = np.lexsort((np.arange(8920), -scores_of(queries[query], rows[80:])))
        hits = labels[80:][order] == query_labels[query]
        assert whole.first_hit[query] == (int(hits.argmax()) + 1 if hits.any() else 0)


def scores_of(query, gallery):
    """One query's float32 scores, from a search to full depth."""
    found = top_k(Scores(Rows(query[None]), Rows(gallery)), len(gallery))
    scores = np.empty(len(gallery), dtype=np.float32)
    scores[found.indices[0]] = found.scores[0]
    exact = (gallery.astype(np.float64) @ query.astype(np.float64)) / (
        np.linalg.norm(gallery.astype(np.float64), axis=1) * np.linalg.norm(query.astype(np.float64))
    )
    assert np.abs(scores - exact).max() < 1e-6
    return scores


def test_copies_of_a_vector_score_the_same_wherever_they_stand():
    rng = np.random.default_rng(7)
    gallery = rng.normal(size=(5001, 512)).astype(np.float32)
    copies = np.flatnonzero(rng.random(5001) < 0.5)
    gallery[copies] = gallery[copies[0]]
    queries = rng.normal(size=(70, 512)).astype(np.float32) + gallery[copies[0]]
    found = top_k(Scores(Rows(queries), Rows(gallery)), len(copies))
    assert np.array_equal(found.indices, np.tile(copies, (70, 1)))
    assert (found.scores == found.scores[:, :1]).all()


def test_neighbours_beyond_the_gallery_are_marked():
    rows = Rows(random_rows(3, 4, 0))
    found = top_k(Scores(rows, rows, np.arange(3)), 5)
    assert (found.indices[:, 2:] == -1).all()
    assert np.isneginf(found.scores[:, 2:]).all()
    assert (found.indices[:, :2] >= 0).all()


def test_a_caller_in_low_precision_still_gets_float32():
    rows, labels = random_rows(60, 64, 8), [i % 9 for i in range(60)]
    expected = retrieval_per_query(rows, labels, k=10)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = retrieval_per_query(rows, labels, k=10)
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("n_gallery", [1_000, 40_000, 300_000])
def test_a_block_of_scores_stays_within_its_bound(n_gallery):
    scores = Scores(Rows(np.ones((2000, 2), np.float32)), Rows(np.ones((n_gallery, 2), np.float32)))
    queries, _ = next(scores.blocks(np.arange(2000), np.ones(2000, np.int64)))
    sizes = [block.nbytes for _, block in scores.columns(queries)]
    assert max(sizes) <= 64 * 2**20
    assert sum(sizes) == 4 * len(queries) * n_gallery


GOOD = np.eye(4)
BAD_INPUT = {
    "NaN": (lambda: retrieval_metrics(np.array([[1, 0], [np.nan, 1]]), [0, 0]), "row 1 of embeddings holds NaN"),
    "infinity": (lambda: retrieval_metrics(np.array([[1, np.inf], [0, 1]]), [0, 0]), "row 0 .* infinity"),
    "zero row": (lambda: retrieval_metrics(np.array([[1, 0], [0, 0]]), [0, 0]), "row 1 .* length 0"),
    "empty": (lambda: retrieval_metrics(np.zeros((0, 3)), []), "shape"),
    "one row only": (lambda: retrieval_metrics(GOOD[:1], [0]), "at least two items of one label"),
    "flat": (lambda: retrieval_metrics(np.ones(4), [0] * 4), "shape"),
    "ragged": (lambda: retrieval_metrics([[1.0], [1.0, 2.0]], [0, 0]), "no table of numbers"),
    "words": (lambda: retrieval_metrics([["a"], ["b"]], [0, 0]), "no table of numbers"),
    "too few labels": (lambda: retrieval_metrics(GOOD, [0, 0]), "2 given for 4"),
    "label missing": (lambda: retrieval_metrics(GOOD, [0, 0, None, 1]), "label None of row 2"),
    "fractional label": (lambda: retrieval_metrics(GOOD, [0.5, 0.5, 1.0, 1.0]), "label 0.5 of row 0"),
    "labels mixed": (lambda: retrieval_metrics(GOOD, [1, "1", 1, "1"]), "mix"),
    "one string": (lambda: retrieval_metrics(GOOD, "abca"), "one label per row"),
    "gallery alone": (lambda: retrieval_metrics(GOOD, [0] * 4, gallery=GOOD), "gallery_labels is missing"),
    "gallery labels short": (
        lambda: retrieval_metrics(GOOD, [0] * 4, gallery=GOOD, gallery_labels=[0]),
        "gallery_labels: 1 given for 4",
    ),
    "widths differ": (
        lambda: retrieval_metrics(GOOD, [0] * 4, gallery=np.eye(3), gallery_labels=[0] * 3),
        "4 dimensions and the gallery 3",
    ),
    "no positive": (lambda: retrieval_metrics(GOOD, [0, 1, 2, 3]), "none of the 4 queries"),
    "k of zero": (lambda: retrieval_metrics(GOOD, [0] * 4, ks=(0,)), "k 0 in ks"),
    "asked with, no roles": (lambda: retrieval_per_query(GOOD, [0] * 4, asked_with=GOOD), "without roles"),
    "asked with, too few": (
        lambda: retrieval_per_query(GOOD, [0] * 4, roles=["both"] * 4, asked_with=GOOD[:3]),
        r"shape \(3, 4\); expected \(4, 4\)",
    ),
    "unknown role": (lambda: evaluate_retrieval(GOOD, [0] * 4, roles=["query", "both", "shop", "both"]), "'shop'"),
    "no gallery role": (lambda: evaluate_retrieval(GOOD, [0] * 4, roles=["query"] * 4), "role gallery"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_said_in_a_sentence(name):
    call, message = BAD_INPUT[name]
    with pytest.raises(FieldmarkError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_values_are_plain_numbers():
    metrics = retrieval_metrics(random_rows(9, 3, 0), [0, 1, 2] * 3)
    assert all(type(value) in (int, float) for value in metrics.values())
    assert list(metrics)[:4] == ["recall@1", "recall@2", "recall@4", "recall@8"]
