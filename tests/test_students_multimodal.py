"""A multimodal LLM as a student: prompts, direction of attention, adapters, pooling, what is saved."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

from fieldmark.errors import FieldmarkError
from fieldmark.students.build import load_student
from fieldmark.students.items import too_long
from fieldmark.students.lora import load_lora
from fieldmark.students.multimodal import (
    build_multimodal_student,
    encode_items,
    is_multimodal,
    merge_lora,
    tokenize_items,
)
from fieldmark.teacher.model import Teacher
from helpers_tiny import TEMPLATE, byte_tokenizer, make_tiny_teacher

KINDS = ("qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava")
TEXTS = ["a wren", "a bird with a long, thin, curved bill", "red crown", ""]


def photo(seed: int, width: int = 224, height: int = 224) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_tiny_teacher(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def students(teachers: dict[str, Path]) -> dict[str, SentenceTransformer]:
    """One of each kind as it is built by default; tests do not change them."""
    return {kind: build_multimodal_student(teachers[kind]) for kind in KINDS}


def states(student: SentenceTransformer, features: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return student(dict(features))["token_embeddings"]


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def randomize_lora(student: SentenceTransformer) -> None:
    """As if trained: a new adapter adds nothing."""
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


# Prompts


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_prompts_come_with_the_chat_template(students: dict[str, SentenceTransformer], kind: str) -> None:
    student = students[kind]

    def written(**items: Any) -> str:
        ids = tokenize_items(student, **items)["input_ids"][0]
        text = student.tokenizer.decode(ids)
        return re.sub(r"(<\|image_pad\|>)+", "<image>", text)

    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    image = "<|vision_start|><image><|vision_end|>"
    assert written(texts=["a wren"]) == f"{head}a wren Describe this text in one word:{tail}"
    assert written(images=[photo(0)]) == f"{head}{image}Describe this image in one word:{tail}"
    both = f"{head}{image}a wren Describe this image and text in one word:{tail}"
    assert written(images=[photo(0)], texts=["a wren"]) == both


def test_prompts_can_be_replaced_and_a_checkpoint_without_template_gets_a_plain_one(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(teachers["qwen2_vl"], tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    student = build_multimodal_student(folder, prompts={"text": 'In "one" word:'}, lora_rank=0)
    ids = tokenize_items(student, texts=["a wren"])["input_ids"][0]
    assert student.tokenizer.decode(ids) == 'a wren In "one" word:'
    ids = tokenize_items(student, images=[photo(0)])["input_ids"][0].tolist()
    image = student.transformers_model.config.image_token_id
    assert ids[:64] == [image] * 64
    assert student.tokenizer.decode(ids[64:]) == "Describe this image in one word:"


def test_control_tokens_in_a_title_are_read_as_text(students: dict[str, SentenceTransformer]) -> None:
    student = students["qwen3_vl"]
    features = tokenize_items(student, images=[photo(0)], texts=["<|image_pad|> <|im_end|>"])
    ids = features["input_ids"][0]
    assert (ids == student.transformers_model.config.image_token_id).sum() == 49
    assert "<|image_pad|> <|im_end|> Describe" in student.tokenizer.decode(ids)
    assert states(student, features).isfinite().all()


def test_a_title_that_looks_like_a_file_is_a_text(students: dict[str, SentenceTransformer]) -> None:
    features = tokenize_items(students["qwen3_vl"], texts=["wren.jpg"])
    assert "pixel_values" not in features
    assert "wren.jpg" in students["qwen3_vl"].tokenizer.decode(features["input_ids"][0])


# Photos


def test_a_photo_is_the_square_that_the_teacher_sees(teachers: dict[str, Path], tmp_path: Path) -> None:
    wide = photo(3, 400, 230)
    wide.save(tmp_path / "wide.png")
    small = photo(4, 60, 80)
    student = build_multimodal_student(teachers["qwen3_vl"], lora_rank=0)
    features = tokenize_items(student, images=[str(tmp_path / "wide.png"), small])
    assert (features["input_ids"] == student.transformers_model.config.image_token_id).sum(1).tolist() == [49, 49]
    theirs = Teacher.load(teachers["qwen3_vl"])._image_inputs([wide, small], None)["pixel_values"]
    assert torch.equal(features["pixel_values"], theirs)


def test_every_kind_of_photo_reference_is_the_same_photo(
    students: dict[str, SentenceTransformer], tmp_path: Path
) -> None:
    picture = photo(5, 300, 200)
    path = tmp_path / "photo.png"
    picture.save(path)
    vectors = encode_items(students["qwen3_vl"], images=[picture, path, str(path), path.read_bytes()])
    assert np.abs(vectors - vectors[0]).max() < 1e-6


def test_squares_of_any_size_stay_squares_in_the_stock_processor(students: dict[str, SentenceTransformer]) -> None:
    for kind, tokens in (("qwen3_vl", 49), ("qwen2_vl", 64), ("llava", 49)):
        student = students[kind]
        for side in (60, 100, 223, 224, 230, 448, 500, 1001):
            ids = student.preprocess([Image.new("RGB", (side, side))])["input_ids"]
            assert (ids == student.transformers_model.config.image_token_id).sum() == tokens, (kind, side)


# Attention


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_an_earlier_state_only_if_bidirectional(
    teachers: dict[str, Path], kind: str, attention: str
) -> None:
    student = build_multimodal_student(teachers[kind], attention=attention, lora_rank=4)
    batches: list[dict[str, Any]] = [{"texts": TEXTS[:1]}, {"texts": TEXTS}, {"images": [photo(0)]}]
    for items, implementation in itertools.product(batches, ("sdpa", "eager")):  # alone, padded, with image tokens
        student.transformers_model.set_attn_implementation(implementation)
        features = tokenize_items(student, **items)
        changed = dict(features, input_ids=features["input_ids"].clone())
        last = int(features["attention_mask"][0].sum()) - 1
        changed["input_ids"][0, last] += 1
        before, after = states(student, features), states(student, changed)
        assert not torch.allclose(before[0, last], after[0, last])
        moved = (before[0, :last] - after[0, :last]).abs().amax(-1)
        assert (moved > 1e-4).all() if attention == "bidirectional" else (moved == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_vision_tower_is_the_checkpoints_own_and_causal_states_too(teachers: dict[str, Path], kind: str) -> None:
    causal = build_multimodal_student(teachers[kind], attention="causal")
    original = AutoModelForImageTextToText.from_pretrained(teachers[kind], dtype=torch.float32).eval()
    features = tokenize_items(causal, images=[photo(0), photo(1)], texts=["a wren", "a longer title"])
    inputs = {k: v for k, v in features.items() if k not in ("modality", "num_images_per_sample")}
    with torch.no_grad():
        theirs = original.model(**inputs).last_hidden_state
        both = build_multimodal_student(teachers[kind])
        pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        visual = [m.get_image_features(**pixels, return_dict=True) for m in (original.model, both.transformers_model)]
    assert torch.allclose(states(causal, features), theirs, atol=1e-5)  # DeepStack and M-RoPE included
    assert not torch.allclose(states(both, features), theirs, atol=1e-2)
    for ours, own in zip(visual[1].pooler_output, visual[0].pooler_output, strict=True):
        assert torch.equal(ours, own)


def test_a_model_that_does_not_follow_the_switch_is_refused(
    teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    real = modeling_qwen2_vl.create_causal_mask

    def always_causal(config: Any, **inputs: Any) -> Any:
        config = copy.copy(config)
        config.is_causal = True
        return real(config=config, **inputs, allow_is_causal_skip=False)

    monkeypatch.setattr(modeling_qwen2_vl, "create_causal_mask", always_causal)
    with pytest.raises(FieldmarkError, match="'bidirectional' was asked of a qwen2_vl model"):
        build_multimodal_student(teachers["qwen2_vl"])


# Pooling and padding


@pytest.mark.parametrize(("pooling", "attention"), [("mean", "bidirectional"), ("lasttoken", "causal")])
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_vl", "llava"])
def test_embeddings_are_pooled_real_tokens_and_a_batch_is_one_by_one(
    teachers: dict[str, Path], kind: str, pooling: str, attention: str
) -> None:
    student = build_multimodal_student(teachers[kind], pooling=pooling, attention=attention)
    features = tokenize_items(student, texts=TEXTS)
    tokens = states(student, features)
    batch = encode_items(student, texts=TEXTS, convert="tensor")
    for row, text in enumerate(TEXTS):
        real = [tokens[row, i] for i in range(tokens.shape[1]) if features["attention_mask"][row, i]]
        pooled = sum(real) / len(real) if pooling == "mean" else real[-1]
        assert torch.allclose(batch[row], pooled / pooled.norm(), atol=1e-5)
        assert np.abs(encode_items(student, texts=[text])[0] - batch[row].numpy()).max() < 1e-5
    photos = [photo(0), photo(1)]
    both = encode_items(student, images=photos, texts=TEXTS[:2])
    alone = [encode_items(student, images=[p], texts=[t])[0] for p, t in zip(photos, TEXTS[:2], strict=True)]
    assert np.abs(both - np.stack(alone)).max() < 1e-5


def test_items_keep_their_order_and_the_student_its_mode(students: dict[str, SentenceTransformer]) -> None:
    student = copy.deepcopy(students["qwen3_vl"]).train()
    done: list[int] = []
    vectors = encode_items(student, texts=TEXTS, batch_size=3, progress=done.append)
    assert done == [3, 4]
    assert student.training
    assert vectors.dtype == np.float32
    student.eval()
    one_by_one = np.concatenate([encode_items(student, texts=[text]) for text in TEXTS])
    assert np.abs(vectors - one_by_one).max() < 1e-5
    encode_items(student, images=[photo(0)])  # must leave nothing behind for the next texts
    assert np.array_equal(encode_items(student, texts=TEXTS, batch_size=3), vectors)


# LoRA


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_every_adapter_of_the_language_model_and_nothing_else(
    teachers: dict[str, Path], kind: str
) -> None:
    student = build_multimodal_student(teachers[kind])
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    layers = student.transformers_model.config.text_config.num_hidden_layers
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert trainable == {
        f"0.model.language_model.layers.{layer}.{projection}.lora_{matrix}.default.weight"
        for layer in range(layers)
        for projection in projections
        for matrix in "AB"
    }
    adapter = student.transformers_model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (32, 32, 0.0)

    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student.train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-4)
    images = student(tokenize_items(student, images=[photo(0), photo(1)]))["sentence_embedding"]
    texts = student(tokenize_items(student, texts=TEXTS[:2]))["sentence_embedding"]
    torch.nn.functional.cross_entropy(images @ texts.T / 0.07, torch.arange(2)).backward()
    optimizer.step()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            assert (parameter != before[name]).any(), name
        elif "lora_A" not in name:  # the gradient of A is zero while B is
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_the_saved_folder_needs_nothing_of_ours(
    teachers: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    student = build_multimodal_student(teachers[kind], lora_rank=4, lora_alpha=8)
    plain = encode_items(student, texts=TEXTS)
    randomize_lora(student)
    pictures = [photo(0), photo(1)]

    def embed(student: SentenceTransformer) -> list[np.ndarray]:
        return [
            encode_items(student, images=pictures),
            encode_items(student, texts=TEXTS),
            encode_items(student, images=pictures, texts=TEXTS[:2]),
        ]

    unmerged = embed(student)
    assert np.abs(unmerged[1] - plain).max() > 1e-2
    merged = embed(merge_lora(student))
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(unmerged, merged, strict=True))
    assert not any("lora" in name or "base_layer" in name for name in student.state_dict())

    student.save_pretrained(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "adapter_config.json").exists()
    loaded = SentenceTransformer(str(tmp_path / "student"))
    for ours, stock in zip(
        merged,
        [loaded.encode(pictures), loaded.encode(TEXTS), loaded.encode(
            [{"image": p, "text": t} for p, t in zip(pictures, TEXTS[:2], strict=True)]
        )],
        strict=True,
    ):  # fmt: skip
        assert np.abs(ours - stock).max() < 1e-6
    again = load_student(tmp_path / "student")
    assert all(np.array_equal(a, b) for a, b in zip(embed(again), merged, strict=True))
    resumed = build_multimodal_student(tmp_path / "student", lora_rank=4)  # its own settings, new adapters
    assert all(np.abs(a - b).max() < 1e-6 for a, b in zip(embed(resumed), merged, strict=True))


def test_adapters_of_a_checkpoint_come_back_bit_by_bit(teachers: dict[str, Path], tmp_path: Path) -> None:
    student = build_multimodal_student(teachers["qwen3_vl"], lora_rank=4)
    randomize_lora(student)
    student.save_pretrained(str(tmp_path / "checkpoint"))  # as a trainer saves it: the adapters alone
    resumed = build_multimodal_student(teachers["qwen3_vl"], lora_rank=4)
    load_lora(resumed, tmp_path / "checkpoint")
    state = resumed.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in student.state_dict().items())
    with pytest.raises(FieldmarkError, match="same LoRA rank"):
        load_lora(build_multimodal_student(teachers["qwen3_vl"], lora_rank=2), tmp_path / "checkpoint")
    with pytest.raises(FieldmarkError, match="cannot be read"):
        load_lora(student, tmp_path)


def test_a_deployed_student_needs_no_fieldmark_and_the_students_room_no_teacher(
    students: dict[str, SentenceTransformer], tmp_path: Path
) -> None:
    student = merge_lora(copy.deepcopy(students["qwen3_vl"]))
    student.save_pretrained(str(tmp_path / "student"))
    script = """
import json, sys
from sentence_transformers import SentenceTransformer
student = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps(student.encode(["a wren"])[0].tolist()))
assert "fieldmark" not in sys.modules
import fieldmark.students.dual_encoder, fieldmark.students.multimodal
assert not [name for name in sys.modules if name.startswith(("fieldmark.teacher", "fieldmark.methods"))]
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "student")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    theirs = np.array(json.loads(run.stdout.splitlines()[-1]))
    assert np.abs(theirs - encode_items(student, texts=["a wren"])[0]).max() < 1e-6


# InternVL: tiles, its own image tokens, and a processor that pads on the left


def test_internvl_reads_one_block_of_tokens_a_photo(tmp_path: Path) -> None:
    bytes_only = byte_tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only.backend_tokenizer,
        eos_token=bytes_only.eos_token,
        pad_token=bytes_only.pad_token,
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": [56, 56], "patch_size": [14, 14]}
    image_token: Any = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    torch.manual_seed(0)
    InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=4)
    ).save_pretrained(tmp_path / "teacher")
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>"),
    ).save_pretrained(tmp_path / "teacher")

    student = build_multimodal_student(tmp_path / "teacher", lora_rank=4)
    wide = photo(0, 300, 100)
    features = tokenize_items(student, images=[wide, photo(1)], texts=TEXTS[:2])
    assert features["pixel_values"].shape == (2, 3, 56, 56)
    assert (features["input_ids"] == image_token).sum(1).tolist() == [4, 4]
    vectors = encode_items(student, images=[wide, photo(1)], texts=TEXTS[:2])
    assert np.abs(encode_items(student, images=[wide], texts=TEXTS[:1])[0] - vectors[0]).max() < 1e-5
    merge_lora(student).save_pretrained(str(tmp_path / "student"))
    loaded = SentenceTransformer(str(tmp_path / "student"))
    square = wide.resize((56, 56), Image.Resampling.BICUBIC)
    assert np.abs(loaded.encode([{"image": square, "text": TEXTS[0]}])[0] - vectors[0]).max() < 1e-5


@pytest.mark.parametrize("model_type", KINDS)
def test_too_long_is_what_would_be_refused(students: dict[str, SentenceTransformer], model_type: str) -> None:
    student, photo = copy.deepcopy(students[model_type]), Image.new("RGB", (64, 64), (90, 140, 60))
    texts = ["é" * count for count in range(1, 30)] + ["bill"]
    length = tokenize_items(student, images=[photo], texts=[texts[12]])["input_ids"].shape[1]
    student.transformers_model.config.get_text_config().max_position_embeddings = length
    refused = []
    for item, text in enumerate(texts):
        try:
            tokenize_items(student, images=[photo], texts=[text])
        except FieldmarkError:
            refused.append(item)
    assert too_long(student, [photo] * len(texts), texts) == refused
    assert 0 < len(refused) < len(texts) - 1
    assert too_long(student, [], []) == []


# Mistakes


def test_a_mistake_is_one_sentence(
    teachers: dict[str, Path], students: dict[str, SentenceTransformer], tmp_path: Path
) -> None:
    student = copy.deepcopy(students["qwen3_vl"])
    adapters = tmp_path / "adapters"
    student.save_pretrained(str(adapters))  # not merged
    short = copy.deepcopy(students["qwen2_vl"])
    short.transformers_model.config.text_config.max_position_embeddings = 40
    merged = tmp_path / "merged"
    merge_lora(copy.deepcopy(student)).save_pretrained(str(merged))
    broken = copy_of(merged, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    foreign = copy_of(merged, tmp_path / "foreign")
    modules = (foreign / "modules.json").read_text()
    (foreign / "modules.json").write_text(modules.replace("sentence_transformers.base.modules.normalize", "evil"))
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "llama"}')
    no_weights = copy_of(teachers["llava"], tmp_path / "no-weights")
    (no_weights / "model.safetensors").unlink()
    half = copy_of(teachers["llava"], tmp_path / "half")
    weights = load_file(half / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, half / "model.safetensors", metadata={"format": "pt"})
    build = build_multimodal_student
    cases: list[tuple[Any, str]] = [
        (lambda: build(teachers["qwen3_vl"], pooling="max"), "expected one of mean, lasttoken"),
        (lambda: build(teachers["qwen3_vl"], attention="both"), "expected one of bidirectional, causal"),
        (lambda: build(teachers["qwen3_vl"], resolution=225), "multiple of 32"),
        (lambda: build(teachers["llava"], resolution=336), "takes 224 px"),
        (lambda: build(teachers["qwen3_vl"], lora_rank=-1), "rank of 0 or more"),
        (lambda: build(teachers["qwen3_vl"], prompts={"video": "x"}), "a prompt for 'video'"),
        (lambda: build(merged, prompts={"text": "x"}), "leave prompts out"),
        (lambda: build(text_only), "without image tokens"),
        (lambda: build(no_weights), "could not be loaded"),
        (lambda: build(half), "weights are missing, first .*layers.1.mlp"),
        (lambda: build(tmp_path / "nothing"), "not a model folder"),
        (lambda: load_student(adapters), "no config.json"),
        (lambda: load_student(broken), "missing or broken"),
        (lambda: build(foreign), "wants to run evil"),
        (lambda: tokenize_items(student), "nothing to embed"),
        (lambda: encode_items(student, texts=[]), "nothing to embed"),
        (lambda: tokenize_items(student, images=[photo(0)], texts=["a", "b"]), "1 photos and 2 texts"),
        (lambda: tokenize_items(student, texts=["a", None]), "given as NoneType"),  # type: ignore[list-item]
        (lambda: tokenize_items(student, images=["missing.png"]), "missing.png"),
        (lambda: encode_items(student, texts=["a"], batch_size=0), "batch_size 0"),
        (lambda: tokenize_items(short, texts=["a title far too long for this student"]), "reads 40"),
    ]
    for attempt, message in cases:
        with pytest.raises(FieldmarkError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_what_a_student_takes_is_known(students: dict[str, SentenceTransformer], teachers: dict[str, Path]) -> None:
    from fieldmark.students.build import build_student

    assert all(is_multimodal(student) for student in students.values())
    photos_only = build_student(teachers["qwen3_vl"])
    assert not is_multimodal(photos_only)
    with pytest.raises(FieldmarkError, match="does not embed both photos and texts"):
        encode_items(photos_only, texts=["a wren"])
