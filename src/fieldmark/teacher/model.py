"""The frozen multimodal LLM: its parts, its prompt, and its own visual tokens.

SAGA (arXiv 2606.15134, section 3) feeds a frozen language model with the tokens of a trained vision tower. So the
parts are needed one by one: the processor makes the prompt and its positions, the tower makes visual tokens, the
language model and its head judge them. `teacher.prefix` runs the language model; nothing here is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from fieldmark.data.photos import load_square, open_photo
from fieldmark.errors import FieldmarkError

# Proved equal to the public forward by the tests; any other type is checked once, when it is loaded.
PROVED_MODEL_TYPES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
DEFAULT_RESOLUTION = 224
# The prompt counts one block of tokens a photo: no tiling.
PROCESSOR_OPTIONS: dict[str, dict[str, Any]] = {"internvl": {"crop_to_patches": False}}


@dataclass(frozen=True)
class VisualTokens:
    """What a vision tower gives the language model.

    Attributes:
        tokens: [B, N, D] post-merger tokens, D the language model's width.
        deepstack: one [B, N, D] tensor for each early layer that receives visual features again (Qwen3-VL); else empty.
    """

    tokens: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def __getitem__(self, images: slice) -> VisualTokens:
        return VisualTokens(self.tokens[images], tuple(feature[images] for feature in self.deepstack))

    def detach(self) -> VisualTokens:
        """The same tokens without gradient."""
        return VisualTokens(self.tokens.detach(), tuple(feature.detach() for feature in self.deepstack))


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt: what all completions of all pairs share, but for the pixels.

    Attributes:
        input_ids: [P] token ids, image placeholders included.
        position_ids: [3, P] (temporal, height, width: M-RoPE) or [1, P].
        image_slots: [n_images, N] indices into the P positions.
        next_position: the position of the first completion token.
    """

    input_ids: Tensor
    position_ids: Tensor
    image_slots: Tensor
    next_position: int


class Teacher:
    """A frozen image-text model and its processor.

    Args:
        model: a Hugging Face image-text-to-text model with `model.language_model`, `model.get_image_features` and
            `lm_head`. Its parameters stop requiring gradients and it is put in eval mode.
        processor: its processor, with a chat template.

    Raises:
        FieldmarkError: when the parts cannot be found, or the model needs more than its parts to compute its logits.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.model_type: str = model.config.model_type
        self.language_model, self.lm_head = _language_parts(model)
        self.image_token_id: int = model.config.image_token_id
        text_config = self.language_model.config
        self.hidden_size: int = text_config.hidden_size
        self.layers: int = text_config.num_hidden_layers
        self.uses_mrope = "mrope_section" in (getattr(text_config, "rope_parameters", None) or {})
        self.deepstack_layers = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
        self._prompts: dict[tuple[str, int, int, torch.device], Prompt] = {}

    @classmethod
    def load(
        cls, id_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Teacher:
        """Load a checkpoint folder or hub id, whatever its stored precision, as `dtype` on `device`.

        Raises:
            FieldmarkError: when it is not there, is not an image-text model, or has an unknown structure.
        """
        import fieldmark.teacher.composed  # noqa: F401  (its model type is known to transformers from here on)

        try:
            model = AutoModelForImageTextToText.from_pretrained(
                str(id_or_path), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
            processor = AutoProcessor.from_pretrained(str(id_or_path), trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FieldmarkError(
                f"teacher '{id_or_path}' could not be loaded ({reason}); give a folder or a hub id of an image-text "
                "model such as Qwen3-VL, with its processor"
            ) from error
        teacher = cls(model.to(device), processor)  # type: ignore[arg-type]
        if teacher.model_type not in PROVED_MODEL_TYPES:
            _check_structure(teacher)
        return teacher

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a completion."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return [eos] if isinstance(eos, int) else list(eos)

    def prompt(self, text: str, n_images: int, tokens_per_image: int) -> Prompt:
        """The chat prompt of one user turn: `n_images` images first, then `text`, then the start of the answer.

        Args:
            text: the instruction.
            n_images: images in the turn, in order.
            tokens_per_image: N, visual tokens the student gives for each image.

        Raises:
            FieldmarkError: when the processor would not make `tokens_per_image` placeholders of one image.
        """
        key = (text, n_images, tokens_per_image, self.device)
        if key not in self._prompts:
            self._prompts[key] = self._build_prompt(text, n_images, tokens_per_image)
        return self._prompts[key]

    @torch.no_grad()
    def visual_tokens(self, images: Sequence[Image.Image], resolution: int | None = None) -> VisualTokens:
        """Tokens of the teacher's own tower, to evaluate the teacher by itself.

        Args:
            images: photos; each is resized whole (no crop) to `resolution` x `resolution`.
            resolution: pixels; default 224 where the tower takes any size, else the processor's own fixed size.

        Raises:
            FieldmarkError: when the tower does not give the number of tokens that the resolution means.
        """
        if not images:
            raise FieldmarkError("visual_tokens got no image; give at least one PIL image")
        factor = self._pixels_per_token()
        inputs = self._image_inputs(images, resolution)
        features = self.model.model.get_image_features(**inputs, return_dict=True)
        expected = None if factor is None else ((resolution or DEFAULT_RESOLUTION) // factor) ** 2
        counts = [len(feature) for feature in features.pooler_output]
        if len(counts) != len(images) or len({*counts, expected or counts[0]}) != 1:
            raise FieldmarkError(
                f"the {self.model_type} tower gave {counts} tokens for {len(images)} images; "
                f"expected {expected or 'one block'} for each; use another resolution"
            )
        deepstack = features.deepstack_features if self.deepstack_layers else ()
        return VisualTokens(
            torch.stack(list(features.pooler_output)), tuple(torch.stack(list(feature)) for feature in deepstack)
        )

    def _own_side(self) -> int:
        """Side in pixels of the photos of a tower of fixed size."""
        own = getattr(self.model.config.vision_config, "image_size", None)
        size: Any = self.processor.image_processor.size
        own = own or size.get("height") or size["shortest_edge"]
        return int(own if isinstance(own, int) else own[0])

    def _image_inputs(self, images: Sequence[Image.Image], resolution: int | None) -> dict[str, Tensor]:
        """Pixels as the tower takes them."""
        factor = self._pixels_per_token()
        photos = [open_photo(image) for image in images]
        options = dict(PROCESSOR_OPTIONS.get(self.model_type, {}))
        if factor is None and resolution not in (None, self._own_side()):
            raise FieldmarkError(
                f"resolution {resolution} was asked of a {self.model_type} teacher, whose processor fixes the size at "
                f"{self._own_side()} px; leave resolution out"
            )
        if factor is not None:
            side = resolution or DEFAULT_RESOLUTION
            if side % factor:
                raise FieldmarkError(
                    f"resolution {side} is not a multiple of {factor}, the pixels of one visual token of this "
                    f"{self.model_type} teacher; give a multiple of {factor}"
                )
            photos = [load_square(photo, side) for photo in photos]
            options["size"] = _exact_size(side)
        batch = self.processor.image_processor(images=photos, return_tensors="pt", **options)
        inputs = {"pixel_values": batch["pixel_values"].to(self.device, self.dtype)}
        if factor is not None:
            inputs["image_grid_thw"] = batch["image_grid_thw"].to(self.device)
        return inputs

    def _pixels_per_token(self) -> int | None:
        """Side in pixels of one merged token, None where the tower has one fixed input size."""
        vision = self.model.config.vision_config
        merge = getattr(vision, "spatial_merge_size", None)
        return int(vision.patch_size) * int(merge) if merge is not None and self.uses_mrope else None

    def _build_prompt(self, text: str, n_images: int, tokens_per_image: int) -> Prompt:
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        if not self.processor.chat_template:
            raise FieldmarkError(
                f"the processor of this {self.model_type} teacher has no chat template; use an instruct checkpoint"
            )
        chat = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        factor = self._pixels_per_token()
        options = dict(PROCESSOR_OPTIONS.get(self.model_type, {}))
        side = DEFAULT_RESOLUTION
        if factor is not None:
            side = factor * math.isqrt(tokens_per_image)
            options["size"] = _exact_size(side)
        blanks = [Image.new("RGB", (side, side))] * n_images
        batch = self.processor(images=blanks or None, text=[chat], return_tensors="pt", **options)
        ids = batch["input_ids"][0]
        slots = (ids == self.image_token_id).nonzero().flatten()
        if len(slots) != n_images * tokens_per_image:
            raise FieldmarkError(
                f"the {self.model_type} processor makes {len(slots)} image tokens of {n_images} square images, the "
                f"student gives {tokens_per_image} for each; use a resolution at which both agree (a square number)"
            )
        return self._with_positions(batch, slots.reshape(n_images, tokens_per_image))

    def _with_positions(self, batch: Any, slots: Tensor) -> Prompt:
        ids = batch["input_ids"]
        if self.uses_mrope:
            positions, _ = self.model.model.get_rope_index(
                ids, mm_token_type_ids=batch["mm_token_type_ids"], image_grid_thw=batch.get("image_grid_thw")
            )
            positions = positions[:, 0]
        else:
            positions = torch.arange(ids.shape[1])[None]
        return Prompt(
            input_ids=ids[0].to(self.device),
            position_ids=positions.to(self.device),
            image_slots=slots.to(self.device),
            next_position=int(positions.max()) + 1,
        )


def _exact_size(side: int) -> dict[str, int]:
    """Bounds that keep a side x side image as it is: the stock minimum would enlarge 224 px (64 tokens, not 49)."""
    return {"shortest_edge": side * side, "longest_edge": side * side}


def _language_parts(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear]:
    """Language model and head, by the structure that Hugging Face documents for image-text models."""
    kind = model.config.model_type
    backbone = getattr(model, "model", None)
    language_model = getattr(backbone, "language_model", None)
    head = getattr(model, "lm_head", None)
    if (
        not isinstance(language_model, PreTrainedModel)
        or not isinstance(head, nn.Linear)
        or not callable(getattr(backbone, "get_image_features", None))
        or getattr(model.config, "image_token_id", None) is None
    ):
        raise FieldmarkError(
            f"a teacher of type '{kind}' has an unknown structure; expected model.language_model, "
            "model.get_image_features, lm_head and config.image_token_id; use a Qwen-VL, LLaVA or InternVL checkpoint"
        )
    return language_model, head


@torch.no_grad()
def _check_structure(teacher: Teacher) -> None:
    """One short prompt both ways: refuses models that do more with their parts than this package knows."""
    from fieldmark.teacher.prefix import prompt_logits

    photos = [Image.new("RGB", (DEFAULT_RESOLUTION, DEFAULT_RESOLUTION), (90, 140, 60))]
    visual = teacher.visual_tokens(photos)
    prompt = teacher.prompt("What is this?", 1, visual.tokens.shape[1])
    ids = prompt.input_ids[None]
    inputs = teacher._image_inputs(photos, None)
    if teacher.uses_mrope:
        inputs["mm_token_type_ids"] = (ids == teacher.image_token_id).int()
    theirs = teacher.model(input_ids=ids, **inputs).logits[0, -1].float()
    if teacher.uses_mrope:
        teacher.model.model.rope_deltas = None  # left behind by the forward above
    difference = (prompt_logits(teacher, prompt, visual)[0].float() - theirs).abs().max() / theirs.std().clamp_min(1e-6)
    if not difference <= (1e-3 if teacher.dtype == torch.float32 else 0.1):
        raise FieldmarkError(
            f"a teacher of type '{teacher.model_type}' does not give the same logits from its parts as from its own "
            "forward; use a Qwen-VL, LLaVA or InternVL checkpoint"
        )
