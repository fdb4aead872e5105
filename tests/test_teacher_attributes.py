"""The attribute generator: the parser, the schema, questions about one photo each, the labels and their file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark import cli
from fieldmark.errors import FieldmarkError
from fieldmark.teacher import attribute_labels
from fieldmark.teacher import cache as cache_module
from fieldmark.teacher.attribute_labels import (
    ask_about_item,
    attribute_cache,
    attributes_of,
    known_attributes,
    label_attributes,
    read_attributes,
    without,
)
from fieldmark.teacher.attributes import (
    MAX_ANSWER_CHARACTERS,
    AttributeSchema,
    attribute_answer,
    load_schema,
    parse_attributes,
    validity,
)
from fieldmark.teacher.cache import photo_hash
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import (
    Answer,
    PhotoQuestions,
    ask_about_photos,
    chat_text,
    square_photo,
    square_processor,
    square_side,
)
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher
from test_teacher_align import photo

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = '<think>its bill</think><answer>{"bill": "red", "legs": 2}</answer>'
BLOCKS = "not one <think> block and one <answer> block behind it"
NO_JSON = "the <answer> block is not JSON"
NO_OBJECT = "the JSON is no object with a name and a value"
BAD_VALUE = "a name or value is blank, nested, or no text, number or list of these"


def answer_of(body: str) -> str:
    return f"<think>t</think><answer>{body}</answer>"


# The parser


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"bill": "red"}', {"bill": "red"}),
        (' {\n"bill" : " deep  red\\n" } ', {"bill": "deep red"}),
        ('{"size": 40, "weight": 1.50, "change": -2e3}', {"size": "40", "weight": "1.50", "change": "-2e3"}),
        ('{"for": ["cats", "dogs", 3]}', {"for": ["cats", "dogs", "3"]}),
        ('```json\n{"bill": "red"}\n```', {"bill": "red"}),
        ('```\n{"bill": "red"}```', {"bill": "red"}),
        ('{"a": "1", "b": "2", "a": "3"}', {"a": "3", "b": "2"}),
        ('{"größe": "ひ \\u00fc"}', {"größe": "ひ ü"}),
        ('{"code": "{[<"}', {"code": "{[<"}),
        ('{"n": ' + "9" * 9000 + "}", {"n": "9" * 9000}),
    ],
)
def test_good_answers(body, expected):
    found = parse_attributes(answer_of(body))
    assert (found.attributes, found.reason, found.think) == (expected, None, "t")


def test_text_around_the_blocks_is_ignored():
    found = parse_attributes(f"Let me see.\n{GOOD}\nI hope it helps.".replace("</think>", "\n</think>\nso: "))
    assert found.attributes == {"bill": "red", "legs": "2"}
    assert found.think == "its bill"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", BLOCKS),
        ('{"bill": "red"}', BLOCKS),
        ('<answer>{"bill": "red"}</answer>', BLOCKS),
        ('<answer>{"bill": "red"}</answer><think>t</think>', BLOCKS),
        ('<think><answer>{"bill": "red"}</answer></think>', BLOCKS),
        ('</think><think><answer>{"bill": "red"}</answer>', BLOCKS),
        (GOOD + GOOD, BLOCKS),
        ("<think>a</think>" + GOOD, BLOCKS),
        (GOOD[:-1], BLOCKS),
        (GOOD.replace("its", "<answer>"), BLOCKS),
        (GOOD.replace("<think>", "<Think>"), BLOCKS),
        (answer_of(""), NO_JSON),
        (answer_of("bill: red"), NO_JSON),
        (answer_of('{"bill": "red"'), NO_JSON),
        (answer_of('{"bill": "red"} {"legs": "two"}'), NO_JSON),
        (answer_of('{"bill": NaN}'), NO_JSON),
        (answer_of('{"bill": -Infinity}'), NO_JSON),
        (answer_of("{}"), NO_OBJECT),
        (answer_of('["bill", "red"]'), NO_OBJECT),
        (answer_of('"red"'), NO_OBJECT),
        (answer_of("null"), NO_OBJECT),
        (answer_of('{"bill": {"colour": "red"}}'), BAD_VALUE),
        (answer_of('{"bill": [["red"]]}'), BAD_VALUE),
        (answer_of('{"bill": []}'), BAD_VALUE),
        (answer_of('{"bill": ["red", " "]}'), BAD_VALUE),
        (answer_of('{"bill": null}'), BAD_VALUE),
        (answer_of('{"bill": true}'), BAD_VALUE),
        (answer_of('{"bill": "  "}'), BAD_VALUE),
        (answer_of('{" ": "red"}'), BAD_VALUE),
        (answer_of('{"bill": "\\ud800"}'), BAD_VALUE),
        (None, f"not a text of at most {MAX_ANSWER_CHARACTERS} characters"),
        (b"<think>", f"not a text of at most {MAX_ANSWER_CHARACTERS} characters"),
        ("a" * (MAX_ANSWER_CHARACTERS + 1), f"not a text of at most {MAX_ANSWER_CHARACTERS} characters"),
    ],
)
def test_bad_answers(text, reason):
    found = parse_attributes(text)
    assert found.attributes is None
    assert found.reason == reason
    assert not validity(text, True)


def test_an_answer_that_was_cut_off_is_not_valid():
    found = parse_attributes(GOOD, finished=False)
    assert (found.attributes, found.reason, found.think) == (None, "cut off before its end", "its bill")
    assert validity(GOOD, True)
    assert not validity(GOOD, False)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 99_000,
        '{"a":' * 19_000,
        "{" * 99_000,
        '"' * 99_000,
        '{"a": "' + "\\" * 90_000,
        "<think" * 16_000,
        " " * 99_000,
    ],
)
def test_hostile_answers_are_refused_in_little_time(body):
    for text in (answer_of(body)[:MAX_ANSWER_CHARACTERS], answer_of(body[: -len(answer_of(""))]), body):
        started = time.perf_counter()
        assert parse_attributes(text).attributes is None
        assert time.perf_counter() - started < 1.0  # a quadratic parser takes minutes


SCHEMA = AttributeSchema("What of {title}?", "it", ("bill", "legs", "tail"), 2)


@pytest.mark.parametrize(
    ("body", "expected", "reason"),
    [
        ('{"legs": "2", "bill": "red"}', {"legs": "2", "bill": "red"}, None),
        ('{"legs": "2", "mood": "glad"}', {"legs": "2"}, None),
        ('{"mood": "glad", "tail": "a", "legs": "2", "bill": "red"}', {"tail": "a", "legs": "2"}, None),
        ('{"mood": "glad", "Bill": "red"}', None, "no attribute of the schema"),
    ],
)
def test_names_outside_the_schema_are_dropped(body, expected, reason):
    found = parse_attributes(answer_of(body), schema=SCHEMA)
    assert (found.attributes, found.reason) == (expected, reason)
    assert validity(answer_of(body), True, SCHEMA) == (expected is not None)


def test_ideal_answers_are_valid():
    attributes = {"bill_colour": "red", "size": 'the "big" one', "for": "ひ"}
    found = parse_attributes(attribute_answer(["bill_colour", "size"], attributes), schema=load_schema())
    assert found.attributes == attributes
    assert found.think == "bill_colour, size"
    assert parse_attributes(attribute_answer([], attributes)).think == "nothing"


# The schema


def test_the_packaged_schema_and_ones_own(tmp_path):
    packaged = load_schema()
    assert packaged.ask("a red bird") == packaged.prompt.replace("{title}", "a red bird")
    assert packaged.ask(None) == packaged.ask("") == packaged.ask(packaged.untitled)
    assert packaged.ask("{title}") == packaged.prompt
    path = tmp_path / "own.yaml"
    path.write_text("{prompt: 'What of {title}?', untitled: it, attributes: [bill, legs, tail], most: 2}", "utf-8")
    assert load_schema(path) == SCHEMA


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read the attribute schema"),
        ("a: [", "cannot read the attribute schema"),
        ("", "has the fields NoneType"),
        ("[1, 2]", "has the fields list"),
        ("{prompt: '{title}', untitled: it, most: 2}", "expected prompt, untitled, attributes, most"),
        ("{prompt: '{title}', untitled: it, attributes: null, most: 2, top: 1}", "has the fields prompt"),
        ("{prompt: What, untitled: it, attributes: null, most: 2}", "has no {title}"),
        ("{prompt: 3, untitled: it, attributes: null, most: 2}", "has no {title}"),
        ("{prompt: '{title}', untitled: '', attributes: null, most: 2}", "untitled is ''"),
        ("{prompt: '{title}', untitled: it, attributes: [], most: 2}", "attributes are []"),
        ("{prompt: '{title}', untitled: it, attributes: bill, most: 2}", "attributes are 'bill'"),
        ("{prompt: '{title}', untitled: it, attributes: [bill, 3], most: 2}", "attributes are ['bill', 3]"),
        ("{prompt: '{title}', untitled: it, attributes: null, most: 0}", "most is 0"),
        ("{prompt: '{title}', untitled: it, attributes: null, most: yes}", "most is True"),
    ],
)
def test_mistakes_in_a_schema_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(FieldmarkError) as error:
        load_schema(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# Questions about one photo each

TITLES = ["a red bird", "Zinc, 5 pieces", "", "éàü ひ", "a bed rird", "a much longer title with an end"]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava"])
def any_teacher(request, tmp_path_factory) -> Teacher:
    return Teacher.load(make_tiny_teacher(request.param, tmp_path_factory.mktemp(request.param)))


def test_questions_in_batches_are_those_of_the_public_path_one_by_one(any_teacher):
    """Prompt tokens and pixels as the processor makes them, answers as the model's own `generate` gives them."""
    teacher, photos = any_teacher, [photo(i).resize((300, 180)) for i in range(len(TITLES))]
    sizes, answers = [], {}
    for batch in ask_about_photos(teacher, photos, TITLES, max_new_tokens=8, batch_size=4):
        sizes.append(len(batch))
        answers.update(batch)
    assert max(sizes) == 3  # three titles have ten bytes
    assert sorted(answers) == list(range(len(TITLES)))
    processor, side = square_processor(teacher), square_side(teacher)
    for i, title in enumerate(TITLES):
        inputs = processor(
            images=[square_photo(photos[i], side)], text=[chat_text(processor, title)], return_tensors="pt"
        )
        visual = teacher.visual_tokens([photos[i]])
        asked = PhotoQuestions(teacher, visual.tokens.shape[1])
        assert torch.equal(asked.prompt([asked.tail(title)]).input_ids, inputs["input_ids"])
        assert torch.equal(teacher._image_inputs([photos[i]], None)["pixel_values"], inputs["pixel_values"])
        if teacher.uses_mrope:
            teacher.model.model.rope_deltas = None
        said = teacher.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[i].text == teacher.tokenizer.decode(said, skip_special_tokens=True)
        assert answers[i].tokens == len(said)
        assert answers[i].finished == (int(said[-1]) in teacher.eos_token_ids)


def test_questions_that_cannot_be_asked(any_teacher):
    context = any_teacher.language_model.config.max_position_embeddings
    picture = any_teacher.tokenizer.convert_ids_to_tokens(any_teacher.image_token_id)
    for titles, words in (
        (["a", "b" * context], f"more than the {context} tokens this teacher reads"),
        (["a", f"one {picture} more"], "the teacher's own token for photos"),
    ):
        with pytest.raises(FieldmarkError, match=words):
            list(ask_about_photos(any_teacher, [photo(0), photo(1)], titles, max_new_tokens=4))
    with pytest.raises(FieldmarkError, match="an answer of"):
        list(ask_about_photos(any_teacher, [photo(0)], ["a"], max_new_tokens=context))


# The labels

QUESTION = AttributeSchema("Mark of {title}?", "it", None, 3)
ITEMS = [(0, "long title"), (1, None), (2, "b"), (0, "other"), (2, "b"), (3, "no answer")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return Teacher.load(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    place = tmp_path_factory.mktemp("photos")
    paths = [str(place / f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        photo(number).resize((64, 64)).save(path)
    return paths


@pytest.fixture
def talker(monkeypatch) -> list[int]:
    """Answers that say which item was asked about; none about "no answer". The list grows by each batch's size."""
    calls: list[int] = []

    def speak(teacher, photos, questions, *, batch_size=16, **settings):
        for start in range(0, len(photos), batch_size):
            batch = range(start, min(start + batch_size, len(photos)))
            calls.append(len(batch))
            yield [(i, answer(photos[i], questions[i])) for i in batch]

    monkeypatch.setattr(attribute_labels, "ask_about_photos", speak)
    return calls


def answer(path: str, question: str) -> Answer:
    if "no answer" in question:
        return Answer("I cannot tell", 4, True)
    said = {"photo": Path(path).stem, "title": question.removeprefix("Mark of ").removesuffix("?")}
    return Answer(attribute_answer(["photo"], said), 9, True)


def label(teacher, path, photos, items=ITEMS, *, schema=QUESTION, temperature=0.0, seed=0, length=4, **settings):
    with attribute_cache(
        path, teacher, schema, temperature=temperature, max_new_tokens=length, seed=seed, resolution=64
    ) as cache:
        return label_attributes(
            teacher, [photos[i] for i, _ in items], [t for _, t in items], cache, schema, **settings
        )


def test_labels_belong_to_their_items_and_bad_answers_are_counted(teacher, photos, tmp_path, talker):
    path = tmp_path / "f.parquet"
    labels = label(teacher, path, photos, batch_size=2)
    assert talker == [2, 2, 1]  # the item given twice is asked about once
    expected = [{"photo": str(i), "title": title or "it"} for i, title in ITEMS[:-1]]
    assert labels.of == [*expected, None]
    assert (labels.answers, dict(labels.invalid)) == (5, {BLOCKS: 1})
    rows = pq.read_table(path).to_pylist()
    assert list(rows[0]) == ["key", "photo", "title", "answer", "think", "attributes", "valid", "reason", "n_tokens"]
    assert [row["valid"] for row in rows] == [True] * 4 + [False]
    assert (rows[0]["think"], json.loads(rows[0]["attributes"]), rows[0]["n_tokens"]) == ("photo", expected[0], 9)
    assert (rows[4]["attributes"], rows[4]["reason"], rows[4]["answer"]) == (None, BLOCKS, "I cannot tell")
    hashes = [photo_hash(path) for path in photos]
    assert read_attributes(path) == {
        (hashes[i], title): own for (i, title), own in zip(ITEMS[:-1], expected, strict=True)
    }
    assert labels.asked == 5
    assert labels.seconds_per_item == labels.seconds / 5 > 0
    talker.clear()
    known = label(teacher, path, photos, batch_size=3)
    assert known == labels
    assert (known.asked, known.seconds_per_item) == (0, None)
    assert not talker


def test_one_item_is_asked_about_as_many_are(teacher, photos, talker):
    for i, title in ITEMS:
        found = ask_about_item(teacher, photos[i], title, QUESTION, max_new_tokens=4)
        if title == "no answer":
            assert (found.attributes, found.reason) == (None, BLOCKS)
        else:
            assert found.attributes == {"photo": str(i), "title": title or "it"}


def test_a_killed_job_goes_on(teacher, photos, tmp_path, talker, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_A_PART", 1)
    path = tmp_path / "f.parquet"

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(teacher, path, photos, batch_size=1, progress=stop)
    with pytest.raises(FieldmarkError, match="are unfinished; run the command"):
        read_attributes(path)
    talker.clear()
    resumed = label(teacher, path, photos, batch_size=1)
    assert talker == [1, 1, 1]
    assert resumed == label(teacher, tmp_path / "whole.parquet", photos)
    assert read_attributes(path) == read_attributes(tmp_path / "whole.parquet")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_depend_on_item_and_seed_alone(teacher, photos, tmp_path, temperature):
    """A random teacher never answers rightly: its answers are kept all the same, those of any batch and order."""

    def answers(name: str, items=ITEMS, **settings) -> dict[tuple[str, str | None], str]:
        with pytest.raises(FieldmarkError, match="none of the first 5 answers holds attributes"):
            label(teacher, tmp_path / name, photos, items, temperature=temperature, **settings)
        files = (tmp_path / f"{name}.parts").glob("*.parquet")
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert {row["reason"] for row in rows} == {"cut off before its end"}
        return {(row["photo"], row["title"]): row["answer"] for row in rows}

    together = answers("together.parquet")
    assert len(set(together.values())) > 1
    assert answers("alone.parquet", ITEMS[::-1], batch_size=1) == together
    assert (answers("other.parquet", seed=1) == together) == (temperature == 0)


def test_a_generator_that_never_answers_rightly_is_stopped(teacher, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(attribute_labels, "PATIENCE", 4)
    asked: list[int] = []
    items = [(i % 4, title) for i, title in enumerate("abcdef")]
    with pytest.raises(FieldmarkError, match=r"none of the first 4 answers holds attributes.*train generator"):
        label(teacher, tmp_path / "f.parquet", photos, items, batch_size=2, progress=asked.append)
    assert asked == [0, 2, 4]


def test_a_late_first_valid_answer_is_waited_for(teacher, photos, tmp_path, talker, monkeypatch):
    monkeypatch.setattr(attribute_labels, "PATIENCE", 3)
    items = [(0, "no answer"), (1, "no answer"), (2, "b"), (3, "no answer")]
    assert label(teacher, tmp_path / "f.parquet", photos, items, batch_size=1).invalid.total() == 3


def test_other_settings_and_no_items_are_refused(teacher, photos, tmp_path, talker):
    path = tmp_path / "f.parquet"
    label(teacher, path, photos)
    for changes, words in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"length": 5}, "max_new_tokens was 4, is 5"),
        ({"temperature": 0.5}, "temperature was 0.0, is 0.5"),
        ({"schema": SCHEMA}, "schema was"),
    ):
        with pytest.raises(FieldmarkError, match=words):
            label(teacher, path, photos, **changes)
    with pytest.raises(FieldmarkError, match="no item was given"):
        label(teacher, tmp_path / "g.parquet", photos, [])


def test_attributes_of_a_catalogues_rows(teacher, photos, tmp_path, talker):
    path = tmp_path / "f.parquet"
    label(teacher, path, photos)
    rows = Dataset.from_dict(
        {"image": [photos[i] for i in (3, 1, 1, 0)], "title": ["no answer", None, "never asked", "other"]}
    )
    found = attributes_of(rows, path)
    assert found == [None, {"photo": "1", "title": "it"}, None, {"photo": "0", "title": "other"}]
    with pytest.raises(FieldmarkError, match="has attributes of none of the 1 items; give the file"):
        attributes_of(rows.select([2]), path)
    assert known_attributes(rows, str(path)) == found
    with pytest.raises(FieldmarkError, match="does not exist"):
        attributes_of(rows, tmp_path / "missing.parquet")
    table = pq.read_table(path).replace_schema_metadata({"fieldmark": json.dumps({"answers": "captions"})})
    pq.write_table(table, tmp_path / "captions.parquet")
    with pytest.raises(FieldmarkError, match="holds captions, expected attributes"):
        read_attributes(tmp_path / "captions.parquet")


def test_a_catalogues_own_attributes():
    rows = Dataset.from_dict({"attributes": [{"bill": "red", "legs": None}, None, {"bill": None, "legs": None}]})
    assert known_attributes(rows, "catalogue") == [{"bill": "red"}, None, None]
    with pytest.raises(FieldmarkError, match="none of the 2 items has attributes of its own; add a column"):
        known_attributes(rows.select([1, 2]), "catalogue")
    assert without([{"bill": "red", "legs": "long"}, {"legs": "long"}, None], "legs") == [{"bill": "red"}, None, None]


def write_table(place: Path, photos: list[str]) -> Path:
    rows = [f"{row},{photos[i]},{i},{title or ''},train" for row, (i, title) in enumerate(ITEMS)]
    (place / "table.csv").write_text("\n".join(["item_id,image,label,title,split", *rows]) + "\n", "utf-8")
    return place / "table.csv"


def test_label_attributes_and_its_second_run(folder, photos, tmp_path, talker, capsys, monkeypatch):
    out, schema = tmp_path / "f.parquet", tmp_path / "schema.yaml"
    schema.write_text("{prompt: 'Mark of {title}?', untitled: it, attributes: null, most: 3}", "utf-8")
    command = ["label", "attributes", "--teacher", str(folder), "--data", str(write_table(tmp_path, photos))]
    command += ["--out", str(out), "--schema", str(schema)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "4 photos, 5 answers, 5 of them asked now" in printed
    assert f"1 answers are not valid: {BLOCKS}" in printed
    assert "4 items have attributes, 2.0 each on average" in printed
    assert len(read_attributes(out)) == 4
    talker.clear()
    monkeypatch.setattr(attribute_labels, "time", SimpleNamespace(monotonic=lambda: 0.0))  # too fast to be measured
    assert cli.main(command) == 0
    assert not talker
    assert "all known before, nothing was asked" in capsys.readouterr().out


def test_mistakes_are_one_sentence(folder, photos, tmp_path, capsys):
    command = ["label", "attributes", "--teacher", str(folder), "--data", str(write_table(tmp_path, photos))]
    command += ["--out", str(tmp_path / "f.parquet")]
    for flag, value, words in (
        ("--batch_size", "0", "--batch_size was given 0; expected 1 or more"),
        ("--max_new_tokens", "0", "--max_new_tokens was given 0; expected 1 or more"),
        ("--temperature", "-1", "--temperature was given -1.0; expected 0 or more"),
        ("--seed", "-1", "--seed was given -1; expected 0 or more"),
        ("--schema", str(tmp_path / "none.yaml"), "cannot read the attribute schema"),
        ("--resolution", "30", "resolution 30 is not a multiple of 32"),
        ("--split", "test", "no row of split 'test'"),
    ):
        assert words in fails(capsys, [*command, flag, value])
    assert cli.main([*command, "--max_new_tokens", "8"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # behind the progress
    assert "none of the first 5 answers holds attributes (5 of them: cut off before its end" in last
