"""The check of all photos: it finds what `open_photo` refuses, says what is lost, and lists it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value

from fieldmark.data import checks
from fieldmark.data.checks import BadPhoto, find_bad_photos, leave_out_bad_photos, read_bad_photos, write_bad_photos
from fieldmark.data.photos import open_photo
from fieldmark.errors import FieldmarkError
from helpers_photos import HOSTILE_BYTES, JPEG, PNG, encoded, make_hostile, scene

pytestmark = pytest.mark.filterwarnings("ignore")


def catalogue(images, labels=None, splits=None):
    """Rows `i0`, `i1`, ... of class `a` of the training part, unless said."""
    count = len(images)
    kind = "binary" if isinstance(images[0], bytes) else "string"
    features = {name: Value("string") for name in ("item_id", "label", "split")} | {"image": Value(kind)}
    columns = {"item_id": [f"i{number}" for number in range(count)], "image": images}
    columns |= {"label": labels or ["a"] * count, "split": splits or ["train"] * count}
    return Dataset.from_dict(columns, features=Features(features))


def refused(ref) -> bool:
    try:
        open_photo(ref)
    except FieldmarkError:
        return True
    return False


@pytest.fixture
def mixed(tmp_path) -> tuple[list[str], list[str]]:
    """Paths of good and hostile photos in turn, and those of the hostile ones."""
    hostile = list(make_hostile(tmp_path))
    kinds = {"JPEG": {}, "PNG": {}, "GIF": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}, "AVIF": {}}
    paths = []
    for number, path in enumerate(hostile):
        kind = list(kinds)[number % len(kinds)]
        good = tmp_path / f"good{number}.{kind.lower()}"
        good.write_bytes(encoded(scene(seed=number), kind, **kinds[kind]))
        paths += [str(good), path]
    return paths, hostile


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_it_finds_what_open_photo_refuses(mixed, at_once, monkeypatch):
    paths, hostile = mixed
    monkeypatch.setattr(checks, "PHOTOS_AT_ONCE", at_once)
    done: list[int] = []
    bad = find_bad_photos(catalogue(paths), progress=done.append)
    assert [one.image for one in bad] == hostile == [path for path in paths if refused(path)]
    assert [one.item_id for one in bad] == [f"i{2 * number + 1}" for number in range(len(hostile))]
    assert done == sorted(done)
    assert done[-1] == len(paths)
    assert all(one.reason and "\n" not in one.reason and one.image not in one.reason for one in bad)


def test_bytes_tar_and_aviary():
    bad = find_bad_photos(catalogue([JPEG, *(data for data, _ in HOSTILE_BYTES.values()), PNG]))
    assert [one.image for one in bad] == [f"<{len(data)} bytes>" for data, _ in HOSTILE_BYTES.values()]
    uris = ["aviary://test/none/0", "tar:///gone.tar#0,9"]
    assert [one.image for one in find_bad_photos(catalogue(uris))] == uris
    assert find_bad_photos(catalogue(["x"]).select([])) == []


def test_a_whole_catalogue_passes_untouched(tmp_path, caplog):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    given = catalogue([str(tmp_path / "a.jpg")] * 3)
    left, bad = leave_out_bad_photos(given)
    assert left is given
    assert bad == []
    assert caplog.messages == []


def test_what_is_lost_is_said(tmp_path, caplog, capsys):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    good, gone = str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg")
    images = [good, gone, gone, gone, gone, good, gone, good]
    labels = ["ant", "ant", "bee", "bee", "cat", "cat", None, "dog"]
    splits = ["train", "train", "train", "test", "test", "train", "test", None]
    left, bad = leave_out_bad_photos(catalogue(images, labels, splits))
    assert left["item_id"][:] == ["i0", "i5", "i7"]
    assert [(one.item_id, one.label, one.split) for one in bad] == [
        ("i1", "ant", "train"), ("i2", "bee", "train"), ("i3", "bee", "test"), ("i4", "cat", "test"),
        ("i6", None, "test"),
    ]  # fmt: skip
    assert caplog.messages == [
        "5 of 8 photos cannot be read and are left out (62.5 %)",
        "no photo can be read of 1 class: bee",
        "no photo of the split test can be read of 1 class: cat",
    ]
    assert "checking photos  8/8" in capsys.readouterr().err


def test_many_lost_classes_are_counted(tmp_path, caplog):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    leave_out_bad_photos(catalogue([str(tmp_path / "a.jpg"), *["gone"] * 9], list("abcdefghij")))
    assert caplog.messages[1] == "no photo can be read of 9 classes: b, c, d, e, f and 4 more"


def test_nothing_left_is_an_error():
    with pytest.raises(FieldmarkError, match=r"None of the 3 photos can be read.*gone\.jpg: no such file") as caught:
        leave_out_bad_photos(catalogue(["gone.jpg"] * 3))
    assert "\n" not in str(caught.value)


def test_the_list_is_read_as_it_was_written(tmp_path):
    bad = [
        BadPhoto(
            "i1", 'a "b", c/\ud800.jpg'.replace("\ud800", os.fsdecode(b"\xff")), "é, ü", "train", "it is; a, pipe"
        ),
        BadPhoto("i2", "<7 bytes>", None, None, "truncated"),
    ]
    for rows in (bad, []):
        write_bad_photos(rows, tmp_path / "bad_files.csv")
        assert read_bad_photos(tmp_path / "bad_files.csv") == rows
        first = (tmp_path / "bad_files.csv").read_bytes().splitlines()[0]
        assert first == b"item_id,image,label,split,reason"
    assert [path.name for path in tmp_path.iterdir()] == ["bad_files.csv"]


def test_two_processes_share_the_work_and_have_the_same_result(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    script = tmp_path / "both.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data_checks import catalogue
from fieldmark.data import checks
whole, checked = checks.photo_fault, []
checks.photo_fault = lambda ref: (checked.append(ref), whole(ref))[1]
good = {str(tmp_path / "a.jpg")!r}
left, bad = checks.leave_out_bad_photos(catalogue([good, "gone", good] * 3))
with open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w") as file:
    print(len(checked), left["item_id"][:], [one.item_id for one in bad], file=file)
checks.this_process().destroy_process_group()
""",
        encoding="utf-8",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rest = "['i0', 'i2', 'i3', 'i5', 'i6', 'i8'] ['i1', 'i4', 'i7']"
    assert [(tmp_path / f"rank{rank}").read_text().strip() for rank in (0, 1)] == [f"5 {rest}", f"4 {rest}"]
    assert done.stderr.count("3 of 9 photos cannot be read") == 1
    assert done.stderr.count("checking photos") == 1
