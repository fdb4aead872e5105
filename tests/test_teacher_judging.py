"""Texts that a small teacher learns to judge by: they are right or wrong as they claim; what its losses train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark.teacher.align import Aligner
from fieldmark.teacher.judging import FALSE_FOR_A_TRUE, Judged, JudgedTexts, JudgingLoss, Named
from test_teacher_align import photo, yes_no_teacher

ROWS = [
    {"crown": "red", "bill": "dark red", "back": "green", "leg": "red"},
    {"crown": "blue", "bill": "yellow", "back": "green", "leg": "grey"},
    {"crown": "olive green", "bill": "red", "back": "blue", "leg": "grey"},
    {"crown": "blue", "bill": "yellow", "back": "brown", "leg": "red"},
]
TITLES = [
    "Bird with Red crown, dark red bill and a green back",
    "blue-crowned bird, yellow bill",
    "Small bird: olive green crown, bluetail",
    "A bird",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def aligner(tmp_path_factory) -> Aligner:
    return Aligner(yes_no_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher")), 49)


def texts(seed: int = 0, titles=TITLES, rows=ROWS, **settings) -> JudgedTexts:
    return JudgedTexts(titles, rows, np.random.default_rng(seed), **settings)


def check_values(one: Judged, row: dict[str, str]) -> None:
    """Every span lies on a value, and says whether it is the item's."""
    assert list(one.named) == sorted(one.named, key=lambda named: named.start)
    for named in one.named:
        said = one.text[named.start : named.stop]
        assert named.true == (said.casefold() == named.truth.casefold())
        assert named.truth in row.values()
        assert any(said.casefold() in (other[name] for other in ROWS) for name in row if row[name] == named.truth)


@pytest.mark.parametrize("true", [True, False])
@pytest.mark.parametrize("count", [None, 1, 3])
def test_statements_say_what_they_claim(true, count):
    drawn = texts()
    lengths = set()
    for k in range(200):
        row = ROWS[k % 4]
        one = drawn.statements(k % 4, true, count)
        said = json.loads(f"{{{one.text}}}")
        assert one.true == true == all(row[name] == value for name, value in said.items())
        assert [one.text[n.start : n.stop] for n in one.named] == list(said.values())
        assert [(n.true, n.truth) for n in one.named] == [(row[a] == value, row[a]) for a, value in said.items()]
        assert all(value in {other[name] for other in ROWS} for name, value in said.items())
        assert one.foretold
        lengths.add(len(said))
    assert lengths == ({count} if count else {1, 2, 3, 4})


def test_a_statement_without_another_value_to_say_is_right():
    alike = texts(rows=[{"crown": "red"}] * 4)
    assert all(alike.statements(0, False).true for _ in range(10))
    assert not texts(rows=[{"crown": "red"}] * 4, values={"crown": ["red", "blue"]}).statements(0, False).true


def test_an_own_title_names_the_longest_values_whole_words_only():
    named = [[TITLES[i][n.start : n.stop] for n in texts()._named(i)] for i in range(4)]
    assert named == [["Red", "dark red", "green"], ["blue", "yellow"], ["olive green"], []]


@pytest.mark.parametrize("many_wrong", [0.0, 1.0])
def test_edited_titles_differ_exactly_in_the_values_named_wrong(many_wrong):
    drawn, wrong = texts(many_wrong=many_wrong), []
    for k in range(150):
        item = k % 3
        one = drawn.edited(item)
        check_values(one, ROWS[item])
        assert not one.true
        wrong.append(sum(not named.true for named in one.named))
        # Between the values the title's own words stand, in the values' places its own values or others.
        restored, end = "", 0
        for named in one.named:
            said = one.text[named.start : named.stop] if named.true else named.truth
            restored, end = restored + one.text[end : named.start] + said, named.stop
        assert (restored + one.text[end:]).casefold() == TITLES[item].casefold()
    assert min(wrong) == 1
    assert (max(wrong) > 1) == bool(many_wrong)
    assert drawn.edited(3) is None  # it names no value


def test_other_titles_are_of_items_with_other_attributes():
    drawn = texts(titles=["one", "two", "two", None], rows=[ROWS[0], ROWS[1], ROWS[1], ROWS[2]])
    for item, expected in ((0, {"two"}), (1, {"one"}), (3, {"one", "two"})):
        found = {drawn.other_title(item).text for _ in range(30)}
        assert found == expected
        assert not drawn.other_title(item).true


def test_draws_are_true_in_every_third_and_repeat_by_seed():
    first, again, other = (texts(seed).draw(0, 30) for seed in (1, 1, 2))
    assert first == again != other
    assert [one.true for one in first] == [k % (1 + FALSE_FOR_A_TRUE) == 0 for k in range(30)]
    for one in first:
        if one.named:
            check_values(one, ROWS[0])
            assert one.true == all(named.true for named in one.named)
    assert any(one.foretold for one in first)
    assert any(one.text == TITLES[0] for one in first)
    assert {one.text for one in texts(titles=[None] * 4).draw(0, 9)}  # statements alone


def test_marks_stand_behind_the_values(aligner):
    """A byte is a token here, so that places in the text are places among the tokens."""
    text = '"crown": "red", "leg": "blue"'
    one = Judged(text, False, (Named(10, 13, True, "red"), Named(24, 28, False, "grey")), foretold=True)
    spans = aligner.spans(one.text)
    assert [text[a:b] for a, b in spans if a >= 0 and b <= len(text)] == list(text)
    start = next(place for place, (a, _) in enumerate(spans) if a == 0)
    assert aligner.teacher.tokenizer.decode(aligner.tail(text)[start : start + len(text)]) == text
    foretold, right, truth = (
        torch.zeros(len(spans)).bool(),
        torch.full((len(spans),), -1.0),
        torch.full((len(spans),), -1),
    )
    JudgingLoss(aligner)._mark(one, spans, foretold, right, truth)
    assert (foretold.nonzero().flatten() - start).tolist() == [10, 11, 12]  # right values only
    assert {int(p) - start: float(right[p]) for p in (right >= 0).nonzero()} == {12: 1.0, 13: 1.0, 27: 0.0, 28: 0.0}
    tokens = [aligner.teacher.tokenizer(f" {value}").input_ids[0] for value in ("red", "grey")]
    assert {int(p) - start: int(truth[p]) for p in (truth >= 0).nonzero()} == {13: tokens[0], 28: tokens[1]}


def test_losses_train_the_language_model_alone_and_fall(aligner):
    teacher = aligner.teacher
    visual = teacher.visual_tokens([photo(1), photo(2)])
    torch.manual_seed(0)
    loss = JudgingLoss(aligner)
    assert {name for name, _ in loss.named_parameters()} == {"right.weight", "right.bias"}
    drawn = texts(3)
    judged = [drawn.draw(item, 3) for item in range(2)]
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    body = [*teacher.language_model.parameters()]
    try:
        for parameter in body:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW([*body, *loss.parameters()], lr=1e-3)
        totals = []
        for _ in range(6):
            parts = loss(visual, judged)
            assert parts.keys() == {"answer", "words", "truth", "values"}
            assert all(torch.isfinite(part) for part in parts.values())
            totals.append(float(sum(part.detach() for part in parts.values())))
            optimizer.zero_grad()
            torch.stack(list(parts.values())).sum().backward()
            got = {name for name, value in teacher.model.named_parameters() if value.grad is not None}
            optimizer.step()
    finally:
        for parameter in body:
            parameter.requires_grad_(False)
            parameter.grad = None
        after = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        teacher.model.load_state_dict(before)
    assert totals[-1] < 0.9 * totals[0]
    assert got
    assert all("language_model" in name for name in got)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all("language_model" in name or name == "lm_head.weight" for name in moved)  # the head may be tied
    assert len([name for name in moved if "language_model.layers" in name]) > 10


def test_losses_of_texts_without_values(aligner):
    visual = aligner.teacher.visual_tokens([photo(3)])
    drawn = texts(rows=[{}] * 4)
    with torch.no_grad():
        losses = JudgingLoss(aligner)(visual, [drawn.draw(0, 3)])
        alone = [JudgingLoss(aligner)(visual, [[Judged("owl", true)]])["answer"] for true in (True, False)]
        logits = aligner.answer_logits(visual, [["owl"]])[0, 0].float()
    assert losses.keys() == {"answer"}
    assert torch.isfinite(losses["answer"])
    for answer, value in zip(aligner.answer_ids, alone, strict=True):
        torch.testing.assert_close(value, -torch.log_softmax(logits, -1)[answer], atol=1e-5, rtol=1e-5)


def test_answers_are_weighted_so_that_a_coin_is_no_help(aligner):
    """One true and two false texts: the true one counts as both others together."""
    visual = aligner.teacher.visual_tokens([photo(4)])
    row = [Judged("owl", True), Judged("red bird", False), Judged("wren", False)]
    loss = JudgingLoss(aligner)
    with torch.no_grad():
        together = loss(visual, [row])["answer"]
        each = [loss(visual, [[one]])["answer"] for one in row]
    torch.testing.assert_close(together, (2 * each[0] + each[1] + each[2]) / 4, atol=1e-5, rtol=1e-5)
