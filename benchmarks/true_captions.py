"""Comparative captions of drawn birds, written from what is known of them where no multimodal LLM can write them.

    uv run python benchmarks/true_captions.py --data runs/scarce/scarce.jsonl --teacher src/fieldmark/teacher/embedded \
        --student runs/scarce/start-2/model --out runs/captions.parquet

For each pair among a photo and its three hard negatives, as MAPLE finds them by that student, one caption each: one or
two of the marks in which the two birds differ. The file is as `fieldmark label captions` writes it; give it to
`benchmarks/maple.py --captions`.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from fieldmark.commands.console import quiet_libraries
from fieldmark.data.aviary import describe
from fieldmark.methods import maple
from fieldmark.teacher.cache import answer_key, photo_hash
from fieldmark.teacher.describe import candidate_pairs, caption_cache
from fieldmark.teacher.model import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, help="in whose name the file is written")
    parser.add_argument("--student", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    config = maple.MapleConfig(
        data=given.data, teacher=given.teacher, student=given.student, out=str(given.out.parent), precision="bf16"
    )
    rows = maple.open_task(config).train
    sets = maple.mine(config, maple.make_student(config), maple.open_items(config, rows))
    marks = dict(zip(rows["image"], rows["attributes"], strict=True))
    found = (candidate_pairs(item, negatives.tolist()) for item, negatives in enumerate(sets.negatives))
    pairs = list(dict.fromkeys(tuple(sorted(pair)) for pair in chain.from_iterable(found)))
    rng = np.random.default_rng(0)
    differing = []
    teacher = Teacher.load(given.teacher)
    with caption_cache(given.out, teacher, temperature=0.7, max_new_tokens=96, seed=0) as cache:
        for one, other in ((sets.photos[i], sets.photos[j]) for i, j in pairs):
            names = [name for name, value in marks[one].items() if value != marks[other][name]]
            differing.append(len(names))
            if not names:
                continue
            chosen = [names[place] for place in rng.permutation(len(names))[: int(rng.integers(1, 3))]]
            form = int(rng.integers(5))
            hashes = photo_hash(one), photo_hash(other)
            row = {"key": answer_key(*hashes, "0"), "photo_1": hashes[0], "photo_2": hashes[1], "generation": 0}
            texts = {f"caption_{k}": describe(marks[photo], chosen, form) for k, photo in enumerate((one, other), 1)}
            cache.add([row | texts | {"answer": "written from the catalogue's attributes"}])
    print(f"{len(pairs)} pairs; by the number of differing marks: {np.bincount(differing).tolist()}")


if __name__ == "__main__":
    main()
