"""A frozen tower's tokens are looked up: the same numbers, each photo computed once, nothing of the tower changes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fieldmark.errors import FieldmarkError
from fieldmark.students.frozen_tower import TowerTokens, digests, remembered_tower, sums_of_bits
from fieldmark.students.items import tokenize_items
from fieldmark.students.multimodal import build_multimodal_student
from helpers_tiny import make_tiny_teacher

PHOTOS = [Image.effect_noise((64, 64), 40 + 20 * i).convert("RGB") for i in range(4)]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_vl", "llava"])
def student(request, tmp_path_factory):
    made = make_tiny_teacher(request.param, tmp_path_factory.mktemp("teacher") / request.param)
    return build_multimodal_student(made, lora_rank=2)


def embed(student, photos) -> Tensor:
    return student(tokenize_items(student, images=photos))["sentence_embedding"]


def counting(student, monkeypatch) -> list[int]:
    """How many photos the tower computes at a time."""
    model, seen = student.transformers_model, []
    whole = type(model).get_image_features

    def counted(self, pixel_values, *args, **kwargs):
        grid = args[0] if args else kwargs.get("image_grid_thw")
        seen.append(len(pixel_values) if grid is None else len(grid))
        return whole(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(model), "get_image_features", counted)
    return seen


def test_embeddings_are_the_same_and_each_photo_is_computed_once(student, monkeypatch):
    student.train()
    plain = embed(student, PHOTOS)
    computed = counting(student, monkeypatch)
    with remembered_tower(student.transformers_model, TowerTokens(64)):
        first, again = embed(student, PHOTOS), embed(student, [PHOTOS[2], PHOTOS[0], PHOTOS[2]])
        again.sum().backward()
    assert computed == [1] * 4
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, plain[[2, 0, 2]], atol=1e-5, rtol=0)
    trained = [p for name, p in student.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.grad is not None for p in trained)
    embed(student, PHOTOS[:2])
    assert computed[4:] == [2], "behind the block the tower runs as before"


def test_new_photos_of_a_batch_are_computed_together_where_asked_for(student, monkeypatch):
    plain = embed(student, PHOTOS)
    computed = counting(student, monkeypatch)
    with remembered_tower(student.transformers_model, TowerTokens(64, at_once=2)):
        embed(student, PHOTOS[:1])
        found = embed(student, [PHOTOS[3], *PHOTOS, PHOTOS[0]])
    assert computed == [1, 2, 1], "four photos, one of them seen before, one twice in the batch"
    torch.testing.assert_close(found, plain[[3, 0, 1, 2, 3, 0]], atol=1e-5, rtol=0)


def test_without_room_every_photo_is_computed_each_time(student, monkeypatch):
    computed = counting(student, monkeypatch)
    with remembered_tower(student.transformers_model, TowerTokens(0)):
        embed(student, PHOTOS[:2])
        embed(student, PHOTOS[:2])
    assert computed == [1] * 4


def test_the_tower_sees_in_eval_mode_and_a_trained_one_is_refused(student):
    model = student.transformers_model
    eyes = [child for name, child in model.named_children() if name != "language_model"]
    student.train()
    modes: list[bool] = []
    hook = eyes[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    with remembered_tower(student.transformers_model, TowerTokens(64)):
        embed(student, PHOTOS[:1])
    hook.remove()
    assert modes == [False]
    assert eyes[0].training, "and is in the mode it was in afterwards"
    parameter = next(eyes[0].parameters())
    parameter.requires_grad_(True)
    try:
        with (
            pytest.raises(FieldmarkError, match="vision tower is trained"),
            remembered_tower(student.transformers_model, TowerTokens(64)),
        ):
            pass
    finally:
        parameter.requires_grad_(False)
    assert isinstance(eyes[0], nn.Module)


def test_tokens_outlive_their_block(student, monkeypatch):
    computed, tokens = counting(student, monkeypatch), TowerTokens(64)
    for _ in range(2):
        with remembered_tower(student.transformers_model, tokens):
            embed(student, PHOTOS[:2])
    assert computed == [1] * 2


@pytest.mark.parametrize("fingerprint", [digests, sums_of_bits])
def test_fingerprints_tell_photos_apart_by_every_bit(fingerprint):
    photo = torch.randn(40, 24)
    one_bit = photo.clone()
    one_bit.view(torch.int32)[7, 3] ^= 1
    swapped = photo[torch.tensor([1, 0, *range(2, 40)])]
    other_shape = torch.cat([photo, torch.zeros(1, 24)])
    photos = [photo, one_bit, swapped, -photo, other_shape, torch.randn(40, 24)]
    found = fingerprint(photos)
    assert len(set(found)) == len(photos)
    assert fingerprint([p.clone() for p in photos[::-1]]) == found[::-1]
    assert fingerprint(photos[:1]) == found[:1], "the same alone"
