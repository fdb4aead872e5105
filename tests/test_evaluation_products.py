"""Product retrieval on two levels and the linear probe, against loops from their definitions; `evaluate` with them."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from scipy.optimize import minimize

from fieldmark import cli
from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation import probe
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.probe import downstream_metrics, linear_probe
from fieldmark.evaluation.products import (
    average_precision,
    categories_of,
    coarse_values,
    evaluate_products,
    instance_values,
    ndcg,
    precision,
)
from fieldmark.evaluation.retrieval import retrieval_metrics, retrieval_per_query
from fieldmark.students.build import build_student, load_student
from fieldmark.students.items import encode_items
from fieldmark.students.multimodal import build_multimodal_student
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher

KS = (1, 5, 10)


# formulas


@pytest.fixture(scope="module")
def ranked() -> tuple[np.ndarray, np.ndarray]:
    """Hits of 300 queries among their 12 nearest, and how many positives there are: at least the hits, at least 1."""
    rng = np.random.default_rng(0)
    hits = rng.random((300, 12)) < rng.random((300, 1))
    hits[:5] = False
    return hits, np.maximum(hits.sum(axis=1), 1) + rng.integers(0, 6, 300)


def slow_average_precision(hits, depth):
    """M5Product's evaluator: precisions at the hits over the number of hits, 0 without a hit."""
    found, total = 0, 0.0
    for rank, hit in enumerate(hits[:depth], start=1):
        if hit:
            found += 1
            total += found / rank
    return total / found if found else 0.0


def slow_ndcg(hits, positives, k):
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits[:k], start=1) if hit)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, positives) + 1))


def test_average_precision_and_precision_equal_the_loop(ranked):
    hits, _ = ranked
    depths = np.random.default_rng(1).integers(1, 13, len(hits))
    found, shares = average_precision(hits, depths), precision(hits, depths)
    for row, depth in enumerate(depths):
        assert found[row] == pytest.approx(slow_average_precision(hits[row], depth))
        assert shares[row] == pytest.approx(sum(hits[row, :depth]) / depth)
    assert found[:5].tolist() == [0] * 5
    # one hit at rank 2 of many positives: 1/2, where the usual form would divide by the positives
    assert average_precision(np.array([[False, True, False]]), np.array([3]))[0] == 0.5


@pytest.mark.parametrize("k", [1, 5, 12, 20])
def test_ndcg_equals_the_loop(ranked, k):
    hits, positives = ranked
    found = ndcg(hits, positives, k)
    for row in range(len(hits)):
        assert found[row] == pytest.approx(slow_ndcg(hits[row], positives[row], k))
    assert found.max() <= 1 + 1e-12
    assert ndcg(np.array([[True, True, False]]), np.array([2]), 3)[0] == pytest.approx(1)


# searches


def slow_searches(embeddings, labels, roles):
    """Of each query that has a positive: whether each item of its ranking is one, and how many there are."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for query in range(len(unit)):
        if roles[query] == "gallery":
            continue
        others = [item for item in range(len(unit)) if item != query and roles[item] != "query"]
        others.sort(key=lambda item: (-round(float(unit[item] @ unit[query]), 6), item))
        hits = [labels[item] == labels[query] for item in others]
        if any(hits):
            yield hits


@pytest.mark.parametrize("with_roles", [False, True])
def test_both_searches_equal_the_loops(with_roles):
    rng = np.random.default_rng(2)
    categories = rng.integers(0, 9, 90)
    categories[:3] = 77  # a category smaller than most depths
    products = [f"{category}/{number}" for category, number in zip(categories, rng.integers(0, 6, 90))]
    embeddings = (np.eye(80)[categories] + 0.8 * rng.standard_normal((90, 80))).astype(np.float32)
    roles = rng.choice(["query", "gallery", "both"], 90).tolist() if with_roles else ["both"] * 90
    found = instance_values(retrieval_per_query(embeddings, products, roles=roles, k=10), KS)
    expected = list(slow_searches(embeddings, products, roles))
    for k in KS:
        assert found[f"instance_recall@{k}"].tolist() == [any(hits[:k]) for hits in expected]
        assert found[f"instance_ndcg@{k}"] == pytest.approx([slow_ndcg(hits, sum(hits), k) for hits in expected])
    found = coarse_values(retrieval_per_query(embeddings, categories, roles=roles, k=10), KS)
    expected = list(slow_searches(embeddings, categories, roles))
    for k in KS:
        depths = [min(k, sum(hits) + 1) for hits in expected]  # the evaluator counts the query in its category
        assert found[f"coarse_map@{k}"] == pytest.approx([*map(slow_average_precision, expected, depths)])
        shares = [sum(hits[:depth]) / depth for hits, depth in zip(expected, depths)]
        assert found[f"coarse_precision@{k}"] == pytest.approx(shares)
    assert len({round(float(values.mean()), 6) for values in found.values()}) > 3


def test_a_gallery_smaller_than_k():
    embeddings = np.array([[1.0, 0], [1, 0.1], [0, 1]])
    coarse = coarse_values(retrieval_per_query(embeddings, ["a", "a", "a"], k=10))
    assert coarse["coarse_map@10"].tolist() == coarse["coarse_precision@10"].tolist() == [1, 1, 1]
    assert instance_values(retrieval_per_query(embeddings, [1, 1, 2], k=10))["instance_ndcg@10"].tolist() == [1, 1]


def test_recall_at_1_is_ndcg_at_1_and_that_of_the_plain_search():
    rng = np.random.default_rng(3)
    embeddings, labels = rng.standard_normal((50, 6)), rng.integers(0, 10, 50)
    values = instance_values(retrieval_per_query(embeddings, labels, k=10))
    plain = retrieval_metrics(embeddings, labels, ks=KS)
    for k in KS:
        assert values[f"instance_recall@{k}"].mean() == pytest.approx(plain[f"recall@{k}"])
    assert values["instance_ndcg@1"].tolist() == values["instance_recall@1"].tolist()


@pytest.mark.parametrize("values", [instance_values, coarse_values])
def test_a_search_that_kept_too_little(values):
    found = retrieval_per_query(np.eye(4), [0, 0, 1, 1], k=3)
    assert len(values(found, (1, 3))) == 4
    with pytest.raises(FieldmarkError, match="depth 5 was asked of a search that kept 3"):
        values(found, (1, 5))
    with pytest.raises(FieldmarkError, match="k 0"):
        values(found, (0,))


# categories


def table(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_categories_of_a_catalogue(tmp_path):
    rows = [
        {"image": f"{n}.jpg", "label": str(n // 2), "attr_category": ("shoe", "", "bag", "bag")[n], "attr_kind": "x"}
        for n in range(4)
    ]
    catalog = load_catalog(table(tmp_path / "t.csv", rows))
    assert categories_of(catalog) == ["shoe", None, "bag", "bag"]
    assert categories_of(catalog, "kind") == ["x"] * 4
    with pytest.raises(FieldmarkError, match=r"'sort' was asked for, which no photo has.* category, kind"):
        categories_of(catalog, "sort")
    bare = load_catalog(table(tmp_path / "bare.csv", [{"image": "a.jpg", "label": "a"}]))
    assert categories_of(bare) is None
    with pytest.raises(FieldmarkError, match="the catalogue has none"):
        categories_of(bare, "category")


def test_items_without_a_category_are_not_searched(tmp_path):
    rng = np.random.default_rng(4)
    rows = [
        {"image": f"{n}.jpg", "label": str(n // 2), "attr_category": ("shoe", "bag", "")[n // 4 % 3]} for n in range(24)
    ]
    catalog, embeddings = load_catalog(table(tmp_path / "t.csv", rows)), rng.standard_normal((24, 5))
    categories = categories_of(catalog)
    found = evaluate_products(None, embeddings, catalog, categories)
    kept = [row for row in range(24) if categories[row]]
    expected = coarse_values(retrieval_per_query(embeddings[kept], [categories[row] for row in kept], k=10))
    assert {*found.metrics} == {*expected, "n_coarse_queries"}
    assert found.metrics["n_coarse_queries"] == 16
    for name, values in expected.items():
        assert found.metrics[name] == pytest.approx(values.mean())
        assert found.intervals[name][0] <= values.mean() <= found.intervals[name][1]


# the probe


def made_rows(count: int, seed: int, labels: int = 3):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, labels, count)
    return (np.eye(6)[codes] + 0.7 * rng.standard_normal((count, 6))).astype(np.float32), codes


def slow_probe(train, codes, test):
    """The minimum of the summed cross-entropy and half the squared weights, by a general minimiser; softmax a row."""
    train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train.astype(float), test))
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    classes, dim = int(codes.max()) + 1, train.shape[1]

    def scores(given, rows):
        weights = given.reshape(classes, dim + 1)
        return rows @ weights[:, :dim].T + weights[:, dim]

    def objective(given):
        loss = 0.0
        for row, code in zip(scores(given, train), codes):
            loss += math.log(sum(math.exp(value) for value in row)) - row[code]
        return loss + 0.5 * (given.reshape(classes, dim + 1)[:, :dim] ** 2).sum()

    best = minimize(objective, np.zeros(classes * (dim + 1)), method="L-BFGS-B", options={"maxiter": 300})
    return scores(best.x, test).argmax(axis=1)


def test_the_probe_equals_a_plain_minimiser():
    train, codes = made_rows(60, 5)
    test, test_codes = made_rows(200, 6)
    found = linear_probe(train, codes, test, test_codes)
    assert found["probe_accuracy"] == pytest.approx((slow_probe(train, codes, test) == test_codes).mean(), abs=0.0051)
    assert 0.5 < found["probe_accuracy"] < 0.95
    assert (found["n_probe_train"], found["n_probe_test"], found["n_probe_skipped"]) == (60, 200, 0)
    assert linear_probe(train, codes, test, test_codes) == found


def test_labels_that_the_probe_has_not_seen_are_left_out_and_counted():
    train, codes = made_rows(60, 7)
    test, test_codes = made_rows(100, 8, labels=4)
    names = [f"class {code}" for code in codes]
    found = linear_probe(train, names, test, [f"class {code}" for code in test_codes])
    known = test_codes < 3
    assert found["n_probe_skipped"] == (~known).sum() > 0
    expected = linear_probe(train, codes, test[known], test_codes[known])
    assert found["probe_accuracy"] == expected["probe_accuracy"]


def test_mistakes_of_the_probe_are_said(caplog, monkeypatch):
    train, codes = made_rows(20, 9)
    with pytest.raises(FieldmarkError, match="have 1 labels"):
        linear_probe(train, [0] * 20, train, codes)
    with pytest.raises(FieldmarkError, match="which 0 test items share"):
        linear_probe(train, codes, train, codes + 10)
    with pytest.raises(FieldmarkError, match="6 dimensions and test embeddings 5"):
        linear_probe(train, codes, train[:, :5], codes)
    with pytest.raises(FieldmarkError, match="test labels: 2 given for 20"):
        linear_probe(train, codes, train, [0, 1])
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 1)
    with caplog.at_level(logging.WARNING), pytest.warns(match="failed to converge"):
        linear_probe(train, codes, train, codes)
    assert "not converged after 1 iterations" in caplog.text


def test_downstream_use_is_of_the_items_with_a_category():
    train, codes = made_rows(60, 10)
    test, test_codes = made_rows(80, 11)
    known, test_known = ([None, *(f"c{code}" for code in given[1:])] for given in (codes, test_codes))
    found = downstream_metrics(train, known, test, test_known)
    probed = linear_probe(train[1:], known[1:], test[1:], test_known[1:])
    clustered = clustering_metrics(test[1:], test_known[1:])
    assert found == probed | {f"coarse_{name}": value for name, value in clustered.items()}


# the command


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Iterator[Path]:
    """24 photos of 12 products in three categories, half to train on; a student of photos and texts, one of photos."""
    root, rng, rows = tmp_path_factory.mktemp("shop"), np.random.default_rng(12), []
    for number in range(24):
        product, category = number // 2, number // 2 % 3
        pixels = 90 * np.eye(3)[category] + 40 * np.eye(3)[product % 2] + rng.integers(0, 120, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number}.png")
        title = f"{('red shoe', 'bag', 'green hat')[category]} no. {product} {'new' * (number % 2)}"
        split = "train" if product < 6 else "test"
        row = {"image": f"{number}.png", "label": f"p{product}", "title": title, "split": split}
        rows.append(row | {"attr_category": f"c{category}", "attr_size": str(product % 4)})
    table(root / "shop.csv", rows)
    table(root / "plain.csv", [{name: value for name, value in row.items() if name[:5] != "attr_"} for row in rows])
    table(root / "single.csv", [row | {"label": str(number)} for number, row in enumerate(rows)])
    make_tiny_teacher("qwen3_vl", root / "teacher")
    student = build_multimodal_student(root / "teacher", resolution=64, lora_rank=0)
    student.save_pretrained(str(root / "both"), create_model_card=False)
    build_student(root / "teacher", resolution=64).save_pretrained(str(root / "photos"), create_model_card=False)
    yield root
    transformers.utils.logging.set_verbosity_warning()  # commands quieten the libraries for the whole process


def evaluated(capsys, shop: Path, model: str, data: str, *more: str) -> tuple[dict, str]:
    capsys.readouterr()
    assert cli.main(["evaluate", str(shop / model), "--data", str(shop / data), *more, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.parametrize("query", ["image", "image+text"])
def test_evaluate_finds_products_by_photos_and_by_photos_with_titles(capsys, shop, query):
    found, _ = evaluated(capsys, shop, "both", "shop.csv", "--query", query, "--downstream")
    whole = load_catalog(str(shop / "shop.csv"))
    student, vectors = load_student(shop / "both"), {}
    for split in ("train", "test"):
        part = select_split(whole, split)
        texts = list(part["title"]) if query == "image+text" else None
        vectors[split] = encode_items(student, images=list(part["image"]), texts=texts)
    test = select_split(whole, "test")
    labels, categories = list(test["label"]), categories_of(test)
    expected = instance_values(retrieval_per_query(vectors["test"], labels, k=10))
    expected |= coarse_values(retrieval_per_query(vectors["test"], categories, k=10))
    assert len(expected) == 12
    for name, values in expected.items():
        assert found[name] == pytest.approx(values.mean(), abs=1e-6), name
        assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1]
    assert found["recall@1"] == pytest.approx(found["instance_recall@1"])
    used = downstream_metrics(
        vectors["train"], categories_of(select_split(whole, "train")), vectors["test"], categories
    )
    assert {name: found[name] for name in used} == pytest.approx(used, abs=1e-6)
    assert found["n_probe_test"] == found["n_coarse_queries"] == 12
    assert found["query"] == query
    assert {"i2t_recall@1", "t2i_recall@1", "nmi"} <= found.keys()


def test_photos_with_titles_are_another_query(capsys, shop):
    photos, _ = evaluated(capsys, shop, "both", "shop.csv")
    both, _ = evaluated(capsys, shop, "both", "shop.csv", "--query", "image+text", "--clustering", "false")
    names = [name for name in photos if name.startswith(("instance_", "coarse_"))]
    assert any(photos[name] != both[name] for name in names)
    assert photos["i2t_recall@5"] == both["i2t_recall@5"]
    assert not {"nmi", "ari_std", "probe_accuracy"} & both.keys()


def test_without_categories_coarse_retrieval_is_left_out_and_that_is_said(capsys, caplog, shop):
    with caplog.at_level(logging.WARNING):
        found, _ = evaluated(capsys, shop, "both", "plain.csv")
    assert "coarse retrieval is left out" in caplog.text
    assert "instance_ndcg@5" in found
    assert "coarse_map@5" not in found


def test_a_student_of_photos_alone(capsys, shop):
    found, _ = evaluated(capsys, shop, "photos", "shop.csv", "--category", "size")
    test = select_split(load_catalog(str(shop / "shop.csv")), "test")
    vectors = load_student(shop / "photos").encode(list(test["image"]))
    values = coarse_values(retrieval_per_query(vectors, categories_of(test, "size"), k=10))
    assert found["coarse_map@5"] == pytest.approx(values["coarse_map@5"].mean(), abs=1e-6)
    plain, err = evaluated(capsys, shop, "photos", "plain.csv")
    assert not any(name.startswith(("instance_", "coarse_")) for name in plain)
    assert "coarse" not in err


@pytest.mark.parametrize("model", ["both", "photos"])
def test_products_of_one_photo_each_are_found_by_category(capsys, shop, model):
    found, _ = evaluated(capsys, shop, model, "single.csv")
    assert 0 < found["coarse_map@1"] <= 1
    assert "instance_recall@1" not in found
    assert "recall@1" not in found


@pytest.mark.parametrize(
    ("model", "data", "more", "words"),
    [
        ("photos", "shop.csv", ["--query", "image+text"], "does not embed both photos and texts"),
        ("both", "shop.csv", ["--query", "text"], "--query was given 'text'; expected one of image, image+text"),
        ("both", "shop.csv", ["--category", "sort"], "the category 'sort' was asked for, which no photo has"),
        ("both", "plain.csv", ["--downstream"], "--downstream was given, but no photo has an attribute 'category'"),
        ("both", "shop.csv", ["--downstream", "--split", "train"], "give another"),
    ],
)
def test_mistakes_of_evaluate_are_one_sentence(capsys, shop, model, data, more, words):
    assert words in fails(capsys, ["evaluate", str(shop / model), "--data", str(shop / data), *more])
