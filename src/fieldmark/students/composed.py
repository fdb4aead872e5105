"""The checkpoint layout of a composed teacher: any vision network, a linear projector, a small language model.

Only its configuration lives here, so that a student can take tower and projector out of such a checkpoint without
importing the teacher room; the model is in `fieldmark.teacher.composed`.
"""

from __future__ import annotations

from transformers import AutoConfig, LlavaConfig

TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.multi_modal_projector."


class ComposedConfig(LlavaConfig):
    """LLaVA's configuration with `feature_dim`, the width of the tower's feature map.

    `vision_config` is a `timm_wrapper` configuration; the tower's map [B, C, h, w] becomes h*w tokens.
    """

    model_type = "fieldmark_composed"
    feature_dim: int = 0


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
