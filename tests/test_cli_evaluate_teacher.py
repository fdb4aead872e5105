"""`fieldmark evaluate` on groups: the teacher's own scores and gap beside the student's, against loops of one pair."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from fieldmark import cli
from fieldmark.commands.evaluate_teacher import GAPS, SCORES
from fieldmark.data import groups as groups_module
from fieldmark.data.aviary import species, species_of_uri
from fieldmark.data.captions import read_groups
from fieldmark.data.photos import open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.groups import group_scores, group_scores_by_category
from fieldmark.evaluation.modality_gap import gap_of_scores, modality_gap
from fieldmark.methods.teacher_groups import gap_rows
from fieldmark.students.build import build_student, load_student
from fieldmark.students.items import encode_items
from fieldmark.students.multimodal import build_multimodal_student
from fieldmark.teacher.inside import PHOTOS_QUESTION, TEXTS_QUESTION
from fieldmark.teacher.model import Teacher
from helpers_cli import draw, fails, table_rows
from helpers_tiny import make_tiny_teacher
from test_teacher_align import one_by_one, yes_no_teacher
from test_teacher_inside import public_score

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS, IN_GAP = 5, 3


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[Path]:
    """Ten photos with titles and without, five groups of them, two teachers, a student with texts and one without."""
    root = tmp_path_factory.mktemp("house")
    for number in range(2 * GROUPS):
        draw(number).save(root / f"{number}.png")
    rows = [
        {"image": f"{n}.png", "label": f"l{n % 5}", "title": f"item {n}" + " tall" * (n % 3), "split": "test"}
        for n in range(2 * GROUPS)
    ]
    for name, lines in (("titled", rows), ("untitled", [row | {"title": ""} for row in rows])):
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
    write_groups(
        root / "groups.jsonl",
        [
            {
                "image_0": f"{2 * g}.png",
                "image_1": f"{2 * g + 1}.png",
                "caption_0": f"a red thing, number {g}" * (1 + g % 2),
                "caption_1": f"one that is blue, {g}",
                "category": ("colour", "size")[g % 2],
            }
            for g in range(GROUPS)
        ],
    )
    teacher = yes_no_teacher("qwen3_vl", root)
    teacher.model.save_pretrained(root / "teacher")
    teacher.processor.save_pretrained(root / "teacher")
    make_tiny_teacher("qwen3_vl", root / "silent")
    student = build_multimodal_student(root / "silent", resolution=64, lora_rank=0)
    student.save_pretrained(str(root / "both"), create_model_card=False)
    build_student(root / "silent", resolution=64).save_pretrained(str(root / "photos"), create_model_card=False)
    yield root
    transformers.utils.logging.set_verbosity_warning()  # commands quieten the libraries for the whole process


def write_groups(path: Path, groups: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(group) + "\n" for group in groups), encoding="utf-8")
    return path


def command(house: Path, *more: object, model: str = "both", data: str = "titled", groups: str = "groups") -> list[str]:
    flags = ["--data", house / f"{data}.csv", "--clustering", "false", "--groups", house / f"{groups}.jsonl", *more]
    return ["evaluate", str(house / model), *map(str, flags)]


def evaluated(capsys, argv: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def by_hand(house) -> dict[str, Any]:
    """What the teacher scores, one pair at a time by its public forward: all groups, and the tables of some."""
    teacher = Teacher.load(house / "teacher")
    groups = read_groups(house / "groups.jsonl")
    rows = sorted(np.random.default_rng(0).permutation(GROUPS)[:IN_GAP].tolist())
    photos = {side: [open_photo(groups[row].images[side]) for row in rows] for side in (0, 1)}
    texts = {side: [groups[row].captions[side] for row in rows] for side in (0, 1)}
    tables = {}
    for a in (0, 1):
        for b in (0, 1):
            tables[f"T{a}I{b}"] = [[one_by_one(teacher, photo, text) for photo in photos[b]] for text in texts[a]]
        asked = [[TEXTS_QUESTION.format(first=one, second=other) for other in texts[a]] for one in texts[a]]
        tables[f"T{a}T{a}"] = [[public_score(teacher, question, []) for question in row] for row in asked]
        tables[f"I{a}I{a}"] = [
            [public_score(teacher, PHOTOS_QUESTION, [one, other]) for other in photos[a]] for one in photos[a]
        ]
    whole = [
        [[one_by_one(teacher, open_photo(photo), text) for text in group.captions] for photo in group.images]
        for group in groups
    ]
    gap, matched = (gap_of_scores(tables, matched_only=only).metrics for only in (False, True))
    gap |= {f"matched_{name}": value for name, value in matched.items()}
    return {"groups": groups, "rows": rows, "gap": gap, "scores": np.array(whole)}


def test_a_teacher_stands_beside_the_student(capsys, house, by_hand):
    plain = evaluated(capsys, command(house))
    found = evaluated(capsys, command(house, "--teacher", house / "teacher", "--teacher_groups", IN_GAP))
    assert {name: found[name] for name in plain} == plain
    expected = group_scores(by_hand["scores"])
    assert {name: found[f"teacher_{name}"] for name in (*SCORES, "n_groups")} == expected
    categories = [group.category for group in by_hand["groups"]]
    assert found["teacher_groups_by_category"] == group_scores_by_category(by_hand["scores"], categories)
    for name in GAPS:
        assert found[f"teacher_{name}"] == pytest.approx(by_hand["gap"][name], rel=2e-3, abs=1e-5), name
    assert found["teacher_n_gap_groups"] == IN_GAP
    assert list(found["teacher_answers"]) == ["Yes", "No"]
    assert found["teacher"] == str(house / "teacher")
    for name in SCORES:
        low, high = found["teacher_intervals"][name]
        assert low <= found[f"teacher_{name}"] <= high


def test_the_students_gap_is_shown_on_the_same_groups(capsys, house, by_hand):
    found = evaluated(capsys, command(house, "--teacher", house / "teacher", "--teacher_groups", IN_GAP))
    student = load_student(house / "both")
    groups = [by_hand["groups"][row] for row in by_hand["rows"]]
    sides = [encode_items(student, texts=[group.captions[side] for group in groups]) for side in (0, 1)]
    sides += [encode_items(student, images=[group.images[side] for group in groups]) for side in (0, 1)]
    gap, matched = (modality_gap(*sides, matched_only=only).metrics for only in (False, True))
    for name, value in gap.items():
        assert found[f"sampled_{name}"] == pytest.approx(value, rel=1e-3), name
        assert found[f"sampled_matched_{name}"] == pytest.approx(matched[name], rel=1e-3), name
        assert found[name] != found[f"sampled_{name}"], name
    whole = evaluated(capsys, command(house, "--teacher", house / "teacher", "--teacher_groups", 50))
    assert whole["teacher_n_gap_groups"] == GROUPS
    assert whole["sampled_gap_ratio"] == pytest.approx(whole["gap_ratio"])


def test_tables_show_both_and_progress_goes_to_stderr(capsys, house):
    argv = command(house, "--teacher", house / "teacher", "--teacher_groups", IN_GAP)
    found = evaluated(capsys, argv)
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    rows = {row[0]: row[1:] for row in table_rows(out) if len(row) == 4 and row[0] in (*SCORES, *GAPS)}
    for name in SCORES:
        low, high = found["teacher_intervals"][name]
        shown = [f"{found[name]:.3f}", f"{found[f'teacher_{name}']:.3f}", f"{low:.3f} – {high:.3f}"]
        assert rows[name] == shown, name
    for name in GAPS:
        assert rows[name] == [f"{found[f'sampled_{name}']:.3f}", f"{found[f'teacher_{name}']:.3f}", ""], name
    assert any(found[name] != found[f"teacher_{name}"] for name in SCORES)
    by_category = [row for row in table_rows(out) if row[0] in ("colour", "size")]
    assert by_category == [
        [name, *(f"{scores[key]:.3f}" for key in SCORES), str(int(scores["n_groups"]))]
        for kind in ("groups_by_category", "teacher_groups_by_category")
        for name, scores in found[kind].items()
    ]
    yes, no = found["teacher_answers"].values()
    assert f"answers: 'Yes' is token {yes}, 'No' is token {no}\n" in out
    assert f"beside the student on {GROUPS} groups; gap on {IN_GAP} of them" in out
    assert "groups by category, teacher" in out
    assert f"alignment of test groups  {2 * GROUPS}/{2 * GROUPS}" in err
    assert f"alignment of all pairs  {8 * IN_GAP**2}/{8 * IN_GAP**2}" in err
    assert "left 0:00" in err


def test_a_student_of_photos_alone_has_a_teacher_too(capsys, house):
    more = ("--teacher", house / "teacher", "--teacher_groups", 0)
    found = evaluated(capsys, command(house, *more, model="photos", data="untitled"))
    assert found["teacher_n_groups"] == GROUPS
    assert not {"text_score", "teacher_gap_ratio", "sampled_gap_ratio"} & set(found)
    assert cli.main(command(house, *more, model="photos")) == 0
    assert "–" in capsys.readouterr().out


def test_one_group_alone_has_no_gap_and_ends_nothing(capsys, caplog, house):
    first = json.loads((house / "groups.jsonl").read_text(encoding="utf-8").splitlines()[0])
    write_groups(house / "one.jsonl", [first])
    found = evaluated(capsys, command(house, "--teacher", house / "teacher", groups="one"))
    assert found["n_groups"] == found["teacher_n_groups"] == 1
    assert not [name for name in found if "gap" in name]
    told = [message for message in caplog.messages if "gap is left out: one group alone has no other" in message]
    assert [message.partition(" modality gap")[0] for message in told] == ["the", "the teacher's"]


def test_groups_of_a_gap_are_drawn_by_seed():
    assert gap_rows(400, 100) == gap_rows(400, 100) != gap_rows(400, 100, seed=1)
    assert len(set(gap_rows(400, 100))) == 100
    assert gap_rows(3, 100) == [0, 1, 2]
    assert gap_rows(1, 100) == gap_rows(400, 1) == gap_rows(400, 0) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--teacher_groups", 1], "--teacher_groups was given 1; expected 2 or more, or 0"),
        (["--teacher_groups", -2], "--teacher_groups was given -2"),
        (["--teacher_resolution", 0], "--teacher_resolution was given 0"),
        (["--teacher_resolution", 65], "resolution 65 is not a multiple of 32"),
        (["--teacher", "{house}/none"], "could not be loaded"),
        (["--teacher", "{house}/silent"], "no single token for 'Yes'"),
    ],
)
def test_mistakes_about_a_teacher_are_one_sentence(capsys, house, monkeypatch, more, words):
    monkeypatch.setattr("fieldmark.evaluation.multimodal.encode_items", None)  # before the student is measured
    given = [str(part).format(house=house) for part in more]
    teacher = [] if "--teacher" in given else ["--teacher", house / "teacher"]
    assert words in fails(capsys, command(house, *teacher, *given))


@pytest.mark.parametrize(
    ("more", "data", "words"),
    [
        (["--category", "no"], "titled", "the category 'no' was asked for, which no photo has"),
        (["--downstream"], "titled", "--downstream was given, but no photo has an attribute 'category'"),
        (["--enrich", "query", "--generator", "{house}/none"], "titled", "could not be loaded"),
        (["--enrich", "query", "--generator", "{house}/silent"], "untitled", "photos have no title for attributes"),
        (["--enrich", "query", "--generator", "{house}/silent", "--schema", "no.yaml"], "titled", "cannot read the"),
        (["--enrich", "query", "--attributes", "no.parquet"], "titled", "no.parquet does not exist"),
        ([], "long", "this student reads"),
    ],
)
def test_other_mistakes_are_found_before_a_teacher_is_asked(capsys, house, monkeypatch, more, data, words):
    rows = (house / "titled.csv").read_text(encoding="utf-8")
    (house / "long.csv").write_text(rows.replace("item 3", "item 3" + " long" * 5000), encoding="utf-8")
    monkeypatch.setattr("fieldmark.commands.evaluate.ask_teacher", None)
    monkeypatch.setattr("fieldmark.evaluation.student.evaluate_student", None)
    given = [str(part).format(house=house) for part in more]
    assert words in fails(capsys, command(house, "--teacher", house / "teacher", *given, data=data))


def test_the_student_is_measured_before_the_teacher_is_asked(capsys, house, monkeypatch):
    def measured(*args, **kwargs):
        raise FieldmarkError("the student is measured")

    monkeypatch.setattr("fieldmark.commands.evaluate.ask_teacher", None)
    monkeypatch.setattr("fieldmark.evaluation.multimodal.evaluate_multimodal", measured)
    assert cli.main(command(house, "--teacher", house / "teacher")) == 2
    assert "the student is measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("teacher_groups", 3), ("teacher_dtype", "bfloat16"), ("teacher_resolution", 64)]
)
def test_what_a_teacher_is_told_needs_one(capsys, house, flag, value):
    told = fails(capsys, command(house, f"--{flag}", value))
    assert f"--{flag} was given without --teacher; add it, or leave it out." in told


def test_captions_that_cannot_be_asked_about_are_refused_first(capsys, house, monkeypatch):
    lines = [json.loads(line) for line in (house / "groups.jsonl").read_text(encoding="utf-8").splitlines()]
    write_groups(house / "long.jsonl", [*lines[:4], lines[4] | {"caption_1": "x" * 5000}])
    write_groups(house / "together.jsonl", [lines[0], lines[1] | {"caption_0": "x" * 2500}])
    monkeypatch.setattr("fieldmark.methods.teacher_groups.label_alignment", None)
    asking = ("--teacher", house / "teacher")
    assert "this student reads" in fails(capsys, command(house, *asking, groups="long"))
    assert "shorten the text" in fails(capsys, command(house, *asking, model="photos", groups="long"))
    assert "shorten them" in fails(capsys, command(house, *asking, groups="together"))


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [("both", "untitled", "untitled.csv has no titles"), ("photos", "titled", "photos takes no texts")],
)
def test_groups_without_texts_are_refused(capsys, house, model, data, words):
    told = fails(capsys, command(house, model=model, data=data))
    assert "--groups was given, but" in told
    assert words in told


def test_a_teacher_without_groups_is_refused(capsys, house):
    argv = ["evaluate", str(house / "both"), "--data", str(house / "titled.csv"), "--teacher", str(house / "teacher")]
    assert "give groups by --groups FILE, or leave it out" in fails(capsys, argv)


@pytest.mark.parametrize("split", ["train", "test"])
def test_groups_of_the_aviary_are_of_the_split_that_is_measured(capsys, house, monkeypatch, split):
    seen: list[str] = []
    monkeypatch.setattr(groups_module, "GROUPS", 4)
    full = groups_module.find_groups

    def finding(*args, **kwargs):
        found = full(*args, **kwargs)
        seen.extend(uri for group in found for uri in group.images)
        return found

    monkeypatch.setattr(groups_module, "find_groups", finding)
    argv = ["evaluate", str(house / "both"), "--data", "aviary:2", "--split", split, "--clustering", "false"]
    assert evaluated(capsys, argv)["n_groups"] == 4
    assert len(seen) == 8
    assert {species_of_uri(uri) for uri in seen} <= set(species(split))
