"""The report as a browser shows it: headless Chromium, light and dark, on a desk and on a phone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fieldmark.evaluation.report import MAX_BYTES, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")

LONG = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
RTL = "נקר סורי עם מקור ארוך"
HTML = "<b>wren</b> & <img src=x onerror=alert(1)>"
CLASSES = ("wren", LONG, RTL, HTML)
SIZES = {"desk": (1280, 900), "phone": (360, 740)}

# Every visible text with the colour behind it: WCAG contrast, and the least that its size needs.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
      if (colour[3] > 0) throw new Error("half transparent: " + at.outerHTML.slice(0, 80));
    }
    throw new Error("no background");
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*:not(script):not(option)")) {
    const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    if (!own || element.closest("[hidden]")) continue;
    const style = getComputedStyle(element);
    const ink = light(parse(element instanceof SVGElement ? style.fill : style.color)), paper = light(behind(element));
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push({
      text: own.slice(0, 40), tag: element.tagName, least: large ? 3 : 4.5,
      contrast: (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05),
    });
  }
  return found;
}"""


def noise(seed: int, side: int = 64) -> Image.Image:
    """Noise compresses worse than any photo."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def a_gallery(label: str, group: str, photo: Image.Image) -> dict[str, Any]:
    results = [(photo, other, 0.9, other == label) for other in CLASSES * 2]
    return {"group": group, "query": photo, "query_label": label, "results": results, "note": "its class at rank 3"}


def a_pair(verdict: bool | None, photo: Image.Image) -> dict[str, Any]:
    looked = np.random.default_rng(0).random((7, 7))
    return {
        "images": (photo, photo),
        "labels": (RTL, LONG),
        "truth_same": False,
        "verdict_same": verdict,
        "words": ({"bill": LONG, "tail": "long"}, {"bill": RTL, "tail": "long"}) if verdict is not None else LONG,
        "teacher_attention": (looked, looked),
        "pooler_attention": (looked.ravel(), looked.ravel()),
        "masks": (np.eye(70), np.eye(70)),
        "differing_attributes": ["bill"],
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_report(tmp_path_factory.mktemp("page") / "report.html", [noise(seed) for seed in range(5)])


def full_report(path: Path, photos: list[Image.Image]) -> Path:
    """A page with every part, names that are long, right-to-left or HTML, and more than 200 photos."""
    galleries = [a_gallery(CLASSES[i % 4], "Worst" if i < 18 else "Found", photos[i % 5]) for i in range(24)]
    example = {"query": (photos[0], LONG), "wrong": (photos[1], HTML), "missed": (photos[2], LONG)}
    confusion = {"classes": (LONG, HTML), "count": 14, "queries": 16, "examples": [example, example]}
    metrics = {key: {"value": 0.5, "spread": 0.01, "interval": (0.4, 0.6)} for key in ("recall@1", "recall@4", "map@r")}
    return write_report(
        path,
        title=f"SAGA on {LONG}",
        subtitle=f"{HTML} and {RTL}: R@1 from 51.7 to 57.7 %.",
        table=[
            {"model": "untrained", **metrics},
            {"model": LONG, **metrics, "recall@1": 0.7},
            {"model": RTL, **metrics},
        ],
        notes=[f"SAGA is better than {LONG}."],
        curves={"Loss": {LONG: [(i, 1 / i) for i in range(1, 60)], RTL: [(1, 1.0), (60, 0.2)]}, LONG: [(1, 1.0)]},
        galleries=galleries,
        confusions=[confusion | {"differing": [(LONG, RTL, HTML)]}, confusion | {"differing": None}],
        differing={name: [{"differing": n, "recall@1": 0.5, "n_queries": 9} for n in (1, 2)] for name in (LONG, RTL)},
        pairs=[a_pair(True, photos[0]), a_pair(False, photos[1]), a_pair(False, photos[2]), a_pair(None, photos[3])],
        health={f"{LONG}: mixed groups": {"value": "18 %", "note": LONG}},
        settings={f"setting_{i}": LONG if i % 5 == 0 else i for i in range(20)},
        cost={"time": LONG},
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    yield from opened(browser, report, *request.param)


@pytest.fixture
def desk(browser: Browser, report: Path) -> Iterator[Page]:
    yield from opened(browser, report, "desk", "light")


def opened(browser: Browser, report: Path, size: str, scheme: Any) -> Iterator[Page]:
    """The page, which must load without a word on the console and without asking for anything."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url[:60]))
    page.goto(report.as_uri(), wait_until="load")
    assert said == []
    assert [url for url in asked if not url.startswith("data:image/")] == [report.as_uri()[:60]]
    yield page
    context.close()


def test_many_large_photos_stay_within_the_size(tmp_path):
    path = full_report(tmp_path / "r.html", [noise(seed, 400) for seed in range(5)])
    assert 1_000_000 < path.stat().st_size <= MAX_BYTES


def test_nothing_is_wider_than_the_screen(page):
    widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]")
    assert max(widths[:2]) <= widths[2]
    outside = """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg, blockquote")
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []


def test_text_stands_out_from_what_is_behind_it(page):
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 300
    assert [text for text in found if text["contrast"] < text["least"]] == []


def test_light_and_dark_differ(browser, report):
    papers = {}
    for scheme in ("light", "dark"):
        for page in opened(browser, report, "desk", scheme):
            papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert papers["light"] != papers["dark"]


def test_every_picture_is_seen_and_has_words(desk):
    pictures = desk.evaluate(
        "[...document.querySelectorAll('img')].map((one) => [one.alt.trim().length, one.naturalWidth, one.complete])"
    )
    assert len(pictures) > 230
    assert all(words and width and complete for words, width, complete in pictures)
    drawn = desk.evaluate("[...document.querySelectorAll('[role=img]')].map((one) => one.ariaLabel)")
    assert all(drawn)


def test_headings_are_in_order(desk):
    levels = desk.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_control_has_a_name(desk):
    for kind in ("select", "[tabindex]", "nav"):
        named = "(e) => e.ariaLabel || [...e.labels].map((label) => label.innerText)[0]"
        names = desk.evaluate(f"[...document.querySelectorAll('{kind}')].map({named})")
        assert names
        assert all(names)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_can_be_chosen(desk, name):
    choice = desk.get_by_label("Class", exact=True)
    status = desk.locator("#neighbours [role=status]")
    assert status.inner_text() == "24 of 24 queries shown"
    choice.select_option(label=f"{name} (6)")
    shown = desk.locator("#queries article:visible .query b").all_inner_texts()
    assert shown == [name] * 6
    assert status.inner_text() == "6 of 24 queries shown"
    choice.select_option(index=0)
    assert desk.locator("#queries article:visible").count() == 24


def test_a_group_without_a_query_of_the_class_is_hidden(browser, tmp_path):
    photo = noise(0, 40)
    galleries = [a_gallery("wren", "Worst", photo), a_gallery("robin", "Found", photo)]
    path = write_report(tmp_path / "r.html", title="t", galleries=galleries)
    for page in opened(browser, path, "desk", "light"):
        page.get_by_label("Class", exact=True).select_option(label="robin (1)")
        assert page.locator("h3:visible").all_inner_texts() == ["Found"]


@pytest.mark.parametrize(
    ("choice", "verdicts"),
    [
        ("Wrong verdicts (1)", ["Truth: different classes. Teacher: same class (wrong)."]),
        ("Right verdicts (2)", ["Truth: different classes. Teacher: different classes."] * 2),
        ("No valid answer (1)", ["Truth: different classes. Teacher: no valid answer."]),
    ],
)
def test_verdicts_can_be_chosen(desk, choice, verdicts):
    desk.get_by_label("Verdicts").select_option(label=choice)
    assert desk.locator("#pairs article:visible .verdict > span").all_inner_texts() == verdicts
    assert desk.locator("#teacher [role=status]").inner_text() == f"{len(verdicts)} of 4 pairs shown"


def test_the_keyboard_reaches_everything_and_is_seen(desk):
    reached = []
    for _ in range(40):
        desk.keyboard.press("Tab")
        at = desk.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.tagName, e.id || e.hash || e.className, s.outlineStyle, parseFloat(s.outlineWidth)]; }"""
        )
        if at[0] == "BODY":
            break
        reached.append(at)
    assert all(style == "solid" and width >= 2 for _, _, style, width in reached)
    names = [name for _, name, _, _ in reached]
    parts = ["result", "training", "neighbours", "confused", "teacher", "health", "cost", "settings"]
    assert names[:8] == [f"#{part}" for part in parts]
    assert {"queries-filter", "pairs-filter", "scroll"} <= set(names)
    assert sum(tag == "SUMMARY" for tag, *_ in reached) == 3 + 1  # words alike of three pairs, settings


def test_the_keyboard_chooses_and_opens(desk):
    desk.locator("#queries-filter").focus()
    desk.keyboard.press("ArrowDown")
    assert desk.locator("#neighbours [role=status]").inner_text() == "6 of 24 queries shown"
    desk.locator("#settings summary").focus()
    desk.keyboard.press("Enter")
    assert desk.locator("#settings dd").first.is_visible()


def test_without_a_script_everything_is_shown(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#queries article:visible").count() == 24
    assert page.locator("#pairs article:visible").count() == 4
    assert page.locator("select:visible").count() == 0
    context.close()


def test_the_page_forbids_itself_to_load_or_run_anything_else(desk):
    answered: list[str] = []
    desk.on("response", lambda response: answered.append(response.url))
    blocked = desk.evaluate(
        """() => new Promise((done) => {
        const found = []; addEventListener("securitypolicyviolation", (event) => {
          found.push(event.effectiveDirective);
          if (found.length === 3) done(found.sort());
        });
        new Image().src = "http://127.0.0.1:9/x.png";
        fetch("http://127.0.0.1:9/x").catch(() => {});
        const script = document.createElement("script");
        script.textContent = "window.ran = true"; document.body.append(script);
      })"""
    )
    assert blocked == ["connect-src", "img-src", "script-src-elem"]
    assert not desk.evaluate("window.ran")
    assert answered == []


def test_motion_is_only_for_those_who_want_it(browser, report):
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        context = browser.new_context(reduced_motion=wish)
        page = context.new_page()
        page.goto(report.as_uri())
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour
        context.close()
