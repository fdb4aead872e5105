"""`fieldmark inspect`: what it counts, finds and writes, on a folder whose faults are known."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from fieldmark import cli
from fieldmark.data import duplicates
from fieldmark.data.catalog import fingerprint, load_catalog
from fieldmark.data.duplicates import MAX_BITS, MAX_GREY, Look, groups_of_equal, look_of, near_pairs
from fieldmark.data.sheet import MAX_BYTES, write_sheet
from fieldmark.data.uses import uses_of


def picture(seed: int, size: int = 64) -> Image.Image:
    """Soft blobs, another picture for every seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def run_cli(capsys):
    """Runs a command: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(argv))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def untidy(tmp_path):
    """Classes a, b (train) and c, d, Löwe (test), with a copy, a photo saved again, and two that cannot be read."""
    root = tmp_path / "birds"
    places = [f"train/{name}/{number}.png" for name in "ab" for number in range(3)]
    places += [f"test/{name}/{number}.png" for name in "cd" for number in range(2)] + ["test/Löwe/0.png"]
    for seed, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, 64 + seed).save(root / place)
    (root / "test/c/copy.png").write_bytes((root / "train/a/0.png").read_bytes())
    picture(1, 65).resize((40, 40)).convert("L").save(root / "train/a/again.jpg", quality=40)
    (root / "train/b/cut.png").write_bytes((root / "train/b/0.png").read_bytes()[:200])
    (root / "test/d/none.jpg").write_text("no photo")
    return root


def test_the_report(run_cli, untidy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("inspect", "--data", str(untidy), "--json")
    assert code == 0
    report = json.loads(out)
    catalog = load_catalog(str(untidy))
    assert report["fingerprint"] == fingerprint(catalog)
    assert report["n_photos"] == 15
    assert report["classes"] == {
        "n": 5, "photos_per_class": {"min": 1, "median": 3.0, "max": 4}, "n_with_one_photo": 1,
        "n_photos_without_label": 0, "n_in_train_and_test": 0,
    }  # fmt: skip
    assert report["splits"] == {"test": {"n_photos": 7, "n_classes": 3}, "train": {"n_photos": 8, "n_classes": 2}}
    assert report["roles"] == {"both": 15}
    photos = report["photos"]
    assert (photos["n_looked_at"], photos["n_bad"]) == (15, 2)
    assert photos["width"] == {"min": 40, "median": 68.0, "max": 74}
    assert photos["modes"] == {"RGB": 12, "L": 1}
    assert {one["item_id"] for one in report["bad_photos"]} == {"train/b/cut.png", "test/d/none.jpg"}
    equal, near = report["exact_duplicates"], report["near_duplicates"]
    assert (equal["n_groups"], equal["n_photos"], equal["n_groups_across_train_and_test"]) == (1, 2, 1)
    assert sorted(equal["item_ids"][0]) == ["test/c/copy.png", "train/a/0.png"]
    assert (near["n_pairs"], near["n_photos"], near["n_pairs_across_train_and_test"]) == (1, 2, 0)
    assert sorted(near["item_ids"][0]) == ["train/a/1.png", "train/a/again.jpg"]
    assert "15/15" in err  # progress
    # the files
    folder = tmp_path / "inspect-birds"
    assert report["out"] == folder.name
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written == {name: value for name, value in report.items() if name != "out"}
    with (folder / "bad_files.csv").open(newline="", encoding="utf-8") as file:
        assert {row["item_id"] for row in csv.DictReader(file)} == {"train/b/cut.png", "test/d/none.jpg"}
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size[0] > 900


def test_the_printed_page(run_cli, untidy, tmp_path):
    out = tmp_path / "seen"
    code, text, _ = run_cli("inspect", "--data", str(untidy), "--out", str(out))
    assert code == 0
    for words in ("2 photos cannot be read", "train/b/cut.png: ", "1 of them across train and test",
                  "method saga: yes", "method maple: no, it needs a title for every train photo; 0 of 8 have one",
                  "metric recall@k, map@r: yes", "metric image-text recall: no", "fingerprint "):  # fmt: skip
        assert words in text
    # again into its own folder; not into another's
    assert run_cli("inspect", "--data", str(untidy), "--out", str(out), "--max_photos", "3")[0] == 0
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["photos"]["n_looked_at"] == 3
    code, _, err = run_cli("inspect", "--data", str(untidy), "--out", str(untidy))
    assert code == 2
    assert "was not made by inspect" in err


def test_a_table_with_columns_of_other_names_and_nothing_readable(run_cli, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("photo;species;colour\n1.jpg;wren;red\n2.jpg;owl;\n")
    flags = ("--image_column", "photo", "--label_column", "species", "--attribute_columns", "[colour]")
    code, out, _ = run_cli("inspect", "--data", str(path), *flags, "--json", "--out", str(tmp_path / "o"))
    assert code == 0
    report = json.loads(out)
    assert report["attributes"] == {"colour": {"coverage": 0.5, "n_values": 1}}
    assert (report["photos"]["n_bad"], report["photos"]["width"]) == (2, None)
    assert not (tmp_path / "o" / "sheet.png").exists()
    code, _, err = run_cli("inspect", "--data", str(path))
    assert code == 2
    assert "--image_column" in err
    code, _, err = run_cli("inspect", "--data", str(path), *flags, "--max_photos", "0")
    assert code == 2
    assert "--max_photos was given 0" in err


def test_drawn_birds(run_cli, tmp_path):
    code, out, _ = run_cli("inspect", "--data", "aviary:2", "--part", "teacher", "--max_photos", "12", "--json",
                           "--out", str(tmp_path / "o"))  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["photos"]["n_looked_at"] == 12
    assert report["photos"]["n_bad"] == report["exact_duplicates"]["n_photos"] == 0
    assert report["splits"].keys() == {"train"}
    assert report["attributes"]["bill_shape"]["coverage"] == 1


# duplicates


def test_near_pairs_are_those_of_a_double_loop(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    rng = np.random.default_rng(0)
    looks, digests = [], []
    for number in range(60):
        if number % 3:  # near the one before, by some bits and greys
            flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 2 * MAX_BITS), replace=False))
            moved = looks[-1].greys.astype(int) + rng.integers(-MAX_GREY, MAX_GREY + 1 + number % 2, 256)
            looks.append(Look(looks[-1].hash ^ flips, moved.clip(0, 255).astype(np.uint8)))
        else:
            looks.append(Look(int(rng.integers(0, 2**63)), rng.integers(60, 190, 256).astype(np.uint8)))
        digests.append(digests[-1] if number % 10 == 1 else bytes([number]))
    expected = []
    for i in range(60):
        for j in range(i + 1, 60):
            bits = (looks[i].hash ^ looks[j].hash).bit_count()
            grey = max(abs(int(a) - int(b)) for a, b in zip(looks[i].greys, looks[j].greys))
            if bits <= MAX_BITS and grey <= MAX_GREY and digests[i] != digests[j]:
                expected.append((i, j))
    assert len(expected) > 5
    seen = []
    assert near_pairs(looks, digests, progress=seen.append) == (sorted(expected), False)
    assert seen[-1] == 60
    assert near_pairs(looks, digests, max_pairs=3) == (sorted(expected)[:3], True)
    assert near_pairs([], []) == ([], False)


def test_a_photo_saved_again_is_found_and_another_one_is_not():
    photos = [picture(seed, 200) for seed in range(30)]
    again = []
    for photo in photos:
        file = io.BytesIO()
        photo.resize((100, 100), Image.Resampling.LANCZOS).save(file, "JPEG", quality=30)
        again.append(Image.open(file).convert("RGB"))
    looks = [look_of(photo) for photo in photos + again]
    pairs, _ = near_pairs(looks, [bytes([number]) for number in range(60)])
    assert pairs == [(number, number + 30) for number in range(30)]


def test_groups_of_equal():
    assert groups_of_equal([b"a", b"b", b"a", b"c", b"b", b"a"]) == [[0, 2, 5], [1, 4]]


# the sheet and the uses


def test_the_sheet_stays_small_and_takes_any_label(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["image,label"]
    labels = ["Löwe", "貓", "two words " * 30, "<b>&amp;", "عربي", "x" * 300, ""]
    for number in range(168):  # noise, the worst case for PNG
        Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f'{number}.png,"{labels[number % 7] and labels[number % 7] + str(number % 21)}"')
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    seen = []
    write_sheet(load_catalog(str(tmp_path / "t.csv")), tmp_path / "sheet.png", progress=seen.append)
    assert (tmp_path / "sheet.png").stat().st_size <= MAX_BYTES
    assert seen == list(range(1, 20))


@pytest.mark.parametrize(
    ("lines", "no"),
    [
        (["a,train,,both,", "a,train,,both,", "b,train,,both,", "b,train,,both,", "c,test,,both,", "c,test,,both,"],
         {"maple", "afmrl", "nmi, ari, purity", "recall by differing attributes", "image-text recall"}),
        (["a,train,x,both,", "b,train,y,both,", "c,test,z,query,red", "c,test,z,gallery,red", "d,test,w,gallery,red"],
         {"metric", "saga", "afmrl"}),
        (["a,train,x,both,", "a,train,y,both,", "c,test,z,query,red", "c,test,z,gallery,red", "d,test,w,gallery,red"],
         {"metric", "saga"}),
        (["a,train,x,both,", "a,train,y,both,", ",train,y,both,", "c,test,z,query,red", "c,test,z,gallery,red",
          "d,test,w,gallery,red"], {"metric", "saga", "afmrl"}),
        (["a,train,x,both,", "a,train,y,both,", "c,test,z,query,", "d,test,z,gallery,"],
         {"metric", "saga", "afmrl", "recall@k, map@r", "recall by differing attributes"}),
        (["a,train,x,both,"], {"metric", "saga", "afmrl", "recall@k, map@r", "nmi, ari, purity",
         "recall by differing attributes", "image-text recall"}),
    ],
)  # fmt: skip
def test_uses(tmp_path, lines, no):
    rows = [f"{number}.jpg,{line}" for number, line in enumerate(lines)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,split,title,role,attr_colour", *rows]))
    found = uses_of(load_catalog(str(tmp_path / "t.csv")))
    reasons = {**found["methods"], **found["metrics"]}
    assert {name for name, reason in reasons.items() if reason is not None} == no
