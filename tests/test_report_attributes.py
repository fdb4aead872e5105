"""The report's parts about attributes: their numbers against slow loops, their order, and how a browser shows them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fieldmark.data.catalog import load_catalog
from fieldmark.evaluation.report import MAX_BYTES, write_report
from fieldmark.evaluation.report_attributes import (
    AttributeFindings,
    ChangedNames,
    EnrichedQueries,
    HardQuery,
    MaskedPair,
    Negative,
    Negatives,
    TwoAnswers,
    enriched_view,
    names_view,
)
from fieldmark.evaluation.report_table import table_view
from fieldmark.losses.bm25 import BM25, bm25_scores
from fieldmark.methods import afmrl_negatives
from fieldmark.methods.afmrl_negatives import look_at_negatives, partners
from fieldmark.methods.afmrl_report import changed_answers, changed_names, gains
from fieldmark.methods.agcl import AgclConfig, ProductTask
from fieldmark.teacher.attribute_labels import items_of

EVIL = "<b>wren</b> & <img src=x onerror=alert(1)>"
LONG = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft"
PARTS = ["enrichment", "attributes", "negatives", "masked"]
COLOURS = ("red", "blue", "green", "grey")


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def made_negatives(side: int = 64, masked: int = 2) -> Negatives:
    near = [Negative(noise(i, side), (EVIL, LONG)[i % 2], 0.9, 0.5, ["red"] * (i % 2)) for i in range(6)]
    hard = [HardQuery(noise(7, side), LONG, {"for": [EVIL, LONG]}, 0.8, near)] * 6
    pair = MaskedPair((EVIL, LONG, "wren"), (noise(8, side), noise(9, side), noise(10, side)), 0.1, 0.9)
    return Negatives(1000, 900, 0.4, hard, [pair] * masked, masked, 12345, -0.25)


def made_findings(side: int = 64, **changes: Any) -> AttributeFindings:
    answers = TwoAnswers(noise(1, side), EVIL, ("", LONG), ({LONG: EVIL, "kept": "x"}, {"kept": "x", "new": [LONG]}))
    parts: dict[str, Any] = {
        "enriched": [EnrichedQueries("distilled generator", 0.5, 0.45, 1.25, 0.9)],
        "names": ChangedNames({LONG: 3, EVIL: 4}, {EVIL: 2}, (4, 4)),
        "answers": [answers] * 6,
        "negatives": made_negatives(side),
    }
    return AttributeFindings(**{**parts, **changes})


# -- views


def test_gains_and_costs_stand_side_by_side():
    rows = enriched_view([EnrichedQueries("a", 0.5, 0.561, 1.234, 0.9), EnrichedQueries("b", 0.5, 0.44, None, 1.0)])
    shown = [[row[key] for key in ("name", "recall", "gain", "seconds", "valid")] for row in rows]
    assert shown == [
        ["no attributes", "50.0", "–", "–", "–"],
        ["a", "56.1", "+6.1", "1.23 s", "90.0 %"],
        ["b", "44.0", "−6.0", "–", "100.0 %"],
    ]
    assert enriched_view([EnrichedQueries("a", 0.5, 0.5, 1.0, 1.0)])[1]["gain"] == "0.0"
    assert enriched_view([]) == []


def test_names_that_changed_most_come_first():
    """In shares of the items that each generator answered about, not in counts."""
    view = names_view(ChangedNames({"gone": 5, "same": 10, "less": 8}, {"same": 20, "less": 8, "new": 1}, (10, 20)))
    assert view is not None
    assert [(row["name"], row["fate"], row["change"]) for row in view["rows"]] == [
        ("gone", "dropped", "−50"),
        ("less", "", "−40"),
        ("new", "new", "+5"),
        ("same", "", "0"),
    ]
    assert [[cell["count"], cell["share"]] for cell in view["rows"][1]["cells"]] == [["8", 80.0], ["8", 40.0]]
    assert view["mean"] == ["2.3", "1.45"]
    many = names_view(ChangedNames({f"n{i}": 1 for i in range(30)}, {}, (30, 0)))
    assert many is not None
    assert (len(many["rows"]), many["left_out"]) == (24, 6)


def test_products_and_categories_are_headed_and_shown_in_per_cent():
    values = {"instance_recall@1": 0.25, "instance_ndcg@10": 0.5, "coarse_map@10": 0.75}
    view = table_view([{"model": "a", **values}])
    assert view is not None
    assert view["columns"] == ["Product R@1", "Product NDCG@10", "Category mAP@10"]
    assert [cell["text"] for cell in view["rows"][0]["cells"]] == ["25.0", "50.0", "75.0"]
    assert "own product" in view["about"]
    assert "category" in view["about"]


def test_gains_are_of_the_rows_that_were_run():
    ladder = {"agcl": {"instance_recall@1": 0.5}, "agcl + RL generator": {"instance_recall@1": 0.75}}
    asked = {stage: {"seconds_per_item": 2.0, "valid": 0.5} for stage in ("attributes", "rl_attributes")}
    assert gains(ladder, asked) == [EnrichedQueries("RL generator", 0.5, 0.75, 2.0, 0.5)]
    assert gains({"agcl": {}}, asked) == []


# -- answers


def birds(labels: list[str | None]) -> datasets.Dataset:
    """A drawn bird an item."""
    photos = load_catalog("aviary:2")["image"][: len(labels)]
    return datasets.Dataset.from_dict(
        {"image": photos, "label": labels, "title": [f"title {i}" for i in range(len(labels))]}
    )


def test_changed_answers_are_of_items_that_both_answered():
    rows = birds(["a", "a", "b", "b"])
    items = items_of(rows)
    before = {item: ("old", {"x": "1", "y": str(i)}) for i, item in enumerate(items)}
    after = {items[0]: ("new", {"x": "1", "y": "0"}), items[1]: ("new", {"z": "1"}), items[2]: ("new", {"x": "2"})}
    task = ProductTask(rows, rows, [None] * 4, [None] * 4, ("product",), [])
    found = changed_answers(task, before, after, seed=0)
    assert [one.title for one in found] == ["title 1", "title 2"], "most names apart first; 0 is as it was, 3 unknown"
    assert found[0].attributes == ({"x": "1", "y": "1"}, {"z": "1"})
    assert found[0].thoughts == ("old", "new")
    names = changed_names(before, after)
    assert (dict(names.before), dict(names.after), names.items) == ({"x": 4, "y": 4}, {"x": 2, "y": 1, "z": 1}, (4, 3))


# -- negatives


def test_a_match_is_another_item_of_the_product():
    labels = ["a", "b", None, "a", None, "a"]
    queries, positive = partners(labels, 0)
    assert queries == [0, 3, 5]
    assert all(labels[match] == "a" and match != query for query, match in zip(queries, positive, strict=True))


def settings(**changes: Any) -> AgclConfig:
    return AgclConfig(**{"data": "d", "out": "o", "attributes": "catalogue", "delta": 0.3, **changes})


@pytest.mark.parametrize("scale", ["raw", "self"])
def test_negatives_are_those_of_a_slow_loop(monkeypatch, scale):
    labels = ["a", "a", "b", "b", "b", "c", "d", None, "e", "e", "f", "f"]
    rows = birds(labels)
    titles = rows["title"][:]
    titles[6] = titles[0]  # an equal title is no negative
    rows = rows.remove_columns("title").add_column("title", titles)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    attributes = [{"colour": COLOURS[i % 4], "size": f"{i % 3} cm"} for i in range(11)] + [None]
    seen: list[tuple[bool, bool]] = []

    def encode(student, *, images, texts, progress):
        seen.append((images is not None, texts is not None))
        return vectors.astype(np.float32)

    monkeypatch.setattr(afmrl_negatives, "encode_items", encode)
    task = ProductTask(rows, rows, attributes, [None] * 12, ("image-text", "product"), [])
    found = look_at_negatives(None, task, settings(bm25_scale=scale))  # type: ignore[arg-type]
    assert found is not None
    assert seen == [(True, True)], "photo with title, once for both sides"

    queries, positive = partners(labels, 0)
    bm25 = BM25.fit(attributes)
    pairs, masked, above = 0, [], {}
    for query, match in zip(queries, positive, strict=True):
        own = float(vectors[query] @ vectors[match])
        for other in range(12):
            if labels[other] == labels[query] or titles[other] == titles[query]:
                continue
            pairs += 1
            above[query, other] = float(vectors[query] @ vectors[other]) - own
            if above[query, other] > 0.3:
                masked.append((query, other))
    assert (found.items, found.queries, found.n_pairs) == (12, len(queries), pairs)
    assert found.n_masked == len(masked) > 0
    assert found.margin == pytest.approx(max(above.values()), abs=1e-5)
    pair = found.masked[0]
    best = max(masked, key=lambda at: above[at])
    assert pair.titles[::2] == (titles[best[0]], titles[best[1]])
    assert pair.other - pair.own == pytest.approx(above[best], abs=1e-5)

    words = [set() if own is None else {own["colour"], *own["size"].split()} for own in attributes]

    def score(query, other):
        encoded = [bm25.encode([attributes[item]]) for item in (query, other)]
        return float(bm25_scores(*encoded))

    hard = found.hard[0]
    query = max(queries, key=lambda query: max(gap for (q, _), gap in above.items() if q == query))
    assert hard.title == titles[query]
    others = sorted((other for q, other in above if q == query), key=lambda other: -above[query, other])[:6]
    assert [one.title for one in hard.negatives] == [titles[other] for other in others]
    own = score(query, positive[queries.index(query)])
    for one, other in zip(hard.negatives, others, strict=True):
        raw = score(query, other)
        relative = raw / own if own else 0.0
        assert one.raised == pytest.approx(np.tanh(raw if scale == "raw" else relative), abs=1e-5)
        assert set(one.shared) == words[query] & words[other]
        having = [sum(word in own for own in words) for word in one.shared]
        assert having == sorted(having), "the rarest first"


def test_without_products_a_photo_searches_its_title(monkeypatch):
    rows = birds([None] * 4)

    def encode(student, *, images, texts, progress):
        assert (images is None) != (texts is None)
        return np.eye(4, dtype=np.float32) if texts is None else np.roll(np.eye(4, dtype=np.float32), 1, axis=0)

    monkeypatch.setattr(afmrl_negatives, "encode_items", encode)
    task = ProductTask(rows, rows, [{"x": "1"}] * 4, [None] * 4, ("image-text", "text-image"), [])
    found = look_at_negatives(None, task, settings())  # type: ignore[arg-type]
    assert found is not None
    assert (found.queries, found.n_pairs, found.n_masked, found.margin) == (4, 12, 4, 1.0)
    assert {pair.titles[:2] for pair in found.masked} == {(title, title) for title in rows["title"]}


def test_there_is_nothing_to_see_without_weights_or_negatives(monkeypatch):
    monkeypatch.setattr(afmrl_negatives, "encode_items", lambda *args, texts, **kwargs: np.eye(len(texts)))
    rows = birds(["a", "a"])
    task = ProductTask(rows, rows, [{"x": "1"}] * 2, [None] * 2, ("product",), [])
    assert look_at_negatives(None, task, settings()) is None, "one product alone"  # type: ignore[arg-type]
    assert look_at_negatives(None, task, settings(weights="none")) is None  # type: ignore[arg-type]


# -- the page


def page_of(path: Path, **changes: Any) -> str:
    return write_report(path, title="t", attributes=made_findings(**changes)).read_text(encoding="utf-8")


def test_parts_are_there_where_there_is_something_to_say(tmp_path):
    sections = re.compile(r'<section id="(\w+)">')
    source = page_of(tmp_path / "r.html")
    assert sections.findall(source) == PARTS
    assert "2 of 12,345 pairs" in source
    assert EVIL not in source
    assert re.findall(r"https?://", source) == []
    assert sections.findall(page_of(tmp_path / "r.html", names=None)) == ["enrichment", "negatives", "masked"]
    assert sections.findall(page_of(tmp_path / "r.html", negatives=None, enriched=[])) == ["attributes"]
    assert sections.findall(write_report(tmp_path / "r.html", title="t").read_text(encoding="utf-8")) == []
    none = " ".join(page_of(tmp_path / "r.html", negatives=made_negatives(masked=0)).split())
    assert "there is none among 12,345 pairs of the same sample; the nearest comes to −0.250" in none
    assert "no answer changed" in page_of(tmp_path / "r.html", answers=[])


def test_many_large_photos_stay_within_the_size(tmp_path):
    path = write_report(tmp_path / "r.html", title="t", attributes=made_findings(side=400))
    assert 500_000 < path.stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_the_page_fits_is_read_and_asks_for_nothing(tmp_path, size, scheme):
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    from test_report_page import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    page_of(tmp_path / "r.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        check_page(browser, tmp_path / "r.html", size, scheme, texts=60, pictures=40)
        browser.close()


def check_page(browser: Any, path: Path, size: str, scheme: str, *, texts: int, pictures: int) -> None:
    """Nothing is wider than the screen, every text stands out, every picture and region has words."""
    from test_report_page import CONTRASTS, opened

    for page in opened(browser, path, size, scheme):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        outside = """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg")
            && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside) == []
        found = page.evaluate(CONTRASTS)
        assert len(found) > texts
        assert [text for text in found if text["contrast"] < text["least"]] == []
        shown = page.evaluate(
            "[...document.querySelectorAll('img')].map((e) => [e.alt.length > 0, e.naturalWidth > 0])"
        )
        assert len(shown) >= pictures
        assert all(map(all, shown))
        named = page.evaluate("[...document.querySelectorAll('[role=img],[tabindex]')].map((e) => e.ariaLabel)")
        assert named
        assert all(named)
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((e) => Number(e.tagName[1]))")
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
