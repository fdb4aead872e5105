"""The photo side of a student made of a multimodal LLM: square pixels in, unit vectors out, for any batch.

A photo, the chat around it and the prompt are one token sequence. The photo's square has one size, so everything of
that sequence but the photo's own tokens is a constant: the embedded tokens before and after them, and all positions.
They are what the student's language model is given when the student embeds one photo. Between them go the tokens of the
tower, and the student's own language model, pooling and normalisation follow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import pad

from fieldmark.errors import FieldmarkError
from fieldmark.students.composed import ComposedConfig
from fieldmark.students.encoders import QwenEncoder, is_qwen
from fieldmark.students.items import tokenize_items
from fieldmark.students.packed import PACKED

PROJECTED = ("llava", "internvl", ComposedConfig.model_type)


class PhotoNetwork(nn.Module):
    """[B, 3, R, R] normalised pixels -> [B, D] of length 1.

    Args:
        student: made of a multimodal LLM; its weights are shared, and it computes as before.
        resolution: R, side in pixels of the square that the student sees.

    Raises:
        FieldmarkError: the language model is of an unknown family, the resolution does not fit the tower, or a photo is
            more than the tokens of one square to this student.
    """

    before: Tensor
    after: Tensor
    mask: Tensor
    positions: Tensor | None

    def __init__(self, student: SentenceTransformer, resolution: int) -> None:
        super().__init__()
        first: Any = student[0]
        self.tower = _tower_of(first.model, resolution)
        self.language_model = first.model.language_model
        self.rest = nn.ModuleList(list(student)[1:])
        features = tokenize_items(student, images=[Image.new("RGB", (resolution, resolution))])
        (places,) = (features["input_ids"][0] == first.config.image_token_id).nonzero(as_tuple=True)
        given = _given_to_language_model(student, features)
        with torch.no_grad():
            tokens, _ = self.tower(torch.zeros(1, 3, resolution, resolution))
        start, end = int(places[0]), int(places[-1]) + 1
        if not tokens.shape[1] == len(places) == end - start:
            raise FieldmarkError(
                f"A photo is {len(places)} tokens to this {first.config.model_type} student, of which one square gives "
                f"{tokens.shape[1]} in a row, so it is not exported as a graph; give --to sentence-transformers."
            )
        self.register_buffer("before", given["inputs_embeds"][:, :start])
        self.register_buffer("after", given["inputs_embeds"][:, end:])
        self.register_buffer("mask", given["attention_mask"])
        self.register_buffer("positions", given["position_ids"])

    def forward(self, *inputs: Tensor) -> Tensor:
        (pixel_values,) = inputs
        tokens, deepstack = self.tower(pixel_values)
        before, after, mask = (
            constant.expand(tokens.shape[0], *constant.shape[1:]) for constant in (self.before, self.after, self.mask)
        )
        more: dict[str, Any] = {}
        if deepstack:
            around = (0, 0, before.shape[1], after.shape[1])
            more["deepstack_visual_embeds"] = [pad(layer, around) for layer in deepstack]
        with _added_to_all_tokens(self.language_model):
            states = self.language_model(
                inputs_embeds=torch.cat([before, tokens, after], dim=1),
                attention_mask=mask,
                position_ids=self.positions,
                use_cache=False,
                **more,
            ).last_hidden_state
        features: dict[str, Any] = {"token_embeddings": states, "attention_mask": mask}
        for part in self.rest:
            features = part(features)
        return features["sentence_embedding"]


class _ProjectedTower(nn.Module):
    """Tower and projector of LLaVA's kind; as `QwenEncoder`, without DeepStack features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        model: Any = self.model
        # The model makes a list of the photos, which no graph for any batch can; so it lists one batch of them.
        hook = model.multi_modal_projector.register_forward_hook(lambda module, given, features: features[None])
        try:
            return model.get_image_features(pixels).pooler_output[0], []
        finally:
            hook.remove()


def _tower_of(model: Any, resolution: int) -> nn.Module:
    """[B, 3, R, R] -> tokens [B, N, D] as the language model takes them, and DeepStack features, each [B, N, D]."""
    if is_qwen(model.config.vision_config):
        shared = {id(tensor): tensor for tensor in (*model.visual.parameters(), *model.visual.buffers())}
        tower = copy.deepcopy(model.visual, shared)  # another attention, which the student must not get
        tower.config._attn_implementation = PACKED
        return QwenEncoder(tower, resolution).eval()
    if model.config.model_type in PROJECTED:
        return _ProjectedTower(model)
    raise FieldmarkError(
        f"A student made of a {model.config.model_type} model is not exported as a graph, since its tower is not known "
        "here (those of Qwen-VL, LLaVA and InternVL are); give --to sentence-transformers."
    )


@torch.no_grad()
def _given_to_language_model(student: SentenceTransformer, features: dict[str, Any]) -> dict[str, Any]:
    """What the language model is called with while the student embeds `features`."""
    first: Any = student[0]
    given: dict[str, Any] = {}
    hook = first.model.language_model.register_forward_pre_hook(
        lambda module, arguments, named: given.update(named), with_kwargs=True
    )
    try:
        student(dict(features))
    finally:
        hook.remove()
    return given


@contextmanager
def _added_to_all_tokens(language_model: Any) -> Iterator[None]:
    """Inside the block Qwen3-VL adds DeepStack features of all tokens (zero but for the photo's); picking tokens by a
    mask, as it does otherwise, is nothing that a graph for any batch can."""
    language_model._deepstack_process = lambda states, places, features: states + features
    try:
        yield
    finally:
        del language_model._deepstack_process
