"""Strangers' data: columns of other names, odd tables, untidy folders, the hub, shards, a teacher's own part."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import unicodedata
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from fieldmark.data import hub
from fieldmark.data.catalog import fingerprint, load_catalog, select_split
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.data.photos import open_photo
from fieldmark.errors import FieldmarkError


def photo(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def pixels(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


# columns


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_of_other_names(tmp_path, suffix, caplog):
    records = [
        {"photo": "1.jpg", "species": "wren", "name": "a wren", "sku": "x1", "set": "training", "use": "query",
         "colour": "brown", "attr_size": "small", "price": "3", "label": "wrong"},
        {"photo": "2.jpg", "species": "owl", "name": "an owl", "sku": "x2", "set": "test", "use": "gallery",
         "colour": "", "attr_size": "big", "price": "4", "label": "wrong"},
    ]  # fmt: skip
    path = tmp_path / f"items{suffix}"
    if suffix == ".csv":
        lines = [",".join(records[0]), *(",".join(record.values()) for record in records)]
        path.write_text("\n".join(lines) + "\n")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    options = CatalogOptions(
        data=str(path), image_column="photo", label_column="species", title_column="name", item_id_column="sku",
        split_column="set", role_column="use", attribute_columns=["colour", "species"],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        catalog, bad = read_catalog(options)
    assert bad == []
    assert catalog.to_list() == [
        {"item_id": "x1", "image": str(tmp_path / "1.jpg"), "label": "wren", "title": "a wren",
         "attributes": {"species": "wren", "colour": "brown", "size": "small"}, "split": "train", "role": "query"},
        {"item_id": "x2", "image": str(tmp_path / "2.jpg"), "label": "owl", "title": "an owl",
         "attributes": {"species": "owl", "colour": None, "size": "big"}, "split": "test", "role": "gallery"},
    ]  # fmt: skip
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1  # the column `label` is not the label here
    assert "price, label are left out" in said[0]


@pytest.mark.parametrize(
    ("columns", "attributes", "words"),
    [
        ({}, [], "has the columns photo, species, colour; expected a column 'image'.* by --image_column"),
        ({"image": "foto"}, [], "no column 'foto', which --image_column names; did you mean 'photo' of photo, species"),
        ({"image": "photo", "label": "zzz"}, [], "'zzz', which --label_column names; choose one of photo, species"),
        ({"image": "photo"}, ["color"], "'color', which --attribute_columns names; did you mean 'colour'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, attributes, words):
    path = tmp_path / "t.csv"
    path.write_text("photo,species,colour\n1.jpg,wren,red\n")
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(str(path), columns=columns, attribute_columns=attributes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["aviary:1", "folder", "cub:folder", "grocery:folder", "fashion:folder"])
def test_columns_of_a_source_that_has_none(tmp_path, monkeypatch, source):
    photo(tmp_path / "folder" / "a" / "1.jpg")
    monkeypatch.chdir(tmp_path)
    words = f"--label_column, --attribute_columns was given, but the source '{source}' has no columns"
    with pytest.raises(FieldmarkError, match=words):
        load_catalog(source, columns={"label": "x"}, attribute_columns=["y"])


# tables


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_separators_newlines_and_byte_order_mark(tmp_path, separator, newline, mark):
    cells = [["image", "label ", "title"], ["1.jpg", "a", f'"one{separator} two, three{newline}four; ""five"""']]
    text = newline.join(separator.join(line) for line in cells) + newline
    path = tmp_path / ("t.tsv" if separator == "\t" else "t.csv")
    path.write_bytes(mark + text.encode())
    row = load_catalog(str(path))[0]
    assert (row["item_id"], row["label"]) == ("1.jpg", "a")
    assert row["title"] == f'one{separator} two, three{newline}four; "five"'


def test_the_separator_is_the_one_that_finds_known_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("photo;a, b, c, and d;kind\n1.jpg;x;wren\n")
    catalog = load_catalog(str(path), columns={"image": "photo", "label": "kind"})
    assert (catalog[0]["item_id"], catalog[0]["label"]) == ("1.jpg", "wren")
    path.write_text("image,label,image\n1.jpg,a,2.jpg\n")
    with pytest.raises(FieldmarkError, match="several columns 'image'"):
        load_catalog(str(path))


def test_paths_of_a_table(tmp_path, monkeypatch):
    place = photo(tmp_path / "far away" / "ä 1.png")
    shard = tmp_path / "s.tar"
    shard.write_bytes(b"xx" + pixels("blue"))
    refs = ["far away/ä 1.png", str(place), place.as_uri(), f"tar://{shard}#2,{len(pixels('blue'))}"]
    (tmp_path / "t.csv").write_text("image\n" + "\n".join(f'"{ref}"' for ref in refs), encoding="utf-8")
    monkeypatch.chdir("/")
    catalog = load_catalog(str(tmp_path / "t.csv"))
    assert catalog["image"][:3] == [str(place)] * 3
    assert [open_photo(ref).getpixel((0, 0)) for ref in catalog["image"]] == [(255, 0, 0)] * 3 + [(0, 0, 255)]


OML = "label,path,split,is_query,is_gallery,category"


def test_oml_tables(tmp_path, caplog):
    path = tmp_path / "df.csv"
    lines = ["1,a.jpg,train,,,bird", "2,b.jpg,validation,True,False,bird", "2,c.jpg,validation,False,True,",
             "2,d.jpg,validation,1,1.0,fish"]  # fmt: skip
    path.write_text("\n".join([OML, *lines]))
    catalog = load_catalog(str(path))
    assert [(row["item_id"], row["label"], row["split"], row["role"]) for row in catalog] == [
        ("a.jpg", "1", "train", "both"), ("b.jpg", "2", "test", "query"), ("c.jpg", "2", "test", "gallery"),
        ("d.jpg", "2", "test", "both"),
    ]  # fmt: skip
    assert [row["attributes"] for row in catalog] == [{"category": kind} if kind else None
                                                      for kind in ("bird", "bird", None, "fish")]  # fmt: skip
    path.write_text("\n".join([OML, "2,b.jpg,validation,False,False,bird"]))
    with pytest.raises(FieldmarkError, match="neither query nor gallery"):
        load_catalog(str(path))
    boxes = f"{OML},x_1,y_1,x_2,y_2"
    path.write_text("\n".join([boxes, "1,a.jpg,train,,,bird,0,0,9,9", "2,b.jpg,validation,True,True,bird,1,1,5,5"]))
    with caplog.at_level(logging.WARNING):
        assert len(load_catalog(str(path))) == 2
    assert "are not cut out" in caplog.text
    path.write_text("\n".join([boxes, "1,a.jpg,train,,,bird,0,0,9,9", "2,a.jpg,validation,True,True,bird,1,1,5,5"]))
    with pytest.raises(FieldmarkError, match=r"2 boxes .* in the photo 'a.jpg'"):
        load_catalog(str(path))


# folders


def test_a_folder_with_strays_links_and_strange_names(tmp_path, caplog):
    decomposed = unicodedata.normalize("NFD", "Löwe")
    for name in (f"train/{decomposed}/1 of 2.jpg", "test/Löwe/ü.jpg", "test/a  b/deep/er/1.jpg", "train/._x/1.jpg",
                 "test/__MACOSX/1.jpg", "test/a  b/._1.jpg"):  # fmt: skip
        photo(tmp_path / "data" / name)
    for name in ("train/.DS_Store", f"train/{decomposed}/Thumbs.db", "test/a  b/.hidden"):
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "data" / "test" / "empty").mkdir()
    (tmp_path / "data" / "test" / "a  b" / "circle").symlink_to("..")
    photo(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "test" / "a  b" / "linked").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(str(tmp_path / "data"))
    assert [(row["item_id"], row["label"], row["split"]) for row in catalog] == [
        ("test/Löwe/ü.jpg", "Löwe", "test"),
        ("test/a  b/deep/er/1.jpg", "a  b", "test"),
        ("test/a  b/linked/2.jpg", "a  b", "test"),
        ("train/Löwe/1 of 2.jpg", "Löwe", "train"),
    ]
    assert all(open_photo(ref).size == (4, 4) for ref in catalog["image"])
    assert "1 directories hold no photo (empty)" in caplog.text
    assert "1 links that lead in a circle" in caplog.text
    strays = [record.message for record in caplog.records if "stray files" in record.message]
    assert len(strays) == 1
    assert "5 stray files" in strays[0]


def test_circles_of_links_end(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / name / "1.jpg")
        (tmp_path / name / "self").symlink_to(".")
        (tmp_path / name / "up").symlink_to("..")
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    catalog = load_catalog(str(tmp_path))
    assert catalog["item_id"][:] == ["a/1.jpg", "a/b/1.jpg", "b/1.jpg", "b/a/1.jpg"]


def test_directories_called_like_splits(tmp_path):
    # vehicles: `train` is a class among others
    for name in ("bus/1.jpg", "car/1.jpg", "train/1.jpg"):
        photo(tmp_path / "vehicles" / name)
    assert load_catalog(str(tmp_path / "vehicles"))["label"][:] == ["bus", "car", "train"]
    # a class `train` inside the split `train`
    for name in ("Train/train/1.jpg", "Train/bus/1.jpg", "Testing/car/1.jpg"):
        photo(tmp_path / "split" / name)
    catalog = load_catalog(str(tmp_path / "split"))
    assert sorted(zip(catalog["label"], catalog["split"])) == [("bus", "train"), ("car", "test"), ("train", "train")]
    # photos right below the splits have no class
    for name in ("train/1.jpg", "val/1.jpg"):
        photo(tmp_path / "plain" / name)
    catalog = load_catalog(str(tmp_path / "plain"))
    assert [(row["label"], row["split"]) for row in catalog] == [(None, "train"), (None, "val")]
    # a directory beside the splits: without photos it is nothing, with photos it is a mistake
    (tmp_path / "split" / "annotations").mkdir()
    assert len(load_catalog(str(tmp_path / "split"))) == 3
    photo(tmp_path / "split" / "more" / "x" / "1.jpg")
    with pytest.raises(FieldmarkError, match="beside 'more', which holds photos too"):
        load_catalog(str(tmp_path / "split"))


def test_a_folder_of_one_class_directory_a_class_needs_nothing_else(tmp_path):
    for name in ("a", "b", "c", "d"):
        for number in range(2):
            photo(tmp_path / name / f"{number}.jpg")
    catalog = load_catalog(str(tmp_path))
    assert set(select_split(catalog, "train")["label"]) == {"a", "b"}
    assert set(select_split(catalog, "test")["label"]) == {"c", "d"}


def test_names_that_are_no_text_and_directories_that_cannot_be_read(tmp_path, monkeypatch):
    photo(tmp_path / "a" / "1.jpg")
    name = os.fsencode(tmp_path / "a") + b"/\xff.jpg"
    os.link(tmp_path / "a" / "1.jpg", name)
    with pytest.raises(FieldmarkError, match="is not UTF-8; rename the file"):
        load_catalog(str(tmp_path))
    os.unlink(name)
    (tmp_path / "a" / "closed").mkdir()
    look = os.scandir

    def refuse(place="."):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(place))
        return look(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):  # the command line says it in one sentence
        load_catalog(str(tmp_path))


# a teacher's own part


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_split_teacher_is_never_the_students(tmp_path, caplog, kind):
    names = ["teacher/x/1.jpg", "teacher/y/1.jpg", "train/a/1.jpg", "test/b/1.jpg"]
    source = tmp_path / "data"
    for name in names:
        photo(source / name)
    if kind == "table":
        lines = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
        source = source / "t.csv"
        source.write_text("\n".join(["image,label,split", *lines]))
    with caplog.at_level(logging.WARNING):
        student, teacher = load_catalog(str(source)), load_catalog(str(source), part="teacher")
    assert [(row["label"], row["split"]) for row in teacher] == [("x", "train"), ("y", "train")]
    assert sorted(zip(student["label"], student["split"])) == [("a", "train"), ("b", "test")]
    assert "teacher" not in caplog.text


def test_a_teacher_without_a_split_of_its_own_is_said(tmp_path, caplog):
    for name in ("train/a/1.jpg", "test/b/1.jpg"):
        photo(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        teacher = load_catalog(str(tmp_path), part="teacher")
    assert teacher["label"][:] == ["a"]
    assert len(caplog.records) == 1
    assert "student's own training photos" in caplog.text


def test_a_teacher_with_the_students_classes_is_said_and_the_rest_is_split_zero_shot(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("image,label,split\n1.jpg,a,teacher\n2.jpg,a,\n3.jpg,b,\n")
    student = load_catalog(str(path))
    assert [(row["label"], row["split"]) for row in student] == [("a", "train"), ("b", "test")]
    with caplog.at_level(logging.WARNING):
        load_catalog(str(path), part="teacher")
    assert "1 classes of the teacher are the student's too (a)" in caplog.text
    path.write_text("image,label,split\n1.jpg,a,teacher\n")
    with pytest.raises(FieldmarkError, match="only rows of the split 'teacher'"):
        load_catalog(str(path))


# the hub


def photos_of(colours: list[str], labels: list[int], **more) -> datasets.Dataset:
    features = {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["wren", "owl"])}
    features |= {name: datasets.Value("string") for name in more}
    stored = [{"bytes": pixels(colour), "path": f"{colour}.png"} for colour in colours]
    return datasets.Dataset.from_dict({"img": stored, "fine": labels, **more}, features=datasets.Features(features))


def test_hub_data_sets(monkeypatch, caplog):
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        return datasets.DatasetDict(
            {
                "train": photos_of(["red", "blue"], [0, 1], caption=["a", None], junk=["", ""]),
                "validation": photos_of(["lime"], [-1], caption=["c"], junk=[""]),
                "extra": photos_of(["lime"], [0], caption=["c"], junk=[""]),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = {"image": "img", "label": "fine", "title": "caption"}
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog("owner/birds-2@v1.0", columns=columns)
    assert asked == [("owner/birds-2", "v1.0")]
    assert catalog.remove_columns("image").to_list() == [
        {"item_id": "train-0", "label": "wren", "title": "a", "attributes": None, "split": "train", "role": "both"},
        {"item_id": "train-1", "label": "owl", "title": None, "attributes": None, "split": "train", "role": "both"},
        {"item_id": "validation-0", "label": None, "title": "c", "attributes": None, "split": "val", "role": "both"},
    ]
    assert catalog["image"][:] == [pixels("red"), pixels("blue"), pixels("lime")]  # not decoded, not written again
    assert open_photo(catalog[1]["image"]).getpixel((0, 0)) == (0, 0, 255)
    assert "the splits extra are left out" in caplog.text
    assert "the columns junk are left out" in caplog.text
    with pytest.raises(FieldmarkError, match="has the columns img, fine, caption, junk; expected a column 'image'"):
        load_catalog("owner/birds-2")


def test_hub_photos_of_a_part_alone(monkeypatch):
    parts = {"train": photos_of(["red"], [0]), "teacher": photos_of(["blue", "lime"], [0, 1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: datasets.DatasetDict(parts))
    columns = {"image": "img", "label": "fine"}
    teacher = load_catalog("owner/name", part="teacher", columns=columns)
    assert teacher["image"][:] == [pixels("blue"), pixels("lime")]
    assert load_catalog("owner/name", columns=columns)["image"][:] == [pixels("red")]


def test_hub_data_sets_of_one_split_are_split_by_class(monkeypatch):
    parts = datasets.DatasetDict({"train": photos_of(["red", "blue"], [0, 1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: parts)
    catalog = load_catalog("owner/name", columns={"image": "img", "label": "fine"})
    assert [(row["label"], row["split"]) for row in catalog] == [("wren", "test"), ("owl", "train")]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore"), "Couldn't reach 'owner/name' on the Hub"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"), "doesn't exist"),
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch, error, words):
    def fail(name, revision):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog("owner/name")
    assert "\n" not in str(caught.value)
    assert "nothing on this machine" in str(caught.value)


def test_hub_data_sets_that_do_not_serve(monkeypatch):
    found = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: datasets.DatasetDict(found))
    columns = {"image": "img"}
    found |= {"a": photos_of(["red"], [0]), "b": photos_of(["red"], [0])}
    with pytest.raises(FieldmarkError, match="has the splits a, b; expected train"):
        load_catalog("owner/name", columns=columns)
    found.clear()
    found |= {"train": photos_of(["red"], [0]), "test": photos_of(["red"], [0], extra=["x"])}
    with pytest.raises(FieldmarkError, match="has other columns in the split 'test'"):
        load_catalog("owner/name", columns=columns)
    found.clear()
    found |= {"train": datasets.Dataset.from_dict({"img": [1, 2]})}
    with pytest.raises(FieldmarkError, match="expected one photo a row"):
        load_catalog("owner/name", columns=columns)
    features = datasets.Features({"img": datasets.Image()})
    mixed = {"img": [{"bytes": pixels("red"), "path": None}, {"bytes": None, "path": "x.png"}]}
    found |= {"train": datasets.Dataset.from_dict(mixed, features=features)}
    with pytest.raises(FieldmarkError, match="mixes paths and bytes"):
        load_catalog("owner/name", columns=columns)


def test_a_folder_in_the_way_is_not_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "owner" / "name" / "a" / "1.jpg")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert load_catalog("owner/name")["label"][:] == ["a"]
    for missing in ("other/name.csv", "owner/nmae"):
        with pytest.raises(FieldmarkError, match="does not exist"):
            load_catalog(missing)
    with pytest.raises(FieldmarkError, match="expected a hub id"):
        hub.read_hub("a b", None)


@pytest.mark.parametrize("together", [False, True])
def test_data_sets_saved_to_disk(tmp_path, together):
    one = photos_of(["red", "blue"], [0, 1])
    saved = datasets.DatasetDict({"train": one, "test": photos_of(["lime"], [0])}) if together else one
    saved.save_to_disk(str(tmp_path / "saved"))
    files = set(tmp_path.rglob("*"))
    catalog = load_catalog(str(tmp_path / "saved"), columns={"image": "img", "label": "fine"})
    assert catalog["label"][:] == ["wren", "owl", "wren"][: len(catalog)]
    assert catalog["split"][:] == (["train", "train", "test"] if together else ["test", "train"])
    assert catalog["image"][:2] == [pixels("red"), pixels("blue")]
    assert set(tmp_path.rglob("*")) == files  # photos are not written a second time
    for name in Path(tmp_path, "saved").rglob("*.arrow"):
        name.unlink()
    with pytest.raises(FieldmarkError, match="save it again"):
        load_catalog(str(tmp_path / "saved"), columns={"image": "img", "label": "fine"})


def test_saved_photos_that_are_paths(tmp_path):
    place = str(photo(tmp_path / "1.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    one = datasets.Dataset.from_dict({"image": [place, place], "label": ["a", "b"]}, features=features)
    (tmp_path / "t").mkdir()
    from fieldmark.data.columns import ColumnMap

    found = hub._source_of(one, ColumnMap(), "here")
    assert found.images["image"][:] == [place, place]


# shards


def shard(path: Path, members: list[tuple[str, bytes]], **kind) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind.pop("mode", "w")) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in kind.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_samples(tmp_path, monkeypatch, caplog):
    about = json.dumps({"split": "train", "colour": "brown", "attributes": {"size": "big"}}).encode()
    shard(tmp_path / "s-000.tar", [
        ("a/0001.jpg", pixels("red")), ("a/0001.cls", b"3\n"), ("a/0001.txt", "ein Löwe".encode()),
        ("a/._0001.jpg", b"stray"), ("a/0002.png", pixels("blue")), ("a/0002.json", about), ("a/0003.cls", b"4"),
    ])  # fmt: skip
    shard(tmp_path / "s-001.tar", [("a/0001.webp", pixels("lime")), ("a/0001.cls", b"owl")])
    expected = [
        ("s-000/a/0001", "3", "ein Löwe", None, None), ("s-000/a/0002", None, None, {"size": "big", "colour": "brown"},
         "train"), ("s-001/a/0001", "owl", None, None, None),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for source in ("wds:s-{000..001}.tar", "wds:s-00{0,1}.tar", f"wds:{tmp_path}/s-*.tar", ".", f"wds:{tmp_path}"):
        catalog = load_catalog(source, attribute_columns=["colour"])
        found = [tuple(row[name] for name in ("item_id", "label", "title", "attributes", "split")) for row in catalog]
        assert found == expected
        assert all(ref.startswith(f"tar://{tmp_path}/s-00") for ref in catalog["image"])
        assert [open_photo(ref).getpixel((0, 0)) for ref in catalog["image"]] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert "1 samples without a photo" in caplog.text
    mapped = load_catalog("s-000.tar", columns={"label": "colour", "title": "label"})
    assert [(row["label"], row["title"]) for row in mapped] == [(None, "3"), ("brown", None)]


def test_shards_named_by_split(tmp_path):
    for name, label in (("train-0", b"a"), ("train-1", b"b"), ("test-0", b"c")):
        shard(tmp_path / f"{name}.tar", [("1.png", pixels("red")), ("1.cls", label)])
    catalog = load_catalog(str(tmp_path))
    assert sorted(zip(catalog["label"], catalog["split"])) == [("a", "train"), ("b", "train"), ("c", "test")]


@pytest.mark.parametrize(
    ("members", "kind", "words"),
    [
        ([("../1.png", b"x")], {}, "member '../1.png' is a link or leads out"),
        ([("/etc/1.png", b"x")], {}, "leads out"),
        ([("1.png", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link"),
        ([("1.png", b"")], {"type": tarfile.LNKTYPE, "linkname": "2.png"}, "is a link"),
        ([("1.png", pixels("red"))], {"mode": "w:gz"}, "expected an uncompressed .tar file"),
        ([("1.png", pixels("red")), ("1.jpg", pixels("red"))], {}, "two photos"),
        ([("1.png", pixels("red")), ("1.json", b"[1]")], {}, "holds a list; expected an object"),
        ([("1.png", pixels("red")), ("1.json", b"{")], {}, "no JSON"),
        ([("1.png", pixels("red")), ("1.txt", b"\xff")], {}, "no text in UTF-8"),
        ([("1.cls", b"3")], {}, "holds no photo"),
    ],
)
def test_shards_that_do_not_serve(tmp_path, members, kind, words):
    path = shard(tmp_path / "s.tar", members, **kind)
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [700, 1100, 1536, 1600, 2300, 3072])
def test_truncated_shards(tmp_path, cut):
    path = shard(tmp_path / "s.tar", [("1.png", b"x" * 600), ("2.png", b"y" * 600)])
    os.truncate(path, cut)
    with pytest.raises(FieldmarkError, match="copied to its end"):
        load_catalog(str(path))


def test_missing_shards(tmp_path):
    shard(tmp_path / "s-0.tar", [("1.png", pixels("red"))])
    with pytest.raises(FieldmarkError, match="2 of 3 shards are missing"):
        load_catalog(f"wds:{tmp_path}/s-{{0..2}}.tar")
    with pytest.raises(FieldmarkError, match="no shard is there"):
        load_catalog(f"wds:{tmp_path}/x-*.tar")


# the fingerprint


def test_the_fingerprint_is_of_items_labels_splits_and_roles(tmp_path):
    path = tmp_path / "t.csv"

    def of(*lines: str) -> str:
        path.write_text("\n".join(["image,label,split,title", *lines]))
        return fingerprint(load_catalog(str(path)))

    first = of("1.jpg,a,train,x", "2.jpg,b,test,y")
    assert first == of("2.jpg,b,test,y", "1.jpg,a,train,another title")
    assert len({first, of("1.jpg,a,train,x", "2.jpg,c,test,y"), of("1.jpg,a,test,x", "2.jpg,b,train,y"),
                of("1.jpg,a,train,x", "3.jpg,b,test,y"), of("1.jpg,a,train,x")}) == 5  # fmt: skip
