"""`fieldmark evaluate --enrich`: photos with titles without attributes and with them, and what a generator costs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from fieldmark import cli
from fieldmark.commands.enriching import TOO_LONG
from fieldmark.data.catalog import load_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.enriched import evaluate_enriched
from fieldmark.students.build import build_student, load_student
from fieldmark.students.multimodal import build_multimodal_student
from fieldmark.teacher import attribute_labels
from fieldmark.teacher.attributes import attribute_answer
from fieldmark.teacher.questions import Answer
from helpers_cli import draw, fails, table_rows
from helpers_export import make_dual_encoder
from helpers_tiny import make_tiny_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS, SILENT = 12, 7
MARKS = ("red", "green", "blue")


def mark_of(number: int) -> dict[str, str]:
    return {"mark": MARKS[number % 3]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Iterator[Path]:
    """12 photos of 4 products in two categories as several tables; students; a generator."""
    root = tmp_path_factory.mktemp("shop")
    rows = []
    for number in range(ITEMS):
        draw(number).save(root / f"{number}.png")
        row = {"image": f"{number}.png", "label": f"p{number % 4}", "title": f"item {number:02d}", "split": "test"}
        role = "query" if number < 4 else "gallery"
        rows.append(row | {"role": role, "attr_category": f"c{number % 2}", "attr_mark": MARKS[number % 3]})
    tables = {
        "roles": rows,
        "shop": [row | {"role": "both"} for row in rows],
        "single": [row | {"role": "both", "label": str(number)} for number, row in enumerate(rows)],
        "lonely": [row | {"label": str(number), "attr_category": ""} for number, row in enumerate(rows)],
        "untitled": [row | {"title": row["title"] * (number > 1)} for number, row in enumerate(rows)],
        "silent": [row | {"title": ""} for row in rows],
        "other": [row | {"title": f"another {row['title']}"} for row in rows],
        "coarse": [row | {"attr_mark": ""} for row in rows],
        "long": [row | {"title": row["title"] + " x" * 5000 * (number == 5)} for number, row in enumerate(rows)],
        "bare": [{name: row[name] for name in ("image", "label", "title", "split")} for row in rows],
    }
    for name, lines in tables.items():
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(lines[0]))
            table.writeheader()
            table.writerows(lines)
    teacher = make_tiny_teacher("qwen3_vl", root / "generator")
    student = build_multimodal_student(teacher, resolution=64, lora_rank=0)
    student.save_pretrained(str(root / "both"), create_model_card=False)
    build_student(teacher, resolution=64).save_pretrained(str(root / "photos"), create_model_card=False)
    yield root
    transformers.utils.logging.set_verbosity_warning()  # commands quieten the libraries for the whole process


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """A generator that names the mark of each item, says nothing of one, and remembers whom it was asked about."""
    numbers: list[int] = []

    def speak(teacher, photos, questions, **settings):
        for place, photo in enumerate(photos):
            number = int(Path(photo).stem)
            numbers.append(number)
            text = "I cannot tell" if number == SILENT else attribute_answer(["mark"], mark_of(number))
            yield [(place, Answer(text, 9, True))]

    monkeypatch.setattr(attribute_labels, "ask_about_photos", speak)
    return numbers


def command(shop: Path, *more: str, model: str = "both", data: str = "shop") -> list[str]:
    return ["evaluate", str(shop / model), "--data", str(shop / f"{data}.csv"), "--clustering", "false", *more]


def evaluated(capsys, argv: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected_of(shop: Path, data: str, attributes: list, enrich: str) -> Any:
    rows = load_catalog(str(shop / f"{data}.csv"))
    return evaluate_enriched(load_student(shop / "both"), rows, attributes, enrich=enrich)


def check_equal(found: dict[str, Any], expected: Any) -> None:
    """All that `evaluate_enriched` says of products, but for clusters, which were left out."""
    names = [name for name in expected.metrics if "instance_" in name or "coarse_" in name]
    assert len([name for name in names if name.startswith("enriched_")]) == 12
    for name in names:
        assert found[name] == pytest.approx(expected.metrics[name], abs=1e-6), name
        if name != "n_coarse_queries":
            assert found["intervals"][name] == pytest.approx(expected.intervals[name], abs=1e-6), name


@pytest.mark.parametrize("enrich", ["query", "both"])
@pytest.mark.parametrize("data", ["shop", "roles"])
def test_metrics_are_those_of_training_on_the_same_attributes(capsys, shop, enrich, data):
    found = evaluated(capsys, command(shop, "--enrich", enrich, "--attributes", "catalogue", data=data))
    attributes = list(load_catalog(str(shop / f"{data}.csv"))["attributes"])
    assert attributes[4] == {"category": "c0", "mark": "green"}
    said = [
        {name: own[name] for name in own if name != "category"} for own in attributes
    ]  # what is counted is not told
    check_equal(found, expected_of(shop, data, said, enrich))
    assert found["enriched_recall@1"] == pytest.approx(found["enriched_instance_recall@1"])
    assert {"enriched_map@r", "enriched_recall@8"} <= found["intervals"].keys()
    assert any(found[name] != found[f"enriched_{name}"] for name in ("map@r", "mrr", "instance_ndcg@10"))
    assert (found["query"], found["enrich"], found["seconds_per_query"]) == ("image+text", enrich, None)
    assert not {"n_answers", "invalid_answers"} & found.keys()
    plain = evaluated(capsys, command(shop, "--query", "image+text", data=data))
    assert {name: found[name] for name in plain if name != "intervals"} == {
        name: value for name, value in plain.items() if name != "intervals"
    }
    assert plain["intervals"].items() <= found["intervals"].items()


@pytest.mark.parametrize(
    ("data", "enrich", "about"),
    [("roles", "query", range(4)), ("roles", "both", range(ITEMS)), ("shop", "query", range(ITEMS))],
)
def test_a_generator_is_asked_about_what_needs_attributes(capsys, shop, asked, data, enrich, about):
    argv = command(shop, "--enrich", enrich, "--generator", str(shop / "generator"), data=data)
    found = evaluated(capsys, argv)
    assert sorted(asked) == list(about)
    attributes = [mark_of(number) if number in about and number != SILENT else None for number in range(ITEMS)]
    check_equal(found, expected_of(shop, data, attributes, enrich))
    assert found["seconds_per_query"] > 0
    assert found["n_answers"] == len(about)
    assert sum(found["invalid_answers"].values()) == (SILENT in about)


def test_a_file_gives_what_its_generator_gives_and_nothing_is_asked(capsys, shop, asked, tmp_path):
    file, generator = tmp_path / "attributes.parquet", str(shop / "generator")
    data = ["--data", str(shop / "shop.csv"), "--split", "test"]
    assert cli.main(["label", "attributes", "--teacher", generator, *data, "--out", str(file)]) == 0
    told = evaluated(capsys, command(shop, "--enrich", "both", "--generator", generator))
    asked.clear()
    read = evaluated(capsys, command(shop, "--enrich", "both", "--attributes", str(file)))
    assert not asked
    assert {name: told[name] for name in read if name != "seconds_per_query"} == {
        name: value for name, value in read.items() if name != "seconds_per_query"
    }
    refusal = fails(capsys, command(shop, "--enrich", "query", "--attributes", str(file), data="other"))
    assert "has attributes of none of the 4 items; give the file" in refusal


def test_the_gain_stands_beside_the_cost(capsys, shop, asked):
    generator = str(shop / "generator")
    argv = command(shop, "--enrich", "query", "--generator", generator, data="roles")
    found = evaluated(capsys, argv)
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    plain, enriched = found["instance_recall@1"], found["enriched_instance_recall@1"]
    assert plain != enriched
    gains = [f"{plain:.3f}", f"{enriched:.3f}", f"{enriched - plain:+.3f}"]
    assert [row[1:4] for row in table_rows(out) if len(row) == 5 and row[3][:1] in "+-"] == [gains]
    assert cli.main(command(shop, "--enrich", "query", "--generator", generator)) == 0
    out = capsys.readouterr().out
    assert "queries with attributes, instance recall@1" in out
    assert f"1 of {ITEMS} answers are not valid: not one <think> block" in out
    columns = ("without", "with", "gain", "seconds a query")
    assert all(column in out for column in columns)
    assert cli.main(command(shop, "--enrich", "query", "--attributes", "catalogue", data="single")) == 0
    out = capsys.readouterr().out
    assert "queries with attributes, coarse map@1" in out
    assert "not measured here" in out
    assert "answers are not valid" not in out


def test_without_enrich_nothing_is_added(capsys, shop, monkeypatch):
    monkeypatch.setattr("fieldmark.commands.evaluate.AttributeSource", None)
    found = evaluated(capsys, command(shop))
    assert found["query"] == "image"
    assert not [name for name in found if name.startswith("enrich") or name.endswith(("_answers", "_query"))]


def test_mistakes_are_one_sentence(capsys, shop, tmp_path, asked, monkeypatch):
    for name in ("student.evaluate_student", "multimodal.evaluate_multimodal"):  # all is refused before
        monkeypatch.setattr(f"fieldmark.evaluation.{name}", None)
    make_dual_encoder("clip", shop).save_pretrained(str(shop / "dual"), create_model_card=False)
    query, own = ["--enrich", "query"], ["--attributes", "catalogue"]
    generator = ["--generator", str(shop / "generator")]
    given = "was given with {} of --generator and --attributes; give one of them."
    for more, where, words in [
        (query, {}, f"--enrich query {given.format('neither')}"),
        (["--enrich", "both", *own, *generator], {}, f"--enrich both {given.format('both')}"),
        (generator, {}, "--generator was given without --enrich; add --enrich query or both, or leave it out."),
        (own, {}, "--attributes was given without --enrich"),
        (["--enrich", "gallery"], {}, "--enrich was given 'gallery'; expected one of query, both, none"),
        ([*query, *own, "--query", "image"], {}, "--query image was given with --enrich, which joins titles"),
        ([*query, *generator, "--max_new_tokens", "0"], {}, "--max_new_tokens was given 0; expected 1 or more"),
        ([*query, *generator, "--generator_resolution", "0"], {}, "--generator_resolution was given 0"),
        ([*query, *own], {"model": "photos"}, "photos does not embed a photo together with a text; leave it out"),
        ([*query, *own], {"model": "dual"}, "dual does not embed a photo together with a text; leave it out"),
        ([*query, *own], {"data": "untitled"}, f"2 of {ITEMS} photos have no title for attributes to join; leave it"),
        ([*query, *own], {"data": "silent"}, f"{ITEMS} of {ITEMS} photos have no title for attributes to join"),
        ([*query, *generator], {"data": "untitled"}, f"2 of {ITEMS} photos have no title for attributes to join"),
        ([*query, *generator, "--category", "no"], {}, "the category 'no' was asked for, which no photo has"),
        (
            [*query, *generator, "--downstream"],
            {"data": "bare"},
            "--downstream was given, but no photo has an attribute",
        ),
        ([*query, *generator, "--downstream"], {}, "no row of split 'train'"),
        ([*query, *generator], {"data": "long"}, "tokens long with its prompt; this student reads"),
        ([*query, *own], {"data": "coarse"}, "attributes of its own beside its category 'category'; add a column"),
        ([*query, *own], {"data": "lonely"}, "--enrich was given for photos without another one of their label or"),
        ([*query, *own], {"data": "bare"}, f"none of the {ITEMS} items has attributes of its own; add a column"),
        ([*query, "--attributes", str(tmp_path / "no.parquet")], {}, "no.parquet does not exist; give a file of"),
        ([*query, "--generator", str(tmp_path)], {}, f"teacher '{tmp_path}' could not be loaded"),
        ([*query, *generator, "--schema", str(tmp_path / "no.yaml")], {}, "cannot read the attribute schema"),
    ]:
        assert words in fails(capsys, command(shop, *more, **where)), words
    assert not asked


def test_what_a_generator_is_told_needs_one(capsys, shop):
    for flag, value in [
        ("schema", "schema.yaml"),
        ("max_new_tokens", "8"),
        ("generator_dtype", "bfloat16"),
        ("generator_resolution", "64"),
    ]:
        for more in ([], ["--enrich", "query", "--attributes", "catalogue"]):
            told = fails(capsys, command(shop, *more, f"--{flag}", value))
            assert f"--{flag} was given without --generator; add it, or leave it out." in told


def test_nothing_is_asked_before_the_plain_student_is_measured(capsys, shop, asked, monkeypatch):
    def measured(*args, **kwargs):
        raise FieldmarkError("the student is measured")

    argv = command(shop, "--enrich", "query", "--generator", str(shop / "generator"))
    for name in ("student.evaluate_student", "multimodal.evaluate_multimodal"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fieldmark.evaluation.{name}", measured)
            assert cli.main(argv) == 2
            assert "the student is measured" in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize("source", ["generator", "file"])
def test_attributes_too_long_for_the_student_end_nothing(capsys, caplog, shop, monkeypatch, tmp_path, source):
    marks = [mark_of(number) if number != 3 else {"mark": "x" * 5000} for number in range(ITEMS)]

    def speak(teacher, photos, questions, **settings):
        for place, photo in enumerate(photos):
            yield [(place, Answer(attribute_answer(["mark"], marks[int(Path(photo).stem)]), 9, True))]

    monkeypatch.setattr(attribute_labels, "ask_about_photos", speak)
    generator, file = str(shop / "generator"), str(tmp_path / "attributes.parquet")
    given = ["--generator", generator]
    if source == "file":
        flags = ["--data", str(shop / "shop.csv"), "--split", "test", "--out", file]
        assert cli.main(["label", "attributes", "--teacher", generator, *flags]) == 0
        given = ["--attributes", file]
    found = evaluated(capsys, command(shop, "--enrich", "query", *given))
    check_equal(
        found, expected_of(shop, "shop", [None if number == 3 else marks[number] for number in range(ITEMS)], "query")
    )
    if source == "generator":
        assert (found["n_answers"], found["invalid_answers"]) == (ITEMS, {TOO_LONG: 1})
    else:
        assert f"1 of {ITEMS} photos are asked without attributes: {TOO_LONG}" in caplog.messages


def test_settings_other_than_those_of_the_generators_run_are_named(capsys, caplog, shop, asked, tmp_path):
    (tmp_path / "model").symlink_to(shop / "generator")
    generator = str(tmp_path / "model")
    argv = command(shop, "--enrich", "query", "--generator", generator)
    for config, told in [
        ("{resolution: 224, max_new_tokens: 512, schema: null}", None),
        ("{resolution: 64, max_new_tokens: 512}", "resolution 64 (here 224)"),
        (
            "{resolution: 64, max_new_tokens: 99, schema: s.yaml}",
            "resolution 64 (here 224), max_new_tokens 99 (here 512), schema s.yaml (here None)",
        ),
        ("[", None),
    ]:
        caplog.clear()
        (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
        evaluated(capsys, argv)
        lines = [line for line in caplog.messages if line.startswith("the generator")]
        assert lines == ([] if told is None else [f"the generator {generator} was trained with {told}"])


def test_a_generator_that_never_answers_rightly_is_one_sentence(capsys, shop):
    argv = command(shop, "--enrich", "query", "--generator", str(shop / "generator"), "--max_new_tokens", "2")
    assert cli.main([*argv, "--generator_resolution", "64"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "none of the first 12 answers holds attributes" in err.splitlines()[-1]
