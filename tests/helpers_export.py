"""Tiny students to export, and run folders that look finished."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from fieldmark.students.build import build_student
from fieldmark.students.dual_encoder import dual_encoder_student
from fieldmark.students.multimodal import build_multimodal_student
from fieldmark.students.tower import VisionTower
from helpers_tiny import byte_tokenizer, make_tiny_teacher

SIDE, CLASSES, PHOTOS, CONTEXT = 64, 4, 4, 32
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
STATISTICS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
SETTINGS = {"data": "aviary:8", "teacher": "/home/someone/models/judge", "loss": "proxy_anchor", "max_steps": 40}


def make_photos(root: Path) -> Path:
    """A folder of small photos, one directory a class; those of a class share a colour."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        colour, folder = rng.integers(0, 256, 3), root / f"class{number}"
        folder.mkdir(parents=True)
        for photo in range(PHOTOS):
            pixels = colour + rng.integers(-90, 90, 3) + rng.integers(-40, 40, (40, 60, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{photo}.png")
    return root


def make_student(kind: str, root: Path, pooling: str = "attention") -> SentenceTransformer:
    """An untrained student of photos whose attention is not even: `qwen3_vl`, `qwen2_5_vl`, `siglip2` or `timm`."""
    torch.manual_seed(0)
    folder, side = root / f"{kind}-base", 140 if kind == "qwen2_5_vl" else SIDE  # windows of four sizes
    if kind == "timm":
        config = TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, num_labels=10)
        network = TimmWrapperModel(config)
        for parameter in network.parameters():
            if parameter.ndim > 1:  # timm's own start lets the signal of so small a network fade
                torch.nn.init.kaiming_normal_(parameter)
        network.save_pretrained(folder)
        save_statistics(folder)
    elif kind == "siglip2":
        model: Any = transformers.AutoModel.from_config(Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=8))
        model.save_pretrained(folder)
        save_statistics(folder)
    else:
        make_tiny_teacher(kind, folder)
    student = build_student(folder, pooling=pooling, resolution=side, embedding_dim=24)
    if pooling == "attention":
        with torch.no_grad():
            student[1].query.normal_()
    assert isinstance(student[0], VisionTower)
    return student.eval()


def save_statistics(folder: Path) -> None:
    transformers.ViTImageProcessor(**STATISTICS).save_pretrained(folder)


def make_dual_encoder(kind: str, root: Path, context: int = CONTEXT) -> SentenceTransformer:
    """An untrained CLIP or SigLIP; bytes for tokens, and the end token, at which CLIP reads a text."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = context
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": context, "pad_token_id": 0}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    vision, size = {**SIZES, "image_size": 32, "patch_size": 8}, {"height": 32, "width": 32}
    if kind == "clip":
        config: Any = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        images: Any = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        processor: Any = CLIPProcessor(images, tokenizer)
    else:
        config = SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        processor = SiglipProcessor(SiglipImageProcessor(size=size), tokenizer)
    torch.manual_seed(0)
    model: Any = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / f"{kind}-base")
    processor.save_pretrained(root / f"{kind}-base")
    return dual_encoder_student(root / f"{kind}-base")


def make_mllm(kind: str, root: Path, pooling: str = "mean", attention: str = "bidirectional") -> SentenceTransformer:
    """An untrained student made of a multimodal LLM; Qwen2.5-VL's windows have four sizes."""
    folder = root / f"{kind}-mllm"
    if not folder.exists():
        make_tiny_teacher(kind, folder)
    resolution = {"qwen3_vl": SIDE, "qwen2_vl": 56, "qwen2_5_vl": 140, "llava": None}[kind]
    student = build_multimodal_student(folder, pooling=pooling, attention=attention, resolution=resolution, lora_rank=0)
    return student


def cut_layers(student: SentenceTransformer) -> SentenceTransformer:
    """A student made of a multimodal LLM with fewer layers, whose graph takes less time to be written (in place)."""
    model: Any = student.transformers_model
    model.language_model.layers = model.language_model.layers[:1]
    if model.config.model_type == "qwen3_vl":
        model.visual.blocks, model.visual.deepstack_visual_indexes = model.visual.blocks[:1], [0]
    return student


def finish_run(run: Path, seed: int = 0, model: SentenceTransformer | None = None, **settings: Any) -> Path:
    """A run folder as a training leaves it: settings, metrics that depend on the seed, and the student."""
    run.mkdir(parents=True, exist_ok=True)
    given = {**SETTINGS, "seed": seed, "out": str(run), **settings}
    (run / "config.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    counts = {"n_queries": 960, "n_gallery": 960}
    after = {"recall@1": 0.6 + 0.01 * seed, "recall@4": 0.8, "map@r": 0.4, "nmi": 0.8, **counts}
    metrics = {"method": "saga", "seed": seed, "before": after | {"recall@1": 0.5}, "after": after}
    metrics["intervals"] = {"before": {}, "after": {"recall@1": [0.55, 0.65]}}
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if model is None:
        (run / "model").mkdir()
        (run / "model" / "modules.json").write_text("[]", encoding="utf-8")
    else:
        model.save_pretrained(str(run / "model"), create_model_card=False)
    return run


def python_of(card: Path) -> str:
    """The one Python block of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return code
