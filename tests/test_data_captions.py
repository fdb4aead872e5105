"""Readers of captioned photos and of groups on small folders of the same layout, and the aviary's groups."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict

import pytest

from fieldmark.commands.evaluate import one_row_a_photo
from fieldmark.data.aviary import ATTRIBUTES, marks_that_differ, species, species_of_uri
from fieldmark.data.aviary.groups import aviary_groups
from fieldmark.data.captions import Group, read_coco, read_flickr30k, read_groups
from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.data.photos import open_photo
from fieldmark.data.sources import SOURCES
from fieldmark.errors import FieldmarkError

COCO_PHOTOS = [
    ("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test"), ("val2014", "test"),
]  # fmt: skip


def write_karpathy(path, photos, captions=2):
    """The fields of Karpathy's JSON; photos as (subfolder or None, name, split)."""
    images, sentence = [], 500
    for number, (subfolder, name, split) in enumerate(photos):
        sentences = []
        for _ in range(captions):
            raw = f"A photo \n of thing {number}, said {sentence}. "
            sentences.append({"tokens": raw.split(), "raw": raw, "imgid": number, "sentid": sentence})
            sentence += 1
        image = {"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": []}
        images.append(image if subfolder is None else image | {"filepath": subfolder, "cocoid": 90 + number})
    path.write_text(json.dumps({"images": images, "dataset": "x"}), encoding="utf-8")


def coco_folder(tmp_path, inside="."):
    photos = [(folder, f"COCO_{folder}_{number}.jpg", split) for number, (folder, split) in enumerate(COCO_PHOTOS)]
    for folder, name, _ in photos:
        (tmp_path / inside / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / inside / folder / name).write_bytes(b"photo")
    write_karpathy(tmp_path / "dataset_coco.json", photos)
    return photos


@pytest.mark.parametrize("inside", [".", "images"])
def test_coco_is_one_row_a_caption(tmp_path, caplog, inside):
    photos = coco_folder(tmp_path, inside)
    rows = read_coco(tmp_path)
    assert Counter(row["split"] for row in rows) == {"train": 4, "val": 2, "test": 4}
    assert rows[2] == {
        "item_id": "1-502",
        "image": str(tmp_path / inside / "val2014" / photos[1][1]),
        "label": "1",
        "title": "A photo of thing 1, said 502.",
        "split": "train",
    }
    assert len({row["item_id"] for row in rows}) == 10
    assert rows[2]["image"] == rows[3]["image"]
    assert "has 2 test photos with 4 captions where 5000 with 25010 are published" in caplog.text


def test_captioned_photos_are_a_catalogue(tmp_path):
    coco_folder(tmp_path)
    catalog = load_catalog(f"coco:{tmp_path}")
    assert len(catalog) == 10
    test = select_split(catalog, "test")
    assert test["label"][:] == ["3", "3", "4", "4"]
    assert test[0]["title"] == "A photo of thing 3, said 506."
    assert "coco" in SOURCES


def test_evaluation_asks_with_each_photo_once(tmp_path):
    coco_folder(tmp_path)
    rows = load_catalog(f"coco:{tmp_path}")
    photos = one_row_a_photo(rows)
    assert len(photos) < len(rows)
    assert sorted(photos["image"]) == sorted(set(rows["image"]))
    assert one_row_a_photo(photos) is photos


def test_coco_for_evaluation_alone_has_no_train_split(tmp_path, caplog):
    coco_folder(tmp_path)
    for path in (tmp_path / "train2014").iterdir():
        path.unlink()
    rows = read_coco(tmp_path)
    assert Counter(row["split"] for row in rows) == {"val": 2, "test": 4}
    assert "there is no train split" in caplog.text


def test_flickr30k_finds_its_photos_and_is_quiet_about_right_counts(tmp_path, caplog):
    photos = [(None, f"{number}.jpg", "test") for number in range(1000)] + [(None, "a.jpg", "train")]
    (tmp_path / "Images").mkdir()
    for _, name, _ in photos:
        (tmp_path / "Images" / name).touch()
    write_karpathy(tmp_path / "dataset_flickr30k.json", photos, captions=5)
    with caplog.at_level(logging.WARNING):
        rows = read_flickr30k(tmp_path)
    assert not caplog.records
    assert Counter(row["split"] for row in rows) == {"test": 5000, "train": 5}
    assert rows[0]["image"] == str(tmp_path / "Images" / "0.jpg")


def test_missing_pieces_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(FieldmarkError, match=r"is no folder; give the one that holds dataset_coco\.json"):
        read_coco(tmp_path / "nowhere")
    with pytest.raises(FieldmarkError, match=r"holds no dataset_flickr30k\.json; get Karpathy's splits from the page"):
        read_flickr30k(tmp_path)
    photos = coco_folder(tmp_path)
    (tmp_path / "val2014" / photos[4][1]).unlink()
    with pytest.raises(FieldmarkError, match=r"lacks 1 of 5 listed photos \(COCO_val2014_4\.jpg.*COCO download page"):
        read_coco(tmp_path)
    for path in (*(tmp_path / "val2014").iterdir(), *(tmp_path / "train2014").iterdir()):
        path.unlink()
    with pytest.raises(FieldmarkError, match="lacks 5 of 5 listed photos"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"images": [{"filename": "a"}]}', '{"images": [{"filename": "a", "split": "new"}]}']
)
def test_another_json_is_refused(tmp_path, text):
    (tmp_path / "dataset_coco.json").write_text(text, encoding="utf-8")
    with pytest.raises(FieldmarkError, match="is not Karpathy's listing"):
        read_coco(tmp_path)


GROUP = {"image_0": "a.jpg", "image_1": "sub/b.jpg", "caption_0": "a dog on a cat", "caption_1": "a cat on a dog"}


def write_groups(tmp_path, *lines):
    (tmp_path / "sub").mkdir(exist_ok=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / name).write_bytes(b"photo")
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_groups_are_read(tmp_path):
    drawn = GROUP | {"image_0": aviary_groups("test", 1)[0].image_0, "category": "swap", "tag": "other"}
    first, second = read_groups(write_groups(tmp_path, GROUP, "", drawn))
    assert first == Group(str(tmp_path / "a.jpg"), str(tmp_path / "sub/b.jpg"), "a dog on a cat", "a cat on a dog")
    assert second.image_0.startswith("aviary://")
    assert second.category == "swap"
    assert first.images == (first.image_0, first.image_1)
    assert first.captions == ("a dog on a cat", "a cat on a dog")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is a list"),
        ({k: v for k, v in GROUP.items() if k != "caption_1"}, "line 2 has caption_1 None"),
        (GROUP | {"caption_0": "  "}, "line 2 has caption_0 '  '"),
        (GROUP | {"image_0": 3}, "line 2 has image_0 3"),
        (GROUP | {"image_1": "c.jpg"}, r"line 2 has image_1 'c\.jpg', which is not there"),
        (GROUP | {"image_1": "http://x/c.jpg"}, "which is not there"),
        (GROUP | {"category": 1}, "line 2 has category 1"),
        (GROUP | {"caption_1": GROUP["caption_0"]}, "line 2 has twice the caption"),
    ],
)
def test_mistakes_in_groups_name_their_line(tmp_path, line, words):
    with pytest.raises(FieldmarkError, match=words):
        read_groups(write_groups(tmp_path, GROUP, line))


def test_no_groups_are_a_mistake(tmp_path):
    with pytest.raises(FieldmarkError, match="is no file"):
        read_groups(tmp_path / "none.jsonl")
    with pytest.raises(FieldmarkError, match="holds no group"):
        read_groups(write_groups(tmp_path, "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FieldmarkError, match="no UTF-8"):
        read_groups(tmp_path / "bytes.jsonl")


@pytest.mark.parametrize("part", ["test", "train"])
def test_aviary_groups_differ_in_the_one_mark_of_their_category(part):
    groups = aviary_groups(part, 200, seed=3)
    members = {one.name for one in species(part)}
    for group in groups:
        one, other = (species_of_uri(uri) for uri in group.images)
        assert {one.name, other.name} <= members
        assert marks_that_differ(one, other) == [group.category]
        words = [Counter(caption.replace(",", "").split()) for caption in group.captions]
        # all but the mark is said in the same words: "a wing patch" stands against "plain wings" or "two wing bars"
        assert all(1 <= (words[a] - words[1 - a]).total() <= 3 for a in (0, 1))
    turns = Counter(group.category for group in groups)
    assert set(turns) == set(ATTRIBUTES)
    assert max(turns.values()) - min(turns.values()) <= 1
    photos = [uri for group in groups for uri in group.images]
    assert len(set(photos)) == len(photos)


def test_aviary_groups_are_found_again_by_their_seed():
    groups = aviary_groups("test", 30, seed=1)
    assert aviary_groups("test", 30, seed=1) == groups
    assert aviary_groups("test", 12, seed=1) == groups[:12]
    assert aviary_groups("test", 30, seed=2) != groups
    first = sum(species_of_uri(g.image_0).name < species_of_uri(g.image_1).name for g in aviary_groups("test", 200))
    assert 60 < first < 140  # which bird comes first says nothing
    with pytest.raises(FieldmarkError, match="0 aviary groups"):
        aviary_groups("test", 0)
    with pytest.raises(FieldmarkError, match="no part 'val'"):
        aviary_groups("val", 3)


def test_captions_of_a_group_name_the_values_that_differ():
    for group in aviary_groups("test", 60):
        one, other = (species_of_uri(uri) for uri in group.images)
        if group.category in ("crown_colour", "leg_colour", "tail_tip"):
            for bird, caption, wrong in ((one, *group.captions), (other, *group.captions[::-1])):
                assert bird.attributes[group.category] in caption
                assert caption != wrong


def test_aviary_groups_can_be_written_read_and_drawn(tmp_path):
    groups = aviary_groups("test", 2)
    assert read_groups(write_groups(tmp_path, *(asdict(group) for group in groups))) == groups
    assert open_photo(groups[0].image_0).mode == "RGB"
