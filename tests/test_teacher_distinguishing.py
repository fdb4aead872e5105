"""Which attributes tell an item from its look-alikes, against a double loop."""

from __future__ import annotations

import numpy as np
import pytest

from fieldmark.data.aviary import species
from fieldmark.teacher import distinguishing
from fieldmark.teacher.distinguishing import distinguishing_attributes, held_back, key_attributes


def differ(one: dict, other: dict, name: str) -> bool:
    return bool(one.get(name) and other.get(name) and one[name] != other[name])


def slow(classes: list[dict], lookalikes: int) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in classes for name in row))
    found = []
    for one, own in enumerate(classes):
        shared = {
            other: sum(bool(own.get(n)) and own.get(n) == row.get(n) for n in names)
            for other, row in enumerate(classes)
            if other != one
        }
        differing = [other for other in shared if any(differ(own, classes[other], name) for name in names)]
        near = sorted(differing, key=lambda other: (-shared[other], other))[:lookalikes]
        telling = {}
        for name in names:
            telling[name] = sum(differ(own, classes[other], name) for other in near)
        found.append([name for name in sorted(names, key=lambda n: -telling[n]) if telling[name]])
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cells", [1, 40, 2**24])
def test_against_a_loop(seed, cells, monkeypatch):
    monkeypatch.setattr(distinguishing, "_CELLS_AT_ONCE", cells)
    rng = np.random.default_rng(seed)
    classes = []
    for _ in range(int(rng.integers(2, 25))):
        row = {f"n{a}": f"v{rng.integers(3)}" for a in rng.permutation(5) if rng.random() < 0.8}
        classes.append({name: None if rng.random() < 0.1 else value for name, value in row.items()})
    for lookalikes in (1, 3, 50):
        assert distinguishing_attributes(classes, lookalikes) == slow(classes, lookalikes)


def test_small_catalogues():
    assert distinguishing_attributes([]) == []
    assert distinguishing_attributes([{"a": "x"}]) == [[]]
    assert distinguishing_attributes([{}, {}]) == [[], []]
    assert distinguishing_attributes([{"a": "x"}, {"a": "x"}]) == [[], []]
    twins = [{"a": "x", "b": "y"}] * 9 + [{"a": "x", "b": "z"}]
    assert distinguishing_attributes(twins) == [["b"]] * 10  # told from the one that can be told apart
    assert distinguishing_attributes([{"a": "x", "b": "y"}, {"a": "z", "b": None}]) == [["a"], ["a"]]


def test_relatives_of_the_aviary_are_told_apart_by_the_marks_in_which_they_differ():
    family = species("test")[:6]
    for own, names in zip(family, distinguishing_attributes([one.attributes for one in family]), strict=True):
        for other in family:
            differ = {name for name, value in own.attributes.items() if other.attributes[name] != value}
            assert other is own or differ & set(names)


@pytest.mark.parametrize(
    ("attributes", "title", "expected"),
    [
        ({"a": "red", "b": "long"}, None, ["a", "b"]),
        ({"a": "red", "b": "long"}, "", ["a", "b"]),
        ({"a": "red", "b": "long"}, "Bird with Red crown", ["b"]),
        ({"a": "red", "b": "long"}, "a long-necked bird, reddish", ["a", "b"]),
        ({"a": "red", "b": "red"}, "a red crown", ["a", "b"]),
        ({"a": "red", "b": "red"}, "a red crown and a red tail", []),
        ({"a": "red", "b": "Red"}, "a red crown and a red tail", []),
        ({"a": "1.5 l (new)", "b": "c++"}, "Cola 1.5 l (new), C++", []),
    ],
)
def test_what_a_title_holds_back(attributes, title, expected):
    assert held_back(attributes, title) == expected


@pytest.mark.parametrize(
    ("title", "most", "expected"),
    [
        (None, 9, {"b": "long", "a": "red"}),
        (None, 1, {"b": "long"}),
        ("a long tail", 9, {"a": "red"}),
        ("an old, long tail", 9, {"a": "red"}),
        ("a grey back", 9, {"b": "long", "a": "red"}),
        ("a long red tail", 9, {"b": "long", "a": "red"}),
        ("a long red tail", 1, {"b": "long"}),
    ],
)
def test_key_attributes(title, most, expected):
    attributes = {"a": "red", "b": "long", "c": None, "d": "old", "e": "grey"}
    found = key_attributes(["b", "c", "a"], attributes, title, most)
    assert found == expected
    assert list(found) == list(expected)
    assert key_attributes([], attributes, title, most) == {}


def test_a_value_of_two_attributes_counts_as_told_by_two_words_alone():
    """The title speaks of the crown, which tells nothing; the breast is red too, and tells."""
    attributes = {"crown": "red", "breast": "red", "tail": "long"}
    assert key_attributes(["breast", "tail"], attributes, "a red crown, long tail", 9) == {"breast": "red"}
    assert key_attributes(["breast", "tail"], attributes, "a red crown, red breast", 9) == {"tail": "long"}
