"""Which photos a report shows: the worst queries first, classes in turns, what two models find differently."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from fieldmark.evaluation.examples import (
    FOUND,
    WORST,
    Thumbnails,
    confusions,
    differing_galleries,
    galleries,
    take_turns,
)
from fieldmark.evaluation.retrieval import retrieval_per_query

CLASSES, EACH = 8, 5


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> datasets.Dataset:
    """Photos of 60 x 30 pixels, the first larger; every photo has its own grey."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for row in range(CLASSES * EACH):
        path = folder / f"{row}.png"
        Image.new("RGB", (600, 300) if row == 0 else (60, 30), (row, row, row)).save(path)
        name = f"class {row // EACH}"
        rows.append({"image": str(path), "label": name, "role": "both", "attributes": {"number": str(row // EACH)}})
    return datasets.Dataset.from_list(rows)


def vectors(seed: int) -> np.ndarray:
    """Classes that overlap."""
    rng = np.random.default_rng(seed)
    return (np.repeat(rng.normal(size=(CLASSES, 6)), EACH, axis=0) + rng.normal(size=(CLASSES * EACH, 6))).astype("f4")


def row_of(photo: Image.Image) -> int:
    return photo.getpixel((0, 0))[0]


def ranks(embeddings: np.ndarray, labels: list[str]) -> list[int]:
    """Rank of the first of the query's class, by a loop."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = []
    for query in range(len(unit)):
        others = sorted((i for i in range(len(unit)) if i != query), key=lambda i: -float(unit[query] @ unit[i]))
        found.append(next(place for place, i in enumerate(others, start=1) if labels[i] == labels[query]))
    return found


def test_the_worst_come_first_and_classes_take_turns(catalog):
    labels, embeddings = list(catalog["label"]), vectors(0)
    found = retrieval_per_query(embeddings, labels, k=4)
    shown = galleries(found, labels, Thumbnails(catalog), worst=10, good=3)
    rank = ranks(embeddings, labels)
    wrong = [one for one in shown if one["group"] == WORST]
    assert [one["group"] for one in shown] == [WORST] * 10 + [FOUND] * 3
    places = [rank[row_of(one["query"])] for one in wrong]
    assert places == sorted(places, reverse=True)
    assert places[0] == max(rank)
    assert [one["note"] for one in wrong] == [f"its class at rank {place}" for place in places]
    assert all(rank[row_of(one["query"])] == 1 and one["note"] == "" for one in shown[10:])
    missed = {labels[row] for row in range(len(labels)) if rank[row] > 1}
    assert {one["query_label"] for one in wrong} == missed  # of 10 queries and at most 8 classes none is left out
    for one in shown:
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        query, scores = row_of(one["query"]), [score for _, _, score, _ in one["results"]]
        assert scores == sorted(scores, reverse=True)
        for photo, label, score, correct in one["results"]:
            assert label == labels[row_of(photo)]
            assert correct == (label == one["query_label"])
            assert score == pytest.approx(float(unit[query] @ unit[row_of(photo)]), abs=1e-5)


@pytest.mark.parametrize(
    ("groups", "count", "taken"),
    [
        ("aaabbc", 3, [0, 3, 5]),
        ("aaabbc", 4, [0, 1, 3, 5]),
        ("aaabbc", 9, [0, 1, 2, 3, 4, 5]),
        ("", 3, []),
        ("ab", 0, []),
    ],
)
def test_taking_turns(groups, count, taken):
    assert take_turns(range(len(groups)), list(groups), count) == taken


def test_two_models_are_shown_where_they_differ(catalog):
    labels = list(catalog["label"])
    models = {"old": vectors(0), "new": vectors(1)}
    found = {name: retrieval_per_query(one, labels, k=4) for name, one in models.items()}
    shown = differing_galleries(found, labels, Thumbnails(catalog), count=50)
    old, new = (ranks(one, labels) for one in models.values())
    better = [row for row in range(len(labels)) if old[row] > 1 and new[row] == 1]
    worse = [row for row in range(len(labels)) if old[row] == 1 and new[row] > 1]
    assert better
    assert worse
    groups = [
        f"Better with new than with old: {len(better)} queries",
        f"Worse with new than with old: {len(worse)} queries",
    ]
    assert list(dict.fromkeys(one["group"] for one in shown)) == groups
    for group, rows, model in ((groups[0], better, old), (groups[1], worse, new)):
        of_group = [row_of(one["query"]) for one in shown if one["group"] == group]
        assert sorted(of_group) == rows
        assert [model[row] for row in of_group] == sorted((model[row] for row in rows), reverse=True)
    assert all(list(one["results"]) == ["old", "new"] for one in shown)
    for one in shown:
        row = row_of(one["query"])
        assert one["note"] == f"its class at rank {old[row]}, then {new[row]}"


def test_confused_classes_show_what_was_missed(catalog):
    labels, attributes, embeddings = list(catalog["label"]), list(catalog["attributes"]), vectors(0)
    found = retrieval_per_query(embeddings, labels, k=1)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    shown = confusions(found, labels, attributes, embeddings, Thumbnails(catalog), count=4)
    assert len(shown) == 4
    for pair in shown:
        (name, first, second) = pair["differing"][0]
        assert (name, f"class {first}", f"class {second}") == ("number", *pair["classes"])
        for example in pair["examples"]:
            query, wrong, missed = (row_of(example[key][0]) for key in ("query", "wrong", "missed"))
            assert {labels[query], labels[wrong]} == set(pair["classes"])
            own = [row for row in range(len(labels)) if labels[row] == labels[query] and row != query]
            assert missed == max(own, key=lambda row: float(unit[query] @ unit[row]))
            assert unit[query] @ unit[wrong] > unit[query] @ unit[missed]
    # both directions where there are both
    one = next(pair for pair in shown if len(pair["examples"]) == 2)
    assert all(example["query"][1] in one["classes"] for example in one["examples"])


def test_thumbnails_are_small_keep_their_shape_and_are_decoded_once(catalog):
    photos = Thumbnails(catalog)
    assert photos[0].size == (256, 128)
    assert photos[1].size == (60, 30)
    assert photos[0] is photos[0]
