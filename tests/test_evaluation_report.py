"""The report as text: the numbers as given, nothing fetched, nothing a label could break, pictures and charts."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.report import MAX_BYTES, write_report
from fieldmark.evaluation.report_charts import draw_chart, number_text
from fieldmark.evaluation.report_images import heat_uri, mass_inside, outline_uri, photo_uri

PARTS = ("result", "training", "neighbours", "confused", "teacher", "health", "cost", "settings")
EVIL = '<script>alert("x")</script> & "quoted" \'name\''


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every tag that opens is closed in order."""

    VOID = ("meta", "img", "br", "line", "circle", "path")

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.text += data


def photo(seed=0, size=(300, 200)):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
    return small.resize(size)


def noise(seed, side=180):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def a_pair(**changes):
    rng = np.random.default_rng(1)
    pair = {
        "images": (photo(1), photo(2)),
        "labels": ("wren", "robin"),
        "truth_same": False,
        "verdict_same": True,
        "words": ({"bill_colour": "black", "crown": "plain"}, {"bill_colour": "red", "crown": "plain"}),
        "teacher_attention": (rng.random((7, 7)), rng.random((7, 7))),
        "pooler_attention": (rng.random(49), rng.random(49)),
        "masks": (np.eye(224), np.eye(224)),
        "differing_attributes": ["bill_colour", "eye_ring"],
    }
    return pair | changes


FULL: dict[str, Any] = {
    "title": "SAGA on the aviary",
    "subtitle": "Trained on 100 species, measured on 100 others.",
    "table": [
        {
            "model": "start",
            "recall@1": {"value": 0.4127, "interval": (0.381, 0.444)},
            "map@r": 0.2,
            "nmi": 0.5,
            "nmi_std": 0.012,
            "n_queries": 1234,
            "n_gallery": 1510,
        },
        {
            "model": "SAGA",
            "recall@1": (0.5926, 0.0114),
            "map@r": 0.3,
            "n_queries": 1234,
            "n_gallery": 1510,
            "seconds": 61.5,
        },
    ],
    "curves": {
        "Loss": [(step, 1 / step) for step in range(1, 200)],
        "Recall@1": {"start": [(0, 0.41), (10, 0.42)], "SAGA": [(0, 0.41), (10, 0.59)]},
    },
    "notes": ["SAGA is better on 143 queries, worse on 88."],
    "galleries": [
        {
            "query": photo(3),
            "query_label": "wren",
            "results": [(photo(4), "wren", 0.912, True), (photo(5), "dunnock", 0.8, False)],
        }
    ],
    "confusions": [
        {
            "classes": ("dunnock", "wren"),
            "count": 14,
            "queries": 16,
            "differing": [("bill_shape", "hooked", "conical")],
            "examples": [
                {"query": (photo(6), "wren"), "wrong": (photo(7), "dunnock"), "missed": (photo(8), "wren")},
                {"query": (photo(9), "dunnock"), "wrong": (photo(10), "wren")},
            ],
        }
    ],
    "differing": {"SAGA": [{"differing": 1, "recall@1": 0.515, "n_queries": 1200}]},
    "pairs": [a_pair(), a_pair(verdict_same=None, words="{ broken json", masks=None, teacher_attention=None)],
    "health": {"Mixed groups": {"value": "45 %", "note": "only these teach"}, "Completion length": 61.25},
    "settings": {"learning_rate": 2e-5, "lambda": {"kl": 0.1}, "resume": False, "seeds": [0, 1], "student": None},
    "cost": {"Minutes": 11.0, "Peak memory GB": 3.1},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = write_report(tmp_path_factory.mktemp("run") / "deep" / "report.html", **FULL)
    return path.read_text(encoding="utf-8")


def test_nothing_is_fetched_and_only_the_one_script_runs(full):
    source = re.sub(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]+", "data:image/", full)
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|javascript:", source, re.IGNORECASE)
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", full, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in Page(full).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ")[:4] == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    for tag, attributes in Page(full).tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#"), tag
    assert all(uri.startswith("data:image/") for uri in re.findall(r"url\(([^)]*)\)", full))


def test_every_link_has_its_target_and_tags_are_balanced(full):
    page = Page(full)
    assert page.open == []
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    controls = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    lists = {attributes["data-filters"] for tag, attributes in page.tags if tag == "select"}
    assert lists == {"queries", "pairs"}
    assert controls == {"queries-filter", "pairs-filter"}
    assert links == targets - lists - controls == {*PARTS}


def test_numbers_are_shown(full):
    text = Page(full).text
    shown = ("41.3", "38.1 – 44.4", "59.3", "± 1.1", "50.0", "± 1.2", "61.5", "1,234 queries in a gallery of 1,510")
    for number in (*shown, "worse on 88", "14 of 16 queries", "51.5", "1,200 queries"):
        assert number in text
    for fact in ("0.912", "45 %", "only these teach", "61.2", "2e-05", "lambda.kl", "0, 1", "no", "11", "3.1"):
        assert fact in text
    assert "n_queries" not in text
    assert "nmi_std" not in text


def test_only_the_best_of_a_column_is_marked(full):
    marked = re.findall(r'<td class="best">([\d.]+)', full)
    assert marked == ["59.3", "30.0"]  # nmi was measured for one model only


def test_every_picture_has_words(full):
    page = Page(full)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    # gallery; confused classes; outlines; heat maps of both; of the pooler only
    assert len(pictures) == 3 + 5 + 2 * 3 + 2 * 2 + 2 * 1
    assert all(attributes.get("alt", "").strip() for attributes in pictures)
    drawn = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(drawn) == 2 + 4 + 1  # charts, photos of pairs, the colour scale
    assert all(attributes.get("aria-label", "").strip() for attributes in drawn)


def test_right_and_wrong_differ_by_more_than_colour(full):
    text = Page(full).text
    assert text.count("✓") == 2 + 1  # in the legend, at the hit, at the missed one
    assert text.count("✗") == 2 + 2 + 2  # in the legend, at the miss, at two found first, at both verdicts
    assert "Truth: different classes. Teacher: same class (wrong)." in text
    assert "Teacher: no valid answer." in text
    assert "1 of 2 right" in text


def test_attributes_of_a_pair_say_what_truly_differs(full):
    rows = re.findall(
        r'<tr class="([a-z ]*)"><th scope="row">(.*?)</th><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi></td>', full
    )
    shown = [(kind.split(), re.sub("<.*?>", "", name), left, right) for kind, name, left, right in rows]
    assert shown == [
        (["true", "told"], "≠bill colour", "black", "red"),
        (["true"], "≠eye ring", "–", "–"),
        ([], "crown", "plain", "plain"),
    ]
    assert "1 attribute described alike" in Page(full).text
    assert "{ broken json" in Page(full).text


def test_light_dark_and_phone(full):
    assert "prefers-color-scheme: dark" in full
    assert "prefers-reduced-motion" in full
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in full
    assert "@media (max-width:" in full


def test_labels_cannot_break_out(tmp_path):
    path = write_report(
        tmp_path / "r.html",
        title=EVIL,
        subtitle=EVIL,
        table=[{"model": EVIL, "recall@1": 0.5, EVIL: EVIL}],
        curves={EVIL: {EVIL: [(0, 1.0), (1, 2.0)]}},
        notes=[EVIL],
        galleries=[
            {
                "group": EVIL,
                "query": photo(),
                "query_label": EVIL,
                "results": {EVIL: [(photo(), EVIL, 0.5, True)]},
                "note": EVIL,
            }
        ],
        confusions=[
            {
                "classes": (EVIL, EVIL),
                "count": 1,
                "queries": 1,
                "differing": [(EVIL, EVIL, EVIL)],
                "examples": [{"query": (photo(), EVIL), "wrong": (photo(), EVIL)}],
            }
        ],
        differing={EVIL: [{"differing": 1, "recall@1": 0.5, "n_queries": 1}]},
        pairs=[a_pair(labels=(EVIL, EVIL), words={"item_1": {EVIL: EVIL}, "item_2": {EVIL: EVIL}}), a_pair(words=EVIL)],
        health={EVIL: {"value": EVIL, "note": EVIL}},
        settings={EVIL: {EVIL: EVIL}},
        cost={EVIL: EVIL},
    )
    source = path.read_text(encoding="utf-8")
    assert source.count("<script") == 1
    page = Page(source)
    assert page.open == []
    assert page.text.count(EVIL) > 30
    assert f"Query photo: {EVIL}" in [attributes.get("alt") for _, attributes in page.tags]


def test_photos_are_made_smaller_until_the_file_fits(tmp_path, monkeypatch):
    results = [(noise(i), "wren", 0.5, True) for i in range(8)]
    task: dict[str, Any] = {"title": "t", "galleries": [{"query": noise(9), "query_label": "wren", "results": results}]}
    large = write_report(tmp_path / "large.html", **task)
    limit = large.stat().st_size - 1
    monkeypatch.setattr("fieldmark.evaluation.report.MAX_BYTES", limit)
    small = write_report(tmp_path / "small.html", **task)
    assert limit / 3 < small.stat().st_size < limit < MAX_BYTES == 5_000_000
    widths = [{opened(uri).size[0] for uri in re.findall(r'src="(data:[^"]*)"', p.read_text())} for p in (large, small)]
    assert max(widths[1]) < min(widths[0])


def test_what_cannot_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fieldmark.evaluation.report.MAX_BYTES", 5_000)
    with pytest.raises(FieldmarkError, match="with 1 galleries, 0 confused classes, 0 candidate sets and 0 pairs"):
        write_report(tmp_path / "r.html", title="t", galleries=FULL["galleries"])  # its style alone takes more
    assert not (tmp_path / "r.html").exists()


def test_empty_parts_are_left_out(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="Nothing yet").read_text())
    assert not any(tag in ("section", "img", "table", "a") for tag, _ in page.tags)
    assert "Nothing yet" in page.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": [{"recall@1": 0.5}]}, "each needs 'model'"),
        ({"galleries": [{"query": "a.jpg", "query_label": "a", "results": []}]}, "is a str; give an opened PIL image"),
        ({"pairs": [a_pair(words=({"a": 1},))]}, "neither a text nor two"),
        ({"pairs": [a_pair(teacher_attention=(np.ones(48), np.ones(48)))]}, "attention has shape"),
        ({"pairs": [a_pair(pooler_attention=(-np.ones(49), np.ones(49)))]}, "negative"),
    ],
)
def test_malformed_parts_are_said_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(FieldmarkError, match=message) as raised:
        write_report(tmp_path / "r.html", title="t", **changes)
    assert "\n" not in str(raised.value)


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_photos_keep_their_shape():
    assert opened(photo_uri(photo(size=(300, 200)), 150, 80)).size == (150, 100)
    assert opened(photo_uri(Image.new("RGBA", (40, 20)), 150, 80)).size == (40, 20)


def test_heat_is_brightest_and_most_opaque_where_attention_is():
    weights = np.zeros((7, 7))
    weights[1, 5] = 0.3
    heat = np.asarray(opened(heat_uri(weights))).astype(float)
    cell = heat.shape[0] // 7
    row, column = np.unravel_index((heat[..., :3].sum(axis=-1) * heat[..., 3]).argmax(), heat.shape[:2])
    assert (row // cell, column // cell) == (1, 5)
    assert np.isfinite(np.asarray(opened(heat_uri(np.zeros(9))))).all()


def test_heat_is_clear_where_attention_is_even_or_less():
    even = np.asarray(opened(heat_uri(np.full((7, 7), 0.02))))[..., 3]
    assert even.max() == 0
    weights = np.full((7, 7), 0.9)
    weights[3, 3] = 1.1
    nearly_even = np.asarray(opened(heat_uri(weights)))[..., 3]
    assert 0 < nearly_even.max() < 80  # not stretched to the full ramp
    assert nearly_even[:8, :8].max() == 0


@pytest.mark.parametrize(("shape", "grid"), [((224, 224), (7, 7)), ((30, 20), (7, 6)), ((5, 5), (8, 8))])
def test_attention_inside_a_part_is_what_a_sum_over_pixels_says(shape, grid):
    rng = np.random.default_rng(0)
    mask, weights = rng.random(shape) < 0.3, rng.random(grid)
    # a fine raster, each point of which belongs to one token and one pixel of the mask
    fine = 120
    inside = total = 0.0
    for row in range(fine):
        for column in range(fine):
            y, x = (row + 0.5) / fine, (column + 0.5) / fine
            weight = weights[int(y * grid[0]), int(x * grid[1])]
            total += weight
            inside += weight * mask[int(y * shape[0]), int(x * shape[1])]
    assert mass_inside(weights, mask) == pytest.approx(inside / total, abs=0.01)
    assert mass_inside(None, mask) == pytest.approx(mask.mean())
    assert mass_inside(np.ones(grid), mask) == pytest.approx(mask.mean())


def test_attention_inside_the_parts_is_shown_beside_their_area(tmp_path):
    mask = np.zeros((70, 70))
    mask[10:20, 10:20] = 1  # the token (1, 1): 1/49 of the area
    looked = np.ones((7, 7))
    looked[1, 1] = 16  # 16 of 64
    pair = a_pair(masks=(mask, mask), teacher_attention=(looked, looked), pooler_attention=(np.ones(49), looked))
    text = Page(write_report(tmp_path / "r.html", title="t", pairs=[pair]).read_text(encoding="utf-8")).text
    assert "Teacher 25 %, Pooler 14 % of attention inside the outlined part, which covers 2 % of the photo." in text
    assert "mean over 2 photos" in text


def test_photos_at_which_nobody_looked_are_left_out_of_the_mean(tmp_path):
    mask, looked, nowhere = np.zeros((70, 70)), np.ones((7, 7)), np.zeros((7, 7))
    mask[:35] = 1
    pairs = [
        a_pair(masks=(mask, mask), teacher_attention=(looked, nowhere), pooler_attention=(looked, looked)),
        a_pair(masks=(mask, mask), teacher_attention=None),
        a_pair(masks=(np.zeros((7, 7)), None), teacher_attention=(looked, looked)),
    ]
    text = Page(write_report(tmp_path / "r.html", title="t", pairs=pairs).read_text(encoding="utf-8")).text
    assert "50 %mean over 1 photo " in " ".join(text.split())


def test_outline_follows_the_border_and_leaves_the_inside_free():
    mask = np.zeros((224, 224), dtype=bool)
    mask[60:120, 80:160] = True
    opacity = np.asarray(opened(outline_uri(mask)))[..., 3]
    assert opacity[90, 120] == 0
    assert opacity[20, 20] == 0
    assert (opacity[59, 85:155] > 0).all()
    assert np.asarray(opened(outline_uri(np.zeros((7, 7)))))[..., 3].max() == 0


def charted(points):
    chart = draw_chart("x", points if isinstance(points, dict) else {"": points})
    assert chart is not None
    return chart


def places(path):
    return [tuple(map(float, point.split())) for point in path[1:].split("L")]


def test_lines_go_where_the_numbers_are():
    chart = charted({"a": [(0, 1.0), (5, float("nan")), (10, 3.0), (20, 2.0)], "b": [(20, 1.0)]})
    (x0, y0), (x1, y1), (x2, y2) = places(chart.lines[0].smooth)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.3)
    assert places(chart.lines[1].smooth) == [(x2, y0)]
    assert "a: from 1 at step 0 to 2 at step 20" in chart.summary
    assert draw_chart("x", {"a": [(0, float("inf"))]}) is None


@pytest.mark.parametrize("points", [[(0, 0.0)], [(3, 5.0), (4, 5.0)], [(0, -1e-9), (1, 1e9)], [(7, -2.0), (7, -3.0)]])
def test_any_points_stay_inside_the_chart(points):
    chart = charted(points)
    for x, y in places(chart.lines[0].smooth):
        assert 0 <= x <= 340
        assert 0 <= y <= 190
    assert len(chart.ticks_y) >= 2


@pytest.mark.parametrize("points", [[(1, 10.68), (2, 10.67)], [(1, 12345.6), (2, 12345.9)], [(1, 0.2), (2, 0.9)]])
def test_every_tick_has_its_own_number(points):
    ticks = charted(points).ticks_y
    assert len({text for _, text in ticks}) == len(ticks)
    assert float(ticks[0][1].replace(",", "")) <= min(value for _, value in points)
    assert float(ticks[-1][1].replace(",", "")) >= max(value for _, value in points)


def test_long_noisy_lines_are_smoothed_to_their_running_mean():
    rng = np.random.default_rng(0)
    chart = charted([(i, 5 + rng.normal()) for i in range(2000)])
    raw, smooth = places(chart.lines[0].raw), places(chart.lines[0].smooth)
    assert len(raw) == len(smooth) == 300
    assert np.std([y for _, y in smooth]) < 0.4 * np.std([y for _, y in raw])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1234.0, "1,234"),
        (0.12345, "0.123"),
        (61.25, "61.2"),
        (2e-5, "2e-05"),
        (12345.6, "12,346"),
        (0.5, "0.5"),
    ],
)
def test_numbers_read_well(value, text):
    assert number_text(value) == text
