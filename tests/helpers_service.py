"""A small store with awkward items, a student that made it, and the service over both."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from sentence_transformers import SentenceTransformer

from fieldmark.search.embedding import PhotoReader, describe_model, embed
from fieldmark.search.limits import ServiceSettings
from fieldmark.search.service import create_app
from fieldmark.search.store import Store
from fieldmark.students.build import build_student, load_student
from fieldmark.students.multimodal import build_multimodal_student
from helpers_photos import encoded
from helpers_tiny import make_tiny_teacher

COLOURS, SIZES, RESOLUTION = ("red", "green", "blue"), ("small", "large"), 64
# item_ids that are no words: paths, quotes, what an address or a filter could take for its own
ODD_IDS = ("shelf/1", "it's", '5"', "50%", "a b", "?k=1#x", "né 鳥", "x/photo", "`tick`")
ITEMS = 24
RARE = {5: "yes"}
HTML_TITLE, RTL_TITLE = "<b>wren</b> & <img src=x onerror=alert(1)>", "נקר סורי עם מקור ארוך"
# An item whose photo was deleted, its title, and an item whose photo lies in the store.
GONE, GONE_TITLE, INSIDE = "gone", "red bird number 9", "inside"


def draw(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int, **options: Any) -> bytes:
    return encoded(draw(seed), "JPEG", quality=95, **options)


def png(seed: int) -> bytes:
    return encoded(draw(seed))


def rows(root: Path) -> list[dict[str, Any]]:
    """Rows of a catalogue whose photos are written below `root`."""
    made = []
    names = [*ODD_IDS, GONE, INSIDE, *(f"item-{number:02d}" for number in range(ITEMS - len(ODD_IDS) - 2))]
    for number, name in enumerate(names):
        path = root / f"{number}.jpg"
        exif = Image.Exif()
        exif[0x010F] = "SECRET CAMERA"
        path.write_bytes(jpeg(number, exif=exif))
        made.append({
            "item_id": name,
            "image": path.read_bytes() if name == INSIDE else str(path),
            "label": f"class {number % 4}",
            "title": {0: HTML_TITLE, 1: RTL_TITLE, 2: None}.get(number, f"{COLOURS[number % 3]} bird number {number}"),
            "attributes": {"Main colour": COLOURS[number % 3], "order": SIZES[number % 2], "rare": RARE.get(number)},
        })  # fmt: skip
    return made


def make_student(kind: str, root: Path) -> Path:
    """An untrained student of photos (with an attention pooler), or of photos and texts."""
    teacher = make_tiny_teacher("qwen3_vl", root / "teacher")
    torch.manual_seed(0)
    if kind == "photos":
        student = build_student(teacher, pooling="attention", resolution=RESOLUTION)
        with torch.no_grad():
            student[1].query.normal_()  # it looks somewhere
    else:
        student = build_multimodal_student(teacher, lora_rank=0, resolution=RESOLUTION)
    student.save_pretrained(str(root / f"student-{kind}"), create_model_card=False)
    return root / f"student-{kind}"


def make_store(root: Path, kind: str = "photos") -> tuple[Store, SentenceTransformer]:
    """A store of `ITEMS` items and the student that made it, in eval mode."""
    folder = make_student(kind, root)
    student = load_student(folder).eval()
    catalog = rows(root)
    reader = PhotoReader(student)
    vectors = embed(student, reader.features([reader.square(row["image"]) for row in catalog]))
    store = Store.create(root / "db", describe_model(folder, student))
    store.add(catalog, vectors, [f"hash {row['item_id']}" for row in catalog])
    store.finish()
    next(Path(row["image"]) for row in catalog if row["item_id"] == GONE).unlink()
    return store, student


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application that a real server runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


class Shop:
    """A store, its student, and a client of a service over both."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.store, self.student = make_store(root, kind)

    def client(self, **settings: Any) -> TestClient:
        """A client of a service of its own; errors of the service are answers, as in use."""
        app = create_app(self.store, self.student, ServiceSettings(**settings))
        return TestClient(app, raise_server_exceptions=False)


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
