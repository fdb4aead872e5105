"""A dual encoder (CLIP, SigLIP, SigLIP 2) as an image-text student: cheap, and what many people deploy.

The paper (MAPLE, arXiv 2506.06970) trains a multimodal LLM only; the losses ask for embeddings of photos and of texts,
and a dual encoder gives both. It is a stock `SentenceTransformer` of `Transformer` and `Normalize`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from transformers import PretrainedConfig

from fieldmark.errors import FieldmarkError
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.lora import DUAL_ENCODER_LAYERS, add_lora
from fieldmark.students.multimodal import load_saved, open_transformer, read_config, show_squares
from fieldmark.students.tower import DUAL_ENCODERS, module_types

SIGLIP = ("siglip", "siglip2")
# The temperature of the checkpoint's own loss; no embedding depends on it.
UNUSED_PARAMETERS = ("logit_scale", "logit_bias")


def dual_encoder_student(
    source: str | Path, *, lora_rank: int = 0, lora_alpha: int = 32, dtype: torch.dtype = torch.float32
) -> SentenceTransformer:
    """A student that embeds photos and texts by two encoders.

    Args:
        source: folder or hub id of a CLIP, SigLIP or SigLIP 2 checkpoint, or of a saved student of this kind.
        lora_rank: 0 trains all parameters; else the rank of adapters on both encoders, and nothing else is trained.
        lora_alpha: the adapters' output is scaled by alpha / rank.
        dtype: of the parameters.

    Raises:
        FieldmarkError: this is no dual encoder, or it cannot be loaded.
    """
    checkpoint = Checkpoint(source)
    config = read_config(checkpoint)
    if config.model_type not in DUAL_ENCODERS:
        raise FieldmarkError(
            f"{source} is a {config.model_type} checkpoint; expected a dual encoder such as CLIP or SigLIP"
        )
    if module_types(checkpoint):
        student = load_saved(checkpoint, dtype=dtype)
    else:
        transformer = open_transformer(checkpoint, dtype, _processing(config))
        processor: Any = transformer.processor
        images = processor.image_processor
        if "spatial_shapes" in images.model_input_names:  # SigLIP 2 in its flexible form counts patches, not pixels
            limits = {"patch_size": images.patch_size, "max_num_patches": images.max_num_patches}
            transformer.processing_kwargs["image"] = limits  # else the processor's own defaults would win
        else:
            show_squares(images, config.vision_config.image_size)
        student = SentenceTransformer(modules=[transformer, Normalize()])
    if lora_rank:
        add_lora(student, DUAL_ENCODER_LAYERS, rank=lora_rank, alpha=lora_alpha)
    model: Any = student.transformers_model
    for name, parameter in model.named_parameters():
        if name in UNUSED_PARAMETERS:
            parameter.requires_grad_(False)
    return student.eval()


def _processing(config: PretrainedConfig) -> dict[str, Any]:
    """SigLIP was trained on texts padded to its full length, the padding attended to, and embeds others differently."""
    if config.model_type not in SIGLIP:
        return {}
    length = config.text_config.max_position_embeddings
    return {"text": {"padding": "max_length", "max_length": length, "return_attention_mask": False}}
