"""Products with several photos: tables with a row a product, Amazon Berkeley Objects, M5Product."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from fieldmark import cli
from fieldmark.data.benchmarks import READERS
from fieldmark.data.benchmarks.abo import ABO, read_abo
from fieldmark.data.benchmarks.m5product import M5PRODUCT, read_m5product
from fieldmark.data.catalog import load_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.products import categories_of
from helpers_cli import fails


def photo(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


# tables

SHOP = [
    {"item_id": "p1", "image": ["a.jpg", "sub/b.jpg"], "title": "red shoe", "attr_category": "shoe"},
    {"item_id": "p2", "image": ["c.jpg"], "title": "bag", "attr_category": "bag"},
]


def write_table(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".csv":
        cells = [{**one, "image": " | ".join(one["image"])} for one in records]
        lines = [",".join(cells[0]), *(",".join(cell.values()) for cell in cells)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(one) for one in records), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_row_a_product(tmp_path, monkeypatch, suffix):
    write_table(tmp_path / f"shop{suffix}", SHOP)
    monkeypatch.chdir(tmp_path)
    catalog = load_catalog(f"products:shop{suffix}")
    found = [(row["item_id"], row["image"], row["label"], row["title"], row["attributes"]) for row in catalog.to_list()]
    assert found == [
        ("p1/1", str(tmp_path / "a.jpg"), "p1", "red shoe", {"category": "shoe"}),
        ("p1/2", str(tmp_path / "sub/b.jpg"), "p1", "red shoe", {"category": "shoe"}),
        ("p2/1", str(tmp_path / "c.jpg"), "p2", "bag", {"category": "bag"}),
    ]
    assert catalog["split"][:] == ["train", "train", "test"]  # zero-shot, by product
    assert categories_of(catalog) == ["shoe", "shoe", "bag"]


def test_columns_labels_splits_and_stored_photos_of_products(tmp_path, caplog):
    records = [
        {"sku": 7, "pics": [b"x", b"y"], "style": "s1", "set": "test", "use": "query", "colour": "red", "price": 1},
        {"sku": 8, "pics": [b"z"], "style": None, "set": "train", "use": None, "colour": "blue", "price": 2},
    ]
    path = write_table(tmp_path / "shop.parquet", records)
    columns = {"item_id": "sku", "image": "pics", "label": "style", "split": "set", "role": "use"}
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(f"products:{path}", columns=columns, attribute_columns=["colour"])
    assert [tuple(row[name] for name in ("item_id", "image", "label", "split", "role")) for row in catalog] == [
        ("7/1", b"x", "s1", "test", "query"), ("7/2", b"y", "s1", "test", "query"), ("8/1", b"z", "8", "train", "both"),
    ]  # fmt: skip
    assert [row["attributes"] for row in catalog] == [{"colour": "red"}] * 2 + [{"colour": "blue"}]
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert len(said) == 1
    assert "the columns price are left out" in said[0]
    # a column may be both the product's name and its label
    same = load_catalog(f"products:{path}", columns=columns | {"label": "sku"})
    assert same["label"][:] == ["7", "7", "8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sku,image\n1,a.jpg", "row 1 has no 'item_id'.* by --item_id_column"),
        ("item_id,image\np1,a.jpg\n,b.jpg", "row 2 has no 'item_id'"),
        ("item_id,image\np1,", "row 1 has the images None; expected a list of photos"),
        ("item_id,image\np1,a.jpg||b.jpg", r"row 1 has the images 'a.jpg\|\|b.jpg'"),
        ("item_id,photo\np1,a.jpg", "has the columns item_id, photo; expected a column 'image'"),
        ("item_id,image\np1,a.jpg\np1,b.jpg", "2 rows with the item_id 'p1/1'"),
        ("item_id,image\n", "holds no photo"),
    ],
)
def test_tables_of_products_that_do_not_serve(tmp_path, text, words):
    (tmp_path / "shop.csv").write_text(text + "\n")
    with pytest.raises(FieldmarkError, match=words) as caught:
        load_catalog(f"products:{tmp_path / 'shop.csv'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.csv", "shop.xlsx", "."])
def test_products_that_are_no_table(tmp_path, name):
    (tmp_path / "shop.xlsx").write_text("x")
    with pytest.raises(FieldmarkError, match=r"is no file that ends in \.csv, \.tsv, \.jsonl, \.parquet"):
        load_catalog(f"products:{tmp_path / name}")


# Amazon Berkeley Objects


def tagged(**values: str) -> list[dict[str, str]]:
    return [{"language_tag": tag, "value": value} for tag, value in values.items()]


# B1: in two countries. B3: a size of B2 (same main photo). "chart": shown by B1 and B2. B5: without a photo.
LISTINGS = [
    [
        {"item_id": "B1", "domain_name": "amazon.de", "item_name": tagged(de_DE="Roter Stuhl"), "main_image_id": "1+a",
         "other_image_id": ["1-b", "chart"], "product_type": [{"value": "CHAIR"}]},
        {"item_id": "B2", "item_name": tagged(es_MX="Zapato", en_GB="Shoe, 8", en_US="Shoe, size 8"),
         "main_image_id": "2a", "other_image_id": ["2b", "chart", "2b"], "product_type": [{"value": "SHOES"}],
         "color": [{"language_tag": "en_US", "standardized_values": ["Black"], "value": "Night"}]},
    ],
    [
        {"item_id": "B3", "item_name": tagged(en_US="Shoe, size 9"), "main_image_id": "2a", "other_image_id": ["3b"],
         "product_type": [{"value": "SHOES"}], "bullet_point": tagged(en_US="soft")},
        {"item_id": "B1", "domain_name": "amazon.com", "item_name": tagged(en_US="Red chair"), "main_image_id": "1+a",
         "product_type": "CHAIR", "material": tagged(fr_FR="bois", en_IN="wood"), "item_shape": []},
        {"item_id": "B4", "item_name": tagged(ja_JP="椅子"), "other_image_id": ["4"]},
        {"item_id": "B5", "item_name": tagged(en_US="Lamp"), "product_type": [{"value": "LAMP"}]},
    ],
]  # fmt: skip
ABO_PHOTOS = ["1+a", "1-b", "chart", "2a", "2b", "3b", "4", "unused"]
SMALL_ABO = replace(ABO, counts={"listings": 6, "images": 8})


def packed(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))


def make_abo(root: Path, size: str = "small") -> None:
    for number, listings in enumerate(LISTINGS):
        lines = [json.dumps(listing, ensure_ascii=False) for listing in listings]
        packed(root / "listings" / "metadata" / f"listings_{number:x}.json.gz", lines)
    rows = [f"{image},4,4,{number:02x}/{number:08x}.jpg" for number, image in enumerate(ABO_PHOTOS)]
    packed(root / "images" / "metadata" / "images.csv.gz", ["image_id,height,width,path", *rows])
    for number in range(len(ABO_PHOTOS)):
        photo(root / "images" / size / f"{number:02x}" / f"{number:08x}.jpg")


@pytest.mark.parametrize("size", ["small", "original"])
def test_abo_has_an_item_a_photo_and_a_label_a_product(tmp_path, monkeypatch, caplog, size):
    make_abo(tmp_path, size)
    with caplog.at_level(logging.WARNING):
        rows = read_abo(tmp_path, SMALL_ABO)
    assert [(row["item_id"], row["label"], row["title"], row["split"]) for row in rows] == [
        ("B1/1+a", "B1", "Red chair", "train"), ("B1/1-b", "B1", "Red chair", "train"),
        ("B2/2a", "B2", "Shoe, size 8", "test"), ("B2/2b", "B2", "Shoe, size 8", "test"),
        ("B2/3b", "B2", "Shoe, size 8", "test"), ("B4/4", "B4", "椅子", "test"),
    ]  # fmt: skip
    assert rows[1]["image"] == str(tmp_path / "images" / size / "01" / "00000001.jpg")
    assert "1 photos that several products show are left out" in caplog.text
    monkeypatch.setitem(READERS, "abo", lambda folder: read_abo(folder, SMALL_ABO))
    catalog = load_catalog(f"abo:{tmp_path}")
    assert categories_of(catalog) == ["CHAIR", "CHAIR", "SHOES", "SHOES", "SHOES", None]
    assert [(row["attributes"]["color"], row["attributes"]["material"]) for row in catalog] == [
        (None, "wood"), (None, "wood"), ("Night", None), ("Night", None), ("Night", None), (None, None),
    ]  # fmt: skip
    assert catalog[0]["attributes"]["shape"] is None


def remove(name: str):
    return lambda root: (root / name).unlink()


def damage(name: str, content: bytes):
    return lambda root: (root / name).write_bytes(content)


FIRST, IMAGES = "listings/metadata/listings_0.json.gz", "images/metadata/images.csv.gz"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove(FIRST), "has 4 listings instead of 6"),
        (remove(IMAGES), r"images\.csv\.gz is missing"),
        (remove("images/small/00/00000000.jpg"), "1 listed photos that are not there"),
        (lambda root: (root / "images" / "small").rename(root / "images" / "tiny"), "no images/small and no images/or"),
        (lambda root: (root / "listings").rename(root / "other"), "holds no listings/metadata"),
        (damage(FIRST, b"no gzip"), r"cannot read .*listings_0\.json\.gz \(BadGzipFile"),
        (damage(FIRST, gzip.compress(b'{"item_id": "B1"}' * 40)[:-12]), r"cannot read .*listings_0"),
        (damage(FIRST, gzip.compress(b"{}\n")), r"cannot read .*listings_0\.json\.gz \(KeyError"),
        (damage(FIRST, gzip.compress(b"[1]\n")), r"cannot read .*listings_0\.json\.gz \(TypeError"),
        (damage(IMAGES, gzip.compress(b"image_id\nx\n")), r"cannot read .*images\.csv\.gz \(KeyError"),
        (damage(IMAGES, gzip.compress(b"image_id,path\n" + b"".join(b"%d,x.jpg\n" % n for n in range(8)))),
         r"images\.csv\.gz lacks 6 photos of the listings \(1\+a, \.\.\.\)"),
    ],
)  # fmt: skip
def test_an_abo_that_is_not_whole(tmp_path, change, words):
    make_abo(tmp_path)
    change(tmp_path)
    with pytest.raises(FieldmarkError, match=words) as caught:
        read_abo(tmp_path, SMALL_ABO)
    assert ABO.place in str(caught.value)
    assert "\n" not in str(caught.value)


# M5Product

M5 = {
    "train": {
        "101": {"title": "红色 运动鞋", "label": "运动鞋", "url": "x", "video": "y", "pv": "颜色#:#红#;#品牌#:#甲"},
        "102": {
            "title": "又一双",
            "label": "运动鞋",
            "url": "x",
            "video": "",
            "pv": "品牌#:#甲#;#颜色#:#红#;#品牌#:#甲",
        },
        "103": {"title": "包", "label": "包", "url": "x", "video": "", "pv": "颜色#:#红#;#品牌#:#甲"},
        "104": {"title": " ", "label": "包", "url": "x", "video": "", "pv": "0"},
    },
    "test": {
        "201": {"title": "鞋", "label": "运动鞋", "url": "x", "video": "", "pv": "品牌#:#甲#;#颜色#:#红"},
        "202": {"title": "鞋", "label": "运动鞋", "url": "x", "video": "", "pv": "品牌#:#乙"},
        "203": {"title": "包", "label": "包", "url": "x", "video": "", "pv": ""},
    },
}
SMALL_M5 = replace(M5PRODUCT, counts={"photos": 7, "train photos": 4, "test photos": 3})


def make_m5(root: Path, inside: str = "") -> None:
    for split, products in M5.items():
        path = root / inside / f"product1m_product5m_{split}_id_label.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(products, ensure_ascii=False), encoding="utf-8")
        for product in products:
            photo(root / "images" / f"{product}.jpg")


@pytest.mark.parametrize("inside", ["", "product5m_v2"])
def test_m5product_calls_products_of_equal_attributes_the_same(tmp_path, monkeypatch, inside):
    make_m5(tmp_path, inside)
    monkeypatch.setitem(READERS, "m5product", lambda folder: read_m5product(folder, SMALL_M5))
    catalog = load_catalog(f"m5product:{tmp_path}")
    assert list(zip(catalog["item_id"], catalog["label"], catalog["split"])) == [
        ("101", "101", "train"), ("102", "101", "train"), ("103", "103", "train"), ("104", "104", "train"),
        ("201", "101", "test"), ("202", "202", "test"), ("203", "203", "test"),
    ]  # fmt: skip
    assert categories_of(catalog) == ["运动鞋", "运动鞋", "包", "包", "运动鞋", "运动鞋", "包"]
    assert catalog["title"][:4] == ["红色 运动鞋", "又一双", "包", None]
    assert [row["properties"] for row in catalog["attributes"]][:4] == ["品牌: 甲; 颜色: 红"] * 3 + [None]
    assert catalog[0]["image"] == str(tmp_path / "images" / "101.jpg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("images/203.jpg"), "1 listed photos that are not there"),
        (remove("product1m_product5m_test_id_label.json"), "test_id_label.json is missing"),
        (damage("product1m_product5m_train_id_label.json", b'{"1": '), "is no listing of M5Product"),
        (damage("product1m_product5m_train_id_label.json", b'{"1": {"title": "x"}}'), "of M5Product .KeyError: 'pv'"),
        (damage("product1m_product5m_train_id_label.json", b'{"1": 2}'), "is no listing of M5Product .TypeError"),
        (damage("product1m_product5m_train_id_label.json", b"[3]"), "is no listing of M5Product .AttributeError"),
        (damage("product1m_product5m_test_id_label.json", b"{}"), "4 photos instead of 7, 0 test photos instead of 3"),
    ],
)
def test_an_m5product_that_is_not_whole(tmp_path, change, words):
    make_m5(tmp_path)
    change(tmp_path)
    with pytest.raises(FieldmarkError, match=words) as caught:
        read_m5product(tmp_path, SMALL_M5)
    assert M5PRODUCT.place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_counts_are_those_of_afmrl_and_of_the_authors():
    assert M5PRODUCT.counts["photos"] == M5PRODUCT.counts["train photos"] + M5PRODUCT.counts["test photos"] == 5_760_482
    assert ABO.counts == {"listings": 147_702, "images": 398_212}


@pytest.mark.parametrize(("prefix", "published"), [("abo", ABO), ("m5product", M5PRODUCT)])
def test_small_missing_and_empty_folders_say_where_the_data_is(tmp_path, prefix, published):
    make_abo(tmp_path / "small")
    make_m5(tmp_path / "small")
    for name, words in (("empty", "holds no"), ("none", "is no folder"), ("small", "instead of")):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(FieldmarkError, match=words) as caught:
            load_catalog(f"{prefix}:{tmp_path / name}")
        assert published.place in str(caught.value)
        assert "http" not in str(caught.value)
    with pytest.raises(FieldmarkError, match="--label_column was given, but the source"):
        load_catalog(f"{prefix}:{tmp_path}", columns={"label": "x"})


# the command


@pytest.mark.parametrize("source", ["abo", "m5product", "products"])
def test_inspect(tmp_path, monkeypatch, capsys, source):
    make_abo(tmp_path)
    make_m5(tmp_path)
    shop = [
        {"item_id": f"p{n}", "image": [f"{n}{view}.png" for view in "ab"], "attr_category": "shoe"} for n in range(4)
    ]
    write_table(tmp_path / "shop.jsonl", shop)
    for number, name in enumerate(name for one in shop for name in one["image"]):
        photo(tmp_path / name, f"hsl({40 * number}, 80%, 50%)")
    monkeypatch.setitem(READERS, "abo", lambda folder: read_abo(folder, SMALL_ABO))
    monkeypatch.setitem(READERS, "m5product", lambda folder: read_m5product(folder, SMALL_M5))
    monkeypatch.chdir(tmp_path)
    argv = ["inspect", "--data", f"{source}:{'shop.jsonl' if source == 'products' else '.'}"]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    photos, products = {"abo": (6, 3), "m5product": (7, 5), "products": (8, 4)}[source]
    assert (report["n_photos"], report["classes"]["n"], report["photos"]["n_bad"]) == (photos, products, 0)
    assert report["attributes"]["category"]["n_values"] == {"abo": 2, "m5product": 2, "products": 1}[source]
    assert sorted(path.name for path in (tmp_path / f"inspect-{source}").iterdir()) == [
        "bad_files.csv", "report.json", "sheet.png",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    assert "attribute category" in capsys.readouterr().out
    assert "is no file that ends in" in fails(capsys, ["inspect", "--data", "products:none.csv"])


def test_no_photo_is_in_two_parts(tmp_path):
    make_abo(tmp_path)
    shown = Counter(row["image"] for row in read_abo(tmp_path, SMALL_ABO))
    assert max(shown.values()) == 1
