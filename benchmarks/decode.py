"""Decoding speed on one core: photos per second of bare Pillow, of `load_square`, and of its fast decoding.

Bare Pillow is `Image.open(path).convert("RGB").resize(side, BICUBIC)`: no check of the file, no rotation, no colour
profile. The photos are generated JPEGs (quality 90) of three sizes, and those of `--data` if given. The three ways
take turns on the same files, pass after pass, and the best pass of each counts.

    uv run python benchmarks/decode.py --data grocery:../shared/data/grocery --waits

- `--waits` also trains a small student for some steps on generated 1000 x 1000 photos with 0, 1 and 2 worker processes,
  with and without fast decoding, and reads from each run's log the share of a step spent waiting for photos.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fieldmark.data.catalog import load_catalog
from fieldmark.data.photos import load_square
from fieldmark.methods.metric import MetricConfig, train
from fieldmark.methods.quickstart import embedded_teacher

SIZES = {"400x300": 64, "1000x1000": 24, "4000x3000": 4}  # size -> photos
CLASSES, PHOTOS, FIRST_STEPS = 8, 12, 2
Ways = dict[str, Callable[[str, int], Any]]
WAYS: Ways = {
    "bare": lambda path, side: bare(path, side),
    "ours": load_square,
    "fast": lambda path, side: load_square(path, side, fast=True),
}


def bare(path: str, side: int) -> Image.Image:
    """What a data loader without any care does."""
    with Image.open(path) as image:
        return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def make_photo(path: Path, width: int, height: int, seed: int) -> str:
    """Smooth colours under fine grain, so that the file is about as large as a photo's."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 6, (height, width, 1))
    Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)
    return str(path)


def measure(paths: list[str], side: int, passes: int) -> dict[str, float]:
    """Photos per second of each way: the best of `passes`, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(passes + 1):
        for name, decode in WAYS.items():
            start = time.process_time()
            for path in paths:
                decode(path, side)
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: len(paths) / min(times) for name, times in seconds.items()}


def waits(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Median share of a training step spent waiting for photos, by worker processes and decoding."""
    for split in ("train", "test"):
        for label in range(CLASSES):
            place = folder / "photos" / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(PHOTOS if split == "train" else 2):
                make_photo(place / f"{number}.jpg", 1000, 1000, label * 100 + number)
    rows = []
    for fast in (False, True):
        for workers in (0, 1, 2):
            out = folder / f"run-{workers}-{fast}"
            config = MetricConfig(
                data=str(folder / "photos"), out=str(out), student=str(embedded_teacher()), max_steps=steps,
                classes_per_batch=CLASSES, items_per_class=4, workers=workers, fast_decode=fast,
            )  # fmt: skip
            train(config)
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            logged = [line for line in lines if "data_wait_share" in line][FIRST_STEPS:]
            rows.append(
                {
                    "workers": workers,
                    "fast_decode": fast,
                    "data_wait_share": statistics.median(line["data_wait_share"] for line in logged),
                    "seconds_a_step": statistics.median(line["seconds"] for line in logged),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a catalogue whose photos are measured too")
    parser.add_argument("--photos", type=int, default=200, help="photos taken of --data, evenly spread")
    parser.add_argument("--side", type=int, default=224, help="side of the square")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--waits", action="store_true", help="measure the data-wait share of training steps")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run of --waits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.steps <= FIRST_STEPS:
        parser.error(f"--steps {options.steps}: the first {FIRST_STEPS} are not counted; give more")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"side": options.side, "photos_per_second": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size, count in SIZES.items():
            width, height = map(int, size.split("x"))
            paths = [make_photo(folder / f"{size}-{number}.jpg", width, height, number) for number in range(count)]
            result["photos_per_second"][size] = measure(paths, options.side, options.passes)
        if options.data:
            images = load_catalog(options.data)["image"][:]
            chosen = [str(image) for image in images[:: max(1, len(images) // options.photos)][: options.photos]]
            result["photos_per_second"][options.data] = measure(chosen, options.side, options.passes)
        if options.waits:
            result["waits"] = waits(folder, options.steps)
    for rates in result["photos_per_second"].values():
        rates["ours_to_bare"] = rates["ours"] / rates["bare"]
        rates["fast_to_bare"] = rates["fast"] / rates["bare"]
    print(json.dumps(result, indent=2) if options.json else table(result))


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"photos per second of one core, {result['side']} px",
        f"{'':36}  bare    ours    fast  ours/bare fast/bare",
    ]
    for name, rates in result["photos_per_second"].items():
        numbers = "".join(f"{rates[way]:8.0f}" for way in WAYS)
        lines.append(f"{name:34}{numbers}{rates['ours_to_bare']:11.2f}{rates['fast_to_bare']:10.2f}")
    if "waits" in result:
        lines.append("workers  fast_decode  data-wait share  seconds a step")
        lines += [
            f"{row['workers']:7}  {row['fast_decode']!s:>11}  {row['data_wait_share']:15.3f}  "
            f"{row['seconds_a_step']:14.3f}"
            for row in result["waits"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
