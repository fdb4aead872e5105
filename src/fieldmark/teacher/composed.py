"""A teacher composed of a pre-trained vision network, a linear projector and a small language model (LLaVA's recipe).

For catalogues of real photos where no public multimodal LLM can be had and a tower from nothing would see too little:
an ImageNet network's last feature map [B, C, 7, 7] becomes 49 tokens, a projector maps them to the language model's
width, and `build-teacher` trains projector and language model. It is also the way to bring one's own tower: a cheap
encoder, understood by a frozen language model through a fitted projector, can then be trained by SAGA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    LlavaPreTrainedModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fieldmark.errors import FieldmarkError
from fieldmark.students.composed import ComposedConfig, ComposedModel
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.tiny import CHAT_TEMPLATE, IMAGE_TOKEN


class ComposedForConditionalGeneration(LlavaForConditionalGeneration):
    """An `AutoModelForImageTextToText` once this module is imported."""

    config_class = ComposedConfig

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ComposedModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoModelForImageTextToText.register(ComposedConfig, ComposedForConditionalGeneration, exist_ok=True)


def make_composed(
    tower: VisionTower, tokenizer: PreTrainedTokenizerFast, *, text: dict[str, Any] | None = None
) -> tuple[ComposedForConditionalGeneration, LlavaProcessor]:
    """A composed model and its processor: the tower's weights, a random projector, a random small Qwen3.

    Args:
        tower: a timm tower without projector.
        tokenizer: as `tiny.make_tokenizer` makes it.
        text: overrides single settings of the language model.

    Raises:
        FieldmarkError: a tower of another kind.
    """
    kind = type(tower.encoder.config).model_type
    if kind != "timm_wrapper":
        raise FieldmarkError(f"The tower is of the kind {kind}; --tower takes a timm network, such as a ResNet.")
    side = round(tower.tokens_per_image**0.5)
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(text or {}),
    }
    image_token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = ComposedConfig(
        vision_config=tower.encoder.config,
        text_config=Qwen3Config(**text_config),
        feature_dim=tower.encoder.token_dim,
        image_token_index=image_token,
        image_seq_length=tower.tokens_per_image,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = ComposedForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.encoder.model.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": tower.resolution, "width": tower.resolution}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=size, do_center_crop=False, crop_size=size, image_mean=tower.image_mean, image_std=tower.image_std
        ),
        tokenizer=tokenizer,
        patch_size=tower.resolution // side,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    with torch.no_grad():
        model.tie_weights()
    return model, processor
