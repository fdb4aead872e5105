"""Tiny random teachers in the layout of published checkpoints: model, processor, template, byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from fieldmark.students.tower import VisionTower
from fieldmark.teacher.composed import make_composed
from fieldmark.teacher.tiny import make_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 32


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
    )


def _text(vocabulary: int, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
        "max_position_embeddings": 4096,
        **more,
    }


def make_tiny_teacher(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Saves a random float32 teacher of `kind` (qwen3_vl, qwen2_5_vl, qwen2_vl, llava) to `folder` and returns it."""
    tokenizer = byte_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image_token_id": "image_pad",
            "video_token_id": "video_pad",
            "vision_start_token_id": "vision_start",
            "vision_end_token_id": "vision_end",
        }.items()
    }
    size = len(tokenizer)
    torch.manual_seed(seed)
    if kind == "qwen3_vl":
        patches = {"patch_size": 16, "temporal_patch_size": 2}
        vision = {
            **patches,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 196,
            "deepstack_visual_indexes": [0, 1],
        }
        text = _text(size, {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, head_dim=8)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
        video, processor_class = Qwen3VLVideoProcessor(**patches, merge_size=2), Qwen3VLProcessor
    elif kind == "qwen2_5_vl":
        patches = {"patch_size": 14, "temporal_patch_size": 2}
        vision = {
            **patches,
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        }
        text = _text(size, {"mrope_section": [2, 1, 1]})
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
        video, processor_class = Qwen2VLVideoProcessor(**patches, merge_size=2), Qwen2_5_VLProcessor
    elif kind == "qwen2_vl":
        patches = {"patch_size": 14, "temporal_patch_size": 2}
        vision = {**patches, "depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
        text = _text(size, {"mrope_section": [2, 1, 1]})
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
        video, processor_class = Qwen2VLVideoProcessor(**patches, merge_size=2), Qwen2VLProcessor
    elif kind == "llava":
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 224,
            "patch_size": 32,
        }
        text = _text(size, {}, model_type="llama")
        image_id = ids["image_token_id"]
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id, image_seq_length=49)
        )
    else:
        raise ValueError(kind)
    _spread(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if kind == "llava":
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessor(),
            tokenizer=tokenizer,
            patch_size=32,
            vision_feature_select_strategy="default",
            chat_template=TEMPLATE,
            image_token="<|image_pad|>",
            num_additional_image_tokens=1,
        )
    else:
        processor = processor_class(
            image_processor=Qwen2VLImageProcessor(**patches, merge_size=2),
            tokenizer=tokenizer,
            video_processor=video,
            chat_template=TEMPLATE,
        )
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """The stock 0.02 gives nearly uniform predictions, which would hide errors."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(12.0 if "lm_head" in name else 1.0 if "projector" in name else 8.0)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)


def make_tiny_composed(folder: Path) -> Path:
    """A composed teacher: a tiny timm network as tower, a projector, a tiny language model; 64 px."""
    torch.manual_seed(0)
    network = TimmWrapperModel(TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, num_labels=10))
    network.save_pretrained(folder / "network")
    tower = VisionTower.from_pretrained(folder / "network", 64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    model, processor = make_composed(tower, make_tokenizer(["Compare the two."] * 3), text=text)
    model.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    return folder / "teacher"
