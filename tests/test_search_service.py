"""The search service: what it finds against the store asked directly, what it says, what it refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
import torch
import transformers
from fastapi.testclient import TestClient

from fieldmark.errors import FieldmarkError
from fieldmark.search.embedding import query_vector
from fieldmark.search.filters import check_filter
from fieldmark.search.rows import Item
from fieldmark.search.service import create_app
from fieldmark.search.store import Store
from fieldmark.search.why import explain
from helpers_cli import fails
from helpers_fuzz import Fuzz, operations
from helpers_service import (
    GONE,
    HTML_TITLE,
    INSIDE,
    ITEMS,
    ODD_IDS,
    Shop,
    draw,
    found,
    jpeg,
    opened,
    png,
    post,
    refused,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _loud_libraries():
    """The command quietens the libraries for the whole process."""
    yield
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("photos"), "photos")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("texts"), "texts")


@pytest.fixture(scope="module")
def client(photos) -> Iterator[TestClient]:
    with photos.client() as opened_client:
        yield opened_client


@pytest.fixture(scope="module")
def texts_client(texts) -> Iterator[TestClient]:
    with texts.client() as opened_client:
        yield opened_client


# -- searching


@pytest.mark.parametrize("k", [1, 5, ITEMS + 3])
@pytest.mark.parametrize("where", [None, "main_colour = 'red'", "`order` = 'small' AND label <> 'class 2'"])
def test_a_photo_finds_what_the_store_finds(photos, client, k, where):
    vector = query_vector(photos.student, image=png(100))
    fields = {"k": k} if where is None else {"k": k, "where": where}
    hits = photos.store.search(vector, k, where)
    answer = post(client, png(100), **fields)
    same(answer, hits)
    for one, hit in zip(answer.json()["results"], hits):
        assert (one["title"], one["label"], one["attributes"]) == (hit.title, hit.label, hit.attributes)
        assert one["margin"] == pytest.approx(hit.margin, abs=1e-5)


def test_its_own_photo_comes_first(client):
    (first, score), *_ = found(post(client, jpeg(3)))
    assert first == ODD_IDS[3]
    assert score > 0.999


def test_words_beside_a_photo_are_looked_for_and_not_embedded(photos, client):
    vector = query_vector(photos.student, image=png(7))
    answer = post(client, png(7), text="number 13", hybrid="true")
    same(answer, photos.store.search(vector, 10, None, "number 13"))
    assert answer.json()["results"][0]["why"]["words"]


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_text_and_both_find_what_the_store_finds(texts, texts_client, hybrid):
    words = "blue bird" if hybrid else None
    fields = {"text": "blue bird", "hybrid": hybrid}
    same(
        post(texts_client, **fields), texts.store.search(query_vector(texts.student, text="blue bird"), 10, None, words)
    )
    both = query_vector(texts.student, image=png(5), text=None if hybrid else "blue bird")
    same(post(texts_client, png(5), **fields), texts.store.search(both, 10, None, words))


@pytest.mark.parametrize("item", [*ODD_IDS[:3], "item-03", GONE])
def test_an_item_finds_what_the_store_finds(photos, client, item):
    answer = client.get(f"/similar/{quote(item, safe='')}", params={"k": 4, "where": "`order` = 'small'"})
    same(answer, photos.store.similar(item, 4, "`order` = 'small'"))
    assert item not in dict(found(answer))


def test_examples_differ_and_pass_the_filter(photos, client):
    items = client.get("/examples").json()["items"]
    assert len({one["item_id"] for one in items}) == 12
    assert items == client.get("/examples").json()["items"]
    red = client.get("/examples", params={"k": 24, "where": "main_colour = 'red'"}).json()["items"]
    assert {one["attributes"]["Main colour"] for one in red} == {"red"}
    assert len(red) == 8


def test_what_the_service_is(photos, client, texts_client):
    about = client.get("/about").json()
    assert (about["model"], about["items"], about["dim"]) == ("student-photos", ITEMS, photos.store.card.model.dim)
    assert (about["texts"], about["attention"], about["recall_at_10"]) == (False, True, None)
    assert [(one["name"], one["column"], one["n_values"]) for one in about["facets"]] == [
        ("Main colour", "main_colour", 3), ("order", "order", 2), ("rare", "rare", 1),
    ]  # fmt: skip
    assert about["facets"][0]["values"] == [{"value": name, "count": 8} for name in ("blue", "green", "red")]
    assert (texts_client.get("/about").json()["texts"], texts_client.get("/about").json()["attention"]) == (True, False)
    assert client.get("/healthz").json() == {"status": "ok"}


# -- why


def an_item(name: str, title: str | None = None, **attributes: str) -> Item:
    return Item(item_id=name, title=title, label=None, attributes=attributes, image=None, row=0)


def test_items_are_compared_with_the_query_or_with_the_first():
    items = [an_item("a", colour="red", size="small"), an_item("b", colour="red", size="large", extra="x")]
    first, second = explain(items)
    assert (first.compared_with, first.same, first.different) == (None, {}, {})
    assert (second.compared_with, second.same) == ("a", {"colour": "red"})
    assert {name: (one.here, one.there) for name, one in second.different.items()} == {"size": ("large", "small")}
    query = an_item("q", colour="blue", extra="x")
    first, second = explain(items, query)
    assert [(one.compared_with, list(one.same), list(one.different)) for one in (first, second)] == [
        ("q", [], ["colour"]), ("q", ["extra"], ["colour"]),
    ]  # fmt: skip
    assert explain([]) == []


def test_words_of_the_text_that_an_item_has():
    item = an_item("a", "A Red-tailed hawk, 12 cm", bill="HOOKED")
    assert explain([item], text="hooked RED hawks red 12")[0].words == ["hooked", "red", "12"]
    assert explain([item])[0].words == []


def test_attention_is_the_poolers(photos, client):
    answer = post(client, jpeg(3), attention="true").json()["attention"]
    with torch.inference_mode():
        features = photos.student.preprocess([draw(3)])
        wanted = photos.student(features)["pooling_attention"][0]
    item = client.get(f"/items/{quote(ODD_IDS[3], safe='')}/attention").json()
    for looked in (answer, item):
        assert (looked["rows"], looked["columns"]) == (2, 2)
        assert sum(looked["weights"]) == pytest.approx(1)
        assert looked["heat"].startswith("data:image/png;base64,")
    np.testing.assert_allclose(item["weights"], wanted, atol=0.05)  # the item's JPEG against the drawing
    np.testing.assert_allclose(answer["weights"], item["weights"], atol=1e-5)
    assert max(item["weights"]) > 0.4
    assert post(client, jpeg(3)).json()["attention"] is None


def test_without_an_attention_pooler_there_is_none(texts_client):
    assert post(texts_client, jpeg(3), attention="true").json()["attention"] is None
    refused(texts_client.get("/items/item-03/attention"), 404, "no attention pooler")


# -- items and photos


@pytest.mark.parametrize("item", [*ODD_IDS, INSIDE, "item-03"])
def test_an_item_and_its_photo_by_any_name(photos, client, item):
    wanted = photos.store.items([item])[0]
    one = client.get("/items", params={"ids": [item]}).json()["items"][0]
    assert (one["item_id"], one["title"], one["attributes"]) == (item, wanted.title, wanted.attributes)
    if item != "x/photo":  # by its path this is the photo of x
        assert client.get(f"/items/{quote(item, safe='')}").json() == one
    answer = client.get(f"/{one['photo']}", params={"side": 40})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    image = opened(answer.content)
    assert image.size == (40, 27)
    assert not image.getexif()
    assert b"SECRET" not in answer.content
    own = np.asarray(
        draw([*ODD_IDS, GONE, INSIDE, "item-00", "item-01", "item-02", "item-03"].index(item), 40, 27), float
    )
    assert np.abs(np.asarray(image, float) - own).mean() < 12


def test_items_come_in_the_order_asked_for(client):
    names = ["item-05", "shelf/1", "item-02"]
    assert [one["item_id"] for one in client.get("/items", params={"ids": names}).json()["items"]] == names


def test_a_photo_that_is_gone(client, photos):
    for path in ("photo", "attention"):
        refused(client.get(f"/items/{GONE}/{path}"), 404, "photo of the item 'gone' is not there")


@pytest.mark.parametrize(
    "path",
    ["..", "../../etc/passwd", "/etc/passwd", "....//....//etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "a\0b", "x" * 5000,
     "aviary://train/x/0", "tar:///etc/passwd#0,10", "file:///etc/passwd"],
)  # fmt: skip
def test_no_path_comes_from_a_client(client, photos, path):
    for pattern in ("/items/{}", "/items/{}/photo", "/items/{}/attention", "/similar/{}", "/assets/{}"):
        answer = client.get(pattern.format(quote(path, safe="").replace(".", "%2E")))
        assert answer.status_code in (404, 405), answer.text
        assert "error" in answer.json()
    refused(client.get("/items", params={"ids": path}), 404, "no item")
    for given in (path[:90], str(photos.root / "3.jpg")):
        answer = client.post("/search", data={"image": given})
        refused(answer, 422, "image")
        refused(client.post("/search", data={"image_url": given}), 400, "fetches none")


def test_no_answer_names_a_path(photos, client):
    asked = [
        client.get("/about"), client.get("/openapi.json"), client.get("/metrics"), client.get("/examples"),
        client.get(f"/items/{GONE}"), client.get(f"/items/{GONE}/photo"), post(client, png(1), k=ITEMS),
        post(client, b"x"), post(client, png(1), where="nope"), client.get("/similar/item-03"),
    ]  # fmt: skip
    assert not [answer.text for answer in asked if str(photos.root) in answer.text or "3.jpg" in answer.text]


def test_an_empty_store_answers(photos, tmp_path):
    store = Store.create(tmp_path / "db", photos.store.card.model)
    with TestClient(create_app(store, photos.student)) as client:
        assert client.get("/about").json()["items"] == 0
        assert post(client, png(1)).json()["results"] == []
        assert client.get("/examples").json()["items"] == []


# -- wrong queries


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({}, 400, "nothing to search with"),
        ({"text": " "}, 400, "empty text"),
        ({"text": "red"}, 400, "photos only"),
        ({"text": "x" * 2001}, 422, "text: "),
        ({"photo": png(1), "k": 0}, 422, "k: .*greater"),
        ({"photo": png(1), "k": 201}, 422, "k: .*less"),
        ({"photo": png(1), "k": "many"}, 422, "k: .*integer"),
        ({"photo": png(1), "hybrid": True}, 400, "hybrid was given without a text"),
        ({"photo": png(1), "hybrid": "perhaps"}, 422, "hybrid: "),
        ({"photo": png(1), "where": "nope = 'x'"}, 400, "'nope'.*main_colour"),
        ({"photo": png(1), "where": "label = 5"}, 400, "filter .* was not understood"),
        ({"photo": png(1), "where": "label = 'x' OR" + " " * 1000}, 422, "where: "),
        ({"photo": b""}, 400, "photo cannot be read: it is not an image"),
        ({"photo": png(1), "image_url": "https://example.com/x.jpg"}, 400, "give one of them"),
    ],
)
def test_wrong_queries(client, fields, status, words):
    refused(post(client, **fields), status, words)


def test_texts_with_the_tokenizers_own_marks(texts_client):
    refused(post(texts_client, text="a <|image_pad|> bird"), 400, r"holds <\|image_pad\|>")
    refused(post(texts_client, png(1), text="<|im_end|>"), 400, r"<\|im_end\|>")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/search", 405), ("PUT", "/items", 405), ("GET", "/nothing", 404), ("GET", "/items", 422),
     ("GET", "/similar/nothing", 404), ("POST", "/v1/embeddings", 422), ("GET", "/assets/page.py", 404),
     ("GET", "/docs", 404), ("BREW", "/about", 405)],
)  # fmt: skip
def test_wrong_requests(client, method, path, status):
    refused(client.request(method, path), status, ".")


COLUMNS = ("item_id", "title", "label", "main_colour", "order", "größe", "repeat")


@pytest.mark.parametrize(
    "where",
    ["label = 'x'", "NOT (label='it''s' or `order` != 'y')", "label IN ('a', 'b') AND größe IS NOT NULL",
     "LABEL like '%;--%'",
     "order >= 'a' and order<'b'", "title BETWEEN 'a' AND 'b'", "1 = 1.5", "label = 'repeat(''a'', 9)'"],
)  # fmt: skip
def test_filters_that_are_let_through(where):
    assert check_filter(where, COLUMNS) == where


@pytest.mark.parametrize(
    "where",
    ["label = repeat('a', 10000000000)", "repeat('a', 1000000000) = label", "`repeat` ('a', 9) = label",
     "length(label) > 1",
     "label = 'x'; DROP TABLE items", "label = 'x' -- y", "label = 'x' /* y */", "label = (SELECT 1)",
     "label || label = 'x'",
     "label = 'x", "label = \"x\"", "label::int = 1", "`other` = 'x'", "other = 'x'", "CASE WHEN true THEN true END",
     "label = $1", "label ~ '(a+)+$'", "photo IS NULL", "vector IS NULL", "label\\ = 'x'", "@@version = 1",
     "label = 'x' OR " * 60 + "label = 'x'", "label = 1 + 1"],
)  # fmt: skip
def test_filters_that_are_not(where):
    with pytest.raises(FieldmarkError, match="The filter holds"):
        check_filter(where, COLUMNS)


# -- embeddings


def embeddings(client: TestClient, given: Any, **more: Any) -> Any:
    return client.post("/v1/embeddings", json={"input": given, "model": client.get("/about").json()["model"], **more})


def test_embeddings_of_texts(texts, texts_client):
    given = ["a red bird", "a much longer text about a blue bird", "x"]
    answer = embeddings(texts_client, given).json()
    assert (answer["object"], answer["model"]) == ("list", "student-texts")
    assert [(one["index"], one["object"]) for one in answer["data"]] == [
        (0, "embedding"),
        (1, "embedding"),
        (2, "embedding"),
    ]
    wanted = [query_vector(texts.student, text=text) for text in given]
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], wanted, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > sum(map(len, given))  # a token a byte
    single = embeddings(texts_client, given[1], encoding_format="base64", dimensions=len(wanted[1])).json()["data"]
    decoded = np.frombuffer(base64.b64decode(single[0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, wanted[1], atol=1e-5)


@pytest.mark.parametrize("which", ["photos", "texts"])
def test_embeddings_of_photos(which, request):
    shop, client = (
        request.getfixturevalue(which),
        request.getfixturevalue("client" if which == "photos" else "texts_client"),
    )
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg(4)).decode()
    answer = embeddings(client, [url]).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], query_vector(shop.student, image=jpeg(4)), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "more", "status", "words"),
    [
        (["x"], {"model": "gpt"}, 404, "'gpt' is not served; give 'student-texts'"),
        ([], {}, 422, "input"),
        (["x"] * 257, {}, 422, "input"),
        ([[1, 2, 3]], {}, 422, "input"),
        ("", {}, 400, "empty text"),
        ("x" * 8193, {}, 400, "8,193 characters"),
        ("x" * 5000, {}, 400, "tokens long"),
        ("x", {"dimensions": 7}, 400, "dimensions 7"),
        ("x", {"encoding_format": "hex"}, 422, "encoding_format"),
        ("data:image/png;base64,!!", {}, 400, "without base64"),
        ("data:image/png,abc", {}, 400, "without base64"),
        ("data:image/png;base64,aGVsbG8=", {}, 400, "not an image"),
        ("\ud800", {}, 422, "input"),
    ],
)
def test_wrong_embeddings(texts_client, given, more, status, words):
    body = json.dumps({"input": given, "model": "student-texts", **more})
    answer = texts_client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    refused(answer, status, words)


def test_no_texts_of_a_student_of_photos(client):
    refused(embeddings(client, "red"), 400, "photos only")
    answer = client.post("/v1/embeddings", content=b"{nonsense", headers={"content-type": "application/json"})
    refused(answer, 422, "JSON")


# -- the description, and requests made from it


@pytest.fixture(scope="module")
def description(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_the_description_is_whole(description):
    assert {path for path, _, _ in operations(description)} == {
        "/search", "/similar/{item_id}", "/items", "/items/{item_id}", "/items/{item_id}/photo", "/examples", "/about",
        "/items/{item_id}/attention", "/v1/embeddings", "/healthz", "/metrics",
    }  # fmt: skip
    for path, _, one in operations(description):
        assert one["description"], path
        errors = {status: answer for status, answer in one["responses"].items() if status != "200"}
        assert set(errors) == {"400", "401", "403", "404", "405", "408", "413", "422", "429", "500", "503"}
        for answer in errors.values():
            assert answer["content"]["application/json"]["schema"]["$ref"] == "#/components/schemas/ErrorAnswer"


@pytest.mark.parametrize("kind", ["photos", "texts"])
def test_whatever_is_sent_is_answered_as_described(kind, request):
    client = request.getfixturevalue("client" if kind == "photos" else "texts_client")
    fuzz = Fuzz(client.get("/openapi.json").json(), seed=0)
    statuses: dict[int, int] = {}
    for number in range(300):
        method, path, given = fuzz.request()
        answer = client.request(method, path, **given)
        told = (number, method, path, str(given)[:300], answer.text[:300])
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, told
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type"}, told
            assert "\n" not in answer.json()["error"]["message"], told
    assert statuses[200] > 60
    assert {400, 404, 422} <= set(statuses)
    assert client.get("/healthz").status_code == 200


# -- the command


def test_a_served_store_from_start_to_end(photos, tmp_path):
    """A process of its own: it answers, Ctrl-C ends it, and nothing of teachers or methods was ever loaded."""
    (tmp_path / "token").write_text("secret\n")
    script = (
        "import sys; from fieldmark import cli; code = cli.main(['serve', *sys.argv[1:]]);"
        "print([name for name in sys.modules if name.startswith(('fieldmark.teacher', 'fieldmark.methods', 'trl'))]);"
        "sys.exit(code)"
    )
    arguments = [str(photos.store.folder), "--port", "0", "--token", f"@{tmp_path / 'token'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        base = re.search(r"24 items of .* at (http://127\.0\.0\.1:\d+) ", line)[1]
        with httpx2.Client(base_url=base, timeout=60) as client:
            assert client.get("/about").status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            assert client.post("/search", files={"image": jpeg(3)}).json()["results"][0]["item_id"] == ODD_IDS[3]
            assert client.get("/items/item-03/attention").status_code == 200
            assert "<title>" in client.get("/").text
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out.strip(), err) == (0, "[]", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{nothing}"], "is not a store"),
        (["{db}", "--port", "{taken}"], "port .* cannot be listened at: address already in use"),
        (["{db}", "--host", "no-such-host.invalid"], "cannot be listened at"),
        (["{db}", "--port", "70000"], "--port was given 70000"),
        (["{db}", "--concurrency", "0"], "--concurrency was given 0"),
        (["{db}", "--max_body_mb", "-3"], "--max_body_mb was given -3"),
        (["{db}", "--timeout_s", "-1"], "--timeout_s was given -1"),
        (["{db}", "--max_wait_ms", "1e9"], "--max_wait_ms was given"),
        (["{db}", "--token", "two words"], "--token is empty or holds spaces"),
        (["{db}", "--token", ""], "--token is empty"),
    ],
)
def test_what_cannot_be_served(photos, tmp_path, capsys, arguments, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"nothing": tmp_path, "db": photos.store.folder, "taken": taken.getsockname()[1]}
        assert re.search(words, fails(capsys, ["serve", *(one.format(**names) for one in arguments)]))


def test_titles_are_kept_as_they_are(client):
    """They are data: the page writes them as text."""
    assert client.get("/items", params={"ids": "shelf/1"}).json()["items"][0]["title"] == HTML_TITLE
