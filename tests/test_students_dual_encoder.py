"""CLIP and SigLIP as students of photos and texts, and composed teachers, which only fieldmark can load."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Processor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipProcessor,
)

from fieldmark.errors import FieldmarkError
from fieldmark.search.indexing import check_titles
from fieldmark.students.build import load_student
from fieldmark.students.dual_encoder import dual_encoder_student
from fieldmark.students.multimodal import (
    build_multimodal_student,
    encode_items,
    is_multimodal,
    merge_lora,
    tokenize_items,
)
from fieldmark.teacher.model import Teacher
from helpers_tiny import byte_tokenizer, make_tiny_composed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a wren", "a bird with a long bill"]
CONTEXT = 32


def photo(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the end token, at which CLIP reads a text."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random CLIP and SigLIP in the layout of published ones."""
    root = tmp_path_factory.mktemp("dual")
    tokenizer = ending_tokenizer()
    tokenizer.model_max_length = CONTEXT
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "pad_token_id": 0}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    size = {"height": 32, "width": 32}
    for kind, config, processor in (
        (
            "clip",
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=24),
            CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer),
        ),
        (
            "siglip",
            SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision),
            SiglipProcessor(SiglipImageProcessor(size=size), tokenizer),
        ),
    ):
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / kind)
        processor.save_pretrained(root / kind)
    return {kind: root / kind for kind in ("clip", "siglip")}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_are_the_checkpoints_own_and_survive_saving(
    checkpoints: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    student = dual_encoder_student(checkpoints[kind])
    assert is_multimodal(student)
    photos = [photo(0), photo(1, 50, 30)]  # the second as a whole: no crop
    images, texts = encode_items(student, images=photos), encode_items(student, texts=TEXTS)
    model = AutoModel.from_pretrained(checkpoints[kind]).eval()
    pixels = torch.stack([torch.from_numpy(np.array(p.resize((32, 32), Image.Resampling.BICUBIC))) for p in photos])
    stock = student[0].processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (stock.image_mean, stock.image_std))
    pixels = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    pads = {"padding": "max_length", "max_length": CONTEXT} if kind == "siglip" else {"padding": True}
    ids = ending_tokenizer()(TEXTS, return_tensors="pt", **pads)
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
        words = {"input_ids": ids["input_ids"]}
        if kind == "clip":
            words["attention_mask"] = ids["attention_mask"]
        theirs_text = model.get_text_features(**words).pooler_output
    assert torch.allclose(torch.from_numpy(images), torch.nn.functional.normalize(theirs), atol=1e-5)
    assert torch.allclose(torch.from_numpy(texts), torch.nn.functional.normalize(theirs_text), atol=1e-5)
    one_by_one = np.concatenate([encode_items(student, texts=[text]) for text in TEXTS])
    assert np.abs(one_by_one - texts).max() < 1e-5

    student.save_pretrained(str(tmp_path / "student"))
    assert np.abs(SentenceTransformer(str(tmp_path / "student")).encode(TEXTS) - texts).max() < 1e-6
    assert np.array_equal(encode_items(load_student(tmp_path / "student"), images=photos), images)
    assert np.array_equal(encode_items(dual_encoder_student(tmp_path / "student"), images=photos), images)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_step_moves_what_is_trainable(checkpoints: dict[str, Path], kind: str, lora_rank: int) -> None:
    student = dual_encoder_student(checkpoints[kind], lora_rank=lora_rank)
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    if lora_rank:
        layers = [n for n in trainable if "lora_B" in n]
        assert len(layers) == 2 * SIZES["num_hidden_layers"] * 6  # two encoders; q, k, v, out, fc1, fc2
    else:
        frozen = {n.split(".")[-1] for n, p in student.named_parameters() if not p.requires_grad}
        assert frozen <= {"logit_scale", "logit_bias"}
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    images = student(tokenize_items(student, images=[photo(0), photo(1)]))["sentence_embedding"]
    texts = student(tokenize_items(student, texts=TEXTS))["sentence_embedding"]
    torch.nn.functional.cross_entropy(images @ texts.T / 0.07, torch.arange(2)).backward()
    optimizer.step()
    for name, parameter in student.named_parameters():
        if name not in trainable:
            assert torch.equal(parameter, before[name]), name
        elif "lora_A" not in name:
            assert (parameter != before[name]).any(), name
    after = encode_items(student, texts=TEXTS)
    assert np.abs(encode_items(merge_lora(student), texts=TEXTS) - after).max() < 1e-5


def test_a_mistake_is_one_sentence(checkpoints: dict[str, Path]) -> None:
    student = dual_encoder_student(checkpoints["clip"])
    siglip = dual_encoder_student(checkpoints["siglip"])
    long = "a title of a bird that has more tokens than the context"
    titled = datasets.Dataset.from_dict({"item_id": ["a"], "title": ["a wren"]})
    cases = [
        (lambda: check_titles(student, titled), "does not embed a photo together with a text; leave it out"),
        (lambda: tokenize_items(student, images=[photo(0)], texts=["a"]), "one or the other"),
        (lambda: tokenize_items(student, texts=["a", long]), f"reads {CONTEXT}"),
        (lambda: tokenize_items(siglip, texts=["a", long]), f"reads {CONTEXT}"),
        (lambda: build_multimodal_student(checkpoints["clip"]), "dual encoder"),
    ]
    for attempt, message in cases:
        with pytest.raises(FieldmarkError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert tokenize_items(student, texts=["x" * (CONTEXT - 1)])["input_ids"].shape == (1, CONTEXT)  # just fits


def test_siglip2_in_its_flexible_form(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = AutoModel.from_pretrained(checkpoints["siglip"]).config.text_config.to_dict()
    config = Siglip2Config(text_config=text, vision_config={**SIZES, "num_patches": 16, "patch_size": 8})
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "siglip2")
    images = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    Siglip2Processor(images, ending_tokenizer()).save_pretrained(tmp_path / "siglip2")
    student = dual_encoder_student(tmp_path / "siglip2")
    features = tokenize_items(student, images=[photo(0, 64, 40)])
    assert features["spatial_shapes"].tolist() == [[4, 4]]  # a square
    vectors = encode_items(student, images=[photo(0), photo(1, 64, 40)])
    assert vectors.shape == (2, 32)  # texts go the way of SigLIP's; its tokenizer class has no tiny form
    assert np.abs(vectors[1] - encode_items(student, images=[photo(1, 64, 40)])[0]).max() < 1e-5
    student.save_pretrained(str(tmp_path / "student"))
    assert np.array_equal(
        encode_items(load_student(tmp_path / "student"), images=[photo(0), photo(1, 64, 40)]), vectors
    )


def test_a_composed_teacher_becomes_a_student(tmp_path: Path) -> None:
    model = Teacher.load(make_tiny_composed(tmp_path)).model
    student = build_multimodal_student(tmp_path / "teacher", attention="causal", lora_rank=4)
    features = tokenize_items(student, images=[photo(0, 64, 64), photo(1, 90, 40)], texts=TEXTS)
    inputs = {k: v for k, v in features.items() if k not in ("modality", "num_images_per_sample")}
    with torch.no_grad():
        assert torch.allclose(
            student(dict(features))["token_embeddings"], model.eval().model(**inputs).last_hidden_state, atol=1e-5
        )
    assert all("language_model" in name for name, p in student.named_parameters() if p.requires_grad)
    both_ways = build_multimodal_student(tmp_path / "teacher", lora_rank=0)
    vectors = encode_items(both_ways, texts=TEXTS)
    assert np.abs(vectors - encode_items(student, texts=TEXTS)).max() > 1e-4
    assert np.abs(vectors - np.concatenate([encode_items(both_ways, texts=[t]) for t in TEXTS])).max() < 1e-5
    both_ways.save_pretrained(str(tmp_path / "student"))
    assert np.array_equal(encode_items(load_student(tmp_path / "student"), texts=TEXTS), vectors)
