"""The generator's cold start: its examples, what the trainer sees, what moves, resuming, and what is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import test_teacher_composed
from fieldmark import cli
from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.errors import FieldmarkError
from fieldmark.methods import generator
from fieldmark.methods.generator import (
    ExampleCollator,
    GeneratorConfig,
    answer_metrics,
    answers_of_the_catalogue,
    make_examples,
    with_chat,
)
from fieldmark.methods.quickstart import embedded_teacher
from fieldmark.teacher.attribute_labels import SCHEMA, attributes_of, items_of, read_attributes
from fieldmark.teacher.attributes import AttributeSchema, attribute_answer, load_schema, parse_attributes
from fieldmark.teacher.cache import AnswerCache, answer_key
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import Answer, PhotoQuestions
from fieldmark.teacher.speaking import answer_loss
from helpers_tiny import make_tiny_teacher
from helpers_training import killed_at, log_of

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (20, 180, 40), "grey": (120, 120, 120)}
composed = test_teacher_composed.composed  # its fixture
QUESTION = "{prompt: 'Mark of {title}?', untitled: it, attributes: null, most: 3}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny random teacher, a short question, and photos whose colour tells them apart; each third is held out."""
    folder = tmp_path_factory.mktemp("generator")
    make_tiny_teacher("qwen3_vl", folder / "teacher")
    (folder / "schema.yaml").write_text(QUESTION, "utf-8")
    rows = ["image,label,title,split,colour,size"]
    for name, colour in COLOURS.items():
        for k in range(3):
            shade = tuple(min(255, part + 5 * k) for part in colour)
            Image.new("RGB", (48, 48), shade).save(folder / f"{name}{k}.png")
            rows.append(f"{name}{k}.png,{name},thing {k},{'test' if k == 2 else 'train'},{name},big")
    (folder / "items.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


def config(place: Path, out: str, **changes) -> GeneratorConfig:
    settings = {
        "data": str(place / "items.csv"),
        "attribute_columns": ["colour", "size"],
        "teacher": str(place / "teacher"),
        "schema": str(place / "schema.yaml"),
        "out": str(place / out),
        "resolution": 64,
        "per_device_batch": 4,
        "eval_items": 2,
        "max_new_tokens": 3,
        "max_steps": 4,
        "learning_rate": 5e-3,
    }
    return GeneratorConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """A run long enough to answer rightly."""
    return generator.train(config(place, "trained", max_steps=60, max_new_tokens=80, eval_items=4))


# Examples


def test_examples_of_the_aviary_name_true_marks_that_the_title_holds_back():
    rows = select_split(load_catalog("aviary:1"), "train")
    schema = load_schema()
    answers = answers_of_the_catalogue(rows, schema, "aviary")
    lengths = []
    for answer, attributes, title in zip(answers, rows["attributes"], rows["title"], strict=True):
        found = parse_attributes(answer, schema=schema)
        assert found.think == ", ".join(found.attributes)
        assert found.attributes.items() <= attributes.items()
        words = title.replace(",", " ").lower().split()
        told = [words.count(v) >= list(attributes.values()).count(v) for v in found.attributes.values()]
        assert not any(told) or all(told)  # what is told only where nothing else tells
        lengths.append(len(found.attributes))
    assert 1 <= min(lengths) <= max(lengths) <= schema.most


def test_examples_keep_to_the_schema_and_leave_out_what_nothing_tells_apart(place):
    made = config(place, "unused")
    rows = select_split(load_catalog(made.data, attribute_columns=made.attribute_columns), "train")
    examples = make_examples(made, rows, AttributeSchema("Mark of {title}?", "it", ("colour",), 1))
    assert examples.column_names == ["image", "question", "answer"]
    assert examples["question"][:2] == ["Mark of thing 0?", "Mark of thing 1?"]
    assert examples["answer"][0] == attribute_answer(["colour"], {"colour": "red"})
    with pytest.raises(FieldmarkError, match="no attributes that tell its training items apart"):
        make_examples(made, rows, AttributeSchema("Mark of {title}?", "it", ("size",), 1))
    with pytest.raises(FieldmarkError, match="no attributes that tell its training items apart"):
        make_examples(made, select_split(load_catalog(made.data), "train"), load_schema())


def test_examples_of_a_larger_teacher(place, tmp_path):
    """Its valid answers, thoughts included, to their items; the file of another catalogue is refused."""
    made = config(place, "unused", examples=str(tmp_path / "answers.parquet"))
    rows = select_split(load_catalog(made.data), "train")
    items = items_of(rows)
    with AnswerCache(tmp_path / "answers.parquet", SCHEMA, {"answers": "attributes"}) as cache:
        for k, (photo, title) in enumerate(items[:3]):
            row = {"photo": photo, "title": title, "answer": "as it was said", "think": f"thought {k}", "n_tokens": 5}
            row |= {"attributes": json.dumps({"n": [str(k)]}), "valid": k != 1, "reason": None}
            cache.add([{"key": answer_key(photo, title), **row}])
    examples = make_examples(made, rows, load_schema())
    assert examples["image"][:] == [rows["image"][0], rows["image"][2]]
    found = [parse_attributes(answer) for answer in examples["answer"]]
    assert [(one.think, one.attributes) for one in found] == [("thought 0", {"n": ["0"]}), ("thought 2", {"n": ["2"]})]
    few = config(place, "unused", examples=str(tmp_path / "answers.parquet"), max_examples=1)
    assert len(make_examples(few, rows, load_schema())) == 1
    with pytest.raises(FieldmarkError, match="valid answers about none of the 4 training items"):
        make_examples(made, select_split(load_catalog(made.data), "test"), load_schema())
    with pytest.raises(FieldmarkError, match="does not exist"):
        make_examples(config(place, "unused", examples=str(tmp_path / "no.parquet")), rows, load_schema())


# What the trainer sees


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "llava"])
@torch.no_grad()
def test_the_trainer_sees_the_tokens_of_labelling_and_learns_the_answer_alone(kind, place, tmp_path):
    """Prompt tokens equal those of `label attributes`; the loss equals that of our own formula, item by item."""
    teacher = Teacher.load(make_tiny_teacher(kind, tmp_path / kind))
    made = config(place, "unused")
    rows = select_split(load_catalog(made.data, attribute_columns=made.attribute_columns), "train")
    rows = rows.add_column("long", ["x" * k for k in range(len(rows))]).remove_columns("title")
    rows = rows.rename_column("long", "title")  # questions of unlike length: padding must not matter
    schema = load_schema(made.schema)
    examples = make_examples(made, rows, schema)
    batch = ExampleCollator(teacher, 224)(list(with_chat(examples, teacher.processor)))
    loss = teacher.model(**batch).loss
    total, count = 0.0, 0
    for i, (photo, question, answer) in enumerate(
        zip(*(examples[name] for name in examples.column_names), strict=True)
    ):
        visual = teacher.visual_tokens([photo], 224 if teacher.uses_mrope else None)
        asked = PhotoQuestions(teacher, visual.tokens.shape[1])
        prompt = asked.prompt([asked.tail(question)])
        said = [*teacher.tokenizer(answer).input_ids, teacher.tokenizer.eos_token_id]
        seen = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert seen == prompt.input_ids[0].tolist() + said
        learned = batch["labels"][i][batch["labels"][i] >= 0].tolist()
        assert learned == said
        ids = torch.tensor([said])
        total += len(said) * float(
            answer_loss(teacher, _flat(prompt), visual, ids, torch.ones_like(ids, dtype=torch.bool))
        )
        count += len(said)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def _flat(prompt):
    """One photo's prompt as `answer_loss` takes it."""
    return type(prompt)(prompt.input_ids[0], prompt.position_ids, prompt.image_slots, prompt.next_position)


# Training


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_learns_and_the_tower_does_not_move(place, trained):
    log = log_of(trained)
    assert len(log) == 60
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert all({"seconds", "data_wait_share", "learning_rate", "grad_norm"} <= record.keys() for record in log)
    before, after = weights(place / "teacher"), weights(trained / "model")
    assert before.keys() == after.keys()
    for name, value in after.items():
        if "visual" in name:
            assert torch.equal(value, before[name]), f"{name} of the frozen tower has changed"
        else:
            assert not torch.equal(value, before[name]), f"{name} was meant to be trained and has not moved"
    assert any("visual" in name for name in after)


def test_the_run_folder_says_what_was_reached(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["method"], metrics["examples"]) == ("generator", 8)
    assert (metrics["before"]["valid"], metrics["before"]["n_items"]) == (0.0, 4)
    assert metrics["before"]["completion_length"] == 80.0
    assert metrics["after"]["valid"] == 1.0
    assert metrics["after"]["value_accuracy"] == 1.0  # four colours, in photos it has not seen
    assert metrics["after"]["completion_length"] < 80
    assert "max_steps: 60" in (trained / "config.yaml").read_text()
    assert not list((trained / "checkpoints").iterdir())


def test_the_generator_labels_a_catalogue(place, trained, tmp_path, capsys):
    out = tmp_path / "answers.parquet"
    command = ["label", "attributes", "--teacher", str(trained / "model"), "--data", str(place / "items.csv")]
    command += ["--out", str(out), "--schema", str(place / "schema.yaml"), "--split", "test", "--resolution", "64"]
    assert cli.main(command) == 0
    assert "4 photos, 4 answers, 4 of them asked now" in capsys.readouterr().out
    rows = select_split(load_catalog(str(place / "items.csv")), "test")
    assert attributes_of(rows, out) == [{"colour": label} for label in rows["label"]]
    assert len(read_attributes(out)) == 4


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_killed_run_resumes_to_the_same_losses_and_weights(place, lora_rank):
    """Bit by bit; with adapters only what they are put on has changed, and nothing of them is left."""
    names = [f"{name}{lora_rank}" for name in ("whole", "killed")]
    whole = generator.train(config(place, names[0], save_steps=2, lora_rank=lora_rank))
    with killed_at(generator.GeneratorTrainer, 3):
        generator.train(config(place, names[1], save_steps=2, lora_rank=lora_rank))
    with pytest.raises(FieldmarkError, match="not empty"):
        generator.train(config(place, names[1], save_steps=2, lora_rank=lora_rank))
    resumed = generator.train(config(place, names[1], save_steps=2, lora_rank=lora_rank, resume=True))
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert [[r[k] for k in keys] for r in log_of(resumed)] == [[r[k] for k in keys] for r in log_of(whole)]
    one, other, start = weights(whole / "model"), weights(resumed / "model"), weights(place / "teacher")
    assert one.keys() == start.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], start[name])}
    language = {name for name in one if "visual" not in name}
    adapted = {name for name in language if name.endswith("_proj.weight")}
    assert moved == (adapted if lora_rank else language)


def test_the_tower_moves_where_it_may(place):
    out = generator.train(config(place, "tower", max_steps=2, freeze_tower=False))
    one, start = weights(out / "model"), weights(place / "teacher")
    assert any("visual" in name and not torch.equal(one[name], start[name]) for name in one)


def test_the_batch_statistics_of_a_frozen_tower_do_not_move(place, composed):
    """Those of a convolutional tower would move in training mode, although no parameter does."""
    out = generator.train(config(place, "composed", teacher=str(composed), max_steps=2))
    one, start = weights(out / "model"), weights(composed)
    assert any("running_mean" in name for name in start)
    for name, value in one.items():
        frozen = "vision_tower" in name or "projector" in name
        assert torch.equal(value, start[name]) == frozen, name


def test_the_embedded_teacher_can_be_trained_in_bf16(tmp_path):
    out = generator.train(
        GeneratorConfig(
            data="aviary:1",
            teacher=str(embedded_teacher()),
            out=str(tmp_path / "run"),
            precision="bf16",
            max_steps=1,
            warmup=0.0,
            per_device_batch=2,
            eval_items=1,
            max_new_tokens=2,
        )
    )
    assert np.isfinite(log_of(out)[0]["loss"])
    assert {value.dtype for value in weights(out / "model").values()} == {torch.bfloat16}


def test_no_more_items_than_asked_for(place):
    out = generator.train(config(place, "few", max_steps=1, max_examples=5, eval_items=3))
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["examples"], metrics["after"]["n_items"]) == (5, 3)


# Measuring


def test_metrics_against_a_loop():
    answers = [
        Answer(attribute_answer(["a"], {"a": "Red", "b": ["x", "y"], "new": "1"}), 10, True),
        Answer(attribute_answer(["a"], {"a": "blue", "b": "x"}), 6, True),
        Answer("no", 2, True),
        Answer(attribute_answer(["a"], {"a": "red"}), 8, False),
        Answer(attribute_answer(["a"], {"a": "red"}), 4, True),
    ]
    truths = [{"a": "red", "b": "x, y", "c": None}, {"a": "red", "b": None}, {"a": "red"}, {"a": "red"}, None]
    schema = AttributeSchema("{title}", "it", None, 8)
    right = known = given = valid = 0
    for answer, truth in zip(answers, truths, strict=True):
        found = parse_attributes(answer.text, finished=answer.finished, schema=schema).attributes
        valid += found is not None
        for name, value in (found or {}).items():
            given += 1
            said = value if isinstance(value, str) else ", ".join(value)
            if truth and truth.get(name):
                known += 1
                right += said.lower() == truth[name].lower()
    expected = {"valid": valid / 5, "value_accuracy": right / known, "known_names": known / given}
    expected |= {"attributes_per_item": given / 5, "completion_length": 6.0, "n_items": 5}
    assert answer_metrics(answers, truths, schema) == expected
    assert (valid, right, known, given) == (3, 2, 3, 6)
    assert answer_metrics(answers[2:3], truths[2:3], schema) == {
        "valid": 0.0, "known_names": 0.0, "attributes_per_item": 0.0, "completion_length": 2.0, "n_items": 1,
    }  # fmt: skip


# Mistakes


@pytest.fixture
def untouched(place) -> Iterator[Path]:
    yield place / "bad"
    assert not (place / "bad").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "A generator needs a multimodal LLM"),
        ({"teacher": "/no/such/teacher"}, "could not be loaded"),
        ({"student": "x"}, "leave student out"),
        ({"lora_rank": 4, "freeze_tower": False}, "language model only"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"per_device_batch": 0}, "per_device_batch is 0"),
        ({"max_examples": 0}, "max_examples is 0"),
        ({"eval_items": 0}, "eval_items is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"schema": "/no/such/schema.yaml"}, "cannot read the attribute schema"),
        ({"examples": "/no/such/file.parquet"}, "does not exist"),
        ({"attribute_columns": []}, "no attributes that tell its training items apart"),
    ],
)
def test_mistakes_are_one_sentence(place, untouched, changes, words):
    with pytest.raises(FieldmarkError, match=words) as error:
        generator.train(config(place, "bad", **changes))
    assert "\n" not in str(error.value)
