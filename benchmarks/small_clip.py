"""A small CLIP, where no public one can be had: a dual encoder for `benchmarks/maple.py --student_kind dual`.

    uv run python benchmarks/small_clip.py --data aviary:8 --out runs/small_clip

In the layout of published checkpoints. Its vision network learns to read the attributes of the catalogue's teacher
part, as a teacher's tower does (`build-teacher`); its text network is random, its tokenizer learned from those titles.
It becomes an embedder by the ladder's own start (`--start_steps`), contrast on the teacher's items.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fieldmark.data.catalog import load_catalog
from fieldmark.progress import JobProgress
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.reading import AttributeTable, train_tower
from fieldmark.teacher.tiny import make_tokenizer

SIDE, CONTEXT = 224, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--read_steps", type=int, default=400, help="steps of 48 photos for the vision network")
    given = parser.parse_args()
    torch.set_num_threads(1)  # two processes of one thread beat one of two
    rows = load_catalog(given.data, part="teacher")
    tokenizer: Any = make_tokenizer(rows["title"])
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # CLIP reads a text at its end token
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = CONTEXT
    sizes = {
        "hidden_size": given.width,
        "intermediate_size": 4 * given.width,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.width // 32,
    }
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = sizes | special | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    vision = sizes | {"image_size": SIDE, "patch_size": given.patch}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=given.width))
    model.save_pretrained(given.out)
    square = {"height": SIDE, "width": SIDE}
    CLIPProcessor(CLIPImageProcessor(size=square, crop_size=square), tokenizer).save_pretrained(given.out)
    read = read_attributes(given.out, rows, given.read_steps)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{given.out}: {size:,} parameters, {read:.3f} of the training photos' attributes read")


def read_attributes(folder: Path, rows: datasets.Dataset, steps: int) -> float:
    """Teaches the checkpoint's vision network, in place; returns the share of attributes that it reads at the end."""
    tower = VisionTower.from_pretrained(folder, SIDE)
    table = AttributeTable.of(rows["attributes"])
    truth = table.encode(rows["attributes"])
    with JobProgress("reading", steps) as job:
        read = train_tower(
            tower,
            list(rows["image"]),
            truth,
            table,
            steps=steps,
            bf16=True,
            progress=lambda done, loss: job.update(done, f"loss {loss:.3f}"),
        )
    model = CLIPModel.from_pretrained(folder)
    weights = tower.encoder.model.state_dict()
    missing, unexpected = model.vision_model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("post_layernorm.") for name in missing), missing  # of the class token: no token shows it
    model.save_pretrained(folder)
    return read


if __name__ == "__main__":
    main()
