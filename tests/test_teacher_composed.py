"""A composed teacher: timm network, projector, small language model; and the student that starts from its tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TimmWrapperConfig, TimmWrapperModel

from fieldmark.errors import FieldmarkError
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.composed import make_composed
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.prefix import prompt_logits
from fieldmark.teacher.reading import fit_projector
from fieldmark.teacher.tiny import make_tokenizer


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    model = TimmWrapperModel(TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, num_labels=10))
    model.save_pretrained(folder)
    tower = VisionTower.from_pretrained(folder, 64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    model, processor = make_composed(tower, make_tokenizer(["Compare the two."] * 3), text=text)
    out = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_it_loads_as_a_teacher_whose_parts_give_its_own_logits(composed):
    teacher = Teacher.load(composed)  # refuses a model whose parts do not add up to its own forward
    assert teacher.model_type == "fieldmark_composed"
    visual = teacher.visual_tokens([noise(0), noise(1)])
    prompt = teacher.prompt("Compare the two.", 2, visual.tokens.shape[1])
    assert prompt_logits(teacher, prompt, visual).shape == (1, len(teacher.tokenizer))


def test_a_students_tower_gives_the_teachers_tokens(composed):
    teacher, tower = Teacher.load(composed), VisionTower.from_pretrained(composed, 64)
    photos = [noise(2), noise(3)]
    with torch.no_grad():
        tokens = tower(tower.preprocess(photos))["token_embeddings"]
    torch.testing.assert_close(tokens, teacher.visual_tokens(photos).tokens, atol=1e-5, rtol=1e-4)
    assert tower.token_dim == teacher.hidden_size == 16


def test_the_resolution_it_has_may_be_asked_of_it_and_no_other(composed):
    teacher = Teacher.load(composed)
    assert torch.equal(teacher.visual_tokens([noise(6)], 64).tokens, teacher.visual_tokens([noise(6)]).tokens)
    with pytest.raises(FieldmarkError, match=r"resolution 96 was asked .* fixes the size at 64 px"):
        teacher.visual_tokens([noise(6)], 96)


def test_batch_statistics_stay_and_everything_else_gets_a_gradient(composed):
    tower = VisionTower.from_pretrained(composed, 64).train()
    before = {name: value.clone() for name, value in tower.named_buffers()}
    tower(tower.preprocess([noise(4), noise(5)]))["token_embeddings"].square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())
    without = [n for n, p in tower.named_parameters() if p.grad is None]
    assert without == []


def test_the_projector_is_the_principal_components(composed):
    tower = VisionTower.from_pretrained(composed, 64)
    photos = [noise(seed) for seed in range(6)]
    kept = fit_projector(tower, photos, batch_size=4)
    with torch.no_grad():
        features = tower.encoder(tower.preprocess(photos)["pixel_values"])[0].flatten(0, 1).double()
        tokens = tower(tower.preprocess(photos))["token_embeddings"].flatten(0, 1).double()
    centred = features - features.mean(0)
    values = torch.linalg.svdvals(centred).square()
    assert kept == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-3)
    assert tokens.mean(0).abs().max() < 1e-3
    covariance = tokens.T @ tokens / len(tokens)
    assert covariance.diagonal().mean().item() == pytest.approx(1.0, rel=1e-2)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-2
