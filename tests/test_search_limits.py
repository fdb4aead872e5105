"""The search service under load and under attack: batches, limits, photos from the web, hostile files."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from fieldmark.commands import serve
from fieldmark.search import uploads
from fieldmark.search.batching import Batcher
from fieldmark.search.embedding import query_vector
from fieldmark.search.limits import Guard, ServiceSettings
from fieldmark.search.service import create_app
from helpers_fuzz import NAMES
from helpers_photos import HOSTILE_BYTES, encoded, png_bomb
from helpers_service import ITEMS, Shop, draw, found, jpeg, png, post, refused, served

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("photos"), "photos")


@pytest.fixture(scope="module")
def address(photos) -> Iterator[str]:
    """Of a service over real sockets."""
    with served(create_app(photos.store, photos.student)) as base:
        yield base


@pytest.fixture(scope="module")
def client(photos) -> Iterator[TestClient]:
    with photos.client() as opened_client:
        yield opened_client


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
            head = ("POST /v1/embeddings HTTP/1.1", "Host: x", "Content-Length: 1000", "Content-Type: application/json")
            slow.sendall("\r\n".join([*head, "", "{"]).encode())
            assert httpx2.post(f"{base}/search", files={"image": png(1)}).status_code == 200
            slow.settimeout(10)
            assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize(
    "head",
    ["GET /about HTTP/1.1\r\nHost: x\r\nX: " + "y" * 300_000, "GET /" + "a" * 300_000 + " HTTP/1.1\r\nHost: x",
     "GET /about HTTP/1.1\r\nHost: x" + "\r\nX: y" * 50_000, "GET /about HTTQ/1.1\r\nHost: x", "\0\x16\x03\x01", "BREW",
     "POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: -1", "GET /about HTTP/1.1",
     "POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked"],
    ids=["header", "path", "headers", "version", "tls", "method", "length", "host", "smuggled"],
)  # fmt: skip
def test_what_is_no_request(address, head):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        with contextlib.suppress(ConnectionError):  # refused before all was sent
            client.sendall(f"{head}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            answer = client.recv(4096)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert httpx2.get(f"{address}/healthz").status_code == 200


# -- photos from the web


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:8.8.8.8",
     "::127.0.0.1",     "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "2001:db8::1"],
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
        with contextlib.suppress(OSError):  # who asked has gone
            self.wfile.write(bytes(300_000) if self.path == "/large" else png(3))

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
        ("http://a\0b/", "not http"),
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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
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
        (b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nab',
         "multipart/form-data; boundary=x"),
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
