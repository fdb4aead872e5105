"""Bad photos in training, `embed` and `evaluate`: `raise` names the first, `skip` leaves them out and lists them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image

from fieldmark import cli
from fieldmark.data.checks import read_bad_photos
from fieldmark.errors import FieldmarkError
from fieldmark.methods import metric
from fieldmark.methods.metric import MetricConfig
from fieldmark.methods.trainer import FieldmarkTrainer
from fieldmark.students.build import build_student
from helpers_photos import JPEG, encoded
from helpers_tiny import make_tiny_teacher
from helpers_training import killed_at, log_of

CLASSES, PHOTOS = 10, 10  # the first five classes are trained on
TRAIN = ["--resolution", "64", "--max_steps", "2", "--classes_per_batch", "5", "--items_per_class", "10"]
# what a bad file holds
DAMAGES = [JPEG[: len(JPEG) // 2], b"", b"<html>404</html>", encoded(Image.new("RGB", (1, 40))), JPEG[:-1]]


@pytest.fixture(autouse=True)
def _loud_libraries():
    """Commands quieten the libraries for the whole process."""
    yield
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny teacher, and an untrained student of its tower."""
    root = tmp_path_factory.mktemp("models")
    make_tiny_teacher("qwen3_vl", root / "teacher")
    build_student(root / "teacher", resolution=64).save_pretrained(str(root / "student"), create_model_card=False)
    return root


def make_photos(root: Path) -> list[Path]:
    """A hundred photos of ten classes, class by class."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(CLASSES):
        colour = rng.integers(40, 216, 3)
        (root / f"class{number}").mkdir(parents=True)
        for photo in range(PHOTOS):
            paths.append(root / f"class{number}" / f"{photo}.jpg")
            pixels = colour + rng.integers(-40, 40, (30, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def damage(paths: list[Path]) -> list[str]:
    for number, path in enumerate(paths):
        path.write_bytes(DAMAGES[number % len(DAMAGES)])
    return sorted(map(str, paths))


@pytest.fixture(scope="module", params=[1, 30])
def photos(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of a hundred photos, one of them bad (of a training class) or thirty (one class of it whole), and the
    bad ones."""
    root = tmp_path_factory.mktemp("photos")
    paths = make_photos(root)
    if request.param == 1:
        return root, damage([paths[33]])
    rest = [path for number, path in enumerate(paths[10:]) if number % 9 in (1, 5)]
    return root, damage(paths[:10] + rest[:20])


@pytest.fixture
def few(tmp_path) -> tuple[Path, list[Path]]:
    paths = make_photos(tmp_path / "photos")
    damage([paths[4], paths[77]])
    return tmp_path / "photos", paths


def train_arguments(models: Path, photos: Path, out: Path, *more: str) -> list[str]:
    where = ["--data", str(photos), "--student", str(models / "teacher"), "--out", str(out)]
    return ["train", "metric", *where, *TRAIN, *more]


def refused(capfd, argv: list[str]) -> str:
    """Runs a command that must end with 2 and one sentence, and no traceback from any process."""
    capfd.readouterr()
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("fieldmark: ")]
    assert len(sentences) == 1
    return sentences[0]


def names_a_bad_one(sentence: str, bad: list[str]) -> bool:
    match = re.match(r"fieldmark: cannot read the photo (\S+): (.{10,}); replace it", sentence)
    return match is not None and match[1] in bad


# -- training


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_stops_at_a_bad_photo_and_names_it(photos, models, tmp_path, capfd, workers):
    root, bad = photos
    sentence = refused(capfd, train_arguments(models, root, tmp_path / "run", "--workers", workers))
    assert names_a_bad_one(sentence, bad)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / "bad_files.csv").exists()


def test_a_whole_process_ends_with_2_and_its_workers_write_no_traceback(few, models, tmp_path):
    root, paths = few
    paths[77].write_bytes(JPEG)  # the one left is of a training class: a worker meets it
    argv = train_arguments(models, root, tmp_path / "run", "--workers", "2")
    done = subprocess.run([sys.executable, "-m", "fieldmark", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert names_a_bad_one(done.stderr.splitlines()[-1], [str(paths[4])])


def test_training_without_bad_photos_with_and_without_workers(photos, models, tmp_path, caplog):
    root, bad = photos
    logs = []
    for workers in ("0", "2"):
        caplog.clear()
        out = tmp_path / workers
        assert cli.main(train_arguments(models, root, out, "--workers", workers, "--bad_photos", "skip")) == 0
        assert f"{len(bad)} of 100 photos cannot be read and are left out ({len(bad)}.0 %)" in caplog.messages
        assert ("no photo can be read of 1 class: class0" in caplog.messages) is (len(bad) == 30)
        listed = read_bad_photos(out / "bad_files.csv")
        assert sorted(one.image for one in listed) == bad
        assert all(one.reason and one.label and one.split for one in listed)
        after = json.loads((out / "metrics.json").read_text())["after"]
        assert after["n_queries"] == 50 - sum(one.split == "test" for one in listed)
        logs.append([(line["step"], line["loss"], line["grad_norm/tower"]) for line in log_of(out)])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


# -- embed and evaluate


def test_embed(photos, models, tmp_path, capfd):
    root, bad = photos
    out = tmp_path / "vectors.parquet"
    argv = ["embed", str(models / "student"), "--data", str(root), "--out", str(out)]
    assert names_a_bad_one(refused(capfd, argv), bad)
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*argv, "--bad_photos", "skip"]) == 0
    assert f"{len(bad)} photos left out: {tmp_path / 'vectors.bad_files.csv'}" in capfd.readouterr().out
    listed = read_bad_photos(tmp_path / "vectors.bad_files.csv")
    assert sorted(one.image for one in listed) == bad
    items = pq.read_table(out)["item_id"].to_pylist()
    assert len(items) == 100 - len(bad)
    assert not set(items) & {one.item_id for one in listed}
    out.unlink()
    assert "vectors.bad_files.csv exists" in refused(capfd, [*argv, "--bad_photos", "skip"])


def test_evaluate(photos, models, tmp_path, capfd):
    root, bad = photos
    argv = ["evaluate", str(models / "student"), "--data", str(root), "--split", "train"]
    assert names_a_bad_one(refused(capfd, argv), bad)
    skipping = [*argv, "--bad_photos", "skip", "--bad_files", str(tmp_path / "bad.csv")]
    assert cli.main([*skipping, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    listed = read_bad_photos(tmp_path / "bad.csv")
    assert sorted(one.image for one in listed) == [path for path in bad if int(Path(path).parent.name[-1]) < 5]
    assert found["n_bad_photos"] == len(listed)
    assert found["n_queries"] == 50 - len(listed)
    assert cli.main(skipping) == 0
    assert re.search(rf"n_bad_photos\W+{len(listed)}\b", capfd.readouterr().out)


# -- what changes meanwhile


def settings(models: Path, root: Path, out: Path, **more) -> MetricConfig:
    fixed = {"resolution": 64, "max_steps": 4, "classes_per_batch": 5, "items_per_class": 2, "bad_photos": "skip"}
    return MetricConfig(data=str(root), student=str(models / "teacher"), out=str(out), **(fixed | more))


def test_a_skipping_run_resumes_unless_other_photos_are_bad(few, models, tmp_path):
    root, paths = few
    metric.train(settings(models, root, tmp_path / "whole"))
    killed = settings(models, root, tmp_path / "killed", save_steps=2)
    with killed_at(FieldmarkTrainer, 3):
        metric.train(killed)
    again = settings(models, root, tmp_path / "killed", save_steps=2, resume=True)
    kept = {path: path.read_bytes() for path in (paths[4], paths[8])}
    damage([paths[8]])
    with pytest.raises(FieldmarkError, match=r"1 can no longer be read \(class0/8\.jpg\); put the files back"):
        metric.train(again)
    Image.new("RGB", (30, 40)).save(paths[4])
    with pytest.raises(FieldmarkError, match=r"1 can no longer be read .* and 1 can now be read \(class0/4\.jpg\)"):
        metric.train(again)
    for path, data in kept.items():
        path.write_bytes(data)
    metric.train(again)
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    with pytest.raises(FieldmarkError, match="finished run"):
        metric.train(again)


def test_the_policy_is_a_setting_that_a_resumed_run_keeps(few, models, tmp_path):
    root, _ = few
    with killed_at(FieldmarkTrainer, 1):
        metric.train(settings(models, root, tmp_path / "run"))
    with pytest.raises(FieldmarkError, match="bad_photos was 'skip', is 'raise'"):
        metric.train(settings(models, root, tmp_path / "run", bad_photos="raise", resume=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_goes_bad_after_the_check_is_named(few, models, tmp_path, monkeypatch, workers):
    root, paths = few
    whole = metric.open_task

    def then_damage(config):
        task = whole(config)
        damage([paths[12]])
        return task

    monkeypatch.setattr(metric, "open_task", then_damage)
    with pytest.raises(FieldmarkError, match=r"cannot read the photo .*/class1/2\.jpg: image file is truncated"):
        metric.train(settings(models, root, tmp_path / "run", items_per_class=10, workers=workers))


def test_a_catalogue_of_bad_photos_alone(models, tmp_path, capfd):
    damage(make_photos(tmp_path / "photos"))
    sentence = refused(capfd, train_arguments(models, tmp_path / "photos", tmp_path / "run", "--bad_photos", "skip"))
    assert "None of the 100 photos can be read" in sentence
    assert not (tmp_path / "run").exists()


# -- fast decoding


def test_fast_decoding_is_a_setting_that_reaches_the_tower(models, tmp_path, monkeypatch):
    make_photos(tmp_path / "photos")
    assert MetricConfig(data="x", out="y").fast_decode is False
    seen = []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *given: seen.append(given))
    for fast in (False, True):
        config = settings(
            models, tmp_path / "photos", tmp_path / f"run {fast}", max_steps=1, fast_decode=fast, bad_photos="raise"
        )
        metric.train(config)
        assert bool(seen) is fast
