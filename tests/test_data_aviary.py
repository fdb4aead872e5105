"""The aviary: its species, photos, masks, uris and titles."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fieldmark.data import aviary
from fieldmark.data.aviary import drawing
from fieldmark.errors import FieldmarkError

PARTS = ("teacher", "train", "test")
# How a title may name marks, written apart from the code that makes titles: one pattern a phrase.
PHRASES = [
    r"(?P<body_shape>slim|round|long-necked|large-headed) body",
    r"(?P<crown_colour>\w+) crown",
    r"(?P<eye_ring>\w+) eye ring",
    r"((?P<bill_shape>conical|straight|hooked|curved|spoon-shaped) )?((?P<bill_colour>\w+) )?bill",
    r"((?P<breast_pattern>plain|spotted|streaked|banded|bibbed) )?((?P<breast_colour>\w+) )?breast",
    r"(?P<back_colour>\w+) back",
    r"(?P<wing_bars>plain wings|one wing bar|two wing bars|a wing patch)",
    r"(?P<tail_shape>\w+) tail",
    r"(?P<tail_tip>\w+) tail tip",
    r"(?P<leg_colour>\w+) legs",
]
SPOKEN = {"spoon-shaped": "spoon", "bibbed": "bib", "no": "none", "plain wings": "none"}
SPOKEN |= {"one wing bar": "one", "two wing bars": "two", "a wing patch": "patch"}


def dilated(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Mask grown by a square of the given half width, by plain shifts."""
    size = mask.shape[0]
    padded = np.pad(mask, pixels)
    grown = np.zeros_like(mask)
    for dy in range(0, 2 * pixels + 1):
        grown |= padded[dy : dy + size, pixels : pixels + size]
    padded = np.pad(grown, pixels)
    wide = np.zeros_like(mask)
    for dx in range(0, 2 * pixels + 1):
        wide |= padded[pixels : pixels + size, dx : dx + size]
    return wide


@pytest.mark.parametrize(("part", "least"), [("teacher", 140), ("train", 100), ("test", 100)])
def test_each_part_has_enough_species_with_valid_marks(part: str, least: int) -> None:
    members = aviary.species(part)
    assert len(members) >= least
    for one in members:
        assert list(one.attributes) == list(aviary.ATTRIBUTES)
        assert all(value in aviary.ATTRIBUTES[name] for name, value in one.attributes.items())
        assert one.habitat in aviary.HABITATS
        assert len(one.name.split()) == 2


def test_species_are_distinct_over_all_parts() -> None:
    everyone = [one for part in PARTS for one in aviary.species(part)]
    assert len({one.name for one in everyone}) == len(everyone)
    assert len({one.slug for one in everyone}) == len(everyone)
    assert len({tuple(one.attributes.values()) for one in everyone}) == len(everyone)
    # families of different parts share no surname and stay three marks apart
    for a_part, b_part in (("teacher", "train"), ("teacher", "test"), ("train", "test")):
        a, b = aviary.species(a_part), aviary.species(b_part)
        assert not {one.name.split()[1] for one in a} & {one.name.split()[1] for one in b}
        assert min(len(aviary.marks_that_differ(x, y)) for x in a for y in b) >= 3


@pytest.mark.parametrize("part", PARTS)
def test_every_value_occurs_and_every_mark_separates_some_pair(part: str) -> None:
    seen = {(name, value) for one in aviary.species(part) for name, value in one.attributes.items()}
    assert seen == {(name, value) for name, values in aviary.ATTRIBUTES.items() for value in values}
    pairs = aviary.one_mark_pairs(part)
    assert len(pairs) >= 100
    assert {mark for _, _, mark in pairs} == set(aviary.ATTRIBUTES)
    for a, b, mark in pairs:
        assert [name for name in aviary.ATTRIBUTES if a.attributes[name] != b.attributes[name]] == [mark]


def test_the_table_of_species_is_the_one_that_shipped_models_have_seen() -> None:
    """Weights are made from these species: a changed table would mix the teacher's species with the student's."""
    table = [(part, one.name, one.habitat, one.attributes) for part in PARTS for one in aviary.species(part)]
    assert hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16] == "27d05eac02ea7204"


def test_a_photo_depends_on_species_seed_and_split_alone() -> None:
    one, other = aviary.species("train")[:2]
    photo = aviary.draw_photo(one, 5).tobytes()
    assert aviary.draw_photo(one, 5).tobytes() == photo
    assert aviary.draw(one, 5).image.tobytes() == photo
    assert aviary.draw_photo(one, 6).tobytes() != photo
    assert aviary.draw_photo(one, 5, split="test").tobytes() != photo
    assert aviary.draw_photo(other, 5).tobytes() != photo


def test_another_process_draws_the_same_bytes() -> None:
    uri = aviary.uri_of(aviary.species("test")[7], 3, "test")
    code = (
        "import hashlib; from fieldmark.data import aviary; "
        f"print(hashlib.sha256(aviary.draw_uri({uri!r}).tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    assert run.stdout.decode().strip() == hashlib.sha256(aviary.draw_uri(uri).tobytes()).hexdigest()


def test_nothing_but_the_marks_tells_the_species() -> None:
    """Two names with equal marks give equal pixels once pose, light and the rest are equal."""
    one = aviary.species("test")[0]
    namesake = replace(one, name="Other Name", habitat=next(h for h in aviary.HABITATS if h != one.habitat))
    for seed in range(5):
        photos = [aviary.draw_photo(bird, seed, split="test", nuisance_key="shared") for bird in (one, namesake)]
        assert photos[0].tobytes() == photos[1].tobytes()


@pytest.mark.parametrize("mark", list(aviary.ATTRIBUTES))
def test_one_mark_changes_its_own_part_only(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before lens and JPEG, which spread any change a few pixels: no pixel outside the marked part may move."""
    monkeypatch.setattr(drawing, "_camera", lambda image, nuisance: image)
    for seed, (a, b) in enumerate(pairs_of(mark)):
        part, change = change_between(a, b, mark, seed)
        assert (change > 40).sum() >= 80, f"{mark} of {a.name} and {b.name} is hardly to be seen"
        # the dark edge of a part lies around it; slivers thinner than a pixel and an edge that looks out from behind a
        # twig, the part itself being hidden, are no pixels of the mask
        elsewhere = (change[~dilated(part, 4)] > 0).sum()
        assert elsewhere <= (16 if mark == "body_shape" else 4), f"{mark} of {a.name} and {b.name} shows elsewhere"


@pytest.mark.parametrize("mark", ["eye_ring", "bill_shape", "tail_tip", "wing_bars"])
def test_finished_photos_differ_near_the_mark_only(mark: str) -> None:
    for seed, (a, b) in enumerate(pairs_of(mark)):
        part, change = change_between(a, b, mark, seed)
        assert (change > 32).sum() >= 25
        assert not change[~dilated(part, 22)].any()  # JPEG codes blocks of 16 pixels


def pairs_of(mark: str) -> list[tuple[aviary.Species, aviary.Species]]:
    return [(a, b) for part in PARTS for a, b, name in aviary.one_mark_pairs(part) if name == mark][::8]


def change_between(a: aviary.Species, b: aviary.Species, mark: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(where either bird carries the mark, largest change over the channels) of two photos taken alike."""
    first, second = (aviary.draw(one, seed, split="test", nuisance_key="pair") for one in (a, b))
    change = np.abs(np.asarray(first.image, int) - np.asarray(second.image, int)).max(2)
    return first.masks[mark] | second.masks[mark], change


def test_masks_show_where_the_marks_are() -> None:
    shown: Counter[str] = Counter()
    areas: dict[str, list[int]] = {name: [] for name in aviary.ATTRIBUTES}
    members = aviary.species("train")
    for seed, one in enumerate(members[::2]):
        shot = aviary.draw(one, seed)
        assert list(shot.masks) == list(aviary.ATTRIBUTES)
        for name, mask in shot.masks.items():
            assert mask.shape == (224, 224)
            assert mask.dtype == bool
            shown[name] += bool(mask.any())
            areas[name].append(int(mask.sum()))
        union = np.logical_or.reduce(list(shot.masks.values()))
        assert (union == shot.masks["body_shape"]).all()
        ys, xs = np.nonzero(union)
        assert max(np.ptp(ys), np.ptp(xs)) >= 0.5 * 224
        own = [shot.masks[name].astype(int) for name in ("bill_colour", "crown_colour", "breast_colour", "back_colour")]
        own += [shot.masks[name].astype(int) for name in ("tail_tip", "leg_colour")]
        assert np.sum(own, 0).max() == 1  # parts do not overlap
    drawn = len(members[::2])
    assert all(shown[name] >= 0.95 * drawn for name in aviary.ATTRIBUTES)
    assert all(np.quantile(areas[name], 0.05) >= 100 for name in aviary.ATTRIBUTES), "a mark is under 10 x 10 pixels"


def test_colours_are_where_the_mask_says() -> None:
    """The mean colour under the crown's mask follows the crown's value, whatever the light."""
    base = aviary.species("test")[0]
    for seed in range(8):
        means = {}
        for value in aviary.ATTRIBUTES["crown_colour"]:
            bird = replace(base, attributes={**base.attributes, "crown_colour": value})
            shot = aviary.draw(bird, seed, split="test", nuisance_key="crown")
            means[value] = np.asarray(shot.image, float)[shot.masks["crown_colour"]].mean(0)
        assert max(means, key=lambda v: means[v].sum()) == "white"
        assert min(means, key=lambda v: means[v].sum()) == "black"
        for value, channel in (("red", 0), ("green", 1), ("blue", 2)):
            assert means[value].argmax() == channel


def test_masks_fit_other_sizes() -> None:
    one = aviary.species("test")[3]
    small, large = (aviary.draw(one, 1, split="test", size=size) for size in (112, 224))
    assert small.image.size == (112, 112)
    reduced = large.masks["body_shape"].reshape(112, 2, 112, 2).mean((1, 3)) > 0.5
    both = (reduced & small.masks["body_shape"]).sum() / (reduced | small.masks["body_shape"]).sum()
    assert both > 0.9


@pytest.mark.parametrize(
    ("split", "low", "high"), [("train", 0.86, 0.97), ("test", 0.05, 0.25), ("teacher", 0.05, 0.25)]
)
def test_habitat_follows_the_species_in_training_photos_only(split: str, low: float, high: float) -> None:
    photos = [(one, seed) for one in aviary.species("train")[::3] for seed in range(5)]
    at_home = [aviary.draw(one, seed, split=split, size=32).habitat == one.habitat for one, seed in photos]
    assert low <= np.mean(at_home) <= high


def test_uris_name_photos() -> None:
    one = aviary.species("teacher")[4]
    uri = aviary.uri_of(one, 12, "teacher")
    assert uri == f"aviary://teacher/{one.slug}/12"
    photo = aviary.draw_uri(uri)
    assert (photo.mode, photo.size) == ("RGB", (224, 224))
    assert photo.tobytes() == aviary.draw_photo(one, 12, split="teacher").tobytes()
    assert aviary.draw_with_masks_uri(uri).image.tobytes() == photo.tobytes()
    assert aviary.species_of_uri(uri) == one


@pytest.mark.parametrize(
    "uri",
    [
        "aviary://",
        "aviary://test/no-such-bird/1",
        "aviary://val/{slug}/1",
        "aviary://test/{slug}",
        "aviary://test/{slug}/x",
        "x",
    ],
)
def test_wrong_uris_are_refused(uri: str) -> None:
    with pytest.raises(FieldmarkError) as error:
        aviary.draw_uri(uri.format(slug=aviary.species("test")[0].slug))
    assert "\n" not in str(error.value)


def test_wrong_requests_are_refused() -> None:
    one = aviary.species("test")[0]
    for request in (
        lambda: aviary.species("val"),
        lambda: aviary.draw(one, 0, split="val"),
        lambda: aviary.draw_photo(one, 0, size=4000),
        lambda: aviary.aviary_rows("train", 0),
        lambda: aviary.contact_sheet([], 3),
    ):
        with pytest.raises(FieldmarkError):
            request()


@pytest.mark.parametrize("part", PARTS)
def test_rows_are_a_catalogue(part: str) -> None:
    rows = aviary.aviary_rows(part, 2)
    assert len(rows) == 2 * len(aviary.species(part))
    assert all(list(row) == ["item_id", "image", "label", "title", "attributes", "split", "role"] for row in rows)
    assert len({row["item_id"] for row in rows}) == len({row["image"] for row in rows}) == len(rows)
    assert {row["split"] for row in rows} == {"test" if part == "test" else "train"}
    for row in rows:
        one = aviary.species_of_uri(row["image"])
        assert (row["label"], row["attributes"]) == (one.name, one.attributes)
    assert rows == aviary.aviary_rows(part, 2)


def test_titles_name_some_marks_truly_and_leave_others_out() -> None:
    titles = set()
    for row in aviary.aviary_rows("train", 2):
        title = row["title"]
        assert not any(word in title.lower() for word in row["label"].lower().split())
        words = re.sub(r"^(\w+ )*[Bb]ird( with| showing|,|:) ", "", title)
        told: dict[str, str] = {}
        for phrase in re.split(r", | and ", words):
            (match,) = [found for pattern in PHRASES if (found := re.fullmatch(pattern, phrase))]
            told |= {name: SPOKEN.get(value, value) for name, value in match.groupdict().items() if value}
        assert 3 <= len(told) <= 5, title
        assert told.items() <= row["attributes"].items(), title
        titles.add(title)
    assert len(titles) > 200


def test_contact_sheet_lays_out_rows() -> None:
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (224, 100), "blue")
    sheet = aviary.contact_sheet([(red, "a"), (blue, "b" * 200), (red, "c")], 2, cell=40, gap=4, font_size=10)
    assert sheet.size == (4 + 2 * 44, 4 + 2 * (44 + 15))
    assert sheet.getpixel((24, 24)) == (255, 0, 0)
    assert sheet.getpixel((68, 24)) == (0, 0, 255)
    assert sheet.getpixel((24, 24 + 59)) == (255, 0, 0)
    assert sheet.getpixel((68, 24 + 59)) == (255, 255, 255)
