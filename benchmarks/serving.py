"""Requests per second of `fieldmark serve`, and how long they take, at 1, 8 and 64 clients.

    OMP_NUM_THREADS=1 uv run python benchmarks/serving.py --seconds 60

Each client sends a photo, waits for its ten nearest items, and sends the next. The service and the clients are two
processes of this machine, so the clients' own work is in the numbers. The student is that of `--model`, else a random
vision transformer (`benchmarks/indexing.py`; the time is that of a trained one); the store holds generated photos.
`bare` is the student alone on decoded photos, 32 at once, in this process, before and after: no service could pass it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from sentence_transformers import SentenceTransformer

from fieldmark.commands.console import quiet_libraries
from fieldmark.search.embedding import PhotoReader, describe_model, embed
from fieldmark.search.indexing import index_catalog
from fieldmark.search.store import Store
from fieldmark.students.build import load_student
from indexing import NETWORKS, make_catalogue, make_student

BARE_BATCH, BARE_PASSES, WARM = 32, 3, 16


def make_store(
    folder: Path, model: Path | None, network: str, photos: int, size: str
) -> tuple[SentenceTransformer, list[Path]]:
    """A store at `folder`/db; returns its student and the photos' files."""
    if model is None:
        model = folder / "model"
        make_student(network, folder / "network").save_pretrained(str(model), create_model_card=False)
    student = load_student(model).eval()
    catalog = make_catalogue(folder / "photos", photos, size)
    store = Store.create(folder / "db", describe_model(model, student))
    index_catalog(store, student, catalog)
    store.finish()
    return student, sorted((folder / "photos").rglob("*.jpg"))


def bare_speed(student: SentenceTransformer, paths: list[Path]) -> float:
    """Photos per second of the student alone."""
    reader = PhotoReader(student)
    features = reader.features([reader.square(paths[n % len(paths)]) for n in range(BARE_BATCH)])
    times = []
    for _ in range(BARE_PASSES):
        started = time.perf_counter()
        embed(student, features)
        times.append(time.perf_counter() - started)
    return BARE_BATCH / min(times)


async def load(base: str, photos: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Clients that search for some time."""
    times: list[float] = []
    errors: list[str] = []
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=base, timeout=120, limits=limits) as client:

        async def search(number: int) -> None:
            started = time.perf_counter()
            try:
                answer = await client.post("/search", files={"image": photos[number % len(photos)]})
                wrong = None if answer.status_code == 200 and len(answer.json()["results"]) == 10 else answer.text[:200]
            except httpx2.HTTPError as error:
                wrong = repr(error)
            times.append(time.perf_counter() - started)
            if wrong is not None:
                errors.append(wrong)

        async def go_on(number: int) -> None:
            while time.perf_counter() < end:
                await search(number)
                number += clients

        end = time.perf_counter()
        await asyncio.gather(*(search(number) for number in range(WARM)))
        times.clear()
        before = await batches(client)
        began = time.perf_counter()
        end = began + seconds
        await asyncio.gather(*(go_on(number) for number in range(clients)))
        took = time.perf_counter() - began
        after = await batches(client)
    return {
        "clients": clients,
        "requests": len(times),
        "per_second": round(len(times) / took, 1),
        "p50_ms": round(1000 * float(np.percentile(times, 50)), 1),
        "p99_ms": round(1000 * float(np.percentile(times, 99)), 1),
        "mean_batch": round((after[0] - before[0]) / (after[1] - before[1]), 1),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


async def batches(client: httpx2.AsyncClient) -> tuple[float, float]:
    """Photos embedded so far, and in how many batches."""
    text = (await client.get("/metrics")).text
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    return found["fieldmark_batch_size_sum"], found["fieldmark_batch_size_count"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--model", type=Path, help="folder of a student, for example RUN/model")
    parser.add_argument("--network", choices=list(NETWORKS), default="vit-s")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--size", default="640x480")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        student, paths = make_store(Path(folder), options.model, options.network, options.photos, options.size)
        bare = bare_speed(student, paths)
        photos = [path.read_bytes() for path in paths]
        command = [sys.executable, "-m", "fieldmark", "serve", f"{folder}/db", "--port", "0"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert service.stdout is not None
            address = re.search(r"http://[\d.:]+", service.stdout.readline())
            if address is None:
                raise SystemExit("the service did not start")
            results = [asyncio.run(load(address[0], photos, clients, options.seconds)) for clients in options.clients]
        finally:
            service.terminate()
            service.wait()
        bare = max(bare, bare_speed(student, paths))
    print(json.dumps({"bare_per_second": round(bare, 1)}))
    for result in results:
        print(json.dumps(result))
    sys.exit(any(result["errors"] for result in results))


if __name__ == "__main__":
    main()
