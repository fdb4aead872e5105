"""From photos to a trained student through the command line: `build-teacher`, `train saga`, and what follows them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fieldmark import cli
from fieldmark.commands.train import gains_of
from fieldmark.data import aviary
from fieldmark.methods import saga
from fieldmark.methods.quickstart import embedded_teacher
from fieldmark.students.build import build_student
from fieldmark.students.tower import VisionTower
from fieldmark.teacher import build
from fieldmark.teacher.compare import load_domain
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.reading import AttributeTable, PhotoSource
from helpers_cli import fails
from helpers_training import weights_of

SPECIES, PHOTOS = 4, 2
SAGA = ["--max_steps", "1", "--classes_per_batch", "4", "--items_per_class", "2", "--seed", "1"]
SAGA += ["--pairs_per_batch", "2", "--target_pairs", "1", "--max_micro_batches", "1", "--group_size", "4"]
# The tower's batch keeps its default, which is more photos than there are.
TINY = ["--tower_steps", "2", "--language_steps", "2", "--language_batch", "2", "--language_drills", "1"]
TINY += ["--max_photos", "8", "--exam_pairs", "2", "--resolution", "64", "--workers", "0"]


@pytest.fixture(autouse=True)
def _loud_libraries():
    """Commands quieten the libraries for the whole process."""
    yield
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """`photos/SPLIT/SPECIES/N.jpg` of drawn birds, and tables of them: one whole, one with a lack each."""
    root = tmp_path_factory.mktemp("birds")
    rows = []
    for split in ("train", "test"):
        for one in aviary.species(split)[:SPECIES]:
            for number in range(PHOTOS):
                path = root / "photos" / split / one.slug / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                aviary.draw_photo(one, number, split=split, size=96).save(path)
                marks = {f"attr_{name}": value for name, value in one.attributes.items()}
                rows.append({"image": str(path), "label": one.name, "split": split, **marks})
    write_table(root / "birds.csv", rows)
    write_table(root / "untested.csv", [row for row in rows if row["split"] == "train"])
    write_table(root / "unsplit.csv", [{**row, "split": ""} for row in rows])
    write_table(root / "single.csv", rows[::PHOTOS])
    write_table(root / "three.csv", rows[PHOTOS:])
    return root


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def saga_arguments(birds: Path, out: Path, *more: str) -> list[str]:
    where = ["--data", str(birds / "photos"), "--teacher", str(embedded_teacher()), "--out", str(out)]
    return ["train", "saga", *where, "--domain", "aviary", *SAGA, *more]


def build_arguments(birds: Path, out: Path, *more: str) -> list[str]:
    return ["build-teacher", "--data", str(birds / "birds.csv"), "--out", str(out), *TINY, *more]


def test_train_saga_then_evaluate_embed_compare(capsys, birds, tmp_path):
    run, data = tmp_path / "run", ["--data", str(birds / "photos")]
    assert cli.main(saga_arguments(birds, run)) == 0
    out, err = capsys.readouterr()
    assert "saga, seed 1" in out
    assert str(run) in out
    assert "Traceback" not in err
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    (step,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert step["valid_json"] > 0, "the teacher was asked in another domain's words"
    assert (run / "report.html").stat().st_size > 0
    start = build_student(embedded_teacher())
    assert sum(w.numel() for w in weights_of(run).values()) == sum(p.numel() for p in start.parameters()), "no teacher"

    assert cli.main(["evaluate", str(run), *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in metrics["after"]} == pytest.approx(metrics["after"], abs=1e-6)
    assert found["n_queries"] == SPECIES * PHOTOS

    assert cli.main(["embed", str(run), *data, "--out", str(tmp_path / "vectors.parquet")]) == 0
    vectors = pq.read_table(tmp_path / "vectors.parquet")
    assert vectors.num_rows == 2 * SPECIES * PHOTOS
    assert vectors.schema.field("embedding").type.list_size == 256

    capsys.readouterr()
    assert cli.main(["compare", str(run), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert (group["method"], group["seeds"], group["max_steps"]) == ("saga", [1], 1)
    assert group["after"]["nmi"]["mean"] == metrics["after"]["nmi"]


def test_a_killed_build_goes_on_and_becomes_a_teacher(capsys, monkeypatch, birds, tmp_path):
    out = tmp_path / "teacher"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def again(*args, **kwargs):
        raise AssertionError("the tower had been finished")

    # What an untrained teacher says is noise, and long.
    monkeypatch.setattr(build, "examine", functools.partial(build.examine, max_new_tokens=8))
    with monkeypatch.context() as patch:
        patch.setattr(build, "train_language", interrupted)
        assert cli.main(build_arguments(birds, out)) == 130
    assert "--resume true goes on behind the last finished stage" in capsys.readouterr().err
    assert "is not empty" in fails(capsys, build_arguments(birds, out))
    with monkeypatch.context() as patch:
        patch.setattr(build, "train_tower", again)
        assert cli.main(build_arguments(birds, out, "--resume", "true")) == 0

    teacher = Teacher.load(out)
    saved = VisionTower.from_pretrained(out, 64).state_dict()
    for name, value in load_file(out / "stages" / "tower.safetensors").items():
        assert torch.equal(saved[name], value.bfloat16().float()), name
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert card["domain"] == "aviary"
    assert card["parameters"] == sum(p.numel() for p in teacher.model.parameters())
    assert card["settings"] | {"tower_steps": 2, "tower_batch": 48, "exam_pairs": 2} == card["settings"]
    for exam in ("unseen_test_classes", "student_training_pairs"):
        assert (card[exam]["pairs"], card[exam]["completion_length"]) == (2, 8.0)
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "| valid json | " in readme

    assert "no student trains on" not in readme
    assert "its train rows, which a student trains on too" in readme
    assert "(those of its train rows it has seen while it was made)" in readme


class ExamMade:
    """An examination's numbers."""

    def as_dict(self) -> dict[str, float]:
        return {"valid_json": 1.0}


def test_the_card_is_true_of_other_teachers(tmp_path):
    """Of a source with classes for a teacher alone, and of a pre-trained tower, which is trained for no step."""
    teacher, domain = Teacher.load(embedded_teacher()), load_domain("aviary")
    exams = {"test": ExamMade(), "train": ExamMade()}
    config = build.BuildConfig(data="aviary", out=str(tmp_path), tower="my/network", tower_steps=777)
    build.write_card(tmp_path, config, ["compare"], domain, teacher, exams, minutes=1.0)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "777" not in readme
    assert "`my/network` as it is" in readme
    assert "(classes that no student trains on or is tested on)" in readme
    assert "Verdicts, on classes it has never seen" in readme
    build.write_card(
        tmp_path, dataclasses.replace(config, tower=None), ["compare"], domain, teacher, exams, minutes=1.0
    )
    assert "777 steps" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_an_unusable_out_is_said_before_the_catalogue_is_read(capsys, monkeypatch, birds, tmp_path):
    monkeypatch.setattr(build, "read_catalog", None)
    (tmp_path / "file").touch()
    assert "is not empty" in fails(capsys, build_arguments(birds, tmp_path))
    assert "is a file" in fails(capsys, build_arguments(birds, tmp_path / "file"))


def test_the_domain_has_the_attributes_of_all_items(monkeypatch, birds, tmp_path):
    """The first item lacks one, and the teacher is asked about it all the same, as `train saga` will ask."""
    with (birds / "birds.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lacking = next(name for name in rows[0] if name.startswith("attr_"))
    write_table(tmp_path / "birds.csv", [{**rows[0], lacking: ""}, *rows[1:]])

    class Asked(Exception):
        pass

    def asked(skills, domain, *args):
        raise Asked(domain.name)

    monkeypatch.setattr(build, "_texts", asked)
    with pytest.raises(Asked, match="aviary"):
        build.build_teacher(build.BuildConfig(data=str(tmp_path / "birds.csv"), out=str(tmp_path / "teacher")))


@pytest.mark.parametrize("resolution", [64, 192, 224])
def test_part_masks_fit_the_tokens_at_any_resolution(birds, resolution):
    tower = VisionTower.from_pretrained(embedded_teacher(), resolution)
    one = aviary.species("teacher")[0]
    table = AttributeTable.of([one.attributes])
    source = PhotoSource(tower, [aviary.uri_of(one, 3, "teacher")], table.encode([one.attributes]), table, seed=0)
    pixels, _, cover = source[0]
    assert pixels.shape == (3, resolution, resolution)
    assert cover.shape == (len(table.names), tower.tokens_per_image)
    assert 0 < cover.max() <= 1


@pytest.mark.parametrize(("source", "domain"), [("birds.csv", "aviary"), ("photos", "generic")])
def test_saga_asks_in_the_words_of_the_attributes(birds, source, domain):
    """A teacher built on a table is asked by a student of that table what it was taught."""
    config = saga.SagaConfig(data=str(birds / source), out="run")
    assert saga.choose_domain(config, saga.open_task(config)).name == domain


WRONG_SAGA = [
    (["--group_sizes", "3"], "did you mean --group_size?"),
    (["--group_size", "1"], "a group needs at least 2 rollouts"),
    (["--pairs_per_batch", "0"], "pairs_per_batch is 0"),
    (["--max_micro_batches", "0"], "max_micro_batches is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--data", "birds:x"], "unknown prefix 'birds'"),
    (["--data", "/no/photos"], "does not exist"),
    (["--teacher", "/no/teacher"], "'/no/teacher' could not be loaded"),
    (["--student", "/no/student"], "/no/student is not a model folder"),
    (["--domain", "fish"], "no domain 'fish'"),
    (["--domain", "/no/domain.yaml"], "cannot read the domain file"),
    (["--pooling", "mean"], "Mean pooling has no attention"),
    (["--resolution", "50"], "give a multiple of 32"),
    (["--loss_options", "{x: 1}"], "does not take these loss_options"),
    (["--out", "birds.csv/run"], "is a file or lies in one"),
]


WRONG_BUILD = [
    (["--tower_stepz", "3"], "did you mean --tower_steps?"),
    (["--tower_steps", "0"], "tower_steps is 0"),
    (["--views", "0"], "views is 0"),
    (["--exam_pairs", "1"], "exam_pairs is 1"),
    (["--tower_learning_rate", "0"], "tower_learning_rate is 0.0"),
    (["--seed", "-1"], "seed is -1"),
    (["--data", "birds:x"], "unknown prefix 'birds'"),
    (["--data", "/no/birds.csv"], "does not exist"),
    (["--data", "photos"], "needs a label and attributes"),
    (["--data", "unsplit.csv"], "has no rows for a teacher"),
    (["--data", "untested.csv"], "no row of split 'test'"),
    (["--data", "single.csv"], "two photos"),
    (["--data", "three.csv"], "at least 4 are needed"),
    (["--tower", "/no/tower"], "/no/tower is not a model folder"),
    (["--tower", str(embedded_teacher())], "--tower takes a timm network"),
    (["--out", "birds.csv"], "is a file or lies in one"),
]
WRONG = [(saga_arguments, *case) for case in WRONG_SAGA] + [(build_arguments, *case) for case in WRONG_BUILD]


@pytest.mark.parametrize(
    ("arguments", "wrong", "expected"), WRONG, ids=[f"{a.__name__[:5]} {' '.join(w)}" for a, w, _ in WRONG]
)
def test_mistakes_are_one_sentence_and_leave_no_folder(
    capsys, monkeypatch, birds, tmp_path, arguments, wrong, expected
):
    monkeypatch.chdir(birds)
    assert expected in fails(capsys, [*arguments(birds, tmp_path / "run"), *wrong])
    assert list(tmp_path.iterdir()) == [], "the corrected command would be told that its folder is not empty"


def test_what_attributes_gain_stands_beside_what_they_cost():
    key = "instance_recall@1"
    ladder = {"agcl": {key: 0.5}, "agcl + distilled generator": {key: 0.6}}
    loop = {"method": "afmrl", "after": {}, "ladder": ladder, "seconds_per_query": {"attributes": 0.25}}
    assert gains_of(loop) == [("distilled generator", "0.500", "0.600", "+0.100", "0.250")]
    alone = {"method": "agcl", "after": {key: 0.5, f"enriched_{key}": 0.4}}
    assert gains_of(alone) == [("agcl", "0.500", "0.400", "-0.100", "not measured here")]
    assert gains_of({"method": "saga", "after": {"recall@1": 0.5}}) == []
