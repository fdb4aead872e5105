"""The search service: what it finds against the store asked directly, what it refuses, what it withstands."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from fieldmark.commands import serve
from fieldmark.errors import FieldmarkError
from fieldmark.search import uploads
from fieldmark.search.batching import Batcher
from fieldmark.search.embedding import query_vector
from fieldmark.search.filters import check_filter
from fieldmark.search.limits import Guard, ServiceSettings
from fieldmark.search.rows import Item
from fieldmark.search.service import create_app
from fieldmark.search.why import explain
from helpers_photos import HOSTILE_BYTES, encoded, png_bomb
from helpers_service import (
    GONE,
    HTML_TITLE,
    INSIDE,
    ITEMS,
    ODD_IDS,
    draw,
    jpeg,
    make_store,
    opened,
    png,
    served,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Shop:
    """A store, its student, and a client of a service over both."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.store, self.student = make_store(root, kind)

    def client(self, **settings: Any) -> TestClient:
        """A client of a service of its own; errors of the service are answers, as in use."""
        app = create_app(self.store, self.student, ServiceSettings(**settings))
        return TestClient(app, raise_server_exceptions=False)


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


def refused(answer: Any, status: int, words: str) -> None:
    """An answer of that status, one sentence of JSON that holds these words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert set(answer.json()["error"]) == {"message", "type"}
    assert re.search(words, answer.json()["error"]["message"]), answer.text


def post(client: TestClient, photo: bytes | None = None, **fields: Any) -> Any:
    files = None if photo is None else {"image": ("photo.jpg", photo)}
    return client.post("/search", files=files, data=fields)


def found(answer: Any) -> list[tuple[str, float]]:
    assert answer.status_code == 200, answer.text
    return [(one["item_id"], one["score"]) for one in answer.json()["results"]]


def same(answer: Any, hits: list[Any]) -> None:
    """The answer names these hits."""
    assert [one for one, _ in found(answer)] == [hit.item_id for hit in hits]
    np.testing.assert_allclose([score for _, score in found(answer)], [hit.score for hit in hits], atol=1e-5)


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
    from fieldmark.search.store import Store

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
    ["label = 'x'", "NOT (label='it''s' or `order` != 'y')", "label IN ('a', 'b') AND größe IS NOT NULL", "LABEL like '%;--%'",
     "order >= 'a' and order<'b'", "title BETWEEN 'a' AND 'b'", "1 = 1.5", "label = 'repeat(''a'', 9)'"],
)  # fmt: skip
def test_filters_that_are_let_through(where):
    assert check_filter(where, COLUMNS) == where


@pytest.mark.parametrize(
    "where",
    ["label = repeat('a', 10000000000)", "repeat('a', 1000000000) = label", "`repeat` ('a', 9) = label", "length(label) > 1",
     "label = 'x'; DROP TABLE items", "label = 'x' -- y", "label = 'x' /* y */", "label = (SELECT 1)", "label || label = 'x'",
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


# -- batches


def gathered(work: Callable[[list[int]], list[int]], items: list[int], **options: Any) -> list[Any]:
    """Results, or errors, of items that are submitted at once."""

    async def run() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(work, **{"max_batch": 4, "max_wait_ms": 0, **options})
        worker = asyncio.create_task(batcher.run())
        try:
            return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)
        finally:
            worker.cancel()

    return asyncio.run(run())


def test_items_are_batched_and_come_back_in_order():
    batches: list[int] = []
    seen: list[list[int]] = []
    results = gathered(
        lambda items: seen.append(items) or [-item for item in items], list(range(10)), on_batch=batches.append
    )
    assert results == [-item for item in range(10)]
    assert batches == [4, 4, 2]
    assert [item for batch in seen for item in batch] == list(range(10))


def test_an_item_that_fails_does_not_fail_its_batch():
    def work(items: list[int]) -> list[int]:
        if 2 in items:
            raise ValueError("two")
        return items

    results = gathered(work, [0, 1, 2, 3])
    assert [results[0], results[1], results[3]] == [0, 1, 3]
    assert isinstance(results[2], ValueError)


def test_items_wait_for_others_and_who_gave_up_is_left_out():
    seen: list[list[int]] = []

    async def run() -> list[int]:
        batcher: Batcher[int, int] = Batcher(
            lambda items: seen.append(list(items)) or list(items), max_batch=4, max_wait_ms=300
        )
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.submit(1))
        given_up = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        given_up.cancel()
        results = [await batcher.submit(3), await first]
        worker.cancel()
        return results

    assert asyncio.run(run()) == [3, 1]
    assert seen == [[1, 3]]


def test_requests_of_many_clients_share_batches(photos):
    with photos.client(max_batch=8, max_wait_ms=200) as client:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda seed: found(post(client, png(seed), k=3)), range(16)))
        counted = numbers(client)
        assert counted["fieldmark_batch_size_sum"] == 16
        assert counted["fieldmark_batch_size_count"] <= 6
        for seed, answer in enumerate(answers):
            hits = photos.store.search(query_vector(photos.student, image=png(seed)), 3)
            assert [name for name, _ in answer] == [hit.item_id for hit in hits]


def numbers(client: TestClient) -> dict[str, float]:
    """Samples of /metrics by name and labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_requests_are_counted_by_route(photos):
    with photos.client() as client:
        for path in ("/items/item-03", "/items/item-04", "/items/none", "/a", "/b?c", "/items"):
            client.get(path)
        post(client, png(1))
        counted = numbers(client)
    assert counted["fieldmark_requests_total /items/{item_id:path} 200"] == 2
    assert counted["fieldmark_requests_total /items/{item_id:path} 404"] == 1
    assert counted["fieldmark_requests_total none 404"] == 2
    assert counted["fieldmark_requests_total /items 422"] == 1
    assert counted["fieldmark_requests_total /search 200"] == 1
    assert counted["fieldmark_request_seconds_count /search"] == 1
    assert counted["fieldmark_items"] == ITEMS
    assert counted["fieldmark_active_requests"] == 1


# -- limits


def test_the_token(photos):
    with photos.client(token="correct-horse") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic correct-horse"},
                        {"Authorization": "Bearer correct-horse2"}, {"Authorization": "Bearer é"}):  # fmt: skip
            for path in ("/about", "/openapi.json", "/metrics", "/items/item-03/photo", "/nothing"):
                answer = client.get(path, headers={key: value.encode() for key, value in headers.items()})
                refused(answer, 401, "token")
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer correct-horse"}
        assert client.get("/about", headers=right).status_code == 200
        assert client.get("/openapi.json", headers=right).json()["components"]["securitySchemes"]
        assert [client.get(path).status_code for path in ("/", "/assets/page.js", "/healthz")] == [200, 200, 200]


def test_pages_of_others_may_call_only_where_they_are_named(photos, client):
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.get("/about", headers=asked).headers
    with photos.client(cors=("https://shop.example",), token="t") as open_client:
        assert open_client.options("/search", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        assert open_client.get("/about", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        other = open_client.options("/search", headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example:8000", 403), ("", 403), ("[", 403)],
)
def test_the_name_it_is_called_by(photos, host, status):
    with photos.client(hosts=serve.LOOPBACK) as client:
        assert client.get("/healthz", headers={"Host": host}).status_code == status


def parts(count: int, size: int = 1000) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(size)


def test_the_size_of_a_request(photos):
    with photos.client(max_body_mb=0.05) as client:
        refused(post(client, bytes(60_000)), 413, "larger than 0.05 MB")
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post("/search", content=parts(60), headers=headers)  # without a Content-Length
        assert "content-length" not in answer.request.headers
        refused(answer, 413, "larger than 0.05 MB")
        answer = client.post("/v1/embeddings", content=parts(60), headers={"Content-Type": "application/json"})
        refused(answer, 413, "larger than 0.05 MB")
        assert len(found(post(client, jpeg(3)))) == 10


def test_the_pixels_of_a_photo(photos):
    with photos.client(max_pixels=90 * 60 - 1) as client:
        refused(post(client, png(1)), 400, "90 x 60 pixels; expected at most 5,399")
        assert found(post(client, encoded(draw(1, 89, 60))))
    with photos.client(max_pixels=90 * 60) as client:
        assert found(post(client, png(1)))


async def call(guard: Guard, *, body: list[bytes | float] | None = None, path: str = "/x") -> tuple[int, dict, Any]:
    """A request to a guard by itself; numbers in the body are pauses."""
    sent: list[dict] = []
    left = list([b""] if body is None else body)

    async def receive() -> dict:
        while isinstance(left[0], float):
            await asyncio.sleep(left.pop(0))
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [] if body is None else [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await guard(scope, receive, send)
    answered = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], answered, sent[1]["body"]


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        pass
    await PlainTextResponse("read")(scope, receive, send)


async def working(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await asyncio.sleep(0.3)
    await PlainTextResponse("done")(scope, receive, send)


@pytest.mark.parametrize(("body", "status"), [([b"a", 1.0, b"b"], 408), ([b"a", 0.01, b"b"], 200)])
def test_the_time_of_an_upload(body, status):
    got, headers, _ = asyncio.run(call(Guard(reading, ServiceSettings(timeout_s=0.2)), body=body))
    assert got == status
    assert ("retry-after" in headers) == (status == 408)


@pytest.mark.parametrize("body", [None, [b"a"]])
def test_the_time_of_an_answer(body):
    status, headers, text = asyncio.run(call(Guard(working, ServiceSettings(timeout_s=0.1)), body=body))
    assert (status, headers["retry-after"]) == (503, "1")
    assert "not answered within 0.1 seconds" in text.decode()


def test_requests_at_a_time():
    async def run() -> list[tuple[int, dict, Any]]:
        guard = Guard(working, ServiceSettings(concurrency=2))
        paths = ["/a", "/b", "/c", "/healthz", "/metrics"]
        first = await asyncio.gather(*(call(guard, path=path) for path in paths))
        return [*first, await call(guard)]

    answers = asyncio.run(run())
    assert [status for status, _, _ in answers] == [200, 200, 429, 200, 200, 200]
    assert answers[2][1]["retry-after"] == "1"


def test_a_client_that_is_slow_keeps_no_one_waiting(photos):
    """Over real sockets: half an upload, then another client's whole search."""
    with served(create_app(photos.store, photos.student, ServiceSettings(timeout_s=1.5))) as base:
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
            )
            import httpx2

            assert httpx2.post(f"{base}/search", files={"image": png(1)}).status_code == 200
            slow.settimeout(10)
            assert b" 408 " in slow.recv(4096)


# -- photos from the web


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:8.8.8.8", "::127.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "2001:db8::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not uploads.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111"])
def test_addresses_that_are(address):
    assert uploads.is_public(address)


class Web(BaseHTTPRequestHandler):
    """What a photo's host may do."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        status = {"/moved": 302, "/none": 404}.get(self.path, 200)
        self.send_response(status)
        if self.path == "/moved":
            self.send_header("Location", "/photo")
        self.end_headers()
        if self.path == "/slow":
            time.sleep(1)
        try:
            self.wfile.write(bytes(300_000) if self.path == "/large" else png(3))
        except OSError:
            pass

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(monkeypatch) -> Iterator[str]:
    """A host of this machine that counts as public under the name photos.example."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    known = {"photos.example": ("127.0.0.1", server.server_port)}
    whole = asyncio.BaseEventLoop.getaddrinfo

    async def lookup(self: Any, host: str, port: int, **more: Any) -> Any:
        return await whole(self, *known.get(host, (host, port)), **more)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lookup)
    monkeypatch.setattr(uploads, "is_public", lambda address: address == "127.0.0.1")
    Web.asked.clear()
    yield f"http://photos.example:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_photo_from_the_web(photos, web):
    with photos.client(allow_urls=True) as client:
        assert found(post(client, image_url=f"{web}/photo?x=1")) == found(post(client, png(3)))
        assert Web.asked == [("/photo?x=1", web.removeprefix("http://"))]
        refused(post(client, image_url=f"{web}/moved"), 400, "answered 302; expected 200 and a photo, no redirect")
        refused(post(client, image_url=f"{web}/none"), 400, "answered 404")
        assert [path for path, _ in Web.asked[1:]] == ["/moved", "/none"]
    with photos.client(allow_urls=True, max_body_mb=0.2) as client:
        refused(post(client, image_url=f"{web}/large"), 400, "more than 0.2 MB")


def test_a_photo_from_a_slow_host(photos, web, monkeypatch):
    monkeypatch.setattr(uploads, "FETCH_S", 0.3)
    with photos.client(allow_urls=True) as client:
        refused(post(client, image_url=f"{web}/slow"), 400, "was not answered: ")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1/x.jpg", "not on the public internet"),
        ("http://localhost:8000/metrics", "not on the public internet"),
        ("http://2130706433/", "not on the public internet|not known"),
        ("http://[::1]/", "not on the public internet"),
        ("http://[::ffff:127.0.0.1]/", "not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("http://no-such-host.invalid/", "not known"),
        ("file:///etc/passwd", "not http"),
        ("ftp://example.com/x.jpg", "not http"),
        ("http://user:password@example.com/", "not http"),
        ("http://", "not http"),
        ("http://[", "not http"),
        ("http://x:99999/", "not http"),
        ("http://exa mple.com/\r\nX: y", "not http|not known"),
        ("/etc/passwd", "not http"),
    ],
)
def test_addresses_that_are_not_fetched(photos, url, words):
    with photos.client(allow_urls=True) as client:
        refused(post(client, image_url=url), 400, words)


# -- hostile files


def peak_memory() -> int:
    """Bytes that this process held at most since it was last asked."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


BOMBS = {"png_20000.png": png_bomb(20_000, 2_000), "png_60000.png": png_bomb(60_000, 60_000)}
NAMES = ["../../../etc/passwd", "x" * 4000 + ".jpg", "a\\b.jpg", "\u202egpj.exe", "con", ".jpg", "%00.jpg", "a;b.jpg"]


def test_hostile_files_are_refused_and_the_service_stays(client):
    peak_memory()
    before = peak_memory()
    for name, (content, _) in HOSTILE_BYTES.items():
        answer = client.post("/search", files={"image": (name, content)})
        assert answer.status_code == 400, (name, answer.text)
        assert "cannot be read" in answer.text or "pixels" in answer.text, (name, answer.text)
        assert "bad_photos" not in answer.text
    for name, content in BOMBS.items():
        refused(client.post("/search", files={"image": (name, content)}), 400, "pixels|cannot be read")
    assert peak_memory() - before < 200_000_000  # the largest claims 10 GB
    assert len(found(post(client, jpeg(3)))) == 10


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_does_not_matter(client, name):
    assert found(client.post("/search", files={"image": (name, jpeg(3), "text/html")})) == found(post(client, jpeg(3)))


def test_a_file_of_two_kinds_is_a_photo_and_nothing_else(client):
    """What follows the image is not read, and what is served is encoded anew."""
    assert found(post(client, jpeg(3) + b"<script>alert(1)</script>PK\x03\x04")) == found(post(client, jpeg(3)))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a\"\r\n\r\nab", "multipart/form-data; boundary=x"),
        (b"--y\r\n\r\n--y--", "multipart/form-data"),
        (b"a" * 1000, "multipart/form-data; boundary=" + "x" * 500),
        (b"--x\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n--x--", "multipart/form-data; boundary=x"),
        (b"".join(b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n\r\n' % n for n in range(2000)) + b"--x--",
         "multipart/form-data; boundary=x"),
        (b"k=" + b"9" * 5000, "application/x-www-form-urlencoded"),
        (b"k=%ff%fe&text=%00", "application/x-www-form-urlencoded"),
        (b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\\ud800\r\n--x--',
         "multipart/form-data; boundary=x; charset=unicode_escape"),
        (b'--x\r\nContent-Disposition: form-data; name="where"\r\n\r\n\\ud800\r\n--x--',
         "multipart/form-data; boundary=x; charset=raw_unicode_escape"),
        (b"\xff\xfe", "application/json"),
        (b"x", "\xff"),
    ],
)  # fmt: skip
def test_broken_bodies(client, content, kind):
    answer = client.post("/search", content=content, headers={"Content-Type": kind.encode("latin-1")})
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()["error"]) == {"message", "type"}


# -- the description, and requests made from it


@pytest.fixture(scope="module")
def description(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, methods in description["paths"].items() for method, one in methods.items()]


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


class Fuzz:
    """Requests from the description, right, wrong and hostile, by a seed."""

    TEXTS = ("", " ", "red bird", "item-03", "shelf/1", "..", "../../etc/passwd", "\0", "a\0b", "é鳥", "\u202e", "x" * 3000,
             "'", "' OR 1=1 --", "main_colour = 'red'", "`order` = 'small'", "label = repeat('a', 99999999)", "((((", "%s%n",
             "<script>", "{{7*7}}", "${x}", "-1", "0", "5", "1e9", "NaN", "true", "null", "[]", "data:image/png;base64,",
             "data:image/png;base64,iVBORw0KGgo=", "http://127.0.0.1/", "student-photos", "student-texts", "<|image_pad|>",
             "\u0301" * 200, "\ufeff", "NOT " * 90, "base64", "float", "12345678901234567890")  # fmt: skip
    FILES = (
        b"",
        b"x",
        png(1),
        jpeg(2),
        jpeg(2)[:200],
        png(1)[:-20],
        bytes(2000),
        png_bomb(30_000, 30_000),
        b"GIF89a" + bytes(9),
    )

    def __init__(self, description: dict[str, Any], seed: int) -> None:
        self.random, self.operations = random.Random(seed), operations(description)
        self.schemas = description["components"]["schemas"]

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """Mostly of the schema's type, at times of any."""
        roll = self.random.random()
        if roll < 0.1:
            return self.random.choice([None, True, -1, 3.5, 10**30, [], {}, "", [[]], {"a": 1}, *self.TEXTS[:8]])
        if "$ref" in schema:
            return self.value(self.schemas[schema["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in schema:
            return self.value(self.random.choice(schema["anyOf"]), depth)
        if "enum" in schema or "const" in schema:
            return self.random.choice([*schema.get("enum", [schema.get("const")]), "other"])
        kind = schema.get("type")
        if kind == "object":
            return {
                name: self.value(one, depth + 1)
                for name, one in schema.get("properties", {}).items()
                if self.random.random() < 0.8
            }
        if kind == "array":
            return [self.value(schema["items"], depth + 1) for _ in range(self.random.choice([0, 1, 2, 5]))]
        if kind in ("integer", "number"):
            return self.random.choice([-1, 0, 1, 3, 10, 64, 200, 201, 2**31, 2**63, 2**70])
        if kind == "boolean":
            return self.random.choice([True, False])
        return self.random.choice(self.TEXTS) + self.random.choice(["", "", "", self.random.choice(self.TEXTS)])

    def request(self) -> tuple[str, str, dict[str, Any]]:
        """Method, path and what httpx is given."""
        path, method, one = self.random.choice(self.operations)
        given: dict[str, Any] = {"params": {}}
        for parameter in one.get("parameters", []):
            value = self.value(parameter["schema"])
            if parameter["in"] == "path":
                text = self.random.choice(["item-03", "shelf/1", GONE, str(value)])
                path = path.replace("{%s}" % parameter["name"], quote(text, safe=self.random.choice(["", "/"])))
            elif self.random.random() < 0.8:
                given["params"][parameter["name"]] = (
                    [str(part) for part in value] if isinstance(value, list) else str(value)
                )
        for kind, content in one.get("requestBody", {}).get("content", {}).items():
            body = self.value(content["schema"])
            if kind == "application/json":
                given["content"] = json.dumps(body).encode()[: self.random.choice([None, None, None, 7])]
                given["headers"] = {"Content-Type": kind}
            elif isinstance(body, dict):
                body.pop("image", None)
                given["data"] = {name: str(value) for name, value in body.items()}
                if self.random.random() < 0.7:
                    given["files"] = {"image": (self.random.choice(NAMES), self.random.choice(self.FILES))}
        if self.random.random() < 0.05:
            method = self.random.choice(["get", "post", "put", "delete", "patch", "options"])
        return method.upper(), path, given


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
        "import sys; from fieldmark.commands.serve import run; run(sys.argv[1:]);"
        "print([name for name in sys.modules if name.startswith(('fieldmark.teacher', 'fieldmark.methods', 'trl'))])"
    )
    arguments = [str(photos.store.folder), "--port", "0", "--token", f"@{tmp_path / 'token'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        import httpx2

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
def test_what_cannot_be_served(photos, tmp_path, arguments, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"nothing": tmp_path, "db": photos.store.folder, "taken": taken.getsockname()[1]}
        with pytest.raises(FieldmarkError, match=words):
            serve.run([one.format(**names) for one in arguments])


def test_titles_are_kept_as_they_are(client):
    """They are data: the page writes them as text."""
    assert client.get("/items", params={"ids": "shelf/1"}).json()["items"][0]["title"] == HTML_TITLE
