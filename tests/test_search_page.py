"""The page of the search service as a browser shows it: headless Chromium, light and dark, on a desk and on a phone."""

from __future__ import annotations

import base64
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fieldmark.search.limits import ServiceSettings
from fieldmark.search.service import create_app
from helpers_service import GONE_TITLE, HTML_TITLE, ODD_IDS, RTL_TITLE, Shop, jpeg, served
from test_report_page import CHROMIUM, CONTRASTS, SIZES

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
    pytest.mark.usefixtures("one_thread"),
]
PATIENCE = 30_000  # ms; a busy machine
BLOCKED = "http://127.0.0.1:9/"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("photos"), "photos")


@pytest.fixture(scope="module")
def base(photos) -> Iterator[str]:
    with served(create_app(photos.store, photos.student)) as address:
        yield address


@pytest.fixture(scope="module")
def texts_base(tmp_path_factory) -> Iterator[str]:
    shop = Shop(tmp_path_factory.mktemp("texts"), "texts")
    with served(create_app(shop.store, shop.student)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(
    browser: Browser, base: str, size: str = "desk", scheme: Any = "light", allowed: str = "", asks: str = ""
) -> Iterator[Page]:
    """The page, which must end without a word on the console (but `allowed`) and without asking anyone else.

    One item's photo is gone, which the browser says too.
    """
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(base)
    yield page
    context.close()
    assert [text for text in said if "404 (Not Found)" not in text and (not allowed or allowed not in text)] == []
    own = (asks or base.partition("/?")[0], "data:", "blob:", BLOCKED)
    assert [url for url in asked if not url.startswith(own)] == []


@pytest.fixture
def page(browser, base) -> Iterator[Page]:
    yield from opened(browser, base)


def upload(page: Page, content: bytes, name: str = "photo.jpg") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": content})


def searched(page: Page, seed: int = 3) -> Page:
    """The page after a search with a photo."""
    upload(page, jpeg(seed))
    expect(page.locator("#found-title")).to_have_text("12 items like your photo")
    return page


def photos_shown(page: Page) -> int:
    """How many of the results' photos can be seen."""
    return page.evaluate(
        """async () => {
          const all = [...document.querySelectorAll("#results img")];
          const see = (one) => { one.loading = "eager"; return one.decode().then(() => 1, () => 0); };
          return (await Promise.all(all.map(see))).reduce((sum, seen) => sum + seen, 0);
        }"""
    )


def names(page: Page) -> list[str]:
    return page.locator("#results h3").all_inner_texts()


# -- searching


def test_a_photo_finds_items_with_score_margin_and_why(page, photos):
    searched(page)
    first, second = (page.locator("#results li.card").nth(place) for place in (0, 1))
    hits = photos.store.similar(ODD_IDS[3], 2)  # item 3 is the photo itself
    expect(first.locator("h3")).to_have_text("red bird number 3")
    assert first.locator(".score b").inner_text() == "1.000"
    assert first.locator(".margin").inner_text() == f"{1 - hits[0].score:.3f} ahead of the next"
    assert first.locator(".why").inner_text() == "the best match"
    assert second.locator(".score b").inner_text() == f"{hits[0].score:.3f}"
    wanted = {True: "order large", False: f"Main colour {hits[0].attributes['Main colour']}, not red"}
    assert wanted[False] in second.locator(".why .different").inner_text()
    assert wanted[True] in second.locator(".why").inner_text()
    assert "compared with the best match, red bird number 3" in page.locator("#compared").inner_text()
    assert page.locator("#status").inner_text() == "12 items like your photo"


def test_a_photo_does_not_wait_for_the_page(browser, base):
    for page in opened(browser, "about:blank", asks=base):
        page.route("**/about", lambda route: time.sleep(1) or route.continue_())
        page.goto(base)
        searched(page)


def test_a_photo_can_be_dropped_and_pasted(page):
    content = base64.b64encode(jpeg(5)).decode()
    carry = """([kind, target, content]) => {
      const carried = new DataTransfer();
      const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
      carried.items.add(new File([bytes], "a.jpg", {type: "image/jpeg"}));
      const more = kind === "paste" ? {clipboardData: carried} : {dataTransfer: carried};
      const made = kind === "paste" ? new ClipboardEvent(kind, {...more, bubbles: true})
        : new DragEvent(kind, {...more, bubbles: true, cancelable: true});
      document.querySelector(target).dispatchEvent(made);
    }"""
    expect(page.locator("#about")).to_contain_text("24 items")
    page.evaluate(carry, ["dragover", "#drop", content])
    expect(page.locator("#drop")).to_have_class("drop over")
    page.evaluate(carry, ["drop", "main", content])
    expect(page.locator("#results h3").first).to_have_text("blue bird number 5")
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#found")).to_be_hidden()
    page.evaluate(carry, ["paste", "body", content])
    expect(page.locator("#results h3").first).to_have_text("blue bird number 5")


def test_words_typed_before_the_page_is_ready_stay(browser, texts_base):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.route("**/about", lambda route: time.sleep(1) or route.continue_())
    page.goto(texts_base, wait_until="commit")
    page.locator("#text").fill("number 13")
    expect(page.locator("#start-title")).to_have_text("Or begin with one of these")
    expect(page.locator("#text")).to_have_value("number 13")
    page.locator("#text").press("Enter")
    expect(page.locator("#found-title")).to_have_text("12 items for “number 13”")
    context.close()


def test_words_find_items(browser, texts_base):
    for page in opened(browser, texts_base):
        expect(page.locator("h1")).to_have_text("Search by photo or words")
        page.get_by_label("Words", exact=True).fill("number 13")
        page.get_by_label("Also look for these words").check()
        page.keyboard.press("Enter")
        expect(page.locator("#found-title")).to_have_text("12 items for “number 13”")
        has_words = page.locator("#results li", has_text="bird number 13")
        assert has_words.locator(".why .words").inner_text() == "number, 13"
        page.get_by_label("Words", exact=True).fill("<|image_pad|>")


def test_words_without_a_photo_are_refused_where_the_model_has_none(page):
    page.get_by_label("Words beside the photo").fill("number 13")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        "This model sees photos only: choose a photo first; the words then choose among what is like it."
    )
    upload(page, jpeg(3))  # the words go along
    expect(page.locator("#found-title")).to_have_text("12 items like your photo and for “number 13”")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.locator("#results .why .words").count() > 1


def test_filters(page):
    searched(page)
    page.locator("#filters summary").click()
    page.get_by_label("Main colour").select_option(label="red (8)")
    expect(page.locator("#found-title")).to_have_text("8 items like your photo")
    expect(page.locator("#filters summary")).to_contain_text("Main colour: red")
    page.get_by_label("order").select_option(label="small (12)")
    expect(page.locator("#found-title")).to_have_text("4 items like your photo")
    page.get_by_label("rare").select_option(label="yes (1)")
    expect(page.locator("#found-title")).to_have_text("Nothing like your photo passes the filters")
    page.get_by_role("button", name="Remove all filters").click()
    expect(page.locator("#found-title")).to_have_text("12 items like your photo")
    assert page.get_by_label("order").input_value() == ""


def test_more_results(page):
    searched(page)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#results li.card")).to_have_count(24)
    expect(page.get_by_role("button", name="Show more")).to_be_visible()
    page.get_by_role("button", name="Show more").click()
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    assert page.locator("#results li.card").last.locator(".margin").inner_text() == "the last one"


def test_one_can_begin_with_an_item_of_those_that_pass(page):
    expect(page.locator("#examples li")).to_have_count(12)
    page.locator("#filters summary").click()
    page.get_by_label("rare").select_option(label="yes (1)")
    expect(page.locator("#examples li")).to_have_count(1)
    page.get_by_role("button", name="Search with blue bird number 5").click()
    expect(page.locator("#found-title")).to_have_text("Nothing like blue bird number 5 passes the filters")
    page.get_by_role("button", name="Remove all filters").click()
    expect(page.locator("#found-title")).to_have_text("12 items like blue bird number 5")
    expect(page.locator("#start")).to_be_hidden()


def test_from_result_to_result_and_back(page, base):
    before = names(searched(page))
    page.locator("#results .shot").nth(1).click()
    expect(page.locator("#found-title")).to_have_text(f"12 items like {before[1]}")
    assert before[1] not in names(page)
    assert "compared with the item you search with" in page.locator("#compared").inner_text()
    assert "?item=" in page.url
    expect(page.locator("#asked-name")).to_have_text(before[1])
    address, after = page.url, names(page)
    page.go_back()
    expect(page.locator("#found-title")).to_have_text("12 items like your photo")
    assert names(page) == before
    page.go_forward()
    expect(page.locator("#found-title")).to_have_text(f"12 items like {before[1]}")
    page.goto(address)  # an item's search has an address of its own
    expect(page.locator("#found-title")).to_have_text(f"12 items like {before[1]}")
    assert names(page) == after


# -- comparing


def test_two_photos_side_by_side(page, photos):
    searched(page)
    item = names(page)[2]
    page.locator("#results .compare").nth(2).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text(item)
    expect(dialog.locator("img.heat")).to_have_count(2)
    assert [one.inner_text() for one in dialog.locator("figcaption").all()] == ["Your photo", item]
    shown = dialog.locator(".photo img").evaluate_all(
        "(all) => all.map((one) => [one.naturalWidth > 0, one.offsetParent !== null])"
    )
    assert shown == [[True, True]] * 4
    dialog.get_by_label("Show where the model looked").uncheck()
    expect(dialog.locator("img.heat:visible")).to_have_count(0)
    own = photos.store.similar(ODD_IDS[3], 3)[1].attributes
    rows = [row.inner_text().split("\t") for row in dialog.locator("tbody tr").all()]
    wanted = [[name, own[name], value] for name, value in photos.store.items([ODD_IDS[3]])[0].attributes.items()]
    assert sorted(rows) == sorted(wanted)
    marks = {row.locator("th").inner_text(): row.get_attribute("class") for row in dialog.locator("tbody tr").all()}
    assert marks == {name: "same" if here == there else "different" for name, here, there in wanted}
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.ariaLabel") == f"Compare with {item}"


def test_an_item_beside_the_item_searched_with(page):
    searched(page)
    before = names(page)
    page.locator("#results .shot").nth(1).click()
    expect(page.locator("#found-title")).to_have_text(f"12 items like {before[1]}")
    page.locator("#results .compare").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("img.heat")).to_have_count(2)
    assert dialog.locator("thead th").all_inner_texts() == ["Attribute", "This item", "Searched with"]
    other = dialog.get_by_role("heading").inner_text()
    dialog.get_by_role("button", name="Search with this item").click()
    expect(page.locator("#found-title")).to_have_text(f"12 items like {other}")


def test_titles_are_text(page):
    """One title is HTML, one is written from right to left."""
    searched(page, seed=0)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#results li.card")).to_have_count(24)
    shown = names(page)
    assert {HTML_TITLE, RTL_TITLE} <= set(shown)
    assert page.locator("#results b, #results [onerror]").count() == page.locator("#results .score b").count()
    page.locator("#results .compare").nth(shown.index(HTML_TITLE)).click()
    expect(page.get_by_role("dialog").get_by_role("heading")).to_have_text(HTML_TITLE)


# -- what goes wrong


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello", "The photo cannot be read: it is not an image, or not whole"),
        (b"", "The photo cannot be read: it is not an image"),
        (jpeg(3)[:900], "The photo cannot be read: "),
    ],
    ids=["text", "empty", "truncated"],
)
def test_a_broken_file_is_told_and_the_page_goes_on(browser, base, content, words):
    for page in opened(browser, base, allowed="400 (Bad Request)"):
        expect(page.locator("#about")).to_contain_text("24 items")
        upload(page, content, "broken.jpg")
        expect(page.get_by_role("alert")).to_contain_text(words)
        expect(page.locator("#found")).to_be_hidden()
        searched(page)
        expect(page.get_by_role("alert")).to_be_hidden()


def test_a_file_that_is_too_large_is_not_even_sent(browser, photos):
    with served(create_app(photos.store, photos.student, ServiceSettings(max_body_mb=0.1))) as base:
        for page in opened(browser, base):
            expect(page.locator("#about")).to_contain_text("24 items")
            upload(page, bytes(160_000), "large.jpg")
            expect(page.get_by_role("alert")).to_have_text("large.jpg has 0.2 MB; expected at most 0.1 MB.")


def test_a_service_that_is_gone_is_told(browser, photos):
    with served(create_app(photos.store, photos.student)) as base:
        tab = opened(browser, base, allowed="ERR_")
        page = next(tab)
        searched(page)
    page.locator("#results .shot").nth(1).click()
    expect(page.get_by_role("alert")).to_have_text("The service was not reached; check the connection and try again.")
    assert list(tab) == []


def test_an_item_that_is_gone_is_told(browser, base):
    for page in opened(browser, f"{base}/?item=nothing"):
        expect(page.get_by_role("alert")).to_contain_text("The store has no item 'nothing'")


def test_a_token_is_asked_for(browser, photos):
    app = create_app(photos.store, photos.student, ServiceSettings(token="secret"))
    with served(app) as base:
        for page in opened(browser, base, allowed="401 (Unauthorized)"):
            asked_for = page.get_by_role("textbox", name="Token")
            asked_for.fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#token-note")).to_contain_text("missing or wrong")
            asked_for.fill("secret")
            page.keyboard.press("Enter")
            expect(page.get_by_role("dialog")).to_be_hidden()
            searched(page)
            wanted = 12 - names(page).count(GONE_TITLE)
            for _ in range(PATIENCE // 100):
                if photos_shown(page) < wanted:
                    page.wait_for_timeout(100)
            assert photos_shown(page) == wanted
            page.reload()  # the tab remembers
            expect(page.locator("#examples li")).to_have_count(12)


# -- how it looks


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def shown(request, browser, base) -> Iterator[Page]:
    """After a search, with the filters open."""
    for page in opened(browser, base, *request.param):
        page.locator("#filters summary").click()
        yield searched(page)


def test_nothing_is_wider_than_the_screen_and_text_stands_out(shown):
    found = shown.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [text for text in found if text["contrast"] < text["least"]] == []
    for step in ("results", "comparison"):
        if step == "comparison":
            shown.locator("#results .compare").nth(2).click()
            expect(shown.locator("img.heat")).to_have_count(2)
        widths = shown.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]")
        assert max(widths[:2]) <= widths[2]
        outside = """[...document.querySelectorAll("main *, dialog[open] *")].filter((e) => !e.closest(".unseen, svg")
            && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
        assert shown.evaluate(outside) == []


def test_fingers_find_the_controls(browser, base):
    for page in opened(browser, base, "phone"):
        searched(page)
        boxes = page.locator("main button:visible, main select:visible, main input:visible:not(.unseen)").all()
        sides = [box.bounding_box() for box in boxes]
        assert len(sides) > 20
        assert [side for side in sides if min(side["width"], side["height"]) < 17.6] == []
        assert [side for side in sides if side["height"] < 36 and side["width"] > 40] == []


def test_pictures_have_words_and_headings_an_order(page):
    page.locator("#filters summary").click()
    searched(page)
    pictures = page.evaluate("[...document.querySelectorAll('main img')].map((one) => one.alt.trim().length)")
    assert len(pictures) > 12
    assert all(pictures)
    levels = page.evaluate(
        "[...document.querySelectorAll('main :is(h1,h2,h3)')].filter((e) => e.offsetParent).map((e) => +e.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    named = "(e) => e.ariaLabel || e.innerText || [...(e.labels ?? [])].map((label) => label.innerText).join()"
    for kind in ("main button", "select", "main input"):
        found = page.evaluate(f"[...document.querySelectorAll('{kind}')].filter((e) => e.offsetParent).map({named})")
        assert found
        assert all(text.strip() for text in found)


def test_the_keyboard_does_it_all(page):
    expect(page.locator("#examples li")).to_have_count(12)
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e.id === "file" ? e.parentElement : e);
            return [e.id || e.tagName || e.className, s.outlineStyle, parseFloat(s.outlineWidth)]; }"""
        ))  # fmt: skip
    assert [name for name, _, _ in reached[:4]] == ["file", "text", "go", "SUMMARY"]
    assert all(style == "solid" and width >= 2 for _, style, width in reached)
    page.keyboard.press("Enter")  # the third example
    expect(page.locator("#found-title")).to_contain_text("12 items like")
    assert page.evaluate("document.activeElement.id") == "found-title"
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#asked-name")).not_to_be_empty()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_the_page_may_load_and_run_nothing_else(browser, base):
    for page in opened(browser, base, allowed="Content Security Policy"):
        expect(page.locator("#about")).to_contain_text("24 items")
        blocked = page.evaluate(
            """() => new Promise((done) => {
            const found = []; addEventListener("securitypolicyviolation", (event) => {
              found.push(event.effectiveDirective);
              if (found.length === 4) done(found.sort());
            });
            new Image().src = "http://127.0.0.1:9/x.png";
            fetch("http://127.0.0.1:9/x").catch(() => {});
            const script = document.createElement("script");
            script.textContent = "window.ran = true"; document.body.append(script);
            const frame = document.createElement("iframe");
            frame.src = "http://127.0.0.1:9/"; document.body.append(frame);
          })"""
        )
        assert blocked == ["connect-src", "frame-src", "img-src", "script-src-elem"]
        assert not page.evaluate("window.ran")


def test_the_assets_are_shipped_whole():
    """What the page names is there, and what the script looks up is in the page."""
    folder = Path(__file__).parents[1] / "src/fieldmark/search/assets"
    html, script = (folder / "page.html").read_text(), (folder / "page.js").read_text()
    assert {path.name for path in folder.iterdir()} == {"page.html", "page.css", "page.js"}
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= ids
