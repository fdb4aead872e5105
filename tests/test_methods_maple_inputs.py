"""`fieldmark train maple` on a small catalogue: what is refused before anything begins, other students, other texts."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fieldmark import cli
from fieldmark.data.photos import PhotoRef
from fieldmark.methods import maple
from fieldmark.students.build import load_student
from fieldmark.students.items import encode_items
from fieldmark.teacher.cache import answer_key, photo_hash
from fieldmark.teacher.describe import caption_cache
from fieldmark.teacher.model import Teacher
from helpers_cli import draw, fails
from helpers_export import make_dual_encoder
from helpers_tiny import make_tiny_teacher
from helpers_training import log_of
from test_teacher_align import yes_no_teacher
from test_teacher_labels import with_scores

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS, TRAIN = 16, 8
CONTEXT, LONG_CONTEXT = 256, 8000  # bytes that the two dual encoders read; the teacher reads 4,096
LONG, TOO_LONG = "a long bill " * 25, "a long bill " * 500


def table(path: Path, **changes: list[str]) -> Path:
    """Photos of the folder as a catalogue, half of them to train on, some columns exchanged."""
    columns = {
        "image": [f"{n}.png" for n in range(PHOTOS)],
        "label": [f"l{n}" for n in range(PHOTOS)],
        "title": [f"bird {n}" for n in range(PHOTOS)],
        "split": ["train"] * TRAIN + ["test"] * (PHOTOS - TRAIN),
        "attr_bill": [("long", "short")[n % 2] for n in range(PHOTOS)],
        **changes,
    }
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def titles(row: int, title: str) -> dict[str, list[str]]:
    return {"title": [title if n == row else f"bird {n}" for n in range(PHOTOS)]}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[Path]:
    """Photos as catalogues, a teacher, one that cannot answer, and dual encoders."""
    root = tmp_path_factory.mktemp("house")
    for number in range(PHOTOS):
        draw(number).save(root / f"{number}.png")
    table(root / "good.csv")
    table(root / "untitled.csv", title=[""] * PHOTOS)
    table(root / "alike.csv", label=["l"] * PHOTOS)
    for where, row in (("train", 2), ("test", PHOTOS - 3)):
        table(root / f"long_{where}.csv", **titles(row, LONG))
        table(root / f"too_long_{where}.csv", **titles(row, TOO_LONG))
    teacher = yes_no_teacher("qwen3_vl", root)
    teacher.model.save_pretrained(root / "teacher")
    teacher.processor.save_pretrained(root / "teacher")
    make_tiny_teacher("qwen3_vl", root / "silent")
    for name, context in (("clip", CONTEXT), ("reader", LONG_CONTEXT)):
        (root / name).mkdir()
        make_dual_encoder("clip", root / name, context)
    yield root
    transformers.utils.logging.set_verbosity_warning()  # commands quieten the libraries for the whole process


def command(house: Path, out: Path, *more: object, data: str = "good", teacher: str = "teacher") -> list[str]:
    flags = {
        "data": house / f"{data}.csv", "out": out, "teacher": house / teacher, "resolution": 64, "max_steps": 2,
        "anchors_per_batch": 4, "negatives": 2, "lora_rank": 2, "lora_alpha": 2,
    }  # fmt: skip
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return ["train", "maple", *map(str, [*given, *more])]


def dual(house: Path, name: str) -> list[str]:
    return ["--student_kind", "dual", "--student", str(house / name / "clip-base")]


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """No student may be measured."""
    monkeypatch.setattr(maple, "measure", None)


def refused(capsys, tmp_path: Path, argv: list[str]) -> str:
    """The one sentence of a run that must end before it has a folder."""
    told = fails(capsys, argv)
    assert not (tmp_path / "run").exists()
    return told


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("flags", "more", "words"),
    [
        ({"data": "untitled"}, [], "8 of 8 train rows"),
        ({"teacher": "silent"}, [], "no single token for 'Yes'"),
        ({"teacher": "silent"}, ["--preference", "none"], "no single token for 'Yes'"),  # it scores the groups
        ({"data": "alike"}, [], "8 of 8 items have fewer than 2 others of another label and title"),
        ({}, ["--negatives", 8], "8 of 8 items have fewer than 8 others"),
        ({}, ["--anchors_per_batch", 9], "8 photos with a text are left to train on; anchors_per_batch is 9"),
        ({}, ["--dedup_clusters", 9], "dedup_clusters is 9 for 8 photos"),
        ({}, ["--resolution", 65], "resolution 65"),
        ({}, ["--captions", "none.parquet"], "none.parquet does not exist"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_run_has_a_folder(capsys, house, tmp_path, flags, more, words):
    assert words in refused(capsys, tmp_path, command(house, tmp_path / "run", *more, **flags))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("where", ["train", "test"])
def test_texts_too_long_for_the_student_are_refused_first(capsys, house, tmp_path, where):
    argv = command(house, tmp_path / "run", *dual(house, "clip"), data=f"long_{where}")
    assert f"this student reads {CONTEXT}; shorten it" in refused(capsys, tmp_path, argv)


@pytest.mark.usefixtures("unmeasured")
def test_texts_too_long_for_the_teacher_are_refused_first(capsys, house, tmp_path):
    argv = command(house, tmp_path / "run", *dual(house, "reader"), data="too_long_train")
    assert "this teacher reads 4096, shorten the text" in refused(capsys, tmp_path, argv)
    lines = [{"image_0": "8.png", "image_1": "9.png", "caption_0": TOO_LONG, "caption_1": "another"}]
    groups = house / "groups.jsonl"
    groups.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    argv = command(house, tmp_path / "run", *dual(house, "reader"), "--groups", groups)
    assert "this teacher reads 4096, shorten the text" in refused(capsys, tmp_path, argv)


def test_alignment_files_that_cannot_be_gone_on_with_are_refused_first(capsys, house, tmp_path, monkeypatch):
    scores = tmp_path / "alignment.parquet"
    assert cli.main(command(house, tmp_path / "first", *dual(house, "clip"), "--alignment", scores)) == 0
    good = scores.read_bytes()
    monkeypatch.setattr(maple, "measure", None)
    stranger = Teacher.load(house / "teacher")
    stranger.model.lm_head.weight.data.mul_(1.5)
    stranger.model.save_pretrained(tmp_path / "other")
    stranger.processor.save_pretrained(tmp_path / "other")
    again = command(house, tmp_path / "run", "--alignment", scores)
    other = [*again, "--teacher", str(tmp_path / "other")]
    assert "were made otherwise (teacher was" in refused(capsys, tmp_path, other)
    finished = command(house, tmp_path / "first", "--alignment", scores, "--teacher", str(tmp_path / "other"))
    assert "holds a finished run; give a new folder" in fails(capsys, finished)
    assert "resolution was 64, is 96" in refused(capsys, tmp_path, [*again, "--resolution", "96"])
    with_scores(scores, float("nan"))
    assert "hold nan for the text" in refused(capsys, tmp_path, again)
    scores.write_bytes(good[: len(good) // 2])
    assert "cannot read the answers in" in refused(capsys, tmp_path, again)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_dual_encoder_is_trained_to_its_end(house, tmp_path, rank):
    out = tmp_path / "run"
    more = ["--lora_rank", rank, "--learning_rate", 1e-2, "--temperature_learning_rate", 1e-2, "--warmup", 0]
    assert cli.main(command(house, out, *dual(house, "clip"), *more)) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert {"i2t_recall@1", "t2i_recall@1", "group_score", "gap_ratio"} <= set(metrics["after"])
    assert len(log_of(out)) == 2
    assert (out / "report.html").stat().st_size > 10_000
    before = load_file(house / "clip" / "clip-base" / "model.safetensors")
    after = load_file(next((out / "model").glob("*.safetensors")))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    whole = {name for name in before if name != "logit_scale"}
    if rank:
        assert moved
        assert all("_proj.weight" in name or ".fc" in name for name in moved)
    else:
        assert whole - moved <= {name for name in whole if name.endswith("k_proj.bias")}  # softmax does not see these
    student = load_student(out / "model")
    assert encode_items(student, texts=["bird 1"]).shape == encode_items(student, images=[draw(1)]).shape


def write_captions(path: Path, teacher: Teacher, pairs: list[tuple[PhotoRef, PhotoRef]]) -> dict[str, set[str]]:
    """A file of comparative captions; of each photo its captions."""
    of: dict[str, set[str]] = {}
    with caption_cache(path, teacher, temperature=0.7, max_new_tokens=96, seed=0) as cache:
        for number, (one, other) in enumerate(pairs):
            first, second = photo_hash(one), photo_hash(other)
            texts = f"the redder of pair {number}", f"the bluer of pair {number}"
            row = {"key": answer_key(first, second, "0"), "photo_1": first, "photo_2": second, "generation": 0}
            cache.add([row | {"caption_1": texts[0], "caption_2": texts[1], "answer": "made up"}])
            of.setdefault(first, set()).add(texts[0])
            of.setdefault(second, set()).add(texts[1])
    return of


def test_captions_take_the_place_of_titles(house, tmp_path, caplog):
    teacher, photos = Teacher.load(house / "teacher"), [str(house / f"{n}.png") for n in range(TRAIN)]
    pairs = [(photos[n], photos[(n + step) % (TRAIN - 1)]) for n in range(TRAIN - 1) for step in (1, 2)]  # not the last
    of = write_captions(tmp_path / "captions.parquet", teacher, pairs)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        assert cli.main(command(house, out, "--captions", tmp_path / "captions.parquet")) == 0
    assert "1 of 8 photos have no caption and are left out" in caplog.messages
    asked = pq.read_table(out / "alignment.parquet").to_pylist()
    trained = {row["photo"] for row in asked if row["text"].startswith("the ")}
    assert trained == set(of) == {photo_hash(photo) for photo in photos[:-1]}
    for photo, captions in of.items():
        assert captions <= {row["text"] for row in asked if row["photo"] == photo}
    titles_asked = {row["text"] for row in asked if not row["text"].startswith("the ")}
    assert titles_asked <= {f"bird {n}" for n in range(TRAIN, PHOTOS)}  # of the groups, which are of test photos
    assert len(log_of(out)) == 2
    assert "their comparative captions" in (out / "report.html").read_text(encoding="utf-8")


def test_one_group_alone_does_not_end_a_run(house, tmp_path, caplog):
    line = {"image_0": "8.png", "image_1": "9.png", "caption_0": "a bird", "caption_1": "another bird"}
    groups = house / "one.jsonl"
    groups.write_text(json.dumps(line) + "\n", encoding="utf-8")
    out = tmp_path / "run"
    assert cli.main(command(house, out, *dual(house, "clip"), "--groups", groups)) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["after"]["n_groups"] == 1
    assert "gap_ratio" not in metrics["after"]
    assert "the modality gap is left out: one group alone" in caplog.text
    assert "modality gap went from" not in (out / "report.html").read_text(encoding="utf-8")
