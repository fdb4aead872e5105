"""Catalogues: every source becomes the same table; what is wrong with a source is said in one sentence."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.data.grocery import ATTRIBUTES, SESSION_COUNTS, grocery_classes, grocery_parts
from fieldmark.data.photos import open_photo
from fieldmark.data.readers import COLUMNS
from fieldmark.errors import FieldmarkError


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def table(path: Path, records) -> str:
    """A CSV, JSONL or Parquet file, by the suffix."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(value) if isinstance(value, dict) else value for name, value in record.items()}
                for record in records
            )
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n\n" for record in records), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def test_folder_with_a_directory_per_class(tmp_path, caplog):
    for name in ("wren/1.jpg", "wren/deep/2.PNG", "robin/1.jpg", "robin/2.webp", "owl/1.gif", "loose.jpg"):
        photo(tmp_path / name)
    (tmp_path / "owl" / "notes.txt").write_text("not a photo")
    (tmp_path / ".hidden").mkdir()
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(str(tmp_path))
    assert tuple(catalog.column_names) == COLUMNS
    assert catalog["item_id"][:] == ["owl/1.gif", "robin/1.jpg", "robin/2.webp", "wren/1.jpg", "wren/deep/2.PNG"]
    assert catalog["label"][:] == ["owl", "robin", "robin", "wren", "wren"]
    assert catalog["split"][:] == ["train", "test", "test", "test", "test"]  # of three classes the first is train
    assert set(catalog["role"]) == {"both"}
    assert set(catalog["title"]) == set(catalog["attributes"]) == {None}
    assert all(os.path.isabs(path) and open_photo(path).size == (4, 4) for path in catalog["image"])
    assert "1 photos outside" in caplog.text
    assert "1 files that are no photos" in caplog.text


def test_folder_with_split_directories(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg", "test/c/1.jpg"):
        photo(tmp_path / name)
    catalog = load_catalog(str(tmp_path))
    assert dict(zip(catalog["item_id"], catalog["split"])) == {
        "train/a/1.jpg": "train", "train/b/1.jpg": "train", "val/b/1.jpg": "val", "test/c/1.jpg": "test",
    }  # fmt: skip
    assert load_catalog(str(tmp_path), part="teacher")["item_id"][:] == ["train/a/1.jpg", "train/b/1.jpg"]
    assert select_split(catalog, "val")["label"][:] == ["b"]


def test_folder_of_photos_only(tmp_path):
    photo(tmp_path / "1.jpg")
    catalog = load_catalog(str(tmp_path))
    assert catalog[0]["label"] is None
    assert catalog[0]["split"] is None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables(tmp_path, suffix, caplog):
    photo(tmp_path / "in" / "1.jpg")
    records = [
        {"image": "in/1.jpg", "item_id": "x1", "label": "b", "title": "Löwe, rot", "attributes": {"size": "big",
         "n": 3}, "attr_colour": "red", "price": "3"},
        {"image": str(tmp_path / "in" / "1.jpg"), "item_id": "x2", "label": "a", "title": None, "attributes": None,
         "attr_colour": None, "price": "4"},
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(table(tmp_path / f"items{suffix}", records))
    assert "price" in caplog.text
    assert catalog.to_list() == [
        {"item_id": "x1", "image": str(tmp_path / "in/1.jpg"), "label": "b", "title": "Löwe, rot",
         "attributes": {"size": "big", "n": "3", "colour": "red"}, "split": "test", "role": "both"},
        {"item_id": "x2", "image": str(tmp_path / "in/1.jpg"), "label": "a", "title": None, "attributes": None,
         "split": "train", "role": "both"},
    ]  # fmt: skip
    assert open_photo(catalog[0]["image"]).size == (4, 4)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_table_with_images_only_and_relative_to_the_working_directory(tmp_path, suffix, monkeypatch):
    (tmp_path / "sub").mkdir()
    table(tmp_path / "sub" / f"t{suffix}", [{"image": "1.jpg"}, {"image": "aviary://test/x/3"}])
    monkeypatch.chdir(tmp_path)
    catalog = load_catalog(f"sub/t{suffix}")
    assert catalog["item_id"][:] == ["1.jpg", "aviary://test/x/3"]
    assert catalog["image"][:] == [str(tmp_path / "sub" / "1.jpg"), "aviary://test/x/3"]
    assert catalog["label"][:] == [None, None]


def test_splits_and_roles_of_a_table(tmp_path):
    rows = [("TRAIN", ""), ("validation", "both"), ("test", "Query"), ("test", "gallery"), ("", "")]
    records = [{"image": f"{i}.jpg", "label": i, "split": split, "role": role} for i, (split, role) in enumerate(rows)]
    catalog = load_catalog(table(tmp_path / "t.csv", records))
    assert catalog["split"][:] == ["train", "val", "test", "test", None]
    assert catalog["role"][:] == ["both", "both", "query", "gallery", "both"]
    assert load_catalog(str(tmp_path / "t.csv"), part="teacher")["item_id"][:] == ["0.jpg"]


def test_parquet_with_stored_photos(tmp_path):
    stored = photo(tmp_path / "1.jpg").read_bytes()
    plain = [{"image": stored, "label": 7}, {"image": stored, "label": 8}]
    catalog = load_catalog(table(tmp_path / "plain.parquet", plain))
    assert catalog["item_id"][:] == ["row-1", "row-2"]
    assert catalog["label"][:] == ["7", "8"]
    assert open_photo(catalog[1]["image"]).size == (4, 4)
    hub = [{"image": {"bytes": stored, "path": "a.jpg"}}, {"image": {"bytes": stored, "path": None}}]
    assert load_catalog(table(tmp_path / "hub.parquet", hub))["item_id"][:] == ["a.jpg", "row-2"]
    mixed = [{"image": {"bytes": stored, "path": "a.jpg"}}, {"image": {"bytes": None, "path": "1.jpg"}}]
    with pytest.raises(FieldmarkError, match="mixes"):
        load_catalog(table(tmp_path / "mixed.parquet", mixed))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "path,label\n1.jpg,a\n", "expected a column 'image'"),
        ("t.csv", "image\n", "holds no photo"),
        ("t.csv", "", "holds no photo"),
        ("t.csv", "image,label\n1.jpg,a,b\n", "row 1 has more cells"),
        ("t.csv", "image,label\n,a\n", "row 1 has the image None"),
        ("t.csv", b"image\n\xff.jpg\n", "UTF-8"),
        ("t.csv", "image\n1.jpg\n1.jpg\n", "2 rows with the item_id '1.jpg'"),
        ("t.csv", "image,item_id\n1.jpg,x\n2.jpg,x\n", "2 rows with the item_id 'x'"),
        ("t.csv", "image,split\n1.jpg,trian\n", "split 'trian'"),
        ("t.csv", "image,role\n1.jpg,index\n", "role 'index'"),
        ("t.csv", "image,attributes\n1.jpg,red\n", "attributes are no JSON"),
        ("t.csv", 'image,attributes\n1.jpg,"[1]"\n', "attributes are a list"),
        ("t.csv", "image\nhttps://x.org/1.jpg\n", "download"),
        ("t.jsonl", '{"image": "1.jpg"}\n{"image"\n', "line 2 is no JSON"),
        ("t.jsonl", "[1]\n", "line 1 is a list"),
        ("t.jsonl", '{"image": 3}\n', "row 1 has the image 3"),
        ("t.jsonl", '{"image": "1.jpg", "attributes": {"a": {"b": 1}}}\n', "mapping"),
        ("t.parquet", "no parquet", "expected a Parquet file"),
        ("t.txt", "1.jpg", "ends in '.txt'"),
    ],
)
def test_wrong_tables_are_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(str(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "does not exist"),
        ("nowhere", "'nowhere' does not exist"),
        ("nowhere.csv", "does not exist"),
        ("birds:/tmp", "unknown prefix 'birds'"),
        ("https://x.org/t.csv", "unknown prefix 'https'"),
        ("aviary:", "number of photos"),
        ("aviary:0", "number of photos"),
        ("aviary:many", "number of photos"),
        ("grocery:nowhere", "no folder"),
        (".", "holds no photo"),
        ("grocery:.", "holds neither"),
    ],
)
def test_wrong_sources_are_one_sentence(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(source)
    assert "\n" not in str(caught.value)


def test_wrong_part_split_and_teacher(tmp_path):
    photo(tmp_path / "a" / "1.jpg")
    photo(tmp_path / "b" / "1.jpg")
    with pytest.raises(FieldmarkError, match="expected one of student, teacher"):
        load_catalog(str(tmp_path), part="both")
    with pytest.raises(FieldmarkError, match="no rows for a teacher"):
        load_catalog(str(tmp_path), part="teacher")
    with pytest.raises(FieldmarkError, match=r"split 'val' \(train: 1 rows, test: 1 rows\)"):
        select_split(load_catalog(str(tmp_path)), "val")


def test_aviary():
    student, teacher = load_catalog("aviary:2"), load_catalog("aviary:1", part="teacher")
    assert tuple(student.column_names) == COLUMNS
    train, test = select_split(student, "train"), select_split(student, "test")
    species = [set(part["label"]) for part in (train, test, teacher)]
    assert not species[0] & species[1]
    assert not species[2] & (species[0] | species[1])
    assert len(species[0] | species[1]) >= 200
    assert len(species[2]) >= 100
    assert len(train) == 2 * len(species[0])
    assert set(teacher["split"]) == {"train"}
    assert len(student[0]["attributes"]) >= 10
    assert len(load_catalog("aviary")) == 10 * len(student)


@pytest.fixture(scope="module")
def groceries(tmp_path_factory):
    """Both layouts of the data set with its real counts, every photo a link to one file."""
    root = tmp_path_factory.mktemp("grocery")
    one = photo(root / "one.jpg")
    classes = grocery_classes()
    records: list[dict] = []
    lines: dict[str, list[str]] = {session: [] for session in SESSION_COUNTS}
    for session, count in SESSION_COUNTS.items():
        for number in range(count):
            name = list(classes)[number % 81]
            records.append({"image": f"photos/{session}/{name}/{number}.jpg", "split": session, "class_name": name})
            place = f"{session}/{classes[name]['kind']}/{name}/{number}.jpg"
            lines[session].append(f"{place}, {classes[name]['class_id']}, 0")
    for layout, places in (("own", [record["image"] for record in records]), ("authors/dataset", None)):
        for place in places or [line.split(",")[0] for part in lines.values() for line in part]:
            (root / layout / place).parent.mkdir(parents=True, exist_ok=True)
            os.link(one, root / layout / place)
    table(root / "own" / "catalog.csv", records)
    for session, part in lines.items():
        (root / "authors" / "dataset" / f"{session}.txt").write_text("\n".join(part) + "\n")
    names = [
        {"Class Name (str)": name, "Class ID (int)": one["class_id"], "Coarse Class Name (str)": one["coarse"]}
        for name, one in classes.items()
    ]
    table(root / "authors" / "dataset" / "classes.csv", names)
    return root


@pytest.mark.parametrize("layout", ["own", "authors", "authors/dataset"])
def test_grocery_protocol_in_both_layouts(groceries, layout):
    student = load_catalog(f"grocery:{groceries / layout}")
    teacher = load_catalog(f"grocery:{groceries / layout}", part="teacher")
    assert len(student) + len(teacher) == 5421
    train, test = select_split(student, "train"), select_split(student, "test")
    labels = [set(part["label"]) for part in (teacher, train, test)]
    assert [len(part) for part in labels] == [27, 27, 27]
    assert len(set.union(*labels)) == 81
    assert set(train["role"]) == set(teacher["role"]) == {"both"}
    assert set(teacher["split"]) == {"train"}
    for row in test:
        session = Path(row["item_id"]).parts[1 if layout == "own" else 0]
        assert row["role"] == ("query" if session == "test" else "gallery")
    assert {Path(item).parts[1 if layout == "own" else 0] for item in train["item_id"]} == set(SESSION_COUNTS)
    assert tuple(student[0]["attributes"]) == ATTRIBUTES
    assert student[0]["title"] == grocery_classes()[student[0]["label"]]["title"]
    assert open_photo(student[0]["image"]).size == (4, 4)


def test_grocery_parts_spread_coarse_classes_and_kinds():
    classes, parts = grocery_classes(), grocery_parts()
    assert Counter(parts.values()) == {"teacher": 27, "train": 27, "test": 27}
    for column in ("coarse", "kind"):
        for value in {record[column] for record in classes.values()}:
            counts = Counter(parts[name] for name in classes if classes[name][column] == value)
            found = [counts[part] for part in ("teacher", "train", "test")]
            assert max(found) - min(found) <= 1
    # a change of the split makes every reported number another one
    listed = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "29edf13cd9391a9d359b7f001fda703ce4e696b7847b82b5b65733238c61f290"
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "val.txt").unlink(), "has no val.txt"),
        (lambda root: (root / "train.txt").write_text("a.jpg\n"), "path, class id, coarse class id"),
        (lambda root: (root / "train.txt").write_text(""), "0 of 2640 train photos"),
        (lambda root: (root / "train.txt").write_text("a.jpg, 99, 0\n"), "path, class id"),
    ],
)
def test_incomplete_groceries_name_what_is_missing(groceries, tmp_path, damage, words):
    for source in (groceries / "authors" / "dataset").iterdir():
        if source.is_file():
            (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(FieldmarkError, match="5421 listed photos that are not there"):
        load_catalog(f"grocery:{tmp_path}")
    damage(tmp_path)
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(f"grocery:{tmp_path}")
    assert "\n" not in str(caught.value)
