"""The vision tower: what it reads, what it computes, what it saves."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor

from fieldmark.errors import FieldmarkError
from fieldmark.students.build import build_student, load_student
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.composed import PROJECTOR_PREFIX, TOWER_PREFIX, ComposedConfig
from fieldmark.students.encoders import QwenEncoder
from fieldmark.students.pooling import AttentionPooling, MeanPooling
from fieldmark.students.tower import VisionTower

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "rope_parameters": ROPE, "head_dim": 16,
}  # fmt: skip
QWEN = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "window_size": 16, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 36,
    },
}  # fmt: skip
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
CLIP_TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip


def write_processor(folder: Path) -> None:
    Qwen2VLImageProcessor(
        patch_size=4, image_mean=MEAN, image_std=STD, size={"shortest_edge": 16, "longest_edge": 10**6}
    ).save_pretrained(folder)


def make_qwen(folder: Path, kind: str) -> torch.nn.Module:
    """A tiny random Qwen-VL checkpoint; returns the whole model."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vision_config=dict(QWEN[kind]), text_config=dict(TEXT))
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    write_processor(folder)
    return model


def make_vision(folder: Path, kind: str) -> torch.nn.Module:
    """A tiny random vision checkpoint (or CLIP/SigLIP pair); returns the model that was saved."""
    torch.manual_seed(0)
    vision = dict(SMALL, num_patches=16) if kind == "siglip2" else SMALL
    options: dict = {
        "vit": SMALL,
        "dinov2": dict(SMALL, mlp_ratio=2),
        "dinov2_with_registers": dict(SMALL, mlp_ratio=2, num_register_tokens=3),
        "dinov3_vit": dict(SMALL, num_register_tokens=2),
        "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    }.get(kind, {"vision_config": vision, "text_config": CLIP_TEXT})
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # class and mask tokens start at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    write_processor(folder)
    return model


def photos(count: int, side: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in QWEN:
        make_qwen(root / kind, kind)
    return {kind: root / kind for kind in QWEN}


@pytest.mark.parametrize("resolution", [16, 24, 32])
@pytest.mark.parametrize("kind", QWEN)
def test_qwen_tokens_equal_the_checkpoint_behind_its_own_processor(folders, kind, resolution):
    images = photos(3, resolution)
    whole = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    stock = Qwen2VLImageProcessor.from_pretrained(folders[kind])(images=images, return_tensors="pt")
    tower = VisionTower.from_pretrained(folders[kind], resolution)
    pixels = tower.preprocess(images)["pixel_values"]
    assert pixels.shape == (3, 3, resolution, resolution)
    torch.testing.assert_close(tower.encoder.patchify(pixels), stock["pixel_values"], rtol=0, atol=1e-6)

    with torch.no_grad():
        expected = whole.model.visual(stock["pixel_values"], grid_thw=stock["image_grid_thw"])
        features = tower(tower.preprocess(images))
    tokens = (resolution // 8) ** 2
    assert tower.tokens_per_image == tokens
    assert tower.token_dim == 32
    assert features["attention_mask"].tolist() == [[1] * tokens] * 3
    torch.testing.assert_close(features["token_embeddings"].flatten(0, 1), expected.pooler_output, rtol=0, atol=1e-6)
    reference = expected.get("deepstack_features") or []
    assert len(features["deepstack"]) == len(reference) == (2 if kind == "qwen3_vl" else 0)
    for ours, theirs in zip(features["deepstack"], reference):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=0, atol=1e-6)


def test_qwen3_at_224_pixels_gives_49_tokens_and_qwen2_64():
    vision = {"qwen3_vl": dict(QWEN["qwen3_vl"], patch_size=16), "qwen2_vl": dict(QWEN["qwen2_vl"], patch_size=14)}
    from fieldmark.students.encoders import new_encoder

    for kind, expected in (("qwen3_vl", 49), ("qwen2_vl", 64)):
        config = transformers.AutoConfig.for_model(f"{kind}_vision", **vision[kind])
        encoder = new_encoder(config, 224)
        with torch.no_grad():
            assert encoder(torch.zeros(2, 3, 224, 224))[0].shape == (2, expected, 32)


@pytest.mark.parametrize("kind", QWEN)
def test_batched_attention_gives_the_gradients_of_the_loop_over_images(folders, kind):
    tower = VisionTower.from_pretrained(folders[kind], 24)
    pixels = tower.preprocess(photos(4, 24))["pixel_values"]
    looped = copy.deepcopy(tower)
    looped.encoder.model.set_attn_implementation("eager")
    gradients = []
    for candidate in (tower, looped):
        tokens, deepstack = candidate.encoder(pixels)
        weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
        sum((layer * weights).sum() for layer in (tokens, *deepstack)).backward()
        gradients.append({name: p.grad for name, p in candidate.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_images_of_a_batch_do_not_see_each_other(folders):
    for kind, folder in folders.items():
        tower = VisionTower.from_pretrained(folder, 24)
        pixels = tower.preprocess(photos(3, 24))["pixel_values"]
        with torch.no_grad():
            together = tower.encoder(pixels)[0]
            alone = torch.cat([tower.encoder(pixels[i : i + 1])[0] for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6, msg=kind)


def test_every_parameter_gets_a_gradient(folders, tmp_path):
    towers = {kind: VisionTower.from_pretrained(folder, 24) for kind, folder in folders.items()}
    for kind in ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip", "siglip2"):
        make_vision(tmp_path / kind, kind)
        towers[kind] = VisionTower.from_pretrained(tmp_path / kind, 16)
    for kind, tower in towers.items():
        tower.train()
        features = tower(tower.preprocess(photos(2, tower.resolution)))
        loss = features["token_embeddings"].square().mean() + sum(d.square().mean() for d in features["deepstack"])
        loss.backward()
        trained = {name: p for name, p in tower.named_parameters() if p.requires_grad}
        silent = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
        # The bias of a key projection shifts all scores of a row alike: its gradient is zero, or rounding.
        assert [name for name in silent if "k_proj.bias" not in name and "key.bias" not in name] == [], kind
        assert {n for n, p in tower.named_parameters() if not p.requires_grad} <= {
            "encoder.model.embeddings.mask_token",
            "encoder.model.post_layernorm.weight",
            "encoder.model.post_layernorm.bias",
        }


@pytest.mark.parametrize(
    ("kind", "leading"),
    [("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 4), ("dinov3_vit", 3), ("clip", 1), ("siglip", 0)],
)
@pytest.mark.parametrize("resolution", [16, 24])
def test_vision_models_give_their_patch_tokens(tmp_path, kind, leading, resolution):
    model = make_vision(tmp_path, kind)
    tower = VisionTower.from_pretrained(tmp_path, resolution)
    features = tower.preprocess(photos(2, resolution))
    vision = getattr(model, "vision_model", model)
    interpolate = {"interpolate_pos_encoding": True} if kind in ("vit", "clip", "siglip") else {}
    with torch.no_grad():
        expected = vision(pixel_values=features["pixel_values"], **interpolate).last_hidden_state
        tokens = tower(features)["token_embeddings"]
    assert expected.shape[1] == leading + (resolution // 4) ** 2
    torch.testing.assert_close(tokens, expected[:, leading:], rtol=0, atol=1e-5)
    assert features["deepstack"] == []
    assert (tower.tokens_per_image, tower.token_dim) == ((resolution // 4) ** 2, 32)


def test_siglip2_takes_the_patches_of_its_own_processor(tmp_path):
    model = make_vision(tmp_path, "siglip2")
    tower = VisionTower.from_pretrained(tmp_path, 16)
    images = photos(2, 16)
    stock = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16, image_mean=MEAN, image_std=STD)(
        images=images, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.vision_model(**stock).last_hidden_state
        tokens = tower(tower.preprocess(images))["token_embeddings"]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_feature_map_becomes_tokens_and_batch_norm_stays_frozen(tmp_path):
    model = make_vision(tmp_path / "conv", "convnext")
    tower = VisionTower.from_pretrained(tmp_path / "conv", 32, projector_dim=5)
    features = tower.preprocess(photos(2, 32))
    with torch.no_grad():
        grid = model(features["pixel_values"]).last_hidden_state  # [B, C, h, w]
        tokens = tower(features)["token_embeddings"]
        rows = [tower.projector(grid[0, :, y, x]) for y in range(grid.shape[2]) for x in range(grid.shape[3])]
    assert tower.token_dim == 5
    torch.testing.assert_close(tokens[0], torch.stack(rows), rtol=0, atol=1e-5)

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    write_processor(tmp_path / "resnet")
    resnet = VisionTower.from_pretrained(tmp_path / "resnet", 32).train()
    before = {name: value.clone() for name, value in resnet.named_buffers()}
    resnet(resnet.preprocess(photos(2, 32)))["token_embeddings"].sum().backward()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in resnet.named_buffers())
    assert any(p.grad is not None for n, p in resnet.named_parameters() if "normalization" in n)

    student = build_student(tmp_path / "resnet", resolution=32)
    student.save_pretrained(str(tmp_path / "student"))
    again = load_student(tmp_path / "student").encode(photos(2, 32))
    np.testing.assert_allclose(again, student.encode(photos(2, 32)), atol=1e-6)


@pytest.mark.parametrize(("name", "tokens", "width"), [("test_efficientnet", 4, 256), ("test_vit", 16, 64)])
def test_timm_networks_give_their_map_or_their_patches(tmp_path, name, tokens, width):
    timm = pytest.importorskip("timm")
    assert timm.is_model(name)
    settings = {"architecture": name, "num_classes": 0, "pretrained_cfg": {"mean": MEAN, "std": STD}}
    side = 64
    if name == "test_vit":
        side, settings["model_args"] = 64, {"img_size": 64}
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig.from_dict(settings)).eval()
    model.save_pretrained(tmp_path / "timm")
    student = build_student(tmp_path / "timm", resolution=side)
    features = student[0].preprocess(photos(2, side))
    with torch.no_grad():
        states = model.timm_model.forward_features(features["pixel_values"])
        expected = (
            states.flatten(2).transpose(1, 2) if states.ndim == 4 else states[:, model.timm_model.num_prefix_tokens :]
        )
        torch.testing.assert_close(student[0](features)["token_embeddings"], expected, rtol=0, atol=1e-5)
    assert expected.shape == (2, tokens, width)
    student.save_pretrained(str(tmp_path / "student"))
    again = load_student(tmp_path / "student").encode(photos(2, side))
    np.testing.assert_allclose(again, student.encode(photos(2, side)), atol=1e-6)


def test_composed_teacher_gives_tower_and_projector(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    body, projector = transformers.ResNetModel(config).eval(), torch.nn.Linear(8, 32)
    text = transformers.Qwen3Config(**{k: v for k, v in TEXT.items() if k != "rope_parameters"})
    ComposedConfig(vision_config=config, text_config=text, feature_dim=8).save_pretrained(tmp_path)
    write_processor(tmp_path)
    tensors = {f"{TOWER_PREFIX}{n}": t for n, t in body.state_dict().items()}
    tensors |= {f"{PROJECTOR_PREFIX}{n}": t.detach() for n, t in projector.state_dict().items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    tower = VisionTower.from_pretrained(tmp_path, 32)
    features = tower.preprocess(photos(2, 32))
    with torch.no_grad():
        expected = projector(body(features["pixel_values"]).last_hidden_state.flatten(2).transpose(1, 2))
        torch.testing.assert_close(tower(features)["token_embeddings"], expected, rtol=0, atol=1e-6)
    assert tower.token_dim == 32


def test_language_model_tensors_are_not_read(tmp_path):
    model = make_qwen(tmp_path, "qwen3_vl")
    (tmp_path / "model.safetensors").unlink()
    tensors = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    vision = {name: value for name, value in tensors.items() if name.startswith("model.visual.")}
    save_file(vision, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"the language model is gone")
    where = {n: f"model-0000{1 if n in vision else 2}-of-00002.safetensors" for n in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    tower = VisionTower.from_pretrained(tmp_path, 16)
    assert {f"model.visual.{n}" for n in tower.encoder.model.state_dict()} == set(vision)
    for name, value in tower.encoder.model.state_dict().items():
        torch.testing.assert_close(value, vision[f"model.visual.{name}"], rtol=0, atol=0)

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    VisionTower.from_pretrained(tmp_path, 16)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"and now the tower too")
    with pytest.raises(FieldmarkError, match="not a readable safetensors"):
        VisionTower.from_pretrained(tmp_path, 16)


def test_old_key_prefix_in_one_file(folders, tmp_path):
    """Qwen2-VL on the hub calls its tower `visual.`, not `model.visual.`."""
    tensors = load_file(folders["qwen3_vl"] / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folders["qwen3_vl"] / name).read_bytes())
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    first, second = (VisionTower.from_pretrained(f, 16).state_dict() for f in (folders["qwen3_vl"], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_half_precision_checkpoint_becomes_float32(folders, tmp_path):
    AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    write_processor(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path, 16)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}


@pytest.mark.parametrize("settings", [{"do_normalize": False}, {"rescale_factor": 1 / 127.5, "rescale_offset": True}])
def test_unusual_image_statistics(tmp_path, settings):
    values = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} | settings
    make_vision(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    tower = VisionTower.from_pretrained(tmp_path, 16)
    photo = photos(1, 16)[0]
    pixels = tower.preprocess([photo])["pixel_values"][0].permute(1, 2, 0).numpy()
    raw = np.asarray(photo, dtype=np.float64)
    expected = raw / 255 if "do_normalize" in settings else raw / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_nested_processor_settings(folders, tmp_path):
    make_vision(tmp_path, "vit")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert Checkpoint(tmp_path).image_statistics().mean == pytest.approx(MEAN)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("kind", [*QWEN, "vit"])
def test_saved_student_gives_the_same_vectors(folders, tmp_path, kind, pooling):
    source = folders.get(kind) or tmp_path / "vit"
    if kind == "vit":
        make_vision(source, "vit")
    student = build_student(source, pooling=pooling, embedding_dim=12, resolution=24)
    images = photos(3, 24)
    before = student.encode(images)
    student.save_pretrained(str(tmp_path / "student"))
    assert not list((tmp_path / "student").rglob("*.bin"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert "weather" not in card  # the default example is a sentence
    assert "assets/image_0" in card
    for again in (
        SentenceTransformer(str(tmp_path / "student"), trust_remote_code=True),
        load_student(tmp_path / "student"),
        build_student(tmp_path / "student"),
    ):
        assert again[0].resolution == 24
        np.testing.assert_allclose(again.encode(images), before, atol=1e-6)
    assert before.shape == (3, 12)
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-6)


def test_student_in_a_fresh_process_needs_no_teacher(folders, tmp_path):
    student = build_student(folders["qwen3_vl"], resolution=16)
    student.save_pretrained(str(tmp_path / "student"))
    photo = photos(1, 16)[0]
    photo.save(tmp_path / "photo.png")
    code = (
        "import sys, json\n"
        "from sentence_transformers import SentenceTransformer\n"
        "student = SentenceTransformer(sys.argv[1], trust_remote_code=True)\n"
        "vector = student.encode(sys.argv[2]).tolist()\n"
        "loaded = [m for m in sys.modules if m.startswith(('fieldmark.teacher', 'fieldmark.methods'))]\n"
        "print(json.dumps([vector, loaded]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "student"), str(tmp_path / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    vector, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    np.testing.assert_allclose(vector, student.encode(photo), atol=1e-6)


def test_encode_takes_every_kind_of_photo(folders, tmp_path):
    photo = photos(1, 16)[0]
    for name in ("bird.png", "no_ending"):
        photo.save(tmp_path / name, format="PNG")
    student = build_student(folders["qwen3_vl"], resolution=16)
    forms = [
        photo, str(tmp_path / "bird.png"), str(tmp_path / "no_ending"), tmp_path / "bird.png",
        (tmp_path / "bird.png").read_bytes(), np.asarray(photo), {"image": photo},
    ]  # fmt: skip
    vectors = student.encode(forms, batch_size=3)
    np.testing.assert_allclose(vectors, np.repeat(vectors[:1], len(forms), axis=0), atol=1e-6)
    assert student.modalities == ["image"]
    assert not student.supports("text")
    with pytest.raises(FieldmarkError, match="a red bird"):
        student.encode(["a red bird"])
    with pytest.raises(FieldmarkError, match="type int"):
        student[0].preprocess([3])


def test_copies_of_a_student_use_their_own_tower(folders):
    student = build_student(folders["qwen3_vl"], resolution=16)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert other.preprocess.__self__ is other[0]
        photo = photos(1, 16)
        np.testing.assert_allclose(other.encode(photo), student.encode(photo), atol=1e-6)


def test_a_student_folder_keeps_its_parts_unless_told_otherwise(folders, tmp_path):
    student = build_student(folders["qwen3_vl"], pooling="mean", embedding_dim=8, resolution=16)
    student.save_pretrained(str(tmp_path / "student"))
    kept = build_student(tmp_path / "student", pooling="mean", embedding_dim=8, resolution=16)
    assert torch.equal(kept[1].output_weight, student[1].output_weight)
    other = build_student(tmp_path / "student", pooling="attention", resolution=24)
    assert isinstance(other[1], AttentionPooling)
    assert other.encode(photos(1, 24)).shape == (1, 32)
    assert torch.equal(
        other[0].encoder.model.merger.linear_fc1.weight, student[0].encoder.model.merger.linear_fc1.weight
    )
    assert isinstance(build_student(tmp_path / "student", embedding_dim=4)[1], MeanPooling)
    assert VisionTower.from_pretrained(tmp_path / "student").resolution == 16


def test_resized_student_equals_a_tower_built_at_that_size(folders):
    tower = VisionTower.from_pretrained(folders["qwen2_5_vl"], 16).at_resolution(24)
    direct = VisionTower.from_pretrained(folders["qwen2_5_vl"], 24)
    batch = direct.preprocess(photos(2, 24))
    with torch.no_grad():
        ours, theirs = (t(dict(batch))["token_embeddings"] for t in (tower, direct))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert isinstance(tower.encoder, QwenEncoder)


def test_bad_checkpoints_are_refused_in_a_sentence(folders, tmp_path, monkeypatch):
    text = tmp_path / "text"
    transformers.Qwen2Config(
        **{k: v for k, v in TEXT.items() if k not in ("rope_parameters", "head_dim")}
    ).save_pretrained(text)
    no_weights = tmp_path / "no_weights"
    make_vision(no_weights, "vit")
    (no_weights / "model.safetensors").rename(no_weights / "pytorch_model.bin")
    no_processor = tmp_path / "no_processor"
    make_vision(no_processor, "vit")
    (no_processor / "preprocessor_config.json").unlink()
    half = tmp_path / "half"
    make_qwen(half, "qwen2_vl")
    tensors = load_file(half / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "merger" not in n}, half / "model.safetensors")
    timm = tmp_path / "timm"
    timm.mkdir()
    (timm / "config.json").write_text(
        json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 0})
    )
    write_processor(timm)
    empty = tmp_path / "empty"
    empty.mkdir()
    foreign = tmp_path / "foreign"
    make_vision(foreign, "vit")
    student = build_student(folders["qwen2_vl"], resolution=16)
    student.save_pretrained(str(tmp_path / "student"))
    modules = tmp_path / "student" / "modules.json"
    modules.write_text(modules.read_text().replace("fieldmark.students.pooling.", "evil.code."))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "timm", None)

    cases = [
        (lambda: VisionTower.from_pretrained(tmp_path / "nothing"), "not a model folder"),
        (lambda: VisionTower.from_pretrained(empty), "no config.json"),
        (lambda: VisionTower.from_pretrained("nobody/no-such-model"), "hub cannot be reached"),
        (lambda: VisionTower.from_pretrained("no/such/model"), "neither a model folder"),
        (lambda: VisionTower.from_pretrained(text), "text-only"),
        (lambda: VisionTower.from_pretrained(no_weights, 16), "no safetensors"),
        (lambda: VisionTower.from_pretrained(no_processor, 16), "image_mean"),
        (lambda: VisionTower.from_pretrained(half, 16), "do not fit"),
        (lambda: VisionTower.from_pretrained(folders["qwen3_vl"], 20), "multiple of 8"),
        (lambda: VisionTower.from_pretrained(foreign, 18), "multiple of 4"),
        (lambda: VisionTower.from_pretrained(timm, 32), "timm is not installed"),
        (lambda: load_student(foreign), "not a trained student"),
        (lambda: load_student(tmp_path / "student"), "evil.code"),
        (lambda: build_student(foreign, pooling="max"), "attention, mean"),
    ]
    for attempt, message in cases:
        with pytest.raises(FieldmarkError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
