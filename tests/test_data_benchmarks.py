"""Public data sets: each reader on a small folder of its authors' layout, its counts asked for both ways."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fieldmark.data.benchmarks import READERS
from fieldmark.data.benchmarks.aircraft import AIRCRAFT, read_aircraft
from fieldmark.data.benchmarks.cars import CARS, read_cars
from fieldmark.data.benchmarks.cub import CUB, read_cub
from fieldmark.data.benchmarks.fashion import FASHION, ITEMS, LEFT_OUT, read_fashion, title_parts
from fieldmark.data.benchmarks.inat_aves import INAT_AVES, read_inat_aves
from fieldmark.data.benchmarks.inshop import INSHOP, read_inshop
from fieldmark.data.benchmarks.published import counts_of
from fieldmark.data.benchmarks.sop import SOP, read_sop
from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.data.sources import BENCHMARKS
from fieldmark.errors import FieldmarkError


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


CUB_PHOTOS = ["002.Wren/W_1.jpg", "001.Owl/O_1.jpg", "001.Owl/O_2.jpg", "003.Tit/T_1.jpg", "004.Jay/J_1.jpg"]


def make_cub(root: Path) -> None:
    names = sorted({name.partition("/")[0] for name in CUB_PHOTOS})
    write(root / "classes.txt", *(f"{number} {name}" for number, name in enumerate(names, start=1)))
    write(root / "images.txt", *(f"{number} {name}" for number, name in enumerate(CUB_PHOTOS, start=1)))
    write(
        root / "image_class_labels.txt",
        *(f"{number} {int(name[:3])}" for number, name in enumerate(CUB_PHOTOS, start=1)),
    )
    for name in CUB_PHOTOS:
        photo(root / "images" / name)


def make_cars_devkit(root: Path) -> None:
    """Six photos of four models; file names repeat in the two folders, as in the authors' archives."""
    boxes = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
    for split, classes in (("train", [1, 2, 3]), ("test", [4, 2, 4])):
        records = np.zeros((1, len(classes)), dtype=[*boxes, ("class", "O"), ("fname", "O")])
        for number, kind in enumerate(classes):
            name = f"{number + 1:05d}.jpg"
            records[0, number] = (1, 1, 3, 3, kind, name)
            photo(root / f"cars_{split}" / name)
        (root / "devkit").mkdir(exist_ok=True)
        file = root / "devkit" / "cars_train_annos.mat" if split == "train" else root / "cars_test_annos_withlabels.mat"
        savemat(file, {"annotations": records})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([CAR_NAMES], dtype=object)})


CAR_NAMES = ["AM General Hummer SUV 2000", "BMW X6 SUV 2012", "BMW M3 Coupe 2012", "smart fortwo Convertible 2012"]


def make_cars_annos(root: Path) -> None:
    boxes = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
    records = np.zeros((1, 6), dtype=[("relative_im_path", "O"), *boxes, ("class", "O"), ("test", "O")])
    for number, kind in enumerate([1, 2, 3, 4, 2, 4]):
        name = f"car_ims/{number + 1:06d}.jpg"
        records[0, number] = (name, 1, 1, 3, 3, kind, number % 2)
        photo(root / name)
    savemat(root / "cars_annos.mat", {"annotations": records, "class_names": np.array([CAR_NAMES], dtype=object)})


def make_aircraft(root: Path) -> None:
    write(root / "images_variant_trainval.txt", "0034309 727-200", "1025794 707-320", "11 Spitfire")
    write(root / "images_variant_test.txt", "12 727-200", "13 F-16A/B")
    for number in ("0034309", "1025794", "11", "12", "13"):
        photo(root / "images" / f"{number}.jpg")


AVES = [
    "03111_Animalia_Chordata_Aves_Accipitriformes_Accipitridae_Accipiter_badius",
    "03112_Animalia_Chordata_Aves_Accipitriformes_Accipitridae_Accipiter_bicolor",
]


def make_inat(root: Path) -> None:
    for name in (*AVES, "00001_Animalia_Arthropoda_Insecta_Odonata_Aeshnidae_Aeshna_mixta"):
        for number in range(2):
            photo(root / "train_mini" / name / f"{number}.jpg")
    photo(root / "val" / AVES[0] / "9.jpg")


def make_sop(root: Path) -> None:
    header = "image_id class_id super_class_id path"
    write(root / "Ebay_train.txt", header, "1 1 1 bicycle_final/1_0.JPG", "2 1 1 bicycle_final/1_1.JPG")
    write(root / "Ebay_test.txt", header, "3 7 2 coffee_maker_final/7_0.JPG")
    for name in ("bicycle_final/1_0.JPG", "bicycle_final/1_1.JPG", "coffee_maker_final/7_0.JPG"):
        path = root / name
        photo(path.with_suffix(".jpg"))
        path.with_suffix(".jpg").rename(path)


INSHOP_LINES = [
    ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
    ("img/WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "train"),
    ("img/MEN/Jackets_Vests/id_00000003/01_1_front.jpg", "id_00000003", "query"),
    ("img/MEN/Jackets_Vests/id_00000003/01_2_side.jpg", "id_00000003", "gallery"),
]


def make_inshop(root: Path, *, listing: str = "Eval/list_eval_partition.txt", img: str = "Img") -> None:
    lines = [f"{name}      {product} {status}" for name, product, status in INSHOP_LINES]
    write(root / listing, str(len(lines)), "image_name item_id evaluation_status", *lines)
    for name, _, _ in INSHOP_LINES:
        photo(root / img / name)


# prefix, reader, what is published, writer of the layout, counts of the small folder
CASES = [
    ("cub", read_cub, CUB, make_cub, {"photos": 5, "classes": 4, "train photos": 3, "test photos": 2}),
    ("cars", read_cars, CARS, make_cars_devkit, {"photos": 6, "classes": 4, "train photos": 3, "test photos": 3}),
    ("cars", read_cars, CARS, make_cars_annos, {"photos": 6, "classes": 4, "train photos": 3, "test photos": 3}),
    ("aircraft", read_aircraft, AIRCRAFT, make_aircraft,
     {"photos": 5, "classes": 4, "train classes": 2, "test classes": 2}),
    ("inat-aves", read_inat_aves, INAT_AVES, make_inat,
     {"photos": 4, "classes": 2, "train photos": 2, "test photos": 2}),
    ("sop", read_sop, SOP, make_sop,
     {"photos": 3, "train photos": 2, "train classes": 1, "test photos": 1, "test classes": 1}),
    ("inshop", read_inshop, INSHOP, make_inshop,
     {"photos": 4, "classes": 2, "train photos": 2, "train classes": 1, "test classes": 1, "query photos": 1,
      "gallery photos": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("prefix", "read", "published", "make", "counts"), CASES)
def test_a_layout_is_read_and_its_counts_are_asked_for(tmp_path, monkeypatch, prefix, read, published, make, counts):
    make(tmp_path)
    assert set(counts) == set(published.counts)
    small = replace(published, counts=counts)
    rows = read(tmp_path, small)
    assert {name: counts_of(rows)[name] for name in counts} == counts
    train = {row["label"] for row in rows if row["split"] == "train"}
    assert train.isdisjoint(row["label"] for row in rows if row["split"] == "test")
    # the same rows come out of the source; the published counts refuse the small folder and say where the whole one is
    monkeypatch.setitem(READERS, prefix, lambda folder: read(folder, small))
    catalog = load_catalog(f"{prefix}:{tmp_path}")
    assert catalog["item_id"][:] == [row["item_id"] for row in rows]
    with pytest.raises(FieldmarkError, match="instead of") as caught:
        read(tmp_path, published)
    for name, count in counts.items():
        assert f"{count:,} {name} instead of {published.counts[name]:,}" in str(caught.value)
    assert published.place in str(caught.value)
    assert "http" not in str(caught.value)
    Path(rows[0]["image"]).unlink()
    with pytest.raises(FieldmarkError, match=r"1 listed photos that are not there|instead of"):
        read(tmp_path, small)


@pytest.mark.parametrize(("prefix", "read", "published", "make", "counts"), CASES)
def test_an_empty_and_a_missing_folder(tmp_path, prefix, read, published, make, counts):
    for folder, words in ((tmp_path, "holds no"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(FieldmarkError, match=words) as caught:
            load_catalog(f"{prefix}:{folder}")
        assert published.place in str(caught.value)
        assert "\n" not in str(caught.value)


def test_published_counts_agree_with_each_other():
    assert CUB.counts["train photos"] + CUB.counts["test photos"] == CUB.counts["photos"]
    assert CARS.counts["train photos"] + CARS.counts["test photos"] == CARS.counts["photos"]
    assert INAT_AVES.counts["photos"] == 50 * INAT_AVES.counts["classes"] == 2 * INAT_AVES.counts["train photos"]
    assert SOP.counts["train photos"] + SOP.counts["test photos"] == SOP.counts["photos"]
    inshop = INSHOP.counts
    assert inshop["train photos"] + inshop["query photos"] + inshop["gallery photos"] == inshop["photos"]
    assert inshop["train classes"] + inshop["test classes"] == inshop["classes"]
    assert set(READERS) | {"fashion"} == set(BENCHMARKS)


def test_cub_splits_by_class_number_and_reads_attributes(tmp_path):
    make_cub(tmp_path / "CUB_200_2011")  # as its archive unpacks, attributes.txt beside the folder
    write(
        tmp_path / "attributes.txt",
        "1 has_bill_shape::curved_(up_or_down)", "2 has_bill_shape::hooked", "3 has_wing_color::blue",
    )  # fmt: skip
    shares = tmp_path / "CUB_200_2011" / "attributes" / "class_attribute_labels_continuous.txt"
    write(shares, "10.5 60.0 0.0", "70 20 30", "1 0 0", "0 0 9")
    rows = read_cub(tmp_path, replace(CUB, counts={"photos": 5, "classes": 4}))
    assert [(row["item_id"], row["label"], row["split"]) for row in rows] == [
        ("images/002.Wren/W_1.jpg", "002.Wren", "train"),
        ("images/001.Owl/O_1.jpg", "001.Owl", "train"),
        ("images/001.Owl/O_2.jpg", "001.Owl", "train"),
        ("images/003.Tit/T_1.jpg", "003.Tit", "test"),
        ("images/004.Jay/J_1.jpg", "004.Jay", "test"),
    ]
    assert [row["attributes"] for row in rows] == [
        {"bill_shape": "curved (up or down)", "wing_color": "blue"},
        {"bill_shape": "hooked"},
        {"bill_shape": "hooked"},
        {"bill_shape": "curved (up or down)"},
        {"wing_color": "blue"},
    ]
    write(shares, "10.5 60.0")
    with pytest.raises(FieldmarkError, match="2 numbers a class; expected 3"):
        read_cub(tmp_path, replace(CUB, counts={"photos": 5, "classes": 4}))


@pytest.mark.parametrize("level", ["", "images", "CUB_200_2011/images"])
@pytest.mark.parametrize("splits", [False, True])
def test_cub_by_class_folders(tmp_path, level, splits, caplog):
    for number, name in enumerate(CUB_PHOTOS):
        photo(tmp_path / level / (("train", "test")[number % 2] if splits else "") / name)
    for name in ("._W_1.jpg", ".DS_Store", "Thumbs.db"):
        write(tmp_path / level / ("train" if splits else "") / "002.Wren" / name, "stray")
    with caplog.at_level(logging.WARNING):
        rows = read_cub(tmp_path, replace(CUB, counts={"photos": 5, "classes": 4, "train photos": 3, "test photos": 2}))
    assert Counter((row["label"], row["split"]) for row in rows) == {
        ("001.Owl", "train"): 2, ("002.Wren", "train"): 1, ("003.Tit", "test"): 1, ("004.Jay", "test"): 1,
    }  # fmt: skip
    assert "3 stray files" in caplog.text
    photo(tmp_path / level / ("train" if splits else "") / "001.Owl" / "one_too_many.jpg")
    with pytest.raises(FieldmarkError, match="6 photos instead of 5, 4 train photos instead of 3"):
        read_cub(tmp_path, replace(CUB, counts={"photos": 5, "classes": 4, "train photos": 3, "test photos": 2}))


def test_cub_labels_that_are_missing(tmp_path):
    make_cub(tmp_path)
    write(tmp_path / "image_class_labels.txt", "1 2")
    with pytest.raises(FieldmarkError, match="gives photo 2 no class"):
        read_cub(tmp_path)
    write(tmp_path / "images.txt", "1")
    with pytest.raises(FieldmarkError, match="line 1 is '1'; expected 2 parts"):
        read_cub(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(FieldmarkError, match=r"classes\.txt is missing; get the whole data set from the CUB"):
        read_cub(tmp_path)


@pytest.mark.parametrize("make", [make_cars_devkit, make_cars_annos])
def test_cars_follow_the_authors_class_numbers(tmp_path, make):
    make(tmp_path)
    rows = read_cars(tmp_path, replace(CARS, counts={"photos": 6}))
    assert [row["label"] for row in rows] == [CAR_NAMES[number - 1] for number in (1, 2, 3, 4, 2, 4)]
    # BMW X6 is class 2 and BMW M3 class 3, against the alphabet: the halves are those of the numbers
    assert {row["label"] for row in rows if row["split"] == "train"} == set(CAR_NAMES[:2])


def test_cars_by_class_folders(tmp_path):
    for number, name in enumerate(CAR_NAMES):
        photo(tmp_path / "car_data" / "car_data" / ("train", "test")[number % 2] / name / "1.jpg")
    rows = read_cars(tmp_path, replace(CARS, counts={"photos": 4, "classes": 4}))
    assert {row["label"] for row in rows if row["split"] == "train"} == {CAR_NAMES[0], CAR_NAMES[2]}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "cars_test_annos_withlabels.mat").unlink(), "cars_test_annos_withlabels.mat is missing"),
        (lambda root: (root / "devkit/cars_train_annos.mat").write_bytes(b"no mat"), "cannot read .*train_annos"),
        (lambda root: savemat(root / "devkit/cars_train_annos.mat", {"x": 1}), "has no annotations"),
        (lambda root: savemat(root / "devkit/cars_meta.mat", {"x": 1}), "has no class_names"),
        (lambda root: savemat(root / "devkit/cars_meta.mat", {"class_names": np.array([["a", "b"]], dtype=object)}),
         "class 3 of 2"),
    ],
)  # fmt: skip
def test_damaged_cars(tmp_path, damage, words):
    make_cars_devkit(tmp_path)
    damage(tmp_path)
    with pytest.raises(FieldmarkError, match=words) as caught:
        read_cars(tmp_path, replace(CARS, counts={"photos": 6, "classes": 4}))
    assert CARS.place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aircraft_pools_its_listings_and_sorts_variants(tmp_path):
    make_aircraft(tmp_path / "fgvc-aircraft-2013b" / "data")
    rows = read_aircraft(tmp_path, replace(AIRCRAFT, counts={"photos": 5}))
    assert [(row["item_id"], row["label"], row["split"]) for row in rows] == [
        ("images/0034309.jpg", "727-200", "train"),
        ("images/1025794.jpg", "707-320", "train"),
        ("images/11.jpg", "Spitfire", "test"),
        ("images/12.jpg", "727-200", "train"),
        ("images/13.jpg", "F-16A/B", "test"),
    ]


@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_inat_takes_birds_of_train_mini_alone(tmp_path, listing, inside):
    make_inat(tmp_path)
    if listing:
        names = [f"train_mini/{name}/{number}.jpg" for name in (*AVES, "00001_Animalia_x") for number in range(2)]
        images = [{"id": number, "file_name": name} for number, name in enumerate(reversed(names))]
        write(tmp_path / "train_mini.json", json.dumps({"images": images, "annotations": []}))
    rows = read_inat_aves(tmp_path / "train_mini" if inside else tmp_path, replace(INAT_AVES, counts={"photos": 4}))
    assert [(row["item_id"], row["label"], row["split"]) for row in rows] == [
        (f"train_mini/{name}/{number}.jpg", name, split)
        for name, split in zip(AVES, ("train", "test"))
        for number in range(2)
    ]


def test_inat_listing_that_is_none(tmp_path):
    make_inat(tmp_path)
    write(tmp_path / "train_mini.json", json.dumps({"images": [{"id": 3}]}))
    with pytest.raises(FieldmarkError, match="is not the JSON of iNaturalist"):
        read_inat_aves(tmp_path)


def test_sop_and_inshop_keep_their_authors_splits_and_roles(tmp_path):
    make_sop(tmp_path / "Stanford_Online_Products")
    rows = read_sop(tmp_path, replace(SOP, counts={"photos": 3}))
    assert [(row["label"], row["split"], row["attributes"]["kind"]) for row in rows] == [
        ("1", "train", "bicycle"), ("1", "train", "bicycle"), ("7", "test", "coffee maker"),
    ]  # fmt: skip
    for place in ({"listing": "list_eval_partition.txt", "img": ""}, {}):
        make_inshop(tmp_path / "inshop", **place)
        rows = read_inshop(tmp_path / "inshop", replace(INSHOP, counts={"photos": 4}))
        assert [(row["label"], row["split"], row["role"]) for row in rows] == [
            ("id_00000002", "train", "both"), ("id_00000002", "train", "both"),
            ("id_00000003", "test", "query"), ("id_00000003", "test", "gallery"),
        ]  # fmt: skip
        assert rows[3]["attributes"] == {"for": "MEN", "kind": "Jackets Vests"}
    write(tmp_path / "inshop" / "list_eval_partition.txt", "1", "header of it", "img/a.jpg id_1 val")
    with pytest.raises(FieldmarkError, match=r"gives img/a\.jpg the status 'val'"):
        read_inshop(tmp_path / "inshop")


def make_fashion(root: Path, records: list[dict[str, str]]) -> str:
    """Writes the catalogue; returns the fingerprint of its items."""
    root.mkdir(exist_ok=True)
    with (root / "catalog.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    for record in records:
        photo(root / record["image"])
    return hashlib.sha256("\n".join(sorted(record["item_id"] for record in records)).encode()).hexdigest()


def test_fashion_keeps_titles_in_one_part_and_a_teacher_apart(tmp_path):
    records = [
        {"image": f"photos/{number}.jpg", "item_id": str(number), "title": f"Shirt {number // 2}", "gender": "Men",
         "masterCategory": "Apparel", "subCategory": "Topwear", "articleType": ("Shirts", "Tops")[number % 4 // 2],
         "baseColour": "Blue", "season": "Fall", "usage": "Casual"}
        for number in range(36)
    ]  # fmt: skip
    items = make_fashion(tmp_path, records)
    small = replace(FASHION, counts={"photos": 36, "classes": 18})
    student, teacher = (read_fashion(tmp_path, part, small, items) for part in ("student", "teacher"))
    titles = {part: {row["title"] for row in student if row["split"] == part} for part in ("train", "test")}
    titles["teacher"] = {row["title"] for row in teacher}
    assert {part: len(found) for part, found in titles.items()} == {"train": 6, "test": 6, "teacher": 6}
    assert len(set.union(*titles.values())) == 18
    assert len(student) + len(teacher) == 36
    assert {row["split"] for row in teacher} == {"train"}
    assert all(row["label"] == row["title"] for row in student)
    for rows in (teacher, student):
        assert {row["attributes"]["kind"] for row in rows} == {"Shirts", "Tops"}
    assert set(student[0]["attributes"]) == {"kind", "colour", "gender", "usage", "season"}
    with pytest.raises(FieldmarkError, match="has other products"):
        read_fashion(tmp_path, "student", small, ITEMS)
    with pytest.raises(FieldmarkError, match="36 photos instead of 9,583"):
        load_catalog(f"fashion:{tmp_path}")
    make_fashion(tmp_path, [{"image": "photos/1.jpg", "item_id": "1"}])
    with pytest.raises(FieldmarkError, match="must be in every row"):
        read_fashion(tmp_path, "student")


def test_fashion_parts_do_not_change():
    kinds = {f"title {number}": f"kind {number % 7}" for number in range(70)}
    parts = title_parts(kinds)
    for kind in set(kinds.values()):
        found = Counter(parts[title] for title in kinds if kinds[title] == kind)
        assert max(found.values()) - min(found.values()) <= 1
    # a change of the parts makes every reported number another one
    listed = "\n".join(f"{title} {parts[title]}" for title in sorted(parts))
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "85a0f8ba85b6805a8f2098158d70ae1f2316fa994cdee048dd1ffa2a08335347"
    )


FASHION_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "fashion"


@pytest.mark.skipif(not FASHION_PHOTOS.is_dir(), reason="the fashion photos are not on this machine")
def test_the_real_fashion_catalogue():
    student, teacher = (load_catalog(f"fashion:{FASHION_PHOTOS}", part=part) for part in ("student", "teacher"))
    assert len(student) + len(teacher) == 9583 - len(LEFT_OUT)
    assert Counter(student["split"][:]) == {"train": 3248, "test": 3120}
    parts = {"teacher": teacher, **{name: select_split(student, name) for name in ("train", "test")}}
    files = {
        name: {hashlib.sha256(Path(image).read_bytes()).digest() for image in rows["image"][:]}
        for name, rows in parts.items()
    }
    titles = {name: set(rows["title"][:]) for name, rows in parts.items()}
    for a, b in (("teacher", "train"), ("teacher", "test"), ("train", "test")):
        assert not files[a] & files[b]
        assert not titles[a] & titles[b]
