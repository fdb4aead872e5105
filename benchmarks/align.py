"""Alignment scores with a shared photo prefix against scoring one pair at a time: pairs per second.

Drawn birds, four titles a photo (its own and those of other species). All ways begin with decoded photos and end with
scores; they take turns, and a ratio is the median over the turns, so that a busy machine disturbs all ways alike. On
such a machine `--threads 1` and the ratios of CPU seconds are the ones to trust.

    uv run python benchmarks/align.py --threads 1 --repeats 5
    uv run python benchmarks/align.py --model 0.3b --threads 1 --repeats 3 --photos 4
    uv run python benchmarks/align.py --model 0.3b --resolution 448 --device cuda

- shared: the tower once a photo, the question up to its text once a photo (`fieldmark.teacher.align`).
- one by one: the processor and the teacher's public forward for each pair, as its model card shows it.
- batched: the same, 16 pairs at once.
- batched, prepared: the same without the processor, whose work is done before the clock starts.

Sharing saves what the pairs of a photo have in common: with K texts of T tokens behind P shared ones, K (P + T) tokens
become P + K T. So the gain grows with the tokens of a photo (`--resolution`) and falls with the length of the texts.

A teacher without tokens for Yes and No gets them in memory. The 0.3 B model is random, with a very small tower: a real
tower, which the other ways run once a pair, would favour sharing.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.data.photos import load_square
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.align import ANSWERS, QUESTION, Aligner
from fieldmark.teacher.model import DEFAULT_RESOLUTION, Teacher
from replay import SIZES

TEXTS, PAIRS_AT_ONCE = 4, 16
WAYS = {
    "shared": "shared",
    "single": "one by one",
    "batched": f"batched, {PAIRS_AT_ONCE} pairs at once",
    "prepared": "batched, prepared",
}


def with_answers(teacher: Teacher) -> Teacher:
    """The teacher itself, or with new tokens for Yes and No."""
    try:
        Aligner(teacher, (DEFAULT_RESOLUTION // teacher._pixels_per_token()) ** 2)
    except FieldmarkError:
        teacher.tokenizer.add_tokens(list(ANSWERS))
        torch.manual_seed(0)
        if len(teacher.tokenizer) > teacher.lm_head.out_features:
            teacher.model.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
        return Teacher(teacher.model, teacher.processor)
    return teacher


def random_teacher(size: str, processor: Any, image_token_id: int, video_token_id: int) -> Teacher:
    """A random Qwen3-VL of `replay.SIZES` that reads with another teacher's processor."""
    settings = SIZES[size]
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": settings["hidden_size"],
        "num_position_embeddings": 196,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config={**settings, "head_dim": 64, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        tie_word_embeddings=True,
    )
    return Teacher(Qwen3VLForConditionalGeneration(config), processor)


def birds(photos: int, resolution: int) -> tuple[list[Image.Image], list[list[str]]]:
    """Square photos, and for each its own title and those of the next species."""
    rows = select_split(load_catalog("aviary"), "test")
    of = {label: (image, title) for image, title, label in zip(rows["image"], rows["title"], rows["label"]) if title}
    chosen = list(of.values())[: max(photos, TEXTS)]
    titles = [title for _, title in chosen]
    texts = [[titles[(i + k) % len(titles)] for k in range(TEXTS)] for i in range(photos)]
    return [load_square(image, resolution) for image, _ in chosen[:photos]], texts


def public_inputs(teacher: Teacher, images: list[Image.Image], texts: list[str]) -> dict[str, torch.Tensor]:
    """What the processor makes of some pairs."""
    chats = [
        teacher.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format(text=text)}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in texts
    ]
    side = images[0].width * images[0].height
    return teacher.processor(
        images=images,
        text=chats,
        size={"shortest_edge": side, "longest_edge": side},
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(teacher.model.device)


@torch.no_grad()
def public_scores(teacher: Teacher, inputs: dict[str, torch.Tensor], answers: tuple[int, int]) -> torch.Tensor:
    """Scores by the model's own forward."""
    teacher.model.model.rope_deltas = None
    logits = teacher.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return torch.sigmoid(logits[:, answers[0]] - logits[:, answers[1]])


def measure(teacher: Teacher, photos: int, repeats: int, resolution: int) -> dict[str, Any]:
    """Pairs per second of each way, how many times the shared way is faster, and the largest difference of scores."""
    images, texts = birds(photos, resolution)
    pairs = [(image, text) for image, row in zip(images, texts, strict=True) for text in row]
    answers = Aligner(teacher, teacher.visual_tokens(images[:1], resolution).tokens.shape[1]).answer_ids
    chunks = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    prepared = [public_inputs(teacher, [i for i, _ in chunk], [t for _, t in chunk]) for chunk in chunks]

    def shared() -> torch.Tensor:
        visual = teacher.visual_tokens(images, resolution)
        return Aligner(teacher, visual.tokens.shape[1]).scores(visual, texts).flatten()

    def single() -> torch.Tensor:
        found = [public_scores(teacher, public_inputs(teacher, [i], [t]), answers) for i, t in pairs]
        return torch.cat(found)

    def batched() -> torch.Tensor:
        inputs = (public_inputs(teacher, [i for i, _ in chunk], [t for _, t in chunk]) for chunk in chunks)
        return torch.cat([public_scores(teacher, one, answers) for one in inputs])

    def from_prepared() -> torch.Tensor:
        return torch.cat([public_scores(teacher, one, answers) for one in prepared])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "shared": shared,
        "single": single,
        "batched": batched,
        "prepared": from_prepared,
    }
    scores = {name: way() for name, way in ways.items()}  # also warms up
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            way().cpu()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
        print(f"turn {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    return {
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "photos": photos,
        "resolution": resolution,
        "texts_a_photo": TEXTS,
        "tokens_a_pair": prepared[0]["input_ids"].shape[1],
        "pairs_per_second": {name: len(pairs) / statistics.median(found) for name, found in wall.items()},
        "times_faster": {name: _ratio(found, wall["shared"]) for name, found in wall.items() if name != "shared"},
        "times_faster_cpu": {name: _ratio(found, cpu["shared"]) for name, found in cpu.items() if name != "shared"},
        "largest_difference": {
            name: float((found - scores["shared"]).abs().max()) for name, found in scores.items() if name != "shared"
        },
        "score_spread": float(scores["shared"].std()),
    }


def _ratio(one: list[float], shared: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, shared, strict=True))


def table(name: str, result: dict[str, Any]) -> str:
    """A markdown table."""
    lines = [
        f"{name}, {result['parameters'] / 1e6:.0f} M parameters, {result['tokens_a_pair']} tokens a pair at most, "
        f"{TEXTS} texts a photo (standard deviation of the scores: {result['score_spread']:.3f})",
        "",
        "| way | pairs/s | shared is faster by | in CPU seconds | largest difference of scores |",
        "|" + " --- |" * 5,
    ]
    for way, text in WAYS.items():
        cells = [text, f"{result['pairs_per_second'][way]:.1f}"]
        if way != "shared":
            cells += [f"{result[key][way]:.2f} x" for key in ("times_faster", "times_faster_cpu")]
            cells.append(f"{result['largest_difference'][way]:.1e}")
        lines.append("| " + " | ".join([*cells, "", "", ""][:5]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a Qwen-VL teacher; the embedded one if left out")
    parser.add_argument("--model", choices=["teacher", *SIZES], default="teacher", help="the teacher, or a random one")
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=DEFAULT_RESOLUTION, help="side of a photo in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    logging.disable(logging.WARNING)
    teacher = Teacher.load(options.teacher or Path(str(resources.files("fieldmark.teacher") / "embedded")))
    name = options.teacher or "the embedded teacher"
    if options.model != "teacher":
        config = teacher.model.config
        teacher = random_teacher(options.model, teacher.processor, config.image_token_id, config.video_token_id)
        name = f"random {options.model}"
    teacher = with_answers(teacher)
    teacher.model.to(options.device)
    result = measure(teacher, options.photos, options.repeats, options.resolution)
    if options.json:
        print(json.dumps({"model": name, "threads": options.threads, **result}, indent=2))
    else:
        print(table(name, result))


if __name__ == "__main__":
    main()
