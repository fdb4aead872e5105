"""The skill caption: pairs that differ, ideal captions of them, what is learned, and the examination's numbers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark.errors import FieldmarkError
from fieldmark.teacher import examine
from fieldmark.teacher.captioning import Captioning, LookalikeDrawer, caption, differing, ideal_captions, phrase
from fieldmark.teacher.compare import domain_for_attributes
from fieldmark.teacher.describe import parse_captions
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.speaking import PhotoBank, train_language
from helpers_tiny import make_tiny_teacher
from test_teacher_align import photo

ROWS = [
    {"crown_colour": "red", "wing_bars": "two", "bill_shape": "hooked", "back": "green"},
    {"crown_colour": "black", "wing_bars": "two", "bill_shape": "hooked", "back": "green"},
    {"crown_colour": "black", "wing_bars": "none", "bill_shape": "spoon", "back": "blue"},
    {"crown_colour": "red", "wing_bars": "", "back": "green"},
]
DOMAIN = domain_for_attributes(list(ROWS[0]))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    return Teacher.load(make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def bank(teacher) -> PhotoBank:
    """One photo of each item."""
    visual = teacher.visual_tokens([photo(number) for number in range(4)])
    tokens = torch.stack([visual.tokens, *visual.deepstack], dim=1).half()
    return PhotoBank(tokens, np.arange(4), ROWS, [None] * 4)


def drawer(classes=(0, 1, 2, 3, 3), rows=ROWS) -> LookalikeDrawer:
    return LookalikeDrawer(np.array(classes), rows, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("crown_colour", "red", "red crown"),
        ("bill_shape", "spoon", "spoon bill"),
        ("wing_bars", "none", "no wing bars"),
        ("colour", "red", "red colour"),
        ("baseColour", "Navy Blue", "Navy Blue baseColour"),
    ],
)
def test_an_attribute_in_words(name, value, words):
    assert phrase(name, value) == words


def test_captions_name_the_same_differing_attributes_of_both():
    drawn, counts = drawer(), set()
    for _ in range(100):
        first, second = (ROWS[drawn.classes[one]] for one in drawn.draw())
        names = drawn.names(first, second)
        counts.add(len(names))
        assert set(names) <= set(differing(first, second))
        answer = parse_captions(ideal_captions(DOMAIN, first, second, names))
        assert answer == (caption(first, names), caption(second, names))
        assert all(first[name] != second[name] and first[name] and second[name] for name in names)
    assert counts == {1, 2}


def test_pairs_differ_and_the_nearest_of_many_are_look_alikes():
    """Photos 0 and 1 differ in one attribute; as there are few photos, many candidates find one such pair."""
    drawn = drawer()
    pairs = [tuple(int(drawn.classes[one]) for one in drawn.draw()) for _ in range(400)]
    assert all(differing(ROWS[a], ROWS[b]) for a, b in pairs)
    assert (0, 3) not in pairs, "they differ in nothing that both have"
    of_first = [b for a, b in pairs if a == 0]
    assert set(of_first) == {1, 2}
    assert of_first.count(1) > 3 * of_first.count(2)


def test_items_that_differ_in_nothing_are_refused():
    with pytest.raises(FieldmarkError, match="needs some that do"):
        drawer((0, 1), [{"a": "x", "b": ""}, {"a": "x", "b": "y"}])
    with pytest.raises(FieldmarkError, match="needs some that do"):
        drawer((0, 1), [{}, {}])


def test_a_teacher_learns_to_caption(teacher, bank):
    skill = Captioning(teacher, DOMAIN, bank, batch_size=4, drills=2)
    before = {name: value.clone() for name, value in teacher.model.named_parameters() if "visual" in name}
    untrained, chance = float(skill.loss()), 2 * math.log(len(teacher.tokenizer))  # of photos and of drills
    assert 0.5 * chance < untrained < 2 * chance
    train_language(teacher, [skill], steps=30, learning_rate=3e-3)
    assert float(skill.loss()) < 0.5 * untrained
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.named_parameters() if name in before)


def test_the_examination_counts_what_captions_say(monkeypatch, teacher, bank):
    """Of each pair: an ideal answer, one of a shared value and a wrong one, and no JSON."""
    drawn = iter([(0, 1), (1, 0)])
    monkeypatch.setattr(LookalikeDrawer, "draw", lambda self: next(drawn))
    shared = json.dumps({"Image 1": "two wing bars, pink crown", "Image 2": "two wing bars"})

    def rollout(teacher, prompt, visual, group_size, **settings):
        texts = [
            [ideal_captions(DOMAIN, ROWS[a], ROWS[b], ["crown_colour"]), shared, "no"] for a, b in ((0, 1), (1, 0))
        ]
        return SimpleNamespace(texts=texts)

    monkeypatch.setattr(examine, "rollout", rollout)
    found = examine.examine_captions(teacher, bank, pairs=2).as_dict()
    assert found == {
        "pairs": 2.0,
        "answers": 3.0,
        "valid_json": 0.6667,
        "values_right": 0.8,
        "values_differing": 0.4,
        "differing": 0.25,
    }
