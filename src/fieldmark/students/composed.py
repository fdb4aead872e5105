"""The checkpoint layout of a composed teacher: any vision network, a linear projector, a small language model.

Its configuration and its model without the language head live here, so that a student can be made of such a checkpoint
without importing the teacher room; the model with its head is in `fieldmark.teacher.composed`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.multi_modal_projector."


class ComposedConfig(LlavaConfig):
    """LLaVA's configuration with `feature_dim`, the width of the tower's feature map.

    `vision_config` is a `timm_wrapper` configuration; the tower's map [B, C, h, w] becomes h*w tokens.
    """

    model_type = "fieldmark_composed"
    feature_dim: int = 0


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)


class ComposedModel(LlavaModel):
    """LLaVA's model with a feature map for patch tokens and one linear layer for projector."""

    config_class = ComposedConfig

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector: Any = nn.Linear(config.feature_dim, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """[B, 3, R, R] -> `pooler_output`: one [h*w, D] tensor a photo."""
        features = self.vision_tower(pixel_values=pixel_values, do_pooling=False).last_hidden_state
        tokens = self.multi_modal_projector(features.flatten(2).transpose(1, 2))
        photos: Any = list(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=photos)


AutoModel.register(ComposedConfig, ComposedModel, exist_ok=True)
