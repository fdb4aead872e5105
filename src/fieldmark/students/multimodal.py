"""A student for images and texts: a multimodal LLM as an embedder.

MAPLE (arXiv 2506.06970, section 3; papers.md 3.2): the language model of a multimodal LLM reads the photo's tokens or
the text, followed by a prompt (`students.chat`); attention is bidirectional, and the mean of the last hidden states,
over all tokens that are not padding, is the embedding. LoRA on the language model is what is trained (`students.lora`).

The student is a stock `SentenceTransformer` of `Transformer`, `Pooling` and `Normalize`. Everything it needs is in
the files they save (direction of attention in `config.json`, prompts in the chat template, pixels in the processor), so
`SentenceTransformer(path)` gives the same embeddings without fieldmark and without `trust_remote_code`. A composed
teacher (`students.composed`) is the exception: its model class is fieldmark's own, so `load_student` loads it.

Fieldmark shows the student whole photos as squares of its resolution, as a teacher sees them: 49 tokens at 224 px for
Qwen3-VL. The stock Qwen processor keeps a photo's proportions instead. Both are equal for square photos of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging as transformers_logging

import fieldmark.students.composed  # noqa: F401  (its model type is known to transformers from here on)
from fieldmark.errors import FieldmarkError
from fieldmark.students.chat import add_prompts
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.items import encode_items, is_multimodal, tokenize_items
from fieldmark.students.lora import LANGUAGE_MODEL_LAYERS, add_lora, merge_lora
from fieldmark.students.tower import DUAL_ENCODERS, module_types

__all__ = ["build_multimodal_student", "encode_items", "is_multimodal", "merge_lora", "tokenize_items"]

POOLINGS = ("mean", "lasttoken")
ATTENTIONS = ("bidirectional", "causal")
DEFAULT_RESOLUTION = 224


def build_multimodal_student(
    source: str | Path,
    *,
    pooling: str | None = None,
    attention: str | None = None,
    lora_rank: int = 32,
    lora_alpha: int = 32,
    resolution: int | None = None,
    prompts: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> SentenceTransformer:
    """A student that embeds photos, texts, and photos with a text, made of a multimodal LLM.

    A folder that already is one is loaded; what is not given stays as it was saved.

    Args:
        source: folder or hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA or InternVL checkpoint, of a composed
            teacher, or of a saved student of this kind.
        pooling: `mean` (of all tokens but padding, prompt and image tokens included; default) or `lasttoken`.
        attention: `bidirectional` (default) or `causal`, in the language model; the vision tower is left alone.
        lora_rank: rank of the adapters on the language model, the only parameters that are trainable; 0 for none.
        lora_alpha: their output is scaled by alpha / rank.
        resolution: side in pixels of the square a photo is shown as; default 224, or the tower's own where it is fixed.
        prompts: replaces single prompts (keys `text`, `image`, `image+text`; see `students.chat`).
        dtype: of the parameters.

    Raises:
        FieldmarkError: this is no such checkpoint, it cannot be loaded, or a setting is out of range or does not fit.
    """
    _check_choice("pooling", pooling, POOLINGS)
    _check_choice("attention", attention, ATTENTIONS)
    checkpoint = Checkpoint(source)
    saved = bool(module_types(checkpoint))
    if saved:
        student = load_saved(checkpoint, dtype=dtype)
        if prompts is not None:
            raise FieldmarkError(
                f"{source} is a trained student, whose prompts are a part of it; leave prompts out, or start from its "
                "multimodal LLM"
            )
        if read_config(checkpoint).model_type in DUAL_ENCODERS:
            raise FieldmarkError(f"{source} is a dual encoder; expected a student made of a multimodal LLM")
    else:
        student = _from_checkpoint(checkpoint, prompts, dtype)
    if pooling is not None:
        dimension = student.get_embedding_dimension()
        assert dimension is not None
        student[1] = Pooling(dimension, pooling)
    if attention is not None or not saved:
        set_attention(student, attention or "bidirectional")
    if resolution is not None or not saved:
        _set_resolution(student, resolution)
    add_lora(student, LANGUAGE_MODEL_LAYERS, rank=lora_rank, alpha=lora_alpha)
    return student.eval()


def set_attention(student: SentenceTransformer, attention: str) -> None:
    """Let the language model's tokens see all tokens (`bidirectional`) or the earlier ones only (`causal`), in place.

    Raises:
        FieldmarkError: transformers' code of this model type does not follow the setting.
    """
    model: Any = student.transformers_model
    for config in (model.config.text_config, model.language_model.config):  # the second may be a copy
        config.is_causal = attention == "causal"
    if _looks_ahead(model.language_model) != (attention == "bidirectional"):
        raise FieldmarkError(
            f"attention {attention!r} was asked of a {model.config.model_type} model, whose code in transformers does "
            "not follow that setting; use a Qwen-VL or LLaVA checkpoint, or the other kind of attention"
        )


def load_saved(
    checkpoint: Checkpoint, device: str | None = None, dtype: torch.dtype | None = None
) -> SentenceTransformer:
    """A saved image-text student of stock modules.

    Raises:
        FieldmarkError: it has a module of another package, takes no texts, or is broken.
    """
    foreign = [kind for kind in module_types(checkpoint) if not kind.startswith("sentence_transformers.")]
    if foreign:
        raise FieldmarkError(
            f"{checkpoint.source} wants to run {foreign[0]}, which is not part of sentence-transformers; "
            "load it yourself if you trust it"
        )
    options = {} if dtype is None else {"dtype": dtype}
    with _told_in_a_sentence(f"{checkpoint.source} is a student with a missing or broken file", "copy it again"):
        student = SentenceTransformer(checkpoint.source, device=device, model_kwargs=options)
        _check_complete(checkpoint)
    if not is_multimodal(student):
        raise FieldmarkError(f"{checkpoint.source} does not embed both photos and texts; expected a student that does")
    return student


def open_transformer(checkpoint: Checkpoint, dtype: torch.dtype, processing: dict[str, Any]) -> Transformer:
    """The checkpoint as sentence-transformers' first module, with `processing` as its processing settings.

    Raises:
        FieldmarkError: it cannot be loaded.
    """
    with _told_in_a_sentence(
        f"{checkpoint.source} could not be loaded as a student",
        "give a checkpoint with weights, a tokenizer and an image processor",
    ):
        _check_complete(checkpoint)
        return Transformer(
            checkpoint.source,
            model_kwargs={"dtype": dtype},
            processing_kwargs=processing,  # type: ignore[arg-type]
            unpad_inputs=False,  # packed texts would need positions that multimodal models make themselves
        )


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The checkpoint's configuration.

    Raises:
        FieldmarkError: transformers does not know the model type.
    """
    try:
        return AutoConfig.from_pretrained(str(checkpoint.config_folder))
    except (ValueError, KeyError) as error:
        raise FieldmarkError(
            f"{checkpoint.source} is of a model type that transformers does not know; give a Qwen-VL or LLaVA "
            "checkpoint"
        ) from error


def pixels_per_token(config: PretrainedConfig) -> int | None:
    """Side in pixels of one visual token of a tower that takes any size (Qwen-VL); None for a fixed input size."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    return None if merge is None else int(vision.patch_size) * int(merge)


def _from_checkpoint(
    checkpoint: Checkpoint, prompts: Mapping[str, str] | None, dtype: torch.dtype
) -> SentenceTransformer:
    """The three modules around a multimodal LLM, nothing but the prompts set."""
    config = read_config(checkpoint)
    if config.model_type in DUAL_ENCODERS:
        raise FieldmarkError(
            f"{checkpoint.source} is a {config.model_type} checkpoint, a dual encoder; build it with "
            "dual_encoder_student, or give a multimodal LLM"
        )
    if getattr(config, "vision_config", None) is None or getattr(config, "image_token_id", None) is None:
        raise FieldmarkError(
            f"{checkpoint.source} is a {config.model_type} checkpoint without image tokens; expected a multimodal LLM "
            "such as Qwen2-VL, Qwen3-VL or LLaVA"
        )
    # A title must not be cut, nor its control tokens act; the last token is where the answer would start.
    chat = {"add_generation_prompt": True, "sanitize_control_tokens": True}
    processing: dict[str, Any] = {"chat_template": chat, "text": {"truncation": False, "padding_side": "right"}}
    if config.model_type == "internvl":
        processing["image"] = {"crop_to_patches": False}  # one block of tokens a photo, no tiles
    transformer = open_transformer(checkpoint, dtype, processing)
    model: Any = transformer.model
    if getattr(model, "language_model", None) is None:
        raise FieldmarkError(
            f"a {config.model_type} model has an unknown structure (no language_model); use a Qwen-VL or LLaVA "
            "checkpoint"
        )
    add_prompts(transformer.processor, prompts)
    if "message" not in transformer.modality_config:  # there was no template before
        transformer.modality_config["message"] = {**transformer.modality_config["text"], "format": "structured"}
    transformer.input_formatter.supported_modalities = list(transformer.modality_config)
    pooling = Pooling(model.language_model.config.hidden_size, "mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()])


def _set_resolution(student: SentenceTransformer, resolution: int | None) -> None:
    """Pixel limits of the processor that keep a square photo of the resolution as it is."""
    transformer: Any = student[0]
    config, images = transformer.config, transformer.processor.image_processor
    factor = pixels_per_token(config)
    if factor is None:
        own: Any = getattr(config.vision_config, "image_size", None) or images.size["height"]
        own = own if isinstance(own, int) else own[0]
        if resolution not in (None, own):
            raise FieldmarkError(
                f"resolution {resolution} was asked of a {config.model_type} model, whose tower takes {own} px; "
                "leave resolution out"
            )
        show_squares(images, own)
        return
    side = DEFAULT_RESOLUTION if resolution is None else resolution
    if side < factor or side % factor:
        raise FieldmarkError(
            f"resolution {side} was asked of a {config.model_type} model; expected a multiple of {factor}, the pixels "
            "of one visual token"
        )
    # The limits are areas. Half a pixel's worth of room on both sides: rounding must not turn a square of another
    # size into one token less or more a side.
    images.size = {"shortest_edge": side * side - side, "longest_edge": side * side + side}


def show_squares(image_processor: Any, side: int) -> None:
    """Make a processor of fixed size show the whole photo as a square, without a crop (in place)."""
    image_processor.size = {"height": side, "width": side}
    image_processor.do_center_crop = False


@torch.no_grad()
def _looks_ahead(language_model: Any) -> bool:
    """Whether another last token changes the first state."""
    training, device = language_model.training, next(language_model.parameters()).device
    language_model.eval()
    first, second = (
        language_model(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state[:, 0]
        for ids in ([10, 11, 12, 13], [10, 11, 12, 14])
    )
    language_model.train(training)
    return not torch.equal(first, second)


def _check_choice(name: str, given: str | None, expected: Sequence[str]) -> None:
    if given is not None and given not in expected:
        raise FieldmarkError(f"{name} {given!r} was given; expected one of {', '.join(expected)}")


@contextmanager
def _told_in_a_sentence(what: str, remedy: str) -> Iterator[None]:
    """What the libraries raise while they load becomes one sentence; what they log on unused weights is left out."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a language model's head that is left out is no news here
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise FieldmarkError(f"{what} ({reason}); {remedy}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_complete(checkpoint: Checkpoint) -> None:
    """No weight is missing: transformers would draw it at random. Reads names and shapes, not the weights."""
    _, report = AutoModel.from_pretrained(checkpoint.source, device_map="meta", output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
