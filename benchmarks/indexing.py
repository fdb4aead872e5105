"""Photos per second of `fieldmark index` against the bare model on tensors that lie in memory.

    OMP_NUM_THREADS=1 uv run python benchmarks/indexing.py --network vit-s

The bare model is the student's forward over batches that were decoded before. Indexing reads the files, hashes and
decodes them, embeds, and writes the store with its indexes. Both take turns, each pass into a new store; the share is
the median over the passes, of wall and of processor seconds. Where the processor both decodes and computes, the second
says what the first would be on an idle machine; with an accelerator decoding runs beside it, and the first counts.

The network has random weights: the time is the same. Photos are generated JPEGs (quality 90), or those of `--data`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bar
from sentence_transformers import SentenceTransformer
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from decode import make_photo
from fieldmark.data.catalog import load_catalog
from fieldmark.search.card import StoredModel
from fieldmark.search.embedding import PhotoReader, embed
from fieldmark.search.indexing import index_catalog, rows_of
from fieldmark.search.store import Store
from fieldmark.students.build import build_student

NETWORKS = {
    "vit-s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


def make_student(network: str, folder: Path) -> SentenceTransformer:
    """A random vision transformer of 12 layers, patches of 16 px, 224 px."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**NETWORKS[network])).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return build_student(folder, pooling="mean").eval()


def make_catalogue(folder: Path, photos: int, size: str) -> Dataset:
    """Generated photos of ten classes."""
    width, height = map(int, size.split("x"))
    for number in range(photos):
        place = folder / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        make_photo(place / f"{number}.jpg", width, height, number)
    return load_catalog(str(folder))


def timed(work: Any) -> tuple[float, float]:
    """Wall and processor seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(
    student: SentenceTransformer, catalog: Dataset, batch_size: int, passes: int, folder: Path
) -> dict[str, Any]:
    """Both ways in turn, after a batch to warm up."""
    reader = PhotoReader(student)
    batches = []
    for start in range(0, len(catalog), batch_size):
        rows = rows_of(catalog, range(start, min(start + batch_size, len(catalog))))
        batches.append(reader.features([reader.square(row["image"]) for row in rows]))
    dim = student.get_embedding_dimension()
    assert dim is not None

    def bare() -> None:
        for features in batches:
            embed(student, dict(features))

    def index(number: int) -> None:
        store = Store.create(folder / f"store-{number}", StoredModel("/none", "0" * 64, dim, texts=False))
        index_catalog(store, student, catalog, batch_size=batch_size)
        store.finish()

    embed(student, dict(batches[0]))
    turns: dict[str, list[tuple[float, float]]] = {"bare": [], "index": []}
    for number in range(passes):
        turns["bare"].append(timed(bare))
        turns["index"].append(timed(lambda number=number: index(number)))
        print(f"pass {number + 1} of {passes}", file=sys.stderr, flush=True)
    pairs = list(zip(turns["bare"], turns["index"], strict=True))
    return {
        "photos": len(catalog),
        "photos_per_second": {
            name: len(catalog) / statistics.median(w for w, _ in found) for name, found in turns.items()
        },
        "photos_per_processor_second": {
            name: len(catalog) / statistics.median(c for _, c in found) for name, found in turns.items()
        },
        "share_of_bare": statistics.median(theirs[0] / ours[0] for theirs, ours in pairs),
        "share_of_bare_cpu": statistics.median(theirs[1] / ours[1] for theirs, ours in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="vit-s")
    parser.add_argument("--data", help="a catalogue; its first --photos photos are taken")
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--size", default="400x300", help="of the generated photos")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student = make_student(options.network, folder / "network")
        if options.data:
            catalog = load_catalog(options.data)
            catalog = catalog.select(np.linspace(0, len(catalog) - 1, options.photos).astype(int).tolist())
        else:
            catalog = make_catalogue(folder / "photos", options.photos, options.size)
        result = measure(student, catalog, options.batch_size, options.passes, folder)
    result = {"network": options.network, "threads": options.threads, "device": str(student.device), **result}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    speeds = result["photos_per_second"]
    print(
        f"{options.network} on {result['device']}, {result['photos']} photos: index {speeds['index']:.1f} photos/s, "
        f"bare model {speeds['bare']:.1f}, share {result['share_of_bare']:.2f} (of processor time "
        f"{result['share_of_bare_cpu']:.2f})"
    )


if __name__ == "__main__":
    main()
